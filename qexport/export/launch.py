"""Launch files, rendered from the templates of a layout, and the name of the model in them.

A template is text with the figures in it. Values that come from a model's name pass `shell` or `yaml`, which quote them
where the language asks for it. A figure that a template names and nobody gives is an error.
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

FOLDER: Final = "launch"

_NAME_LIMIT: Final = 63 - len("-predictor")  # which KServe adds


def served_name(origin: str) -> str:
    """A name that requests, Triton and KServe all take: small letters, digits and dashes, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", origin.rpartition("/")[2].lower().removesuffix(".gguf")).strip("-")
    name = words if words[:1].isalpha() else f"model-{words}"
    return name[:_NAME_LIMIT].strip("-")


def render_launch_files(layout: str, templates: Mapping[str, str], figures: object) -> dict[str, bytes]:
    """The content of the folder `launch`, by the name inside the artifact.

    Args:
        layout: the package of the layout, which has a folder `templates`.
        templates: the template of each launch file, by the file's name inside `launch`.
        figures: what the templates know as `figures`.

    Raises:
        jinja2.UndefinedError: a template asks for a figure that is not there.
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
    environment.filters |= {"shell": shlex.quote, "yaml": _yaml_scalar}
    return environment


def _yaml_scalar(value: Any) -> str:
    """A value as it stands in a block of YAML: strings that would be read as something else are quoted."""
    yaml, stream = YAML(), StringIO()
    yaml.width = 1 << 20
    yaml.dump([value], stream)
    return stream.getvalue().removeprefix("- ").rstrip("\n")
