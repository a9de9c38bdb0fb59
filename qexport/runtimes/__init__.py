"""Runtimes that an artifact's users have: what verification asks them for, and how it reaches them.

The recipe's `verify.through` is here.
"""

from __future__ import annotations

import re
import sys
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, model_validator

from qexport.amounts import checked_size
from qexport.errors import RecipeError
from qexport.settings import Settings
from qexport.yaml.problems import combination

RuntimeName = Literal["vllm", "onnxruntime-genai", "gptqmodel", "llama.cpp"]
ServedDtype = Literal["float32", "float16", "bfloat16"]

MODULES: Final[dict[RuntimeName, str]] = {
    "vllm": "vllm",
    "onnxruntime-genai": "onnxruntime_genai",
    "gptqmodel": "gptqmodel",
    "llama.cpp": "llama_cpp",
}
"""The module that a runtime's environment must have."""

NAMES: Final = tuple(MODULES)


class RuntimeSettings(Settings):
    """A runtime that the artifact is measured through: a program in a Python environment of its own, or an endpoint."""

    runtime: RuntimeName | None = None
    """The program, which is started with the artifact's folder. Without it, `url` names an endpoint."""

    python: str | None = None
    """The interpreter of the environment that has the program; by default the one that runs qexport."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+")] | None = None
    """An endpoint that serves the artifact: vLLM, SGLang or TGI. `qexport run` does not ask it, since nothing serves an
    artifact before it is published."""

    dtype: ServedDtype | None = None
    """What it computes in: by default float16 for vllm, float32 for the other programs, bfloat16 for an endpoint. A
    program is told so, if it can be; an endpoint cannot be asked. llama.cpp rounds the inputs of quantized layers to 8
    bits, and is measured like that by default; float32 keeps them, and needs a build with BLAS. The limit of
    `fidelity_kl` follows from it, or from what the runtime says, where that is narrower."""

    timeout: Annotated[int, Field(ge=1, le=86_400)] = 1800
    """Seconds that one answer may take, and the start of a program."""

    max_memory: Annotated[str, AfterValidator(checked_size)] | None = None
    """The most main memory that a program may take, for example `8GB`, before it is stopped. No limit by default."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> RuntimeSettings:
        if (self.runtime is None) == (self.url is None):
            raise combination({"runtime": f"give either runtime (one of {', '.join(NAMES)}) or url"})
        if self.url is not None and (self.python or self.max_memory):
            name = "python" if self.python else "max_memory"
            raise combination({name: "is for a program, and url names an endpoint"})
        if self.runtime == "llama.cpp" and self.dtype not in (None, "float32"):
            raise combination({"dtype": "llama.cpp computes as it is served, without dtype, or in float32"})
        if self.url is not None and (urlsplit(self.url).query or urlsplit(self.url).username):
            raise combination({"url": "give the server's address alone, without a query, a user or a password"})
        return self

    @property
    def label(self) -> str:
        """The name in reports and of gates; two entries of a recipe must differ in it."""
        if self.url is not None:
            return urlsplit(self.url).netloc
        return f"{self.runtime} {self.dtype}" if self.dtype else str(self.runtime)

    @property
    def interpreter(self) -> str:
        """The interpreter that starts the program."""
        return self.python or sys.executable


def each_once(through: list[RuntimeSettings]) -> list[RuntimeSettings]:
    """Refuses two entries of one label."""
    labels = [each.label for each in through]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"{twice[0]} is listed twice: list it once, or give each another dtype")
    return through


def parse_through(text: str) -> RuntimeSettings:
    """The settings of one `--through`: an URL, or `NAME` or `NAME@PYTHON`; further fields follow as `,key=value`.

    Raises:
        RecipeError: it is none of these.
    """
    first, *rest = text.split(",")
    name, at, python = first.partition("@")
    found: dict[str, Any] = {"url": first} if "://" in first else {"runtime": name} | ({"python": python} if at else {})
    for each in rest:
        key, equals, value = each.partition("=")
        if not equals or key in found:
            raise _not_understood(text, f"{each!r} is not key=value, or given twice")
        found[key] = int(value) if key == "timeout" and value.isdecimal() else value
    try:
        return RuntimeSettings.model_validate(found)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))} {each['msg']}".strip() for each in error.errors()]
        raise _not_understood(text, "; ".join(problems)) from error


def portable_through(text: str) -> str:
    """The text with the interpreter's last component alone, as commands in reports name local files."""
    found = re.match(r"([^@,]+)@([^,]*)(.*)", text, re.DOTALL)
    return text if found is None or "://" in found[1] else f"{found[1]}@{PurePath(found[2]).name}{found[3]}"


def _not_understood(text: str, why: str) -> RecipeError:
    return RecipeError(
        f"--through was not understood: {why}",
        where=text,
        mend=f"give a URL, or one of {', '.join(NAMES)}, as NAME or NAME@PYTHON, then ,dtype=float16 where it matters",
    )
