"""Evaluation of a trained run: metrics, the fixed-box baseline, reliability maps."""
