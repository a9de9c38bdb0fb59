"""A folder of safetensors as servers find it that have layers of their own: how each linear layer is quantized by its
config, and whether layers that these servers join are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qexport.architectures.architecture import Architecture
from qexport.architectures.joined import joined_modules
from qexport.architectures.structure import LinearSpec, Structure
from qexport.artifact.disk import disk_failure
from qexport.errors import InputError, QexportError
from qexport.export.served import ServedModel, ServedWeights
from qexport.formats.awq import AwqRules
from qexport.formats.block_fp8 import BlockFp8Rules
from qexport.formats.compressed_tensors.reading import CompressedTensorsRules
from qexport.formats.gptq.reading import GptqRules
from qexport.formats.stored_weight import Scheme
from qexport.tensors.safetensors_folder import SafetensorsFolder


@dataclass(frozen=True)
class ServedLayers(ServedModel):
    """An artifact with the scheme of each of its layers; see `ServedModel`.

    Attributes:
        plan: the structure of a planned model; None to read it from config.json.
    """

    plan: Structure | None = None

    @staticmethod
    def read_weights(folder: Path) -> ServedWeights:
        """The tensors of the single file, or of all files in the index."""
        try:
            with SafetensorsFolder(folder) as weights:
                return ServedWeights(dict(weights.specs()))
        except InputError as error:
            if disk_failure(error, where=None):
                raise
            return ServedWeights({}, unreadable={"*.safetensors": error.what})

    @property
    def dtype(self) -> Any:
        """The dtype that config.json names."""
        return self.config.get("dtype", self.config.get("torch_dtype"))

    @cached_property
    def structure_or_fault(self) -> Structure | str:
        """The structure of the model in config.json, or why there is none."""
        if self.plan is not None:
            return self.plan
        try:
            config = {key: value for key, value in self.config.items() if key != "quantization_config"}
            return Architecture(config).structure
        except (QexportError, AttributeError, TypeError, ValueError) as error:
            return str(error).partition("\n")[0]

    @property
    def structure(self) -> Structure | None:
        """The structure of the model in config.json; None if there is none."""
        return self.structure_or_fault if isinstance(self.structure_or_fault, Structure) else None

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The linear layers of the blocks."""
        return self.structure.block_linears if self.structure else ()

    @cached_property
    def schemes(self) -> dict[str, Scheme | None]:
        """How each linear layer of the blocks is quantized by config.json; None for an unquantized one.

        Raises:
            InputError: the quantization_config is malformed or not supported.
        """
        find = self._scheme_of()
        return {linear.name: find(linear.name) for linear in self.linears}

    @property
    def schemes_or_none(self) -> dict[str, Scheme | None]:
        """`schemes`, but empty if the quantization_config is not supported, which another rule reports."""
        try:
            return self.schemes
        except InputError:
            return {}

    def _scheme_of(self) -> Callable[[str], Scheme | None]:
        match self.method:
            case "gptq":
                return GptqRules(self.quantization).scheme
            case "awq":
                return AwqRules(self.quantization).scheme
            case "compressed-tensors":
                return CompressedTensorsRules(self.quantization).scheme
            case "fp8":
                return BlockFp8Rules(self.quantization).scheme
            case _:
                return lambda module: None


def unfollowed_config(model: ServedLayers, methods: Collection[str]) -> Iterator[str]:
    """Why the quantization_config cannot be followed; `methods` are those that the server reads."""
    try:
        schemes = model.schemes
    except InputError as error:
        yield error.what
        return
    if model.method in methods and model.structure and not any(schemes.values()):
        yield "no layer is quantized by it"


def unequal_siblings(model: ServedLayers, server: str) -> Iterator[str]:
    """Layers that a server joins and the artifact quantizes differently, each set of siblings once for all blocks."""
    schemes = model.schemes_or_none
    found: dict[str, list[str]] = {}
    for group in joined_modules(schemes):
        if len({schemes[module] for module in group}) > 1:
            named = ", ".join(f"{module.rpartition('.')[2]} ({in_words(schemes[module])})" for module in group)
            found.setdefault(named, []).append(group[0].rpartition(".")[0])
    for named, parents in found.items():
        more = f" and {len(parents) - 1} more" if len(parents) > 1 else ""
        yield f"{named} in {parents[0]}{more}: {server} makes them one layer, which cannot be quantized in two ways"


def in_words(scheme: Scheme | None) -> str:
    """How a layer is quantized, in as many words as siblings differ in."""
    if scheme is None:
        return "unquantized"
    groups = "one group per row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    symmetry = "symmetric" if scheme.sym else "asymmetric"
    return f"{scheme.bits} bits, {groups}, {symmetry}"


SIBLINGS_ALIKE = (
    "quantize them all in the same way, or none of them, with patterns in overrides or skip_modules that match all: "
    "*.self_attn.[qkv]_proj, *.mlp.[gu]*_proj"
)
"""How unequal siblings are mended."""
