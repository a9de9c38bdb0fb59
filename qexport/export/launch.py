"""The files of the folder `launch`, rendered from a layout's templates and a record of what they say.

The record stands in the manifest, so that a release can render them again under its own name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from functools import cache
from io import StringIO
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import SingleQuotedScalarString

from qexport.artifact.names import label
from qexport.records import Record

FOLDER: Final = "launch"

_OTHER_IN_1_1: Final = re.compile(r"(?i:y|n|yes|no|on|off)|[-+.]?[0-9].*")


class Launch(Record):
    """What all launch files say."""

    name: str
    """Of the model, in requests where the server takes any text."""

    @property
    def label(self) -> str:
        """The same for servers that allow few characters; see `qexport.artifact.names.label`."""
        return label(self.name)


def render_launch_files(layout: str, templates: Mapping[str, str], figures: object) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact.

    Args:
        layout: the name of the layout's package, which has a folder `templates`.
        templates: the template of each launch file, by the file's name inside `launch`.
        figures: the variable `figures` of the templates.

    Raises:
        jinja2.UndefinedError: a template uses a figure that does not exist.
    """
    environment = _environment(layout)
    return {
        f"{FOLDER}/{name}": environment.get_template(template).render(figures=figures).encode("utf-8")
        for name, template in templates.items()
    }


@cache
def _environment(layout: str) -> Environment:
    environment = Environment(
        loader=PackageLoader(layout),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shell": shlex.quote, "yaml": _yaml_scalar, "python": ascii}
    return environment


def _yaml_scalar(value: Any) -> str:
    """A value as YAML in block style: strings that would be read as another type are quoted, also those that only
    YAML 1.1 reads so, which Kubernetes does.
    """
    if isinstance(value, str) and _OTHER_IN_1_1.fullmatch(value):
        value = SingleQuotedScalarString(value)
    yaml, stream = YAML(), StringIO()
    yaml.width = 1 << 20
    yaml.dump([value], stream)
    return stream.getvalue().removeprefix("- ").rstrip("\n")
