"""Estimate a run's memory from the recipe and the model's config.json. No PyTorch."""
