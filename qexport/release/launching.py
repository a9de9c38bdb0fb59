"""The launch files of a release, rendered again under its name."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from qexport.artifact.manifest import Manifest
from qexport.artifact.report import Report
from qexport.artifact.served import confirmation
from qexport.errors import InputError
from qexport.export.gguf.launch import GgufLaunch
from qexport.export.gguf.launch import launch_files as gguf_files
from qexport.export.launch import Launch
from qexport.export.onnx.launch import OnnxLaunch
from qexport.export.onnx.launch import launch_files as onnx_files
from qexport.export.tgi.launch import TgiLaunch
from qexport.export.tgi.launch import launch_files as tgi_files
from qexport.export.vllm.launch import VllmLaunch
from qexport.export.vllm.launch import launch_files as vllm_files


def released_launch(manifest: Manifest, name: str, report: Report | None) -> Launch | None:
    """What the launch files of a release say; None if its layout has none.

    Args:
        manifest: of the artifact.
        name: of the release.
        report: what verification found: vLLM starts in the dtype that it was confirmed in.
    """
    told = manifest.launch
    if told is None:
        return None
    changes: dict[str, Any] = {"name": name}
    if manifest.layout == "vllm" and (dtype := _confirmed_dtype(report, told.get("dtype"))):
        changes["dtype"] = dtype
    return read_launch(manifest.layout, told | changes)


def read_launch(layout: str, told: dict[str, Any]) -> Launch:
    """The record of a layout's launch files, from a manifest.

    Raises:
        InputError: the manifest is not one that qexport wrote.
    """
    kinds: dict[str, type[Launch]] = {"vllm": VllmLaunch, "tgi": TgiLaunch, "onnx": OnnxLaunch, "gguf": GgufLaunch}
    kind = kinds.get(layout)
    try:
        if kind is None:
            raise ValueError(f"the layout {layout} has no launch files")
        return kind.model_validate(told)
    except (ValueError, ValidationError) as error:
        raise InputError(f"the manifest's launch is malformed: {error}", where="qexport-manifest.json") from error


def render(launch: Launch | None) -> dict[str, bytes]:
    """The launch files, by their paths inside the artifact."""
    match launch:
        case VllmLaunch():
            return vllm_files(launch)
        case TgiLaunch():
            return tgi_files(launch)
        case OnnxLaunch():
            return onnx_files(launch)
        case GgufLaunch():
            return gguf_files(launch)
        case _:
            return {}


def _confirmed_dtype(report: Report | None, planned: str | None) -> str | None:
    """The one dtype that vLLM was confirmed in, if it is another than the planned one; None to keep that."""
    if report is None:
        return None
    confirmed = {
        each.runtime.dtype
        for each in report.served
        if each.runtime.name.casefold() == "vllm" and confirmation(each, report.gates) == "pass"
    }
    return next(iter(confirmed)) if len(confirmed) == 1 and planned not in confirmed else None
