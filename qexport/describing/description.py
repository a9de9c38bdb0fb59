"""The description of a place: which kind of thing it is, and what its headers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Final, Literal

from qexport.amounts import counted, size
from qexport.artifact.digests import sha256_file
from qexport.artifact.manifest import LISTING_NAME, MANIFEST_NAME, Manifest
from qexport.artifact.names import gguf_of
from qexport.describing.adapters import ADAPTER_CONFIG, AdapterFacts, adapter_of
from qexport.describing.architecture import ArchitectureFacts, architecture_of
from qexport.describing.beside import Beside, beside, json_file
from qexport.describing.quantization import Quantization, quantization_of
from qexport.describing.tensors import StoredTensors, tensors_of_file, tensors_of_folder
from qexport.errors import InputError
from qexport.quantizing import recorded_method
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path

Kind = Literal["model", "adapter", "gguf", "onnx", "tensors"]

_WORDS: Final[Mapping[Kind, str]] = {
    "model": "a model",
    "adapter": "a PEFT adapter",
    "gguf": "a GGUF file",
    "onnx": "an ONNX graph",
    "tensors": "a safetensors file",
}
_GRAPH: Final = "model.onnx"
_LABEL: Final = 12
_LINE: Final = 1000


@dataclass(frozen=True)
class ArtifactFacts:
    """What the manifest of an artifact of qexport says. Nothing was compared with its digests.

    Attributes:
        layout: its name.
        method: how it was quantized.
        base: the base's name.
        base_revision: its commit or version.
        adapter: the adapter's name; None if there was none.
        verdict: on its gates; None if it was not verified.
        mean_kl: its mean KL divergence from the reference in nats, if it was measured.
        root: the root digest; None without a listing.
        qexport: the version that made it.
    """

    layout: str
    method: str
    base: str
    base_revision: str | None
    adapter: str | None
    verdict: str | None
    mean_kl: float | None
    root: str | None
    qexport: str

    def words(self) -> str:
        """The same for the terminal."""
        source = f"{self.base}{f' at {self.base_revision}' if self.base_revision else ''}"
        source += f" + {self.adapter}" if self.adapter else ""
        drift = "" if self.mean_kl is None else f", mean KL divergence {self.mean_kl:.4g} nats"
        verdict = "not verified" if self.verdict is None else f"verdict {self.verdict}{drift}"
        return f"layout {self.layout}, {self.method}, from {source}; {verdict}; qexport {self.qexport}"


@dataclass(frozen=True)
class Description:
    """What a place is.

    Attributes:
        place: as it was named.
        kind: which kind of thing.
        weights: its tensors; of a graph only its files.
        architecture: of the model; None for an adapter.
        quantization: how weights are stored.
        adapter: for an adapter.
        artifact: for an artifact of qexport.
        beside: tokenizer, template and license.
        problems: what is wrong with it, as far as headers say.
    """

    place: str
    kind: Kind
    weights: StoredTensors
    architecture: ArchitectureFacts | None = None
    quantization: Quantization | None = None
    adapter: AdapterFacts | None = None
    artifact: ArtifactFacts | None = None
    beside: Beside | None = None
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "place": self.place,
            "kind": self.kind,
            "architecture": self.architecture.as_dict() if self.architecture else None,
            "tensors": len(self.weights.tensors),
            "total_bytes": self.weights.total_bytes,
            "bytes_by_dtype": self.weights.by_dtype,
            "files": dict(self.weights.files),
            "quantization": self.quantization.as_dict() if self.quantization else None,
            "adapter": self.adapter.as_dict() if self.adapter else None,
            "artifact": asdict(self.artifact) if self.artifact else None,
            **(self.beside.as_dict() if self.beside else {"tokenizer": None, "template": None, "license": None}),
            "problems": list(self.problems),
        }

    def lines(self) -> list[str]:
        """The same as lines for the terminal."""
        return [f"{label:<{_LABEL}}{shorten(text, _LINE)}" for label, text in self._labelled()]

    def _labelled(self) -> Iterator[tuple[str, str]]:
        yield "what", f"{_WORDS[self.kind]}: {self.place}"
        if self.artifact is not None:
            yield "artifact", self.artifact.words()
        if self.architecture is not None:
            yield "model", self.architecture.words()
        if self.adapter is not None:
            yield from self.adapter.lines()
        yield "weights", self._weights()
        if self.quantization is not None:
            yield "stored as", self.quantization.words()
        if self.beside is not None:
            yield "tokenizer", self.beside.tokenizer.words() if self.beside.tokenizer else "none"
            yield "template", self.beside.template.words() if self.beside.template else "none"
            yield "license", self.beside.license.words()
        if self.artifact is not None and self.artifact.root is not None:
            yield "root digest", f"{self.artifact.root} (no file was compared with it)"
        yield from (("problem", each) for each in self.problems)

    def _weights(self) -> str:
        files = f"{counted(len(self.weights.files), 'file')} of {size(sum(self.weights.files.values()), decimals=1)}"
        if not self.weights.tensors:
            return files
        parameters = "" if self.quantization is None else f"{self.quantization.parameters / 1e6:,.1f}M parameters in "
        kinds = ", ".join(f"{kind} {size(count, decimals=1)}" for kind, count in self.weights.by_dtype.items())
        return f"{parameters}{counted(len(self.weights.tensors), 'tensor')}, {files}: {kinds}"


def describe(path: Path, *, place: str) -> Description:
    """What is at a path, from headers and small files.

    Args:
        path: a folder, a GGUF file or a safetensors file.
        place: how the user named it.

    Raises:
        InputError: it is none of these, or a file is malformed.
    """
    if path.is_dir():
        return _folder(path, place)
    if path.is_file() and path.suffix == ".gguf":
        from qexport.describing.gguf import GgufHeader  # imports numpy

        header = GgufHeader(path)
        return Description(
            place, "gguf", header.weights, header.architecture, header.quantization, beside=header.beside
        )
    if path.suffix == ".safetensors":
        found = tensors_of_file(path)
        return Description(place, "tensors", found, quantization=quantization_of({}, found.tensors))
    raise InputError(
        "neither a folder nor a file of weights", where=place, mend="name a folder, a .gguf or a .safetensors file"
    )


def _folder(folder: Path, place: str) -> Description:
    if (folder / ADAPTER_CONFIG).is_file():
        found = tensors_of_folder(folder)
        own = quantization_of({}, found.tensors)
        return Description(
            place, "adapter", found, None, own, adapter_of(folder), beside=beside(folder), problems=found.problems
        )
    if not (folder / "config.json").is_file():
        raise _no_model(folder, place)
    config = json_file(folder, "config.json", limit=CONFIG_BYTES)
    kind, weights, quantization = _weights(folder, config)
    problems = list(weights.problems)
    return Description(
        place,
        kind,
        weights,
        architecture_of(config),
        quantization,
        artifact=_artifact(folder, problems),
        beside=beside(folder),
        problems=tuple(problems),
    )


def _weights(folder: Path, config: Mapping[str, Any]) -> tuple[Kind, StoredTensors, Quantization | None]:
    if (name := gguf_of(folder)) is not None:
        from qexport.describing.gguf import GgufHeader  # imports numpy

        header = GgufHeader(contained_path(folder, name))
        return "gguf", header.weights, header.quantization
    if (folder / _GRAPH).is_file():
        return "onnx", _graph_files(folder), None
    weights = tensors_of_folder(folder)
    return "model", weights, quantization_of(config, weights.tensors)


def _graph_files(folder: Path) -> StoredTensors:
    names = [_GRAPH, *sorted(path.name for path in folder.glob("*.onnx.data"))]
    return StoredTensors({}, {name: (folder / name).stat().st_size for name in names})


def _artifact(folder: Path, problems: list[str]) -> ArtifactFacts | None:
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = Manifest.read(folder)
        method = recorded_method(manifest.recipe["quantize"]).title
    except (InputError, KeyError, ValueError) as error:
        problems.append(
            f"{MANIFEST_NAME}: {error.what if isinstance(error, InputError) else 'the recipe is malformed'}"
        )
        return None
    checked, listing = manifest.verification, folder / LISTING_NAME
    kl = None if checked is None else next((each.value for each in checked.figures if each.name == "mean_kl"), None)
    return ArtifactFacts(
        layout=manifest.layout,
        method=method,
        base=manifest.base.name,
        base_revision=manifest.base.revision,
        adapter=manifest.adapter.name if manifest.adapter else None,
        verdict=checked.verdict if checked else None,
        mean_kl=kl,
        root=sha256_file(listing) if listing.is_file() else None,
        qexport=manifest.qexport_version,
    )


def _no_model(folder: Path, place: str) -> InputError:
    inside = [path.parent.name for path in folder.glob("*/config.json")] + [path.name for path in folder.glob("*.gguf")]
    mend = f"name one of: {', '.join(str(Path(place) / name) for name in sorted(inside)[:12])}" if inside else None
    return InputError(f"the folder holds neither config.json nor {ADAPTER_CONFIG}", where=place, mend=mend)
