"""Reliable-pseudo-label mutual learning for semi-supervised segmentation (Su et al., Medical Image Analysis 2024).

>>> import rplib
>>> rplib.ReliableMutualLoss().options.confidence
'entropy'
"""

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
