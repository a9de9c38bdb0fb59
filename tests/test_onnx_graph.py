"""Graphs that somebody else wrote: nothing outside of the folder is read, and no weight hides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnx_folders
from qexport.errors import InputError
from qexport.reading.onnx.graph import Graph

WEIGHT = torch.arange(12, dtype=torch.float32).reshape(3, 4)
Edit = Callable[[onnx.ModelProto], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A graph with one weight in its data file; beside the folder a secret of the same size."""
    graph = onnx_folders.Builder()
    graph.add("Identity", graph.weight("w", WEIGHT))
    graph.add("Identity", graph.constant([1, 2]))
    (tmp_path / "secret").write_bytes(b"s" * WEIGHT.nbytes)
    return graph.write(tmp_path / "model", {})


def change(folder: Path, edit: Edit) -> None:
    path = folder / "model.onnx"
    model = onnx.load_model_from_string(path.read_bytes())
    edit(model)
    path.write_bytes(model.SerializeToString())


def entry(key: str, value: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        next(item for item in model.graph.initializer[0].external_data if item.key == key).value = value

    return edit


def test_weights_and_constants_are_found(folder: Path) -> None:
    graph = Graph(folder)
    assert torch.equal(graph.read("w"), WEIGHT)
    assert graph.read("constant_1").tolist() == [1, 2]
    assert [node.op_type for node in graph.nodes] == ["Identity", "Identity"]


@pytest.mark.parametrize("dtype", onnx_folders.TYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randint(0, 120, (3, 5)).to(dtype)
    graph = onnx_folders.Builder()
    graph.add("Identity", graph.weight("outside", tensor))
    inside = onnx.TensorProto(name="inside", data_type=onnx_folders.TYPES[dtype], dims=tensor.shape)
    inside.raw_data = tensor.view(torch.uint8).numpy().tobytes()
    graph.initializers.append(inside)
    found = Graph(graph.write(tmp_path, {}))
    assert torch.equal(found.read("outside"), tensor)
    assert torch.equal(found.read("inside"), tensor)
    assert found.read("inside").dtype == dtype


def test_constants_of_every_form_are_read(tmp_path: Path) -> None:
    graph = onnx_folders.Builder()
    values: dict[str, Any] = {"value_float": 0.5, "value_floats": [0.5, 1.5], "value_int": 3, "value_ints": [3, 4]}
    names = [graph.add("Constant", **{form: value}) for form, value in values.items()]
    scalar = graph.add("Constant", value=numpy_helper.from_array(np.array(128, np.uint8)))
    found = Graph(graph.write(tmp_path, {}))
    assert [found.read(name).tolist() for name in names] == list(values.values())
    assert found.read(scalar).dtype == torch.uint8
    assert found.nodes == ()


OUTSIDE = {
    "absolute": "/etc/hostname",
    "above": "../secret",
    "above, through itself": "sub/../../secret",
    "below": "sub/data",
    "with backslashes": "..\\secret",
    "the folder": ".",
    "nothing": "",
    "with a zero": "model.onnx.data\0x",
    "an address in memory": "*/_ORT_MEM_ADDR_/*",
    "no file": "other",
}


@pytest.mark.parametrize("location", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_data_outside_of_the_folder_is_refused(location: str, folder: Path) -> None:
    for name in ("sub", "*/_ORT_MEM_ADDR_"):
        (folder / name).mkdir(parents=True)
    for name in ("sub/data", "*/_ORT_MEM_ADDR_/*"):
        (folder / name).write_bytes(b"x" * WEIGHT.nbytes)
    change(folder, entry("location", location))
    with pytest.raises(InputError):
        Graph(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_links_out_of_the_folder_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match="symbolic link"):
        Graph(folder)


def test_links_inside_the_folder_are_followed(folder: Path) -> None:
    (folder / "model.onnx.data").rename(folder / "blob")
    (folder / "model.onnx.data").symlink_to("blob")
    assert torch.equal(Graph(folder).read("w"), WEIGHT)


def test_no_pipe_is_opened(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "model.onnx.data")
    with pytest.raises(InputError, match="there is no file"):
        Graph(folder)


PLACES = {
    "before the file": (entry("offset", "-8"), "is not a number of bytes"),
    "beyond the end": (entry("offset", "4"), "ends at byte 52"),
    "far beyond": (entry("offset", "9" * 18), "ends at byte"),
    "a giant number": (entry("offset", "9" * 400), "is not a number of bytes"),
    "no number": (entry("offset", "0x0"), "is not a number of bytes"),
    "other digits": (entry("length", "٤٨"), "is not a number of bytes"),
    "too short": (entry("length", "44"), "takes 48 bytes, not 44"),
    "too long": (entry("length", "52"), "takes 48 bytes, not 52"),
    "twice": (lambda model: model.graph.initializer[0].external_data.add(key="location", value="x"), "once each"),
    "no length": (lambda model: model.graph.initializer[0].external_data.pop(), "once each"),
    "unknown key": (lambda model: model.graph.initializer[0].external_data.add(key="prepacked_0", value="x"), "once"),
    "another shape": (lambda model: model.graph.initializer[0].dims.append(2), "takes 96 bytes"),
    "negative shape": (lambda model: model.graph.initializer[0].dims.append(-1), "has no valid shape"),
    "giant and empty": (
        lambda model: model.graph.initializer[0].dims.extend([0, 1 << 62, 1 << 62]),
        "has no valid shape",
    ),
    "unknown dtype": (lambda model: setattr(model.graph.initializer[0], "data_type", 8), "unknown dtype"),
    "in both places": (
        lambda model: setattr(model.graph.initializer[0], "data_location", TensorProto.DEFAULT),
        "both in the graph and in a data file",
    ),
    "cut short inside": (
        lambda model: setattr(model.graph.initializer[1], "raw_data", b"1234567"),
        "contradicts its shape",
    ),
    "shape of what is inside": (lambda model: model.graph.initializer[1].dims.append(3), "contradicts its shape"),
}


@pytest.mark.parametrize(("edit", "message"), PLACES.values(), ids=PLACES.keys())
def test_places_that_contradict_themselves_are_refused(edit: Edit, message: str, folder: Path) -> None:
    change(folder, edit)
    with pytest.raises(InputError, match=message) as caught:
        Graph(folder)
    assert caught.value.where


def body(*nodes: onnx.NodeProto, weights: list[onnx.TensorProto] | None = None) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "body", [], [helper.make_tensor_value_info("b", 1, None)], weights or [])


def append(op: str, *, domain: str = "", **attributes: Any) -> Edit:
    return lambda model: model.graph.node.append(
        helper.make_node(op, ["w"], ["new"], name="n", domain=domain, **attributes)
    )


def external() -> onnx.TensorProto:
    tensor = numpy_helper.from_array(WEIGHT.numpy(), "hidden")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "../secret", "offset": "0", "length": "48"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


LARGE = numpy_helper.from_array(np.zeros(2000, np.float32), "large")
IDENTITY = helper.make_node("Identity", ["w"], ["b"])
FUNCTION = helper.make_function("d", "f", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], [])
HIDDEN = {
    "a domain": append("MatMul", domain="evil"),
    "Python": append("PyOp", domain="ai.onnx.contrib"),
    "a context of a provider": append("EPContext", domain="com.microsoft"),
    "a function": lambda model: model.functions.append(FUNCTION),
    "training": lambda model: model.training_info.add(),
    "a sparse initializer": lambda model: model.graph.sparse_initializer.add(),
    "a sparse attribute": append("Constant", sparse_value=onnx.SparseTensorProto()),
    "an attribute outside": append("Neg", value=external()),
    "a constant outside": append("Constant", value=external()),
    "a body's weight outside": append("If", then_branch=body(IDENTITY, weights=[external()])),
    "a body's constant outside": append(
        "If", then_branch=body(helper.make_node("Constant", [], ["b"], value=external()))
    ),
    "a body's large weight": append("If", then_branch=body(IDENTITY, weights=[LARGE])),
    "a body's large constant": append("If", then_branch=body(helper.make_node("Constant", [], ["b"], value=LARGE))),
    "a body in a body": append(
        "If",
        then_branch=body(helper.make_node("If", ["w"], ["b"], then_branch=body(IDENTITY, weights=[LARGE]))),
    ),
    "codes in a body": append(
        "Loop", body=body(helper.make_node("MatMulNBits", ["w", "w", "w"], ["b"], domain="com.microsoft"))
    ),
    "two weights of a name": lambda model: model.graph.initializer.append(numpy_helper.from_array(WEIGHT.numpy(), "w")),
    "a weight that is an input": lambda model: model.graph.input.append(helper.make_tensor_value_info("w", 1, [3, 4])),
    "a weight that is computed": lambda model: model.graph.node.append(helper.make_node("Neg", ["constant_1"], ["w"])),
    "a weight without a name": lambda model: model.graph.initializer.append(numpy_helper.from_array(WEIGHT.numpy())),
    "a constant with two values": append("Constant", value_int=1, value_float=2.0),
    "a text": append("Constant", value_string="x"),
    "no graph": lambda model: model.ClearField("graph"),
    "no opset": lambda model: model.ClearField("opset_import"),
}


@pytest.mark.parametrize("edit", HIDDEN.values(), ids=HIDDEN.keys())
def test_places_where_weights_could_hide_are_refused(edit: Edit, folder: Path) -> None:
    change(folder, edit)
    with pytest.raises(InputError):
        Graph(folder)


def test_small_bodies_are_read(folder: Path) -> None:
    small = numpy_helper.from_array(np.array(1), "small")
    change(folder, append("If", then_branch=body(IDENTITY, weights=[small]), else_branch=body(IDENTITY)))
    graph = Graph(folder)
    assert "small" not in graph.initializers
    assert "w" in graph.used
    assert "b" in graph.used


def test_files_that_are_no_graphs_are_refused(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x0a" * 100)
    with pytest.raises(InputError, match="cannot be read"):
        Graph(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(InputError, match="the file does not exist"):
        Graph(folder)


def test_giant_files_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "model.onnx").open("r+b") as file:
        file.truncate(1 << 28)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("it was read"))
    with pytest.raises(InputError, match="too many"):
        Graph(folder)


def test_data_that_is_cut_short_meanwhile_is_noticed(folder: Path) -> None:
    graph = Graph(folder)
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(40)
    with pytest.raises(InputError, match="ends inside"):
        graph.read("w")


@pytest.mark.parametrize("text", [b"model.onnx.data", b"location", b"Identity", b"value_0"])
def test_names_that_are_no_text_are_refused(tmp_path: Path, text: bytes) -> None:
    """The library hands them out as bytes."""
    builder = onnx_folders.Builder()
    builder.add("Identity", builder.weight("w", WEIGHT))
    folder = builder.write(tmp_path, {})
    content = (folder / "model.onnx").read_bytes()
    assert text in content
    (folder / "model.onnx").write_bytes(content.replace(text, b"\xff" + text[1:]))
    with pytest.raises(InputError, match="a name in the graph is not UTF-8"):
        Graph(folder)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 400), bits=st.integers(1, 255), cut=st.booleans())
def test_damaged_graphs_are_refused_or_read(
    place: int, bits: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No other error than ours, whatever byte has changed."""
    builder = onnx_folders.Builder()
    builder.add("Identity", builder.weight("w", WEIGHT))
    builder.add("Identity", builder.constant([1, 2]))
    folder = builder.write(tmp_path_factory.mktemp("damaged"), {})
    content = bytearray((folder / "model.onnx").read_bytes())
    place %= len(content)
    content[place] ^= bits
    (folder / "model.onnx").write_bytes(content[:place] if cut else content)
    try:
        graph = Graph(folder)
        for name in graph.initializers:
            graph.read(name)
    except InputError:
        pass
