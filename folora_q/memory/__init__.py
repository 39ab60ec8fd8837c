"""Memory of a run before it: from the recipe and the model's config.json alone. No torch."""
