"""Which modules an adapter changes, by PEFT's rules, and how a base's modules and tensors are named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.naming import Naming
from qexport.architectures.structure import Structure
from qexport.errors import CompatibilityError, InputError
from qexport.merge.adapter import MERGE_WITH_PEFT, AdapterOptions
from qexport.tensors.source import TensorSpec

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class Module:
    """One module of the base.

    Attributes:
        kind: `linear` stores [out, in], `conv1d` (GPT-2's) [in, out], `embedding` [tokens, dimensions].
        tensors: its parameters and persistent buffers and those inside it, by their path within the module.
    """

    kind: Kind
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored with its outputs last."""
        return self.kind in ("conv1d", "embedding")

    @property
    def inputs(self) -> int:
        """The number of inputs; for an embedding, of tokens."""
        return self.tensors["weight"][0 if self.transposed else 1]

    @property
    def outputs(self) -> int:
        """The number of outputs; for an embedding, of dimensions."""
        return self.tensors["weight"][1 if self.transposed else 0]

    @property
    def has_bias(self) -> bool:
        """Whether it has a bias."""
        return "bias" in self.tensors


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter is merged into.

    Attributes:
        structure: the family, and whether embedding and head are tied; it names tensors as the files do.
        modules: every module below the root, by path, in the order of PEFT; after them the matrices of experts, by
            their names in the files, which were the modules' names up to transformers 4.
        embedding: the path of the input embedding.
        head: the path of the output head.
        naming: the names of the modules' tensors in the checkpoint's files.
        weights: the checkpoint's tensors, as their headers say.
    """

    structure: Structure
    modules: Mapping[str, Module]
    embedding: str
    head: str
    naming: Naming
    weights: Mapping[str, TensorSpec]


def describe_base(checkpoint: Checkpoint) -> BaseModel:
    """The modules of a checkpoint's architecture, and its tensors."""
    architecture = checkpoint.architecture
    model, naming = architecture.skeleton, architecture.naming
    modules = {
        path: Module(_kind(module), {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
        for path, module in model.named_modules()
        if path
    }
    paths = {module: path for path, module in model.named_modules()}
    embedding, head = paths[model.get_input_embeddings()], paths[model.get_output_embeddings()]
    weights = checkpoint.weights.specs()
    experts = {
        name.removesuffix(".weight"): Module("linear", {"weight": part.shape})
        for name, part in naming.parts.items()
        if part.expert is not None and name.endswith(".weight")
    }
    return BaseModel(architecture.structure, modules | experts, embedding, head, naming, weights)


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else "other"


TIME_LIMIT = 10.0
"""Seconds that one pattern may take over all module names."""

_PLAIN = re.compile(r"[\w.-]*")

# Python's matcher cannot be interrupted from another thread, a process can.
_MATCHER = """
import json, re, sys
pattern, names = json.load(sys.stdin)
json.dump([name for name in names if re.fullmatch(pattern, name)], sys.stdout)
"""


def is_plain(pattern: str) -> bool:
    """Whether nothing in a pattern repeats or branches, so that matching it is fast. Most patterns are so."""
    return _PLAIN.fullmatch(pattern) is not None


def full_matches(pattern: str, names: Sequence[str], *, field: str) -> set[str]:
    """The names that match from start to end, as for `re.fullmatch`.

    Raises:
        InputError: the pattern is not a regular expression, or takes longer than `TIME_LIMIT`.
    """
    return _matches(pattern, pattern, names, field)


def suffix_matches(pattern: str, names: Sequence[str], *, field: str) -> set[str]:
    """The names whose last components match: PEFT's rule for the keys of rank_pattern and alpha_pattern."""
    return _matches(pattern, rf"(.*\.)?({pattern})", names, field)


def _matches(pattern: str, expression: str, names: Sequence[str], field: str) -> set[str]:
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{pattern!r} is not a regular expression: {error}", where=f"adapter_config.json: {field}"
        ) from error
    if is_plain(pattern):
        return {name for name in names if compiled.fullmatch(name)}
    return _match_in_child(expression, names, field)


def _match_in_child(expression: str, names: Sequence[str], field: str) -> set[str]:
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([expression, list(names)]),
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"the regular expression {expression!r} takes longer than {TIME_LIMIT:g} s over {len(names)} module names",
            where=f"adapter_config.json: {field}",
            mend='list the module names instead, for example ["q_proj", "v_proj"]',
        ) from error
    return set(json.loads(answer.stdout))


def targeted(options: AdapterOptions, base: BaseModel) -> list[str]:
    """The paths of the modules that the adapter changes, in the model's order.

    Raises:
        InputError: nothing is targeted, or a pattern cannot be matched.
        CompatibilityError: a field holds a pattern where qexport accepts only names.
    """
    if options.target_modules is None:
        raise InputError(
            "target_modules is missing", where="adapter_config.json", mend="name the modules that it changes"
        )
    excluded = _excluded(options, base)
    names = [name for name in base.modules if name not in excluded]
    if isinstance(options.target_modules, list):
        found = [name for name in names if _named(name, options.target_modules, options)]
    elif options.target_modules.lower() == "all-linear":
        found = [name for name in names if _is_inner_linear(name, base)]
    else:
        matches = full_matches(options.target_modules, names, field="target_modules")
        found = [name for name in names if name in matches]
    if not found:
        raise InputError(
            f"no module of the base matches target_modules {options.target_modules!r}",
            where="adapter_config.json: target_modules",
            mend="give the base that the adapter was trained on",
        )
    return found


def ends_with(name: str, suffixes: Sequence[str]) -> bool:
    """Whether the last components of a module path are one of `suffixes`."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def saved(options: AdapterOptions, base: BaseModel) -> list[str]:
    """The modules that modules_to_save stores as a whole. PEFT compares the ends of names, not whole components."""
    return [name for name in base.modules if name.endswith(tuple(options.modules_to_save or ()))]


def _is_inner_linear(name: str, base: BaseModel) -> bool:
    return base.modules[name].kind in ("linear", "conv1d") and name != base.head


def _excluded(options: AdapterOptions, base: BaseModel) -> set[str]:
    names = list(base.modules)
    whole = [_checked_name(name, "modules_to_save") for name in options.modules_to_save or ()]
    excluded = {name for name in names if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in whole)}
    if isinstance(options.exclude_modules, str):
        return excluded | full_matches(options.exclude_modules, names, field="exclude_modules")
    return excluded | {name for name in names if ends_with(name, options.exclude_modules or ())}


def _named(name: str, targets: list[str], options: AdapterOptions) -> bool:
    # PEFT checks the layers only if a module is named by its end, not if it is named in full.
    return name in targets or (ends_with(name, targets) and _in_layers(name, options))


def _in_layers(name: str, options: AdapterOptions) -> bool:
    layers = options.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = [options.layers_pattern] if isinstance(options.layers_pattern, str) else options.layers_pattern
    if patterns:
        wanted = "|".join(_checked_name(pattern, "layers_pattern") for pattern in patterns)
        match = re.match(rf"(?:^|.*?\.)(?:{wanted})\.(\d+)\.", name)
    else:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _checked_name(pattern: str, field: str) -> str:
    if not is_plain(pattern):
        raise CompatibilityError(
            f"{pattern!r} is a regular expression, but qexport accepts only names here",
            where=f"adapter_config.json: {field}",
            mend=MERGE_WITH_PEFT,
        )
    return pattern
