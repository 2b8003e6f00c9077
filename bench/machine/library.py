"""This library's own kernels on the machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from rplib import dispatch
from rplib.bench.machine.driver import Session, compiled


@contextmanager
def compiled_library(architecture: int = 90) -> Iterator[Session]:
    """Like `compiled`; inside, ``impl="triton"`` also accepts CPU tensors, without Triton's interpreter."""
    with mock.patch.object(dispatch, "interpreting", return_value=True), compiled(architecture) as session:
        yield session
