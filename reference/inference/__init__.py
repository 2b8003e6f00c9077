"""Segmentation of whole images by sliding windows, and of new images from files."""
