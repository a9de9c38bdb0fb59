"""Weights read back from ONNX artifacts, against the safetensors artifacts that hold the same codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor

import factories
import onnx_folders
import stored_models
from qexport.errors import InputError
from qexport.formats.bitsandbytes.four_bit_tensors import dequantize
from qexport.reading.onnx.weights import OnnxWeights
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.tensors import BlockQuantized, GroupQuantized, Quantized, RowQuantized

CONFIG = factories.llama_config(num_hidden_layers=1, attention_bias=True)
Q_PROJ = "model.layers.0.self_attn.q_proj"
WITH_OPERATORS = {
    name: each for name, each in stored_models.QUANTIZATIONS.items() if not name.startswith(("fp8", "nvfp4", "mxfp4"))
}


def stored(source: SafetensorsWeights) -> dict[str, Tensor | Quantized]:
    """Everything in an artifact, with its codes as they are."""
    values: dict[str, Tensor | Quantized] = {name: source.read(name) for name in source.specs()}
    return values | {
        f"{module}.weight": weight.quantized(source.tensors(module)) for module, weight in source.quantized.items()
    }


@pytest.fixture(scope="module")
def dense() -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in factories.build(CONFIG).state_dict().items()}


@pytest.mark.parametrize("quantization", WITH_OPERATORS.values(), ids=WITH_OPERATORS.keys())
@pytest.mark.parametrize("config", [CONFIG, factories.gpt2_config(n_layer=1)], ids=["llama", "gpt-2"])
def test_weights_are_those_of_the_safetensors_artifact(
    config: Any, quantization: dict[str, Any], tmp_path: Path
) -> None:
    """MatMulBnb4 multiplies with float32 products, which a bfloat16 artifact has rounded: equal in bfloat16."""
    dtype = torch.bfloat16 if quantization.get("load_in_4bit") else torch.float32
    folder = stored_models.write(factories.build(config), tmp_path / "safetensors", quantization)
    with SafetensorsWeights(folder, dtype=dtype) as source:
        onnx_folders.parameters(stored(source), source.config, tmp_path / "onnx")
        found = OnnxWeights(tmp_path / "onnx", dtype=dtype)
        found.check_complete()
        assert found.quantized.keys() == source.quantized.keys()
        assert found.specs() == source.specs()
        for name in source.specs():
            assert np.array_equal(found.read(name).float().numpy(), source.read(name).float().numpy()), name


def of_operators(value: Quantized, folder: Path, dense: dict[str, Tensor], *, nibbles: bool = False) -> OnnxWeights:
    onnx_folders.parameters({**dense, f"{Q_PROJ}.weight": value}, CONFIG.to_dict(), folder, nibbles=nibbles)
    return OnnxWeights(folder, dtype=torch.float32)


def groups(bits: int, group: int, columns: int, *, sym: bool, desc_act: bool, seed: int = 0) -> GroupQuantized:
    generator = torch.Generator().manual_seed(seed)
    shape = (columns // group, 64)
    zeros = torch.randint(1, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    g_idx = torch.arange(columns, dtype=torch.int32) // group
    return GroupQuantized(
        codes=torch.randint(1 << bits, (64, columns), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(shape, generator=generator) + 0.01).half(),
        zeros=torch.full_like(zeros, 1 << bits - 1) if sym else zeros,
        g_idx=g_idx[torch.randperm(columns, generator=generator)] if desc_act else g_idx,
        bits=bits,
        group_size=group,
        sym=sym,
        desc_act=desc_act,
    )


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]), group=st.sampled_from([16, 32, 64]), sym=st.booleans(), desc_act=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_groups_are_read_in_the_order_of_the_inputs(
    bits: int, group: int, sym: bool, desc_act: bool, seed: int, tmp_path_factory: pytest.TempPathFactory,
    dense: dict[str, Tensor],
) -> None:  # fmt: skip
    value = groups(bits, group, 64, sym=sym, desc_act=desc_act, seed=seed)
    found = of_operators(value, tmp_path_factory.mktemp("groups"), dense)
    assert torch.equal(found.read(f"{Q_PROJ}.weight"), value.dequantize())
    matrix = found.quantized[Q_PROJ]
    assert (matrix.kind, matrix.bits, matrix.block_size, matrix.shape) == ("MatMulNBits", bits, group, (64, 64))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("group", [16, 64])
def test_two_nodes_of_nibbles_are_one_matrix(
    group: int, desc_act: bool, sym: bool, tmp_path: Path, dense: dict[str, Tensor]
) -> None:
    value = groups(8, group, 64, sym=sym, desc_act=desc_act)
    found = of_operators(value, tmp_path, dense, nibbles=True)
    matrix, read = found.quantized[Q_PROJ], found.stored(f"{Q_PROJ}.weight")
    assert isinstance(read, GroupQuantized)
    for part in ("codes", "zeros", "scales", "g_idx"):
        assert np.array_equal(getattr(read, part).numpy(), getattr(value, part).numpy()), part
    assert (read.bits, read.group_size, read.sym, read.desc_act) == (8, group, sym, desc_act)
    assert found.grids[Q_PROJ] == value.spec
    assert (matrix.kind, matrix.bits, matrix.block_size, matrix.shape) == ("MatMulNBits", 8, group, (64, 64))
    assert found.method == f"ONNX, MatMulNBits, 8 bits as 4 and 4, blocks of {group}"
    assert len(matrix.parts) == 4 + (not sym) + desc_act


def test_rows_of_nibbles_are_those_of_llm_int8(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    weight = dense[f"{Q_PROJ}.weight"].float()
    absmax = weight.abs().amax(1)
    rows = RowQuantized((weight / (absmax / 127)[:, None]).round().to(torch.int8), absmax)
    found = of_operators(rows, tmp_path, dense, nibbles=True)
    read = found.stored(f"{Q_PROJ}.weight")
    assert isinstance(read, GroupQuantized)
    assert np.array_equal(read.codes.numpy(), rows.codes.to(torch.int16).add(128).to(torch.uint8).numpy())
    assert torch.equal(found.read(f"{Q_PROJ}.weight"), rows.dequantize())
    assert (found.layers[Q_PROJ].method, found.layers[Q_PROJ].group_size, found.grids) == ("int8", 64, {})


@pytest.mark.parametrize(("columns", "group"), [(576, 576), (576, 192), (568, 568)])
def test_split_groups_and_ragged_rows_have_the_same_values(columns: int, group: int, tmp_path: Path) -> None:
    config = factories.llama_config(num_hidden_layers=1, intermediate_size=columns)
    values: dict[str, Tensor | Quantized] = dict(factories.build(config).state_dict())
    value = groups(4, group, columns, sym=False, desc_act=False)
    values["model.layers.0.mlp.down_proj.weight"] = value
    found = OnnxWeights(onnx_folders.parameters(values, config.to_dict(), tmp_path), dtype=torch.float32)
    assert torch.equal(found.read("model.layers.0.mlp.down_proj.weight"), value.dequantize())
    layer, grid = found.layers["model.layers.0.mlp.down_proj"], found.grids["model.layers.0.mlp.down_proj"]
    assert (layer.method, layer.bits, layer.group_size, grid.group_size) == ("gptq", 4, group, group)
    assert found.quantized["model.layers.0.mlp.down_proj"].block_size < group


def test_rows_of_llm_int8_are_told_from_groups_by_their_scales(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    weight = dense[f"{Q_PROJ}.weight"].float()
    absmax = weight.abs().amax(1)
    rows = RowQuantized((weight / (absmax / 127)[:, None]).round().to(torch.int8), absmax)
    found = of_operators(rows, tmp_path / "rows", dense)
    assert (found.layers[Q_PROJ].method, found.layers[Q_PROJ].group_size, found.grids) == ("int8", 64, {})
    found = of_operators(groups(8, 64, 64, sym=True, desc_act=False), tmp_path / "groups", dense)
    assert (found.layers[Q_PROJ].method, found.grids[Q_PROJ].group_size) == ("gptq", 64)


def test_rows_of_matmulinteger(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    weight = dense[f"{Q_PROJ}.weight"].float()
    absmax = weight.abs().amax(1)
    rows = RowQuantized((weight / (absmax / 127)[:, None]).round().to(torch.int8), absmax)
    values: dict[str, Tensor | Quantized] = {**dense, f"{Q_PROJ}.weight": rows}
    folder = onnx_folders.llama(values, CONFIG, tmp_path, integers=True)
    found = OnnxWeights(folder, dtype=torch.float32)
    assert torch.equal(found.read(f"{Q_PROJ}.weight"), rows.dequantize())
    assert found.quantized[Q_PROJ].kind == "MatMulInteger"


def test_what_a_report_needs(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    value = groups(4, 32, 64, sym=True, desc_act=True)
    found = of_operators(value, tmp_path, dense)
    codes, scales, order = 64 * 64 // 2, 64 * 2 * 4, 64 * 8
    others = sum(tensor.nbytes for name, tensor in dense.items() if name != f"{Q_PROJ}.weight")
    assert found.stored_bytes == codes + scales + order + others
    assert found.config["model_type"] == "llama"


def change(folder: Path, edit: Any) -> Path:
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    edit(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def node(graph: onnx.GraphProto) -> onnx.NodeProto:
    found: list[onnx.NodeProto] = [node for node in graph.node if node.op_type.startswith("MatMul")]
    return found[0]


def set_attribute(name: str, value: int) -> Any:
    def edit(graph: onnx.GraphProto) -> None:
        next(item for item in node(graph).attribute if item.name == name).i = value

    return edit


def without_gather(graph: onnx.GraphProto) -> None:
    node(graph).input[0] = "input_ids"


def with_g_idx(graph: onnx.GraphProto) -> None:
    node(graph).input.append(f"{Q_PROJ}.order")


EDITS = {
    "another number of bits": (set_attribute("bits", 8), "expected"),
    "3 bits": (set_attribute("bits", 3), "MatMulNBits with bits 3"),
    "another block size": (set_attribute("block_size", 16), "expected"),
    "a block size of zero": (set_attribute("block_size", 0), "lacks the attribute"),
    "swapped sizes": (set_attribute("K", 32), "expected"),
    "order not applied": (without_gather, "not applied"),
    "g_idx": (with_g_idx, "g_idx"),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS.keys())
def test_operators_that_contradict_their_codes_are_refused(
    edit: Any, message: str, tmp_path: Path, dense: dict[str, Tensor]
) -> None:
    of_operators(groups(4, 32, 64, sym=False, desc_act=True), tmp_path, dense)
    with pytest.raises(InputError, match=message):
        OnnxWeights(change(tmp_path, edit), dtype=torch.float32)


def of_pair(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The nodes of the pair: high, low, Mul and Add."""
    found = {node.name.rpartition("_")[2]: node for node in graph.node if node.op_type == "MatMulNBits"}
    return found | {node.op_type: node for node in graph.node if node.op_type in ("Mul", "Add")}


def set_factor(graph: onnx.GraphProto) -> None:
    name = of_pair(graph)["Mul"].input[1]
    (factor,) = [tensor for tensor in graph.initializer if tensor.name == name]
    factor.CopyFrom(numpy_helper.from_array(np.array(8, np.float32), name))


def without_low(graph: onnx.GraphProto) -> None:
    """The high nibbles alone, with an Add that reads something else."""
    nodes = of_pair(graph)
    nodes["Add"].input[1] = "input_ids"
    graph.node.remove(nodes["low"])


def without_high(graph: onnx.GraphProto) -> None:
    nodes = of_pair(graph)
    nodes["Mul"].input[0] = "input_ids"
    graph.node.remove(nodes["high"])


def without_factor(graph: onnx.GraphProto) -> None:
    nodes = of_pair(graph)
    nodes["Add"].input[0] = nodes["high"].output[0]


def subtracted(graph: onnx.GraphProto) -> None:
    of_pair(graph)["Add"].op_type = "Sub"


def read_elsewhere(graph: onnx.GraphProto) -> None:
    nodes = of_pair(graph)
    graph.node.append(onnx.helper.make_node("Identity", [nodes["high"].output[0]], ["elsewhere"]))


def other_inputs(graph: onnx.GraphProto) -> None:
    of_pair(graph)["low"].input[0] = "attention_mask"


def turned_round(graph: onnx.GraphProto) -> None:
    nodes = of_pair(graph)
    high, low = nodes["high"].input[1], nodes["low"].input[1]
    nodes["high"].input[1], nodes["low"].input[1] = low, high


def without_zero_points(graph: onnx.GraphProto) -> None:
    del of_pair(graph)["low"].input[3]


def level_of_one(graph: onnx.GraphProto) -> None:
    next(item for item in of_pair(graph)["low"].attribute if item.name == "accuracy_level").i = 4


PAIRS = {
    "wrong factor": (set_factor, r"multiplied by 8\.0, not by 16"),
    "low nibbles missing": (without_low, "are not added"),
    "high nibbles missing": (without_high, "are not added"),
    "factor missing": (without_factor, "are not added"),
    "subtracted": (subtracted, "are not added"),
    "read elsewhere too": (read_elsewhere, "are not added"),
    "other inputs": (other_inputs, "belong together"),
    "turned round": (turned_round, "belong"),
    "zero points of the low nibbles missing": (without_zero_points, "belong together"),
    "another accuracy level": (level_of_one, "belong together"),
}


@pytest.mark.parametrize(("edit", "message"), PAIRS.values(), ids=PAIRS.keys())
def test_pairs_of_nibbles_that_are_not_one_matrix_are_refused(
    edit: Any, message: str, tmp_path: Path, dense: dict[str, Tensor]
) -> None:
    of_operators(groups(8, 32, 64, sym=True, desc_act=False), tmp_path, dense, nibbles=True)
    with pytest.raises(InputError, match=message) as caught:
        OnnxWeights(change(tmp_path, edit), dtype=torch.float32)
    assert Q_PROJ in str(caught.value.where)


def test_symmetric_zero_points_with_a_low_nibble_are_refused(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    of_operators(groups(8, 32, 64, sym=True, desc_act=False), tmp_path, dense, nibbles=True)
    flip(tmp_path, f"{Q_PROJ}.zero_points_low")
    with pytest.raises(InputError, match="zero point is not 0"):
        OnnxWeights(tmp_path, dtype=torch.float32).read(f"{Q_PROJ}.weight")


@pytest.mark.parametrize("half", ["high", "low"])
def test_a_nibble_that_has_changed_is_another_code(half: str, tmp_path: Path, dense: dict[str, Tensor]) -> None:
    value = groups(8, 32, 64, sym=True, desc_act=False)
    of_operators(value, tmp_path, dense, nibbles=True)
    flip(tmp_path, f"{Q_PROJ}.qweight_{half}")
    read = OnnxWeights(tmp_path, dtype=torch.float32).stored(f"{Q_PROJ}.weight")
    assert isinstance(read, GroupQuantized)
    assert (read.codes != value.codes).nonzero().tolist() == [[0, 0]]
    assert int(read.codes[0, 0]) ^ int(value.codes[0, 0]) == {"high": 16, "low": 1}[half]


def flip(folder: Path, name: str) -> None:
    """Flips the first bit of an initializer in the data file."""
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_an_order_that_is_no_permutation_is_refused(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    graph = onnx_folders.Builder()
    for name, tensor in dense.items():
        if name != f"{Q_PROJ}.weight":
            graph.add("Identity", graph.weight(name, tensor))
    value = groups(4, 32, 64, sym=True, desc_act=False)
    sorted_inputs = graph.add(
        "Gather", "x", graph.weight(f"{Q_PROJ}.order", torch.zeros(64, dtype=torch.int64)), axis=-1
    )
    graph.linear(sorted_inputs, Q_PROJ, value)
    found = OnnxWeights(graph.write(tmp_path, CONFIG.to_dict()), dtype=torch.float32)
    with pytest.raises(InputError, match="does not have each input once"):
        found.read(f"{Q_PROJ}.weight")


def test_values_that_are_no_numbers_are_refused(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    value = groups(4, 32, 64, sym=True, desc_act=False)
    value.scales[1, 3] = torch.nan
    weird = {**dense, "model.norm.weight": torch.full((64,), torch.inf)}
    found = of_operators(value, tmp_path, weird)
    for name in (f"{Q_PROJ}.weight", "model.norm.weight"):
        with pytest.raises(InputError, match="NaN or Inf"):
            found.read(name)


def test_rows_that_no_absmax_gives_are_refused(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    codes = torch.zeros(64, 64, dtype=torch.int8)
    codes[5, 5] = -128
    values: dict[str, Tensor | Quantized] = {**dense, f"{Q_PROJ}.weight": RowQuantized(codes, torch.ones(64))}
    found = OnnxWeights(onnx_folders.llama(values, CONFIG, tmp_path, integers=True), dtype=torch.float32)
    with pytest.raises(InputError, match="-128"):
        found.read(f"{Q_PROJ}.weight")


@pytest.mark.parametrize("fault", ["missing", "unread", "shape"])
def test_a_graph_that_is_another_model_is_refused(fault: str, tmp_path: Path, dense: dict[str, Tensor]) -> None:
    values: dict[str, Tensor | Quantized] = dict(dense)
    if fault == "missing":
        del values["model.norm.weight"]
    if fault == "shape":
        values["model.norm.weight"] = torch.ones(63)
    folder = onnx_folders.parameters(values, CONFIG.to_dict(), tmp_path)
    if fault == "unread":
        change(folder, lambda graph: graph.node.pop())
    with pytest.raises(InputError, match="not the model of its config") as caught:
        OnnxWeights(folder, dtype=torch.float32).check_complete()
    assert {"missing": "missing", "unread": "no operator", "shape": "[63]"}[fault] in str(caught.value.where)


def test_a_quantization_config_is_refused(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    config = CONFIG.to_dict() | {"quantization_config": {"quant_method": "gptq"}}
    folder = onnx_folders.parameters(dict(dense), config, tmp_path)
    with pytest.raises(InputError, match="quantization_config"):
        OnnxWeights(folder, dtype=torch.float32)


def shared(folder: Path, tensors: dict[str, Tensor], dense: dict[str, Tensor]) -> Path:
    """A graph that finds two tensors in a safetensors file."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    graph = onnx_folders.Builder()
    for name, tensor in dense.items():
        if name in tensors:
            graph.external(name, tensors[name], "model.safetensors", 8 + length + header[name]["data_offsets"][0])
            graph.add("Identity", name)
        else:
            graph.add("Identity", graph.weight(name, tensor))
    return graph.write(folder, CONFIG.to_dict())


def test_tensors_are_found_in_a_safetensors_file(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    names = [f"{Q_PROJ}.weight", "model.layers.0.self_attn.o_proj.weight"]
    found = OnnxWeights(shared(tmp_path, {name: dense[name] for name in names}, dense), dtype=torch.float32)
    for name in names:
        assert torch.equal(found.read(name), dense[name])


@pytest.mark.parametrize("fault", ["swapped", "dtype", "shape", "shifted"])
def test_another_safetensors_file_is_refused(fault: str, tmp_path: Path, dense: dict[str, Tensor]) -> None:
    first, second = f"{Q_PROJ}.weight", "model.layers.0.self_attn.o_proj.weight"
    tensors = {name: dense[name] for name in (first, second)}
    folder = shared(tmp_path, tensors, dense)
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    match fault:
        case "swapped":
            header[first], header[second] = header[second], header[first]
        case "dtype":
            header[first]["dtype"] = "F16"
        case "shape":
            header[first]["shape"] = [32, 128]
        case "shifted":
            header["a"] = header.pop(first)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(InputError, match="not the safetensors file that the graph was made for"):
        OnnxWeights(folder, dtype=torch.float32)


def test_codes_of_bitsandbytes_may_stand_in_a_column(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    flat = {name: tensor.reshape(-1) for name, tensor in dense.items() if name == "model.norm.weight"}
    folder = shared(tmp_path, {name: tensor[:, None] for name, tensor in flat.items()}, dense)
    change(folder, lambda graph: next(i for i in graph.initializer if i.name == "model.norm.weight").dims.pop())
    assert torch.equal(OnnxWeights(folder, dtype=torch.float32).read("model.norm.weight"), flat["model.norm.weight"])


def test_two_readings_of_the_same_codes_are_refused(tmp_path: Path, dense: dict[str, Tensor]) -> None:
    of_operators(groups(4, 32, 64, sym=False, desc_act=False), tmp_path, dense)

    def again(graph: onnx.GraphProto) -> None:
        other = graph.node.add()
        other.CopyFrom(node(graph))
        del other.input[3:]
        other.output[0] = "again"

    with pytest.raises(InputError, match="read the same codes in different ways"):
        OnnxWeights(change(tmp_path, again), dtype=torch.float32)


def test_blocks_keep_float32_products(tmp_path: Path) -> None:
    """What the operator multiplies with, not what bitsandbytes rounds it to."""
    folder = stored_models.write(factories.build(CONFIG), tmp_path / "a", stored_models.NF4)
    with SafetensorsWeights(folder, dtype=torch.float32) as source:
        onnx_folders.parameters(stored(source), source.config, tmp_path / "b")
        codes = source.quantized[Q_PROJ].quantized(source.tensors(Q_PROJ))
        found = OnnxWeights(tmp_path / "b", dtype=torch.float32).read(f"{Q_PROJ}.weight")
        assert not torch.equal(found, source.read(f"{Q_PROJ}.weight"))
        assert isinstance(codes, BlockQuantized)
        assert torch.equal(found, dequantize(replace(codes, spec=replace(codes.spec, dtype=torch.float32))))
