"""Executes the compiled PTX of Triton kernels on a CPU; see README.md in this folder."""

from rplib.bench.machine.driver import ARCHITECTURES, Ran, Session, compiled, execute
from rplib.bench.machine.findings import Finding
from rplib.bench.machine.ptx import Unsupported

__all__ = ["ARCHITECTURES", "Finding", "Ran", "Session", "Unsupported", "compiled", "execute"]
