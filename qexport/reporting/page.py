"""The environment that pages are rendered in: everything is escaped, nothing may be left undefined."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qexport.amounts import counted, duration, size
from qexport.reporting.svg import gauge
from qexport.reporting.values import written
from qexport.reporting.view import VERDICT_WORDS
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
    filters = (written, visible, visible_token, gauge, size, duration, counted)
    environment.filters.update({function.__name__: function for function in filters})
    environment.globals["verdict_words"] = VERDICT_WORDS
    return environment
