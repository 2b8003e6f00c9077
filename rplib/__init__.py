"""Reliable-pseudo-label mutual learning for semi-supervised segmentation (Su et al., Medical Image Analysis 2024).

>>> import rplib
>>> rplib.ReliableMutualLoss().options.confidence
'entropy'
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rplib import functional
    from rplib.functional import reliability
    from rplib.losses import MutualObjective, ObjectiveTerms, ObjectiveTermsAndStatistics, ReliableMutualLoss
    from rplib.maps import Reliability
    from rplib.outputs import regions, unstack
    from rplib.ramps import ramp
    from rplib.statistics import ObjectiveStatistics
    from rplib.tap import FeatureTap

__version__ = "0.1.0"

__all__ = [
    "FeatureTap",
    "MutualObjective",
    "ObjectiveStatistics",
    "ObjectiveTerms",
    "ObjectiveTermsAndStatistics",
    "Reliability",
    "ReliableMutualLoss",
    "__version__",
    "functional",
    "ramp",
    "regions",
    "reliability",
    "unstack",
]

# Public names and modules are imported on first use, so that `rplib` starts, and can be interrupted, before torch is imported.
_HOMES = {
    "FeatureTap": "tap",
    "MutualObjective": "losses",
    "ObjectiveStatistics": "statistics",
    "ObjectiveTerms": "losses",
    "ObjectiveTermsAndStatistics": "losses",
    "Reliability": "maps",
    "ReliableMutualLoss": "losses",
    "ramp": "ramps",
    "regions": "outputs",
    "reliability": "functional",
    "unstack": "outputs",
}

if not TYPE_CHECKING:  # a type checker should report names that are not above

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            value = getattr(importlib.import_module(f"rplib.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"rplib.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"rplib.{name}":
                    raise
        raise AttributeError(f"module 'rplib' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
