"""Faults planted into the layout onnx, each of which the checks of its other tests must see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

import onnx_exports
from onnx_exports import METHODS, Export, assert_same_model, assert_same_weights, export, passed_once
from qexport.errors import CompatibilityError, InputError, QexportError
from qexport.export.onnx import linears
from qexport.export.onnx.attention import AdditiveMasks
from qexport.export.onnx.linears import Linears
from qexport.export.onnx.nodes import Emitter
from qexport.export.onnx.tracing import Trace
from qexport.formats.onnx import matmul_nbits
from qexport.reading.onnx.graph import GRAPH_NAME


def made(folder: Path, family: str = "llama", method: str = "gptq", **settings: Any) -> Export:
    return export(passed_once(family, method), folder, **settings)


def change_codes(monkeypatch: pytest.MonkeyPatch, part: str, change: Any) -> None:
    """Lets MatMulNBits' packer make something else of one initializer."""
    pack = matmul_nbits.pack_groups

    def changed(*args: Any) -> dict[str, torch.Tensor]:
        packed = pack(*args)
        return packed | {part: change(packed[part])}

    monkeypatch.setattr(matmul_nbits, "pack_groups", changed)


@pytest.mark.parametrize(
    ("method", "part", "change"),
    [
        ("gptq", "qweight", lambda codes: codes << 4 | codes >> 4),
        ("gptq", "scales", lambda scales: scales.roll(1, 0)),
        ("gptq asymmetric", "zero_points", lambda zeros: zeros - 0x11),
        ("gptq asymmetric", "zero_points", lambda zeros: zeros << 4 | zeros >> 4),
        ("gptq act-order", "order", lambda order: torch.arange(len(order))),
        ("gptq act-order", "order", lambda order: order.argsort()),
    ],
    ids=["high nibble first", "another row's scales", "zero points off by one", "zero points swapped",
         "order left out", "order turned round"],
)  # fmt: skip
def test_wrong_codes(method: str, part: str, change: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change_codes(monkeypatch, part, change)
    wrong = made(tmp_path, method=method)
    with pytest.raises(AssertionError, match="weight"):
        assert_same_weights(wrong)
    with pytest.raises(AssertionError, match="deviation"):
        assert_same_model(wrong)


@pytest.mark.parametrize("bit", [0x10, 0x01], ids=["high", "low"])
def test_a_nibble_that_has_changed(bit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change_codes(monkeypatch, "qweight", lambda codes: codes ^ bit)
    with pytest.raises(AssertionError, match="weight"):
        assert_same_weights(made(tmp_path, method="gptq 8 bits"))


def test_a_wrong_factor_of_the_high_nibbles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(linears, "FACTOR", 8)
    wrong = made(tmp_path, method="gptq 8 bits")
    with pytest.raises(InputError, match=r"multiplied by 8\.0, not by 16"):
        wrong.weights()


def test_an_order_that_the_graph_does_not_apply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups = Linears._groups
    monkeypatch.setattr(
        Linears,
        "_groups",
        lambda self, inputs, module, spec: groups(self, inputs, module, replace(spec, desc_act=False)),
    )
    with pytest.raises(CompatibilityError, match="does not use these weights"):
        made(tmp_path, method="gptq act-order")


@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_a_mask_that_is_ignored(attention: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    additive = AdditiveMasks.additive
    monkeypatch.setattr(
        AdditiveMasks,
        "additive",
        lambda self, mask: self._emit.one(
            "Mul", additive(self, mask), self._emit.constant(np.array(0, dtype=np.float32))
        ),
    )
    with pytest.raises(AssertionError, match="deviation"):
        assert_same_model(made(tmp_path, attention=attention))


def in_trace(monkeypatch: pytest.MonkeyPatch, op_type: str, change: Any) -> None:
    """Changes the nodes of a traced graph."""
    copied = onnx_exports.copied_trace

    def changed(config: Any, activations: torch.dtype) -> Trace:
        found = copied(config, activations)
        for node in [node for node in found.model.graph if node.op_type == op_type]:
            change(found.model.graph, node)
        return found

    monkeypatch.setattr(onnx_exports, "copied_trace", changed)


def wrong_scale(graph: ir.Graph, node: ir.Node) -> None:
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.01 * node.attributes.get_float("scale", 0.0))


def swapped_heads(graph: ir.Graph, node: ir.Node) -> None:
    """Queries share keys in turn (0, 1, 0, 1) and not side by side (0, 0, 1, 1)."""
    emit, query = Emitter(graph), node.inputs[0]
    assert query is not None
    emit.before = node
    first, second, third, fourth = emit("Split", query, axis=1, num_outputs=4, outputs=4)
    swapped = emit.one("Concat", first, third, second, fourth, axis=1)
    swapped.shape, swapped.type = query.shape, query.type
    node.replace_input_with(0, swapped)


def past_of_another_layer(graph: ir.Graph, node: ir.Node) -> None:
    past = next(value for value in graph.inputs if value.name == "past_key_values.0.value")
    node.replace_input_with(4, past)


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize("change", [wrong_scale, swapped_heads, past_of_another_layer])
def test_attention_that_is_wrong(change: Any, attention: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_trace(monkeypatch, "Attention", change)
    with pytest.raises(AssertionError, match="deviation"):
        assert_same_model(made(tmp_path, attention=attention))


def test_a_decay_of_the_mambas_state_that_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def squared(graph: ir.Graph, node: ir.Node) -> None:
        emit, decay = Emitter(graph), node.inputs[1]
        emit.before = node
        node.replace_input_with(1, emit.one("Mul", decay, decay))

    in_trace(monkeypatch, "SelectiveScan", squared)
    with pytest.raises(AssertionError, match="deviation"):
        assert_same_model(made(tmp_path, "falcon h1"))


def test_a_tied_head_that_has_weights_of_its_own(tmp_path: Path) -> None:
    wrong = made(tmp_path, "qwen2")
    model = onnx.load(wrong.onnx / GRAPH_NAME)
    name = "model.embed_tokens.weight"
    embedding = wrong.stored(torch.bfloat16)[name]
    own = numpy_helper.from_array((embedding.float() * 1.01).numpy(), "head")
    model.graph.initializer.append(own)
    (head,) = [node for node in model.graph.node if node.name == "model.embed_tokens" and node.op_type == "MatMul"]
    (turned,) = [node for node in model.graph.node if node.output[0] == head.input[1]]
    turned.input[0] = "head"
    (wrong.onnx / GRAPH_NAME).write_bytes(model.SerializeToString())
    assert_same_weights(wrong)
    with pytest.raises(AssertionError, match="deviation"):
        assert_same_model(wrong)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.qweight", "model.norm.weight"])
def test_a_bit_that_has_flipped_on_the_disk(name: str, tmp_path: Path) -> None:
    wrong = made(tmp_path)
    place = wrong.layout.weights.places[name]
    wrong.layout.weights.read_back(wrong.onnx, wrong.written)
    with (wrong.onnx / place.file).open("r+b") as file:
        file.seek(place.offset + 5)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(QexportError, match="not those written") as caught:
        wrong.layout.weights.read_back(wrong.onnx, wrong.written)
    assert name in str(caught.value)


@pytest.mark.parametrize("location", ["../safetensors/model.safetensors", "/etc/hostname", "../onnx/model.onnx.data"])
def test_data_that_lies_outside_of_the_folder(location: str, tmp_path: Path) -> None:
    wrong = made(tmp_path)
    model = onnx.load(wrong.onnx / GRAPH_NAME, load_external_data=False)
    for entry in model.graph.initializer[-1].external_data:
        if entry.key == "location":
            entry.value = location
    (wrong.onnx / GRAPH_NAME).write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="not beside the graph"):
        wrong.layout.weights.read_back(wrong.onnx, wrong.written)
    with pytest.raises(QexportError):
        wrong.layout.check(wrong.onnx)


def test_types_that_do_not_fit_are_seen_without_verification(tmp_path: Path) -> None:
    """onnx.checker knows no types; the folder must not be published for ONNX Runtime to refuse it."""
    honest = made(tmp_path / "honest", method="none bf16")
    graph = onnx.load(honest.onnx / GRAPH_NAME, load_external_data=False)
    cast = next(node for node in graph.graph.node if node.op_type == "Cast" and node.input[0].endswith(".weight"))
    cast.attribute[0].i = onnx.TensorProto.DOUBLE
    (honest.onnx / GRAPH_NAME).write_bytes(graph.SerializeToString())
    onnx.checker.check_model(str(honest.onnx / GRAPH_NAME))
    with pytest.raises(InputError, match="cannot load the graph"):
        honest.layout.check(honest.onnx)


def test_without_a_fault_nothing_is_seen(tmp_path: Path) -> None:
    """The checks above do not fail by themselves."""
    assert METHODS["gptq act-order"].quantize["desc_act"]
    right = made(tmp_path, method="gptq act-order")
    assert_same_weights(right)
    assert_same_model(right)
