"""The recipe: what a run is to do, checked before anything is loaded. Needs pydantic and yaml only."""

from folora_q.recipe.load import load_recipe, places_in
from folora_q.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "places_in"]
