"""The gguf layout: one file that llama.cpp runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from gguf import GGMLQuantizationType, LlamaFileType

from qexport.amounts import parse_size
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.structure import Structure
from qexport.artifact.manifest import CardText
from qexport.errors import CompatibilityError, QexportError, listed
from qexport.export import GgufSettings
from qexport.export.gguf.files import GgufFiles
from qexport.export.gguf.launch import GgufLaunch, launch_files
from qexport.export.gguf.model_keys import context_length, family_of, model_keys
from qexport.export.gguf.model_keys import notes as model_notes
from qexport.export.gguf.sentencepiece_keys import SCORES, TOKEN_TYPES, TOKENS, same_vocabulary
from qexport.export.gguf.tokenizer_keys import GgufTokenizer, gguf_tokenizer
from qexport.export.loaders import Folder, loading_section
from qexport.export.model_files import card_text, model_files, sizes_of, write_files
from qexport.export.rounded_ends import rounded_ends, rounding_note
from qexport.formats import GptqFormat, LlmInt8Format, MergedFormat, Outputs, W8A8Format
from qexport.formats.gguf import GgufFormat
from qexport.formats.gguf.blocks import LARGEST_SHIFT, NARROW, kind_of
from qexport.formats.gguf.families import constants, places
from qexport.formats.gguf.header import Value
from qexport.formats.gguf.pre_tokenizers import named
from qexport.tensors import GroupQuantizedSpec, RowQuantizedSpec
from qexport.tensors.gguf_file import GgufFile
from qexport.tensors.gguf_parts import open_gguf

_QUANTIZATION_VERSION: Final = 2
_PRE: Final = "tokenizer.ggml.pre"
_FILE_TYPES: Final = {
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_FORMATS: Final = (GptqFormat, LlmInt8Format, W8A8Format, MergedFormat)
_UNQUANTIZED: Final = {torch.bfloat16: LlamaFileType.MOSTLY_BF16, torch.float16: LlamaFileType.MOSTLY_F16}


class GgufLayout:
    """One or several files with weights, configuration and tokenizer; beside them what transformers and qexport read.

    Args:
        settings: from the recipe.
        outputs: what the pass will yield.
        structure: of the model.
        checkpoint: the merged model.

    Raises:
        CompatibilityError: llama.cpp does not compute the model or does not have its tokenizer, or a layer cannot be
            stored value by value.
        InputError: a file of the tokenizer is malformed.
    """

    name = "gguf"
    graph = None
    readers = ("llama.cpp",)
    degrees: Mapping[str, Sequence[int]] = {}

    def __init__(self, settings: GgufSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> None:
        self._outputs, self._structure, self._config = outputs, structure, checkpoint.architecture.parsed
        self._name = checkpoint.name
        family = family_of(checkpoint.architecture)
        self._refuse_method()
        inexact = settings.inexact == "allow"
        self._tokenizer = gguf_tokenizer(checkpoint.files, checkpoint.config, structure.vocab_size, inexact=inexact)
        own = places(family, self._config, structure.parameters)
        form = GgufFormat(own, rounded_ends(settings, outputs, structure), inexact)
        self._refuse_homeless(form)
        self._refuse_faults(form)
        self._refuse_uneven_experts(form)
        values = _header(checkpoint.architecture, self._tokenizer, self._name)
        values["general.file_type"] = int(self._file_type)
        most = 0 if settings.split_max_size is None else parse_size(settings.split_max_size)
        self.weights: GgufFiles = GgufFiles(form, outputs, most, values, constants(self._config))

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the codes were made. It is not in config.json, since loaders would look for other tensors."""
        return self._outputs.format.quantization_config(self._outputs.specs, self._structure)

    @property
    def notes(self) -> list[str]:
        """What users of this folder should know."""
        return [*model_notes(self._config), *self._tokenizer.notes, *self._code_notes()]

    def prepare(self) -> None:
        """Does nothing: the constructor has checked everything that needs no weights."""

    def files(self, checkpoint: Checkpoint) -> Mapping[str, int]:
        """See `Layout.files`."""
        return {**self.weights.files, **sizes_of(self._files(checkpoint))}

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes config, tokenizer and launch files."""
        write_files(folder, self._files(checkpoint))

    def check(self, folder: Path) -> None:
        """Compares the header on disk with the model and its tokenizer.

        Raises:
            QexportError: they differ.
        """
        first = self.weights.first
        with closing(open_gguf(folder / first)) as file:
            if problems := list(header_differences(file, self.weights.values)):
                raise QexportError("the header is not the model's", where=f"{first}: {listed(problems)}")

    @property
    def card(self) -> CardText:
        """The format, and the programs that run the file."""
        return card_text(self._outputs.format, self.notes, loading_section(self._folder))

    @property
    def launch(self) -> GgufLaunch:
        """What the launch files say."""
        chat = "tokenizer.chat_template" in self.weights.values
        return GgufLaunch(
            name=self._name, longest=context_length(self._config), chat=chat, parts=len(self.weights.parts)
        )

    def _files(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """All files except the weights, the manifest and the model card."""
        served = replace(checkpoint, files={**checkpoint.files, **launch_files(self.launch)})
        return model_files(served, None, self._unquantized_dtype)

    @property
    def _folder(self) -> Folder:
        shapes = {module: spec.shape for module, spec in self._outputs.quantized.items()}
        parts = len(self.weights.parts)
        return Folder(None, shapes, self._structure.model_type, self._structure.head, self.name, gguf_files=parts)

    @property
    def _unquantized_dtype(self) -> torch.dtype:
        return self._outputs.unquantized_dtype(f"{self._structure.embedding}.weight")

    @property
    def _file_type(self) -> LlamaFileType:
        """How most of the matrices are stored."""
        found = [
            spec for spec in self._outputs.quantized.values() if isinstance(spec, GroupQuantizedSpec | RowQuantizedSpec)
        ]
        kinds = [kind_of(spec) for spec in found]
        if not kinds:
            return _UNQUANTIZED[self._unquantized_dtype]
        return _FILE_TYPES[max(dict.fromkeys(kinds), key=kinds.count)]

    def _code_notes(self) -> Iterator[str]:
        """What the file does not hold value by value, or in more bits than other layouts."""
        form = self.weights.encoding
        assert isinstance(form, GgufFormat)
        yield from rounding_note(form.rounded)
        kinds = [spec for spec in self._outputs.quantized.values() if isinstance(spec, GroupQuantizedSpec)]
        if not all(spec.sym for spec in kinds):
            yield (
                "Q4_1 rounds the minima of asymmetric codes to float16: values differ from those of other layouts by "
                f"at most {LARGEST_SHIFT:.2g} steps"
            )
        if narrow := sorted({spec.bits for spec in kinds if spec.bits in NARROW}):
            yield (
                f"codes of {' and '.join(map(str, narrow))} bits take the 4.5 bits per weight of Q4_0; those of 4 bits "
                "take as many, and drift less"
            )

    def _refuse_method(self) -> None:
        if not isinstance(self._outputs.format, _FORMATS):
            title = self._outputs.format.card.title
            why = "GGUF's type for it is not written" if title == "MXFP4" else "GGUF has no type with these values"
            raise CompatibilityError(
                f"the layout gguf stores codes in groups or rows, and no {title}: {why}",
                where="export: gguf",
                mend="quantize with gptq, sym: true, group_size: 32; or leave this layout out",
            )

    def _refuse_homeless(self, form: GgufFormat) -> None:
        """Refuses a model with parameters that llama.cpp's architecture does not have."""
        if homeless := [name for name in self._outputs.specs if name not in form.places.names]:
            raise CompatibilityError(
                "llama.cpp has no place for parameters of this model",
                where=f"export: gguf: {listed(homeless)}",
                mend="leave this layout out",
            )

    def _refuse_faults(self, form: GgufFormat) -> None:
        faults = {name: form.fault(spec) for name, spec in self._outputs.quantized.items()}
        if named := [f"{name}: {why}" for name, why in faults.items() if why]:
            raise CompatibilityError(
                f"{len(named)} layers cannot be stored in GGUF value by value",
                where=f"export: gguf: {listed(named)}",
                mend="quantize with sym: true and group_size: 32; or leave this layout out",
            )

    def _refuse_uneven_experts(self, form: GgufFormat) -> None:
        """Refuses experts that are quantized in several ways, since one tensor of the file has them all."""
        found = dict[str, dict[GGMLQuantizationType, str]]()
        for name in form.places.experts:
            kinds = found.setdefault(form.places.names[name], {})
            kinds.setdefault(form.entry(name, self._outputs.specs[name]).kind, name)
        uneven = [
            " and ".join(f"{name} in {kind.name}" for kind, name in kinds.items())
            for kinds in found.values()
            if len(kinds) > 1
        ]
        if uneven:
            raise CompatibilityError(
                f"{len(uneven)} tensors of GGUF would have experts of several types, and each has one",
                where=f"export: gguf: {listed(uneven)}",
                mend="give all experts of a layer the same bits in overrides ('*.experts.*'); or leave this layout out",
            )


def header(architecture: Architecture, files: Mapping[str, bytes], name: str) -> dict[str, Value]:
    """The values of a file's header, by key, in the order of the file, without `general.file_type`.

    Args:
        architecture: the model's.
        files: of the tokenizer, by name.
        name: of the model.

    Raises:
        CompatibilityError: llama.cpp does not compute the model, or does not have its tokenizer.
        InputError: a file of the tokenizer is malformed.
    """
    rows = architecture.structure.vocab_size
    return _header(architecture, gguf_tokenizer(files, architecture.config, rows, inexact=True), name)


def _header(architecture: Architecture, tokenizer: GgufTokenizer, name: str) -> dict[str, Value]:
    return {
        "general.architecture": family_of(architecture).name,
        "general.type": "model",
        "general.name": tokenizer.model_name(name),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **model_keys(architecture),
        **tokenizer.values,
    }


def header_differences(file: GgufFile, wanted: Mapping[str, Value]) -> list[str]:
    """How a file's values differ from others, one line each.

    Args:
        file: the file.
        wanted: the values that it should have, by key.
    """
    found = [key for key in (*file.metadata, *file.array_lengths) if key not in wanted]
    return [*(f"{key}: unexpected" for key in found), *_value_differences(file, wanted)]


def _value_differences(file: GgufFile, wanted: Mapping[str, Value]) -> list[str]:
    problems = []
    for key, value in wanted.items():
        own = file.array(key) if key in file.array_lengths else file.metadata.get(key)
        if own != _stored(value):
            problems.append(f"{key}: {_difference(own, _stored(value))}")
    return problems


def _stored(value: Value) -> Any:
    """A value as it is read back: floats are float32."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32).item()
    return value if isinstance(value, (str, int)) else list(value)


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, list) and isinstance(wanted, list):
        if len(found) != len(wanted):
            return f"{len(found)} entries in place of {len(wanted)}"
        index = next(index for index, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        return f"entry {index} is {found[index]!r:.60} in place of {wanted[index]!r:.60}"
    return f"{found!r:.80} in place of {wanted!r:.80}"


def compared_header(file: GgufFile, architecture: Architecture, files: Mapping[str, bytes]) -> Sequence[str]:
    """How the header of a finished file differs from what a model and its tokenizer would get.

    Its name and the type of most matrices are its own.

    Raises:
        CompatibilityError: llama.cpp does not compute the model, or does not have its tokenizer.
        InputError: a file of the tokenizer is malformed.
    """
    own = {key: file.metadata[key] for key in ("general.name", "general.file_type") if key in file.metadata}
    return [
        *header_differences(file, header(architecture, files, "") | own),
        *_constant_differences(file, architecture),
    ]


def compared_header_of_others(file: GgufFile, architecture: Architecture, files: Mapping[str, bytes]) -> Sequence[str]:
    """The same for a file that another program made, which may leave out what llama.cpp takes for granted, and may give
    a pre-tokenizer another of its names.

    Raises:
        CompatibilityError: as for `compared_header`.
        InputError: as for `compared_header`.
    """
    wanted: dict[str, Any] = dict(header(architecture, files, ""))
    pre = file.metadata.get(_PRE)
    if isinstance(pre, str) and (known := named(pre)) is not None and known.name == wanted[_PRE]:
        wanted[_PRE] = pre
    if SCORES in wanted:
        found = {key: file.array(key) for key in (TOKENS, SCORES, TOKEN_TYPES) if key in file.array_lengths}
        wanted |= same_vocabulary(found, wanted)
    there = {*file.metadata, *file.array_lengths} - {"general.name", "general.quantization_version"}
    return [
        *_value_differences(file, {key: value for key, value in wanted.items() if key in there}),
        *_constant_differences(file, architecture),
    ]


def _constant_differences(file: GgufFile, architecture: Architecture) -> list[str]:
    return [
        f"{name}: other values"
        for name, wanted in constants(architecture.parsed).items()
        if _differs(file, name, wanted)
    ]


def _differs(file: GgufFile, name: str, wanted: torch.Tensor) -> bool:
    tensor = file.tensors.get(name)
    return tensor is None or file.read_rows(name, 0, tensor.rows).tobytes() != wanted.numpy().tobytes()
