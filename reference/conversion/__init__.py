"""Conversion of raw public releases to the h5 layouts, and downsampling."""
