"""Instruments that measure the kernels; import them as ``rplib.bench``."""

if __name__ != "rplib.bench":
    raise ImportError(
        f"this folder is the package rplib.bench but was imported as {__name__!r}; write 'from rplib import bench' "
        "(from a checkout without installation: with the repository root on PYTHONPATH)."
    )
