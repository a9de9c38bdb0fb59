"""Which runtimes measure which folder: what is checked of them before any work is done."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qexport.artifact.figures import CATALOGUE
from qexport.errors import CompatibilityError, RecipeError, listed
from qexport.export.vllm.launch import max_model_len
from qexport.gates.limits import SPEED
from qexport.reading.stored_model import StoredModel
from qexport.runtimes import MODULES, RuntimeSettings
from qexport.verifying import VerifySettings
from qexport.verifying.served import most_tokens

_STARTING_SECONDS: Final = 120
_HAS_MODULE: Final = "import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"


def check_runtimes(settings: VerifySettings) -> None:
    """Checks that the named environments have their runtimes, before any work is done.

    Raises:
        RecipeError: an interpreter does not exist, or does not find its runtime; or a gate limits what only a runtime
            can tell, and none is named.
    """
    for index, each in enumerate(settings.through):
        if each.runtime is not None and (why := _missing(each)):
            raise RecipeError(
                f"{each.runtime} is not there: {why}",
                where=f"verify.through.{index}.python: {each.interpreter}",
                mend="name the interpreter of an environment that has it, for example ./venv/bin/python",
            )
    names = limited_through(settings)
    if names and not settings.through:
        raise RecipeError(
            "only a runtime gives what these gates limit, and none is named",
            where=listed([f"verify.gates.{name}" for name in names]),
            mend="give verify.through or --through, or remove the gates",
        )


def refuse_only_endpoints(settings: VerifySettings) -> None:
    """Refuses gates that a run can never decide, since it asks no endpoint.

    Raises:
        RecipeError: a gate limits what only a runtime can tell, and no program is named.
    """
    names = limited_through(settings)
    if names and not any(each.runtime for each in settings.through):
        raise RecipeError(
            "a run asks no endpoint, and only a runtime gives what these gates limit",
            where=listed([f"verify.gates.{name}" for name in names]),
            mend="name a program in verify.through; or remove the gates, and ask the endpoint with qexport verify",
        )


def refuse_unmeasured_speed(settings: VerifySettings, codes: Sequence[str]) -> None:
    """Refuses gates on the speed of codes, which only a runtime's is measured of, if no program is named.

    Args:
        settings: the recipe's `verify`.
        codes: the layouts whose folders hold codes and no graph.

    Raises:
        RecipeError: there are such gates and layouts.
    """
    names = [name for name, bounds in settings.gates.items() if bounds is not None and name in SPEED]
    if names and codes and not any(each.runtime for each in settings.through):
        raise RecipeError(
            "gates on speed can never be decided: of quantized weights only the speed of a runtime is measured",
            where=f"{listed([f'verify.gates.{name}' for name in sorted(names)])}; layouts: {', '.join(codes)}",
            mend="name a program that loads them in verify.through, or remove these gates",
        )


def limited_through(settings: VerifySettings) -> list[str]:
    """The figures that gates limit and that only runtimes give."""
    return [name for name, bounds in settings.gates.items() if bounds is not None and CATALOGUE[name].served]


def _missing(settings: RuntimeSettings) -> str | None:
    """Why a runtime cannot be started; None if it can."""
    assert settings.runtime is not None
    module = MODULES[settings.runtime]
    try:
        found = subprocess.run(
            [settings.interpreter, "-c", _HAS_MODULE.format(module=module)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_STARTING_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if found.returncode == 0 else f"its environment has no module {module}"


def misfit(settings: RuntimeSettings, artifact: StoredModel) -> str | None:
    """Why a runtime cannot load a folder; None if it should."""
    quantization = artifact.quantization or {}
    match settings.runtime:
        case "vllm" if artifact.kind != "weights":
            return "vllm loads safetensors folders, not ONNX graphs or GGUF files"
        case "onnxruntime-genai" if artifact.kind != "graph":
            return "onnxruntime-genai loads folders of the layout onnx"
        case "onnxruntime-genai" if not (artifact.folder / "genai_config.json").is_file():
            return "the folder has no genai_config.json: onnxruntime-genai does not know the model's family"
        case "llama.cpp" if artifact.kind != "gguf":
            return "llama.cpp loads folders of the layout gguf"
        case "gptqmodel" if quantization.get("quant_method") != "gptq":
            return "gptqmodel loads folders with GPTQ codes"
    return None


def refuse_misfits(settings: VerifySettings, artifact: StoredModel) -> None:
    """Refuses a folder that none of the named runtimes can load.

    Raises:
        CompatibilityError: with every reason.
    """
    reasons = [misfit(each, artifact) for each in settings.through]
    if reasons and None not in reasons:
        raise CompatibilityError(
            "no runtime that is named can load this artifact",
            where=f"{artifact.folder}: {listed([why for why in reasons if why])}",
            mend="name another runtime, or another layout's folder",
        )


_LIMITED_BY_CONTEXT: Final = ("vllm", "onnxruntime-genai")
"""Programs that refuse a text as long as the model's context, since they generate a token after it."""


def refuse_full_context(settings: VerifySettings, config: Mapping[str, Any]) -> None:
    """Refuses windows that leave a program no room for a token.

    Args:
        settings: the recipe's `verify`.
        config: of the model.

    Raises:
        CompatibilityError: the windows are too long.
    """
    context, length = max_model_len(config), settings.sequence_length
    limited = [index for index, each in enumerate(settings.through) if each.runtime in _LIMITED_BY_CONTEXT]
    if context is None or not limited or most_tokens(length) <= context:
        return
    largest = next((shorter for shorter in range(length, 0, -1) if most_tokens(shorter) <= context), 0)
    name = settings.through[limited[0]].runtime
    raise CompatibilityError(
        f"{name} needs room for {most_tokens(length)} tokens, the model's context has {context}",
        where=f"verify.through.{limited[0]}: {name}; verify.sequence_length: {length}",
        mend=f"set verify.sequence_length to {largest} or less" if largest else "remove the runtime",
    )


_HOMES: Final[Mapping[str, Sequence[str]]] = {
    "vllm": ("vllm", "safetensors"),
    "onnxruntime-genai": ("onnx",),
    "gptqmodel": ("safetensors", "tgi", "vllm"),
    "llama.cpp": ("gguf",),
}
"""The layouts that a run serves with a runtime: the first one that the recipe has."""


def home(settings: RuntimeSettings, layouts: Sequence[str]) -> str | None:
    """The layout that a run measures through a program; None for an endpoint, or if no layout is for it."""
    return next((name for name in _HOMES.get(settings.runtime or "", ()) if name in layouts), None)


def refuse_homeless(settings: VerifySettings, layouts: Sequence[str]) -> None:
    """Refuses a recipe whose layouts a named program cannot load.

    Raises:
        CompatibilityError: with the layouts that it loads.
    """
    for index, each in enumerate(settings.through):
        if each.runtime is not None and home(each, layouts) is None:
            raise CompatibilityError(
                f"{each.runtime} loads none of the layouts {', '.join(layouts)}",
                where=f"verify.through.{index}",
                mend=f"add the layout {_HOMES[each.runtime][0]} to export, or remove the runtime",
            )


def runtimes_of(
    layout: str, settings: VerifySettings, layouts: Sequence[str]
) -> tuple[list[RuntimeSettings], list[str]]:
    """The programs that a run measures one of its layouts through, and why the endpoints are not asked.

    Args:
        layout: the layout.
        settings: the recipe's `verify`.
        layouts: all of the run.
    """
    own = [each for each in settings.through if home(each, layouts) == layout]
    waiting = [each.label for each in settings.through if each.runtime is None]
    return own, [f"serving at {label} (ask it with qexport verify, once it serves the artifact)" for label in waiting]
