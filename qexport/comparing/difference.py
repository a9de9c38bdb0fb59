"""Everything in which two models, adapters or artifacts differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qexport.artifact.manifest import MANIFEST_NAME, Manifest
from qexport.comparing.documents import DocumentDifference, compare_values
from qexport.comparing.files import different_files, files_of, listed_files
from qexport.comparing.sides import open_side
from qexport.comparing.tensors import WORDS, ParameterDifference, compare_parameters, counts
from qexport.errors import InputError
from qexport.hidden_packages import hidden
from qexport.progress import Progress, ProgressCallback, silent

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
        InputError: one of them is malformed, or has more files than are compared.
        CompatibilityError: one is a GGUF file of an architecture that is not supported.
    """
    listed = [] if weights_only else [listed_files(path) for path in paths]  # refused before the weights are read
    with open_side(paths[0]) as a, open_side(paths[1]) as b:
        parameters = compare_parameters(
            a, b, step=lambda name, done, total: progress(Progress("verify", done, total, "tensor", name))
        )
        notes = [f"{name}: {note}" for name, side in zip(names, (a, b), strict=True) for note in side.notes]
        contents = [files_of(*each) for each in zip(paths, listed, (a, b), strict=False)]
        files = list(different_files(*contents)) if contents else []
    evidence = [] if weights_only else list(_evidence(paths, names, notes))
    return Difference(*names, parameters, files, evidence, notes)


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
