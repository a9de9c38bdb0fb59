"""The fields of a recipe as Markdown and as a JSON Schema, made from the settings' docstrings."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from qexport.recipe import Recipe

BEGIN, END = "<!-- fields: made by `python -m qexport.recipe.reference docs/recipe.md` -->", "<!-- end of fields -->"

_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "null": "null",
}
_BOUNDS = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}


def fields() -> str:
    """A section with a table for the recipe and each of its parts."""
    schema = Recipe.model_json_schema()
    return "\n".join(_section(path, tag, part) for path, tag, part in _parts("", "", schema, schema["$defs"]))


def updated(page: str) -> str:
    """The page with the fields between the marks written again."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{fields()}\n{END}{rest.partition(END)[2]}"


def _parts(
    path: str, tag: str, part: dict[str, Any], definitions: dict[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The part and those below it: its path, the method or layout that it belongs to, and its schema."""
    yield path, tag, part
    for name, field in part["properties"].items():
        for reference, suffix in _references(field):
            inner = definitions[reference]
            tags = [value for item in inner["properties"].values() if (value := item.get("const"))]
            below = f"{path}.{name}{suffix}".lstrip(".")
            yield from _parts(below, tags[0] if tags else tag, inner, definitions)


def _references(field: dict[str, Any], suffix: str = "") -> Iterator[tuple[str, str]]:
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2], suffix
    if "items" in field:
        yield from _references(field["items"], "[]")
    if "additionalProperties" in field:
        yield from _references(field["additionalProperties"], f"{suffix}.*")
    for option in [*field.get("anyOf", ()), *field.get("oneOf", ())]:
        yield from _references(option, suffix)


def _section(path: str, tag: str, part: dict[str, Any]) -> str:
    title = " ".join([f"`{path}`" if path else "The whole recipe", f"({tag})" if tag else ""]).strip()
    rows = [_row(name, field, part.get("required", ())) for name, field in part["properties"].items()]
    head = "| field | type | default | |\n|---|---|---|---|"
    return f"### {title}\n\n{_one_line(part['description'])}\n\n{head}\n" + "\n".join(rows) + "\n"


def _row(name: str, field: dict[str, Any], required: Any) -> str:
    default = "required" if name in required else f"`{_default(field['default'])}`"
    return f"| `{name}` | {_type(field)} | {default} | {_one_line(field['description'])} |"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return "mapping"
    options = field.get("anyOf") or field.get("oneOf")
    if options:
        return " or ".join(dict.fromkeys(map(_type, options)))
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_type(field['items'])}s"
    if field["type"] == "object":
        return f"mapping of names to {_type(field['additionalProperties'])}"
    bounds = [f"{words} {field[bound]}" for bound, words in _BOUNDS.items() if bound in field]
    return " ".join([_TYPES[field["type"]], " and ".join(bounds)]).strip()


def _default(value: Any) -> str:
    """The default as YAML; that of a mapping is in its own section."""
    return "{}" if isinstance(value, dict) else value if isinstance(value, str) else json.dumps(value)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def recipe_schema() -> str:
    """The schema (draft 2020-12) as JSON text; `recipes/recipe.schema.json` is a copy of it."""
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **Recipe.model_json_schema(mode="validation")}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
