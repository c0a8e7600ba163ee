"""What a circuit is asked to explain, kept so that it can be run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tl_modules.attribution.gradient import Method, gradient_scores, paired_batches
from tl_modules.attribution.read import PromptBatch, read_batches
from tl_modules.attribution.scores import Scores
from tl_modules.attribution.targets import Answer, Target, make_target
from tl_modules.modules import Modules
from tl_modules.sites import Basis


@dataclass(frozen=True)
class Asked:
    """The arguments of `circuit` that decide what is scored."""

    model: Any
    modules: Modules
    basis: Basis | None
    answer: Answer | None
    wrong: Answer | None
    target: str
    corrupted: Any
    method: Method
    batch_tokens: int

    def batches(self, prompts: Any) -> tuple[list[PromptBatch], Sequence[PromptBatch | None]]:
        """The prompts as batches, and the corrupted ones likewise."""
        prepend = None if self.basis is None else self.basis.prepend_bos
        batches = read_batches(self.model, prompts, batch_tokens=self.batch_tokens, prepend_bos=prepend)
        others = paired_batches(self.model, self.corrupted, batches, self.batch_tokens, prepend)
        return batches, others

    def target_of(self, n_prompts: int) -> Target:
        """The target of so many prompts."""
        return make_target(self.model, n_prompts, self.answer, wrong=self.wrong, kind=self.target)

    def scores(self, prompts: Any) -> Scores:
        """Scores of all heads, units and modules."""
        return gradient_scores(
            self.model,
            prompts,
            self.answer,
            wrong=self.wrong,
            target=self.target,
            method=self.method,
            corrupted=self.corrupted,
            basis=self.basis,
            modules=self.modules,
            batch_tokens=self.batch_tokens,
        )
