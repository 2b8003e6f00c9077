"""Triton kernels of the reliable mutual loss; import them as ``rplib.kernels``."""

if __name__ != "rplib.kernels":
    raise ImportError(
        f"this folder is the package rplib.kernels but was imported as {__name__!r}; write 'from rplib import kernels' "
        "(from a checkout without installation: with the repository root on PYTHONPATH)."
    )
