"""Inspects a finished folder: its digests and headers, which programs can load it, and the rules of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qexport.amounts import size
from qexport.artifact.manifest import MANIFEST_NAME, REPORT_FOLDER, Verification
from qexport.artifact.publish import open_artifact
from qexport.artifact.report import REPORT_NAME, Report
from qexport.errors import InputError
from qexport.export.loaders import Folder, Loader, Verdict, loaders
from qexport.export.served import Check
from qexport.hidden_packages import hidden
from qexport.reading.stored_model import model_folder, open_stored

Server = Literal["tgi", "vllm"]
ReportState = Literal["as in the manifest", "missing"]

_WORDS: Mapping[Verdict, str] = {"yes": "loads", "wrong": "WRONG", "no": "refused", "untried": "untried"}


@dataclass(frozen=True)
class Inspection:
    """The result for a folder whose files match its manifest and whose tensors match its model.

    Attributes:
        path: the folder.
        layout: from its manifest; None if it has no manifest, so that no digest was checked.
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
    layout: str | None
    method: str
    quantized_layers: int
    unquantized_tensors: int
    total_bytes: int
    report: ReportState | None
    loaders: Sequence[Loader]
    server: Server | None
    checks: Sequence[Check]

    @property
    def failed(self) -> list[Check]:
        """The server's demands that are not met."""
        return [check for check in self.checks if not check.passed]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "artifact": str(self.path),
            "layout": self.layout,
            "digests_checked": self.layout is not None,
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
        layout = f"{self.layout}; every file is as in its manifest" if self.layout else "no manifest, digests unknown"
        return [
            f"artifact  {self.path}",
            f"layout    {layout}",
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
def inspect_artifact(path: Path, *, server: Server | None = None) -> Inspection:
    """Checks a finished folder, made by qexport or by another tool.

    Args:
        path: the folder of one layout.
        server: the server whose rules to check.

    Raises:
        InputError: a file or the report does not match the manifest, or the tensors are not those of the model that
            config.json describes.
        CompatibilityError: transformers does not know the family.
    """
    path = model_folder(path)
    manifest = open_artifact(path).manifest if (path / MANIFEST_NAME).is_file() else None
    layout = manifest.layout if manifest else None
    report = _check_report(path, manifest.verification) if manifest and manifest.verification else None
    with open_stored(path, dtype=torch.float32) as source:
        structure = source.architecture.structure
        source.check_complete()
        shapes = {module: layer.shape for module, layer in source.layers.items()}
        graph = source.kind == "graph"
        blocks = {name: each.group_size for name, each in source.layers.items() if each.method in ("nf4", "fp4")}
        folder = Folder(source.quantization, shapes, structure.model_type, structure.head, layout, graph, blocks)
        unquantized = len(source.specs()) - len(shapes)
        method, total = source.method, source.stored_bytes
    checks = _check(path, server) if server else []
    return Inspection(path, layout, method, len(shapes), unquantized, total, report, loaders(folder), server, checks)


def _check_report(path: Path, verification: Verification) -> ReportState:
    """The manifest's file digests omit the report, so it is compared with the digest in `verification`."""
    place = path / REPORT_FOLDER / REPORT_NAME
    if not place.is_file():
        return "missing"
    if Report.read(place).digest() != verification.report_sha256:
        raise InputError(
            "the report is not the one that the manifest was made with",
            where=str(place),
            mend="fetch the artifact again, or verify it",
        )
    return "as in the manifest"


def _check(path: Path, server: Server) -> list[Check]:
    match server:
        case "tgi":
            from qexport.export.tgi.rules import TGI

            return TGI.check(path)
        case "vllm":
            from qexport.export.vllm.rules import VLLM

            return VLLM.check(path)


def _check_line(check: Check) -> str:
    return f"{check.name} ({check.source})" if check.passed else str(check)
