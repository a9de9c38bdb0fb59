"""ONNX graphs that point outside of their folder or hold code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import torch

import onnx_folders
from cases import GRAPHS, Case
from world import Spoil


def graphs() -> Iterator[Case]:
    def graph(change: Callable[[onnx.ModelProto, Path], object]) -> Spoil:
        def spoil(world: Path) -> None:
            builder = onnx_folders.Builder()
            builder.add("Identity", builder.weight("w", torch.zeros(2, 2)))
            folder = builder.write(world / "graph", json.loads((world / "base/config.json").read_text()))
            model = builder.model()
            change(model, folder)
            (folder / "model.onnx").write_bytes(model.SerializeToString())

        return spoil

    def placed(location: str) -> Callable[[onnx.ModelProto, Path], object]:
        return lambda model, _: setattr(model.graph.initializer[0].external_data[0], "value", location)

    def operator(name: str, domain: str) -> Callable[[onnx.ModelProto, Path], object]:
        return lambda model, _: model.graph.node.append(onnx.helper.make_node(name, ["w"], ["x"], domain=domain))

    def linked(_: onnx.ModelProto, folder: Path) -> None:
        (folder / "model.onnx.data").unlink()
        (folder / "model.onnx.data").symlink_to("../base/model.safetensors")

    changes: dict[str, tuple[Callable[[onnx.ModelProto, Path], object], str]] = {
        "data above": (placed("../base/model.safetensors"), "not beside the graph"),
        "data at an absolute path": (placed("/etc/passwd"), "not beside the graph"),
        "data behind a link": (linked, "symbolic link"),
        "Python": (operator("PyOp", "ai.onnx.contrib"), "PyOp"),
        "a domain of its own": (operator("Fire", "evil"), "Fire"),
        "a context of a provider": (operator("EPContext", "com.microsoft"), "EPContext"),
    }
    for name, (change, says) in changes.items():
        for command in GRAPHS:
            yield Case(f"{command[0]}: {name}", graph(change), command, 3, says)
