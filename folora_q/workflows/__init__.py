"""The three jobs: train a recipe, evaluate a target, merge an adapter. Each takes a request and returns a result."""
