"""A mistake to plant, for planted_faults.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One mistake: in ``file``, each ``old`` (found exactly once) becomes ``new``; ``test`` must fail then."""

    name: str
    file: str
    substitutions: tuple[tuple[str, str], ...]
    test: str
