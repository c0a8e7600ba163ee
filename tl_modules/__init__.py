"""Functional modules of a language model, and the circuits they form.

Names are loaded on first touch: `import tl_modules` imports neither torch nor TransformerLens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_modules._lazy import load
from tl_modules._version import __version__

if TYPE_CHECKING:
    from tl_modules._checks import TLModulesError
    from tl_modules.activations import UnitActivations
    from tl_modules.bases import HeadBasis, NeuronBasis
    from tl_modules.causes.by_topic import selectivity
    from tl_modules.causes.doses import dose
    from tl_modules.causes.steering import steering_effect
    from tl_modules.circuits.build import circuit
    from tl_modules.circuits.profile import circuit_profile
    from tl_modules.collection import collect
    from tl_modules.demo import load_demo_model, load_demo_prompts
    from tl_modules.demo_features import load_demo_features
    from tl_modules.features import FeatureBasis
    from tl_modules.find import find_modules
    from tl_modules.hooked import HookedModuleTransformer, ModuleTransformerBridge
    from tl_modules.interventions import ablate, steer
    from tl_modules.iterd import IterD
    from tl_modules.module import Module
    from tl_modules.modules import Modules
    from tl_modules.separability.loop import separate
    from tl_modules.sweep import sweep_modules

_ROOM_OF = {
    "FeatureBasis": "features",
    "HeadBasis": "bases",
    "HookedModuleTransformer": "hooked",
    "IterD": "iterd",
    "Module": "module",
    "ModuleTransformerBridge": "hooked",
    "Modules": "modules",
    "NeuronBasis": "bases",
    "TLModulesError": "_checks",
    "UnitActivations": "activations",
    "ablate": "interventions",
    "circuit": "circuits.build",
    "circuit_profile": "circuits.profile",
    "collect": "collection",
    "dose": "causes.doses",
    "find_modules": "find",
    "load_demo_features": "demo_features",
    "load_demo_model": "demo",
    "load_demo_prompts": "demo",
    "selectivity": "causes.by_topic",
    "separate": "separability.loop",
    "steer": "interventions",
    "steering_effect": "causes.steering",
    "sweep_modules": "sweep",
}

__all__ = [
    "FeatureBasis",
    "HeadBasis",
    "HookedModuleTransformer",
    "IterD",
    "Module",
    "ModuleTransformerBridge",
    "Modules",
    "NeuronBasis",
    "TLModulesError",
    "UnitActivations",
    "__version__",
    "ablate",
    "circuit",
    "circuit_profile",
    "collect",
    "dose",
    "find_modules",
    "load_demo_features",
    "load_demo_model",
    "load_demo_prompts",
    "selectivity",
    "separate",
    "steer",
    "steering_effect",
    "sweep_modules",
]


def __getattr__(name: str) -> Any:
    value = load(__name__, _ROOM_OF, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
