"""Calibration: text sampled from the base model, and the statistics from which gates are computed."""
