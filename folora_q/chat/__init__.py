"""Talking to what came out of a run."""
