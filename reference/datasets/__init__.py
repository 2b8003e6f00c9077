"""Data sets on disk: supported layouts, case lists, h5 and NIfTI files, checks, generated volumes."""
