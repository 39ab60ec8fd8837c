"""The recipe: schema, loading and checks. Needs pydantic and PyYAML only."""

from folora_q.recipe.load import load_recipe, places_in
from folora_q.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "places_in"]
