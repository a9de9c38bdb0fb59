"""Recipes: the model, overrides, checking, the schema."""

from qexport.recipe.model import Recipe
from qexport.recipe.reading import load_recipe

__all__ = ["Recipe", "load_recipe"]
