"""The environment that pages are rendered in: everything is escaped, nothing may be left undefined."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qexport.reporting.selection import VERDICT_WORDS
from qexport.reporting.svg import gauge
from qexport.reporting.values import (
    counted,
    duration,
    figure_interval,
    figure_value,
    gate_interval,
    gate_limit,
    gate_units,
    gate_value,
    label_of,
    size,
    written,
)
from qexport.reporting.visible_text import visible, visible_token


def render(template: str, **content: Any) -> str:
    """A page from one of the templates beside this file."""
    return _environment().get_template(template).render(**content)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("qexport.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (
        figure_value, figure_interval, gate_value, gate_interval, gate_limit, gate_units, label_of, written, visible,
        visible_token, gauge, size, duration, counted,
    )  # fmt: skip
    environment.filters.update({function.__name__: function for function in filters})
    environment.globals["verdict_words"] = VERDICT_WORDS
    return environment
