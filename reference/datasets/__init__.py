"""Data sets in the layouts that people have: lists, cases, h5, NIfTI, checks, generated volumes."""
