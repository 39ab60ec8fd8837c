"""Chat with a run, an adapter or a model."""
