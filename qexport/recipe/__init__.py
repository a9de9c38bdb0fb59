"""Recipes: reading YAML with line numbers, checking, the schema."""
