"""The jobs: train a recipe, evaluate a target, trim or merge an adapter, compare two adapters.

Each takes a request and returns a result.
"""
