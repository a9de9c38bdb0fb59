"""Where a rebuilt artifact begins to differ from the recorded one, and what is likely to have caused it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qexport.artifact.attestation import FirstDifference, Rebuild
from qexport.errors import InputError
from qexport.tensors.safetensors_file import SafetensorsFile

_WEIGHTS: Final = (".safetensors", ".onnx.data", ".onnx", ".gguf")
_PIECE: Final = 1 << 20
_OF_BITS: Final = ("torch", "cpu_capability", "architecture", "device", "numpy")
_OF_FILES: Final = ("transformers", "safetensors", "python")
_WORDS: Final = {"cpu_capability": "type of CPU", "architecture": "instruction set", "device": "device"}

_UNKNOWN: Final = (
    "nothing that is recorded differs: a library that is not recorded, memory or a disk that fails, or a defect in "
    "qexport"
)


def first_difference(names: Sequence[str], recorded: Path | None, rebuilt: Path) -> FirstDifference:
    """The first of the files that differ, weights before others, and where in it.

    Args:
        names: the files that differ.
        recorded: the recorded artifact; None if it is not at hand.
        rebuilt: the new one.
    """
    name = min(names, key=lambda each: (not each.endswith(_WEIGHTS), each))
    if recorded is None or not ((recorded / name).is_file() and (rebuilt / name).is_file()):
        return FirstDifference(name)
    byte = _first_byte(recorded / name, rebuilt / name)
    if not name.endswith(".safetensors"):
        return FirstDifference(name, byte)
    try:
        differing = list(_differing_tensors(recorded / name, rebuilt / name))
    except InputError:
        return FirstDifference(name, byte)
    return FirstDifference(name, byte, differing[0] if differing else None, len(differing))


def _first_byte(a: Path, b: Path) -> int:
    """The first byte that differs, or the length of the shorter file."""
    place = 0
    with a.open("rb") as ours, b.open("rb") as theirs:
        while True:
            left, right = ours.read(_PIECE), theirs.read(_PIECE)
            if left != right or not left:
                common = zip(left, right, strict=False)
                return place + next((i for i, (x, y) in enumerate(common) if x != y), min(len(left), len(right)))
            place += len(left)


def _differing_tensors(a: Path, b: Path) -> Iterator[str]:
    """The tensors of one file that the other does not have with the same bytes, in the order of the file."""
    with SafetensorsFile(a) as ours, SafetensorsFile(b) as theirs:
        specs = theirs.specs()
        for name, spec in ours.specs().items():
            if specs.get(name) != spec or not _equal(ours, theirs, name):
                yield name


def _equal(a: SafetensorsFile, b: SafetensorsFile, name: str) -> bool:
    return all(bytes(x) == bytes(y) for x, y in zip(a.chunks(name), b.chunks(name), strict=True))


def causes_of(found: Rebuild, first: FirstDifference, renamed: Sequence[str]) -> list[str]:
    """Likely causes, the likeliest first.

    Args:
        found: the comparison.
        first: where it begins to differ.
        renamed: inputs that have other names than recorded, which model card and launch files show.
    """
    (was, then), (now, here) = found.recorded, found.here
    before, after = then.model_dump(), here.model_dump()
    other = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    weights = first.file.endswith(_WEIGHTS)
    order = (*_OF_BITS, *_OF_FILES) if weights else (*_OF_FILES, *_OF_BITS)
    causes = [_cause(name, *other[name]) for name in order if name in other]
    version = [f"another version of qexport: {now} here, {was} recorded"] if was != now else []
    causes = [*causes, *version] if weights and any(name in other for name in _OF_BITS) else [*version, *causes]
    causes = causes if weights else [*renamed, *causes]
    return causes or [_UNKNOWN]


def _cause(name: str, then: str, now: str) -> str:
    return f"another {_WORDS.get(name, f'version of {name}')}: {now} here, {then} recorded"
