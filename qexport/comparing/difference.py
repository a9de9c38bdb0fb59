"""Everything in which two models, adapters or artifacts differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qexport.artifact.manifest import LISTING_NAME, MANIFEST_NAME, REPORT_FOLDER, Manifest
from qexport.comparing.documents import DocumentDifference, compare_bytes, compare_json, compare_text, compare_values
from qexport.comparing.sides import Side, open_side
from qexport.comparing.tensors import WORDS, ParameterDifference, compare_parameters, counts
from qexport.describing.beside import template_text
from qexport.errors import InputError
from qexport.hidden_packages import hidden
from qexport.progress import Progress, ProgressCallback, silent
from qexport.tensors.strict_files import contained_path, read_bounded
from qexport.text.file_names import CHAT_TEMPLATE, OLD_TEMPLATE, TOKENIZER_CONFIG

_WEIGHTS: Final = (".safetensors", ".gguf", ".onnx", ".onnx.data", ".bin", ".pt", ".pth")
_EVIDENCE: Final = (MANIFEST_NAME, LISTING_NAME)
_LIMIT: Final = 1 << 27
_MOST_FILES: Final = 2000
_DEEPEST: Final = 8
_SHOWN: Final = 10


@dataclass(frozen=True)
class Difference:
    """The comparison of two places.

    Attributes:
        a: the one, as it was named.
        b: the other.
        parameters: every parameter of either, in the order of A.
        files: the configs, tokenizers, templates and other small files that differ.
        evidence: what differs between two manifests: inputs, recipes, figures, gates; empty unless both are artifacts.
        notes: what was not compared.
    """

    a: str
    b: str
    parameters: list[ParameterDifference]
    files: list[DocumentDifference]
    evidence: list[DocumentDifference]
    notes: list[str]

    @property
    def same_weights(self) -> bool:
        """Whether both have the same parameters with the same values, however they are stored."""
        return not any(each.differs for each in self.parameters)

    @property
    def equal(self) -> bool:
        """Whether nothing that was compared differs."""
        return self.same_weights and not self.files and not self.evidence

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values; parameters that are equal are counted alone."""
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "same_weights": self.same_weights,
            "counts": counts(self.parameters),
            "parameters": [each.as_dict() for each in self.parameters if each.differs],
            "files": [each.as_dict() for each in self.files],
            "evidence": [each.as_dict() for each in self.evidence],
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """The same for the terminal."""
        return [
            f"A  {self.a}",
            f"B  {self.b}",
            *(f"note: {note}" for note in self.notes),
            *self._weights(),
            *(line for each in (*self.files, *self.evidence) for line in each.lines()),
            *([] if self.files or self.evidence else ["all other files that were compared are equal"]),
        ]

    def _weights(self) -> Iterator[str]:
        found = counts(self.parameters)
        yield f"weights: {', '.join(f'{count} {WORDS[state]}' for state, count in found.items())}"
        differing = [each for each in self.parameters if each.differs]
        differing.sort(key=lambda each: -(each.relative or 0.0))
        yield from (f"  {each.name}: {each.words()}" for each in differing[:_SHOWN])
        if len(differing) > _SHOWN:
            yield f"  and {len(differing) - _SHOWN} more"


@hidden("kernels")
def compare(
    paths: tuple[Path, Path], *, names: tuple[str, str], weights_only: bool = False, progress: ProgressCallback = silent
) -> Difference:
    """Compares two folders or files.

    Args:
        paths: A and B: folders of models, adapters or artifacts of any maker, GGUF files, safetensors files.
        names: how the user named them.
        weights_only: leave out everything but the weights.
        progress: is called with each parameter.

    Raises:
        InputError: one of them is malformed.
        CompatibilityError: one is a GGUF file of an architecture that is not supported.
    """
    with open_side(paths[0]) as a, open_side(paths[1]) as b:
        parameters = compare_parameters(
            a, b, step=lambda name, done, total: progress(Progress("verify", done, total, "tensor", name))
        )
        notes = [f"{name}: {note}" for name, side in zip(names, (a, b), strict=True) for note in side.notes]
        files = [] if weights_only else list(_files(_small_files(paths[0], a), _small_files(paths[1], b)))
    evidence = [] if weights_only else list(_evidence(paths, names, notes))
    return Difference(*names, parameters, files, evidence, notes)


def _small_files(path: Path, side: Side) -> Mapping[str, bytes]:
    """Files beside the weights that are no evidence, by name."""
    if side.checkpoint is not None:
        return {"config.json": json.dumps(dict(side.checkpoint.config)).encode(), **side.checkpoint.files}
    if not path.is_dir():
        return {}
    found: dict[str, bytes] = {}
    for each in sorted(path.rglob("*"))[:_MOST_FILES]:
        name = each.relative_to(path).as_posix()
        if name.count("/") > _DEEPEST or name in _EVIDENCE or name.startswith(f"{REPORT_FOLDER}/"):
            continue
        if each.is_file() and not name.endswith(_WEIGHTS):
            found[name] = read_bounded(contained_path(path, name), _LIMIT)
    return found


def _files(a: Mapping[str, bytes], b: Mapping[str, bytes]) -> Iterator[DocumentDifference]:
    for name in dict.fromkeys([*a, *b]):
        if name in (CHAT_TEMPLATE, OLD_TEMPLATE):
            continue  # compared as text, wherever it stands
        ours, theirs = a.get(name), b.get(name)
        if ours is None or theirs is None or not name.endswith(".json"):
            found = compare_bytes(name, ours, theirs)
        else:
            found = compare_json(name, ours, theirs, without="chat_template" if name == TOKENIZER_CONFIG else None)
        if found is not None:
            yield found
    if (found := compare_text("chat template", _template(a), _template(b))) is not None:
        yield found


def _template(files: Mapping[str, bytes]) -> str | None:
    found = template_text(files.get)
    return None if found is None else found[1]


def _evidence(paths: tuple[Path, Path], names: tuple[str, str], notes: list[str]) -> Iterator[DocumentDifference]:
    """What differs between two manifests; why one cannot be read is added to the notes."""
    found = list[Manifest]()
    for path, name in zip(paths, names, strict=True):
        if not (path.is_dir() and (path / MANIFEST_NAME).is_file()):
            notes.append(f"{name}: no manifest, so recipes and figures are not compared")
            continue
        try:
            found.append(Manifest.read(path))
        except InputError as error:
            notes.append(f"{name}: {error.what}")
    if len(found) == 2:
        for part, (ours, theirs) in _parts(*found).items():
            if (different := compare_values(part, ours, theirs)) is not None:
                yield different


def _parts(a: Manifest, b: Manifest) -> dict[str, tuple[Any, Any]]:
    """The parts of two manifests that are compared, as JSON values."""
    return {
        "recipe": (a.recipe, b.recipe),
        "inputs": (_inputs(a), _inputs(b)),
        "environment": (a.environment.model_dump(), b.environment.model_dump()),
        "figures": (_figures(a), _figures(b)),
        "gates": (_gates(a), _gates(b)),
    }


def _inputs(manifest: Manifest) -> dict[str, Any]:
    fields = ("base", "adapter", "calibration", "tokenizer")
    return {name: value for name, value in manifest.model_dump(mode="json").items() if name in fields}


def _figures(manifest: Manifest) -> dict[str, float]:
    found = manifest.verification
    return {} if found is None else {each.name: each.value for each in found.figures}


def _gates(manifest: Manifest) -> dict[str, str]:
    found = manifest.verification
    return {} if found is None else {"verdict": str(found.verdict)} | {each.name: each.verdict for each in found.gates}
