"""Scores of a trained run: metrics, the fixed box as a baseline, reliability maps."""
