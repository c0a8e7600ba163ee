"""Does a module cause what it correlates with? Ablation by topic, controls, doses and steering.

Names are loaded on first touch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_modules._lazy import load

if TYPE_CHECKING:
    from tl_modules.causes.across_groups import cross_table
    from tl_modules.causes.by_topic import selectivity
    from tl_modules.causes.doses import Dose, dose
    from tl_modules.causes.judged import Selectivity
    from tl_modules.causes.massive import UnitActivity, unit_activity
    from tl_modules.causes.passages import Passages, TokenScores
    from tl_modules.causes.steering import SteeringEffect, steering_effect

_ROOM_OF = {
    "Dose": "doses",
    "Passages": "passages",
    "Selectivity": "judged",
    "SteeringEffect": "steering",
    "TokenScores": "passages",
    "UnitActivity": "massive",
    "cross_table": "across_groups",
    "dose": "doses",
    "selectivity": "by_topic",
    "steering_effect": "steering",
    "unit_activity": "massive",
}

__all__ = [
    "Dose",
    "Passages",
    "Selectivity",
    "SteeringEffect",
    "TokenScores",
    "UnitActivity",
    "cross_table",
    "dose",
    "selectivity",
    "steering_effect",
    "unit_activity",
]


def __getattr__(name: str) -> Any:
    return load(__name__, _ROOM_OF, name)


def __dir__() -> list[str]:
    return sorted(__all__)
