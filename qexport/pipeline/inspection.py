"""Inspects a finished folder: its digests and headers, which programs can load it, and the rules of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qexport.amounts import size
from qexport.artifact.agreement import report_of
from qexport.artifact.integrity import Artifact, find_artifact
from qexport.export.loaders import Loader, Verdict, loaders
from qexport.export.served import Check
from qexport.hidden_packages import hidden
from qexport.reading.folders import model_folder
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path, read_json_object

Server = Literal["tgi", "vllm", "sglang", "tensorrt-llm"]
ReportState = Literal["as in the manifest", "missing"]

_WORDS: Mapping[Verdict, str] = {"yes": "loads", "wrong": "WRONG", "no": "refused", "untried": "untried"}


@dataclass(frozen=True)
class Inspection:
    """The result for a folder whose files match its manifest and whose tensors match its model.

    Attributes:
        path: the folder.
        artifact: the folder's manifest and what confirms its digests; None if another tool made the folder, so that no
            digest was checked.
        method: how the weights are stored.
        quantized_layers: modules that are stored quantized.
        unquantized_tensors: the other parameters.
        total_bytes: bytes of all tensors.
        report: whether the report is the one that the manifest was made with; None if there is no manifest, or if the
            artifact was not verified.
        loaders: which programs can load the folder.
        server: the server whose rules were checked.
        checks: their results; empty if no server was named.
    """

    path: Path
    artifact: Artifact | None
    method: str
    quantized_layers: int
    unquantized_tensors: int
    total_bytes: int
    report: ReportState | None
    loaders: Sequence[Loader]
    server: Server | None
    checks: Sequence[Check]

    @property
    def layout(self) -> str | None:
        """The layout's name; None if another tool made the folder."""
        return self.artifact.layout if self.artifact else None

    @property
    def failed(self) -> list[Check]:
        """The server's demands that are not met."""
        return [check for check in self.checks if not check.passed]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "artifact": str(self.path),
            "layout": self.layout,
            "digests_checked": self.artifact is not None,
            "root": self.artifact.root if self.artifact else None,
            "confirmed_by": self.artifact.confirmed_by if self.artifact else None,
            "method": self.method,
            "quantized_layers": self.quantized_layers,
            "dense_tensors": self.unquantized_tensors,
            "total_bytes": self.total_bytes,
            "report": self.report,
            "loaders": [asdict(loader) for loader in self.loaders],
            "server": self.server,
            "checks": [asdict(check) for check in self.checks],
        }

    def lines(self) -> list[str]:
        """The same as lines for the terminal."""
        return [
            f"artifact  {self.path}",
            *_integrity_lines(self.artifact),
            f"method    {self.method}",
            f"layers    {self.quantized_layers} quantized; {self.unquantized_tensors} tensors are unquantized",
            f"weights   {size(self.total_bytes, decimals=1)}",
            *([f"report    {self.report}"] if self.report else []),
            *(self._loader_line(loader) for loader in self.loaders),
            *(f"{'ok' if check.passed else 'FAILED':<9} {_check_line(check)}" for check in self.checks),
        ]

    def _loader_line(self, loader: Loader) -> str:
        return f"{_WORDS[loader.verdict]:<9} {loader.name}{': ' if loader.reason else ''}{loader.reason}"


@hidden("kernels")
def inspect_artifact(path: Path, *, server: Server | None = None, root: str | None = None) -> Inspection:
    """Checks a finished folder, made by qexport or by another tool. What needs no model is checked before torch is
    imported.

    Args:
        path: the folder of one layout.
        server: the server whose rules to check.
        root: the root digest that the folder should have; None for the one recorded beside it, if there is one.

    Raises:
        InputError: a file does not match its digest, the digests not the root digest, manifest, report and weights
            contradict each other, the tensors are not those of the model that config.json describes, or some loader
            would read another model from the folder.
        CompatibilityError: transformers does not know the family.
    """
    path = model_folder(path)
    artifact = find_artifact(path, root=root)
    report = _check_report(artifact) if artifact else None
    read_json_object(contained_path(path, "config.json"), limit=CONFIG_BYTES)
    from qexport.pipeline.weights_inspection import inspect_weights  # takes seconds

    weights = inspect_weights(path, artifact)
    checks = _check(path, server) if server else []
    return Inspection(
        path=path,
        artifact=artifact,
        method=weights.method,
        quantized_layers=len(weights.folder.shapes),
        unquantized_tensors=weights.unquantized_tensors,
        total_bytes=weights.total_bytes,
        report=report,
        loaders=loaders(weights.folder),
        server=server,
        checks=checks,
    )


def _check_report(artifact: Artifact) -> ReportState | None:
    if artifact.manifest.verification is None:
        return None
    return "missing" if report_of(artifact) is None else "as in the manifest"


def _integrity_lines(artifact: Artifact | None) -> list[str]:
    if artifact is None:
        return ["layout    no manifest, digests unknown"]
    kept = "every file is listed and has its digest"
    match artifact:
        case Artifact(root=None):
            words = f"{kept}, but manifest and report have none: qexport 0.2 or older made this artifact"
        case Artifact(confirmed_by=None):
            words = f"{kept}; nothing outside the folder confirms the list (no root digest to compare with)"
        case _:
            words = f"unchanged: {kept}, and the root digest is {artifact.confirmed_by}"
    root = [f"root      {artifact.root}"] if artifact.root else []
    unlisted = [f"not checked: {name}" for name in artifact.unlisted if not name.endswith("/")]
    return [f"layout    {artifact.layout}", f"digests   {words}", *root, *unlisted]


def _check(path: Path, server: Server) -> list[Check]:
    match server:
        case "tgi":
            from qexport.export.tgi.rules import TGI

            return TGI.check(path)
        case "vllm":
            from qexport.export.vllm.rules import VLLM

            return VLLM.check(path)
        case "sglang":
            from qexport.export.sglang import SGLANG

            return SGLANG.check(path)
        case "tensorrt-llm":
            from qexport.export.tensorrt_llm import TENSORRT_LLM

            return TENSORRT_LLM.check(path)


def _check_line(check: Check) -> str:
    return f"{check.name} ({check.source})" if check.passed else str(check)
