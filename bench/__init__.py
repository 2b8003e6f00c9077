"""Benchmarks and measurements of the kernels; import as ``rplib.bench``."""

import sys

if __name__ == "bench" and "_pytest" in sys.modules:
    # `pytest bench` names packages after their folders: let it have the one package there is.
    import rplib.bench

    sys.modules[__name__] = rplib.bench
elif __name__ != "rplib.bench":
    raise ImportError(
        f"this folder is the package rplib.bench but was imported as {__name__!r}; write 'from rplib import bench' "
        "(from a checkout without installation: with the repository root on PYTHONPATH)."
    )
