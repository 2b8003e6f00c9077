"""The reference trainer: a two-decoder V-Net, the paper's recipes, training and evaluation.

Everything here uses only the public interface of `rplib`. The folder is at the top of the repository and is
imported as `rplib.reference`, whether rplib is installed or not.
"""

if __name__ != "rplib.reference":
    raise ImportError(
        f"this folder is the package rplib.reference, not {__name__}: write `import rplib.reference` "
        "(from a checkout with the repository root on PYTHONPATH, or after `pip install -e .`)."
    )
