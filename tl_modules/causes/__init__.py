"""Does a module cause what it correlates with? Ablation by topic, controls, doses and steering."""
