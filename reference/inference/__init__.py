"""Sliding-window segmentation of whole images, and prediction on new image files."""
