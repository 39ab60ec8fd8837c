"""Faster ways to compute a training step: fused adapters, compiled decoder layers, Liger's kernels."""
