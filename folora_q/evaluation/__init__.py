"""Measurements: losses, the KL divergence from the base, layer drift, generated answers and benchmarks."""
