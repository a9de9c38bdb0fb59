"""JSON under a schema. The import takes a second of CPU time, most of it for checks of strings that are not used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

from qexport.errors import InputError
from qexport.text.extraction import first_json


class JsonSchema:
    """JSON that a schema accepts (draft 2020-12).

    Args:
        schema: its references must lead into itself.
        where: for errors.

    Raises:
        InputError: the schema is malformed, or refers to something outside.
    """

    kind: Final = "json"

    def __init__(self, schema: Any, where: str) -> None:
        self._where = where
        try:
            Draft202012Validator.check_schema(schema)
        except (SchemaError, RecursionError) as error:
            what = error.message if isinstance(error, SchemaError) else str(error)
            raise InputError(f"the JSON Schema is malformed: {what}", where=where) from error
        for reference in _references(schema):
            if not reference.startswith("#"):
                raise InputError(
                    f"the JSON Schema refers to {reference!r}, and nothing is fetched",
                    where=where,
                    mend="copy what it refers to into $defs, and write #/$defs/NAME",
                )
        self._validator = Draft202012Validator(schema, registry=Registry())

    def problem(self, text: str) -> str | None:
        """See `Format`. The first JSON value of the text counts, see `first_json`."""
        try:
            value = first_json(text)
        except ValueError as error:
            return str(error)
        return self.value_problem(value)

    def value_problem(self, value: Any) -> str | None:
        """Why the schema does not accept a value; None if it does.

        Raises:
            InputError: a reference of the schema leads nowhere, or in a circle.
        """
        try:
            found = next(iter(self._validator.iter_errors(value)), None)
        except (Unresolvable, RecursionError) as error:
            raise InputError(f"the JSON Schema cannot be applied: {error}", where=self._where) from error
        return None if found is None else _in_short(found)


def _references(schema: Any) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        match waiting.pop():
            case dict() as value:
                yield from (to for key in ("$ref", "$dynamicRef") if isinstance(to := value.get(key), str))
                waiting += value.values()
            case list() as value:
                waiting += value


def _in_short(error: ValidationError) -> str:
    place = ".".join(map(str, error.absolute_path))
    message = error.message if len(error.message) <= 160 else f"{error.message[:160]}…"
    return f"{place}: {message}" if place else message
