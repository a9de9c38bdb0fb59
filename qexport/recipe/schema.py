"""The JSON Schema of a recipe, for editors."""

from __future__ import annotations

import json

from pydantic.json_schema import GenerateJsonSchema

from qexport.recipe.model import Recipe


def recipe_schema() -> str:
    """The schema (draft 2020-12) as JSON text; `recipes/recipe.schema.json` is a copy of it."""
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **Recipe.model_json_schema(mode="validation")}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
