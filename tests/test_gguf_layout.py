"""The layout gguf: the values of safetensors, a header that llama.cpp reads, and every refusal with its case."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import factories
import gguf_folders
import qexport
from gguf_faults import Q4_0_BYTES, Rows, copied, first_row_larger, half_rotated, rolled, rows_of, swapped, value_of
from qexport.artifact.figures import CheckResult
from qexport.artifact.names import GGUF_NAME
from qexport.errors import CompatibilityError, InputError, QexportError, ResourceError
from qexport.export.gguf.files import GgufFiles
from qexport.export.gguf.tokenizer_keys import gguf_tokenizer
from qexport.formats.gguf.blocks import LARGEST_SHIFT
from qexport.formats.gguf.header import header_bytes
from qexport.pipeline.inspection import inspect_artifact
from qexport.pipeline.runtimes import misfit
from qexport.reading.gguf_weights import GgufWeights
from qexport.reading.layer_records import refuse_other_layers
from qexport.reading.stored_model import open_stored
from qexport.records import LayerRecord
from qexport.runtimes import NAMES, RuntimeSettings
from qexport.tensors import GroupQuantized
from qexport.tensors.gguf_file import GgufFile


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], gguf_folders.Made]:
    found: dict[str, gguf_folders.Made] = {}

    def make(name: str) -> gguf_folders.Made:
        if name not in found:
            family, _, method = name.partition(", ")
            quantize = METHODS.get(method) or {**gguf_folders.GPTQ, "bits": int(method or 4)}
            found[name] = gguf_folders.make(gguf_folders.CONFIGS[family], tmp_path_factory.mktemp("made"), quantize)
        return found[name]

    return make


Make = Callable[[str], gguf_folders.Made]
METHODS: Mapping[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "int8": {"method": "int8", "scales": "float16"},
    "w8a8": {"method": "w8a8", "scales": "float16"},
    "by layer": {
        **gguf_folders.GPTQ,
        "overrides": [
            {"modules": "*.0.mlp.down_proj", "bits": 2},
            {"modules": "*.0.mlp.*_proj", "bits": 3, "group_size": 64},
            {"modules": "*.1.self_attn.[qkv]_proj", "bits": 8},
            {"modules": "*.1.mlp.down_proj", "dense": True},
        ],
    },
}


ROWS = ("int8", "w8a8")


@pytest.mark.parametrize(
    "name",
    [
        *gguf_folders.CONFIGS,
        "llama, 2",
        "llama, 3",
        "llama, by layer",
        "llama, 8",
        "llama, none",
        "gpt-2, none",
        "gpt-2, int8",
        "mixtral, none",
        "mixtral, 3",
        "mixtral, w8a8",
        "qwen3 moe, int8",
        "llama, int8",
        "llama, w8a8",
        "falcon 40b, int8",
    ],
)
def test_every_value_is_that_of_the_safetensors_layout(name: str, made: Make) -> None:
    folders = made(name)
    with (
        open_stored(folders.gguf, dtype=torch.float32) as own,
        open_stored(folders.safetensors, dtype=torch.float32) as other,
    ):
        assert own.specs().keys() == other.specs().keys()
        for each in other.specs():
            assert np.array_equal(own.read(each).float().numpy(), other.read(each).float().numpy()), each
        assert own.layers.keys() == other.layers.keys()
        if name.endswith(ROWS):  # as one group of GPTQ for each row
            assert {layer.group_size == layer.shape[1] for layer in own.layers.values()} == {True}
        else:
            assert (own.layers, own.grids) == (other.layers, other.grids)
        own.check_complete()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "falcon 7b",
        "qwen2",
        "llama, 2",
        "llama, 3",
        "llama, 8",
        "gemma 2",
        "gemma 3",
        "phi 3",
        "gpt-2",
        "gpt-2, none",
    ],
)
def test_the_gguf_package_reads_the_same_values(name: str, made: Make) -> None:
    """The rows are ordered here as llama.cpp's converter orders them."""
    folders = made(name)
    reader = gguf.GGUFReader(folders.gguf / GGUF_NAME)
    config = gguf_folders.CONFIGS[name.partition(",")[0]]
    names = gguf.get_tensor_name_map(arch_of(config), config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(folders.records)
    for parameter, record in folders.records.items():
        module, _, leaf = parameter.rpartition(".")
        tensor = tensors[f"{names.get_name(module)}.{leaf}"]
        value = record.value.dequantize() if isinstance(record.value, GroupQuantized) else record.value
        assert isinstance(value, torch.Tensor)
        wanted = reordered(parameter, value.float(), config) + (parameter.endswith("norm.weight") and "gemma" in name)
        if isinstance(record.value, torch.Tensor) and parameter.endswith(
            ("c_attn.weight", "c_fc.weight", "c_proj.weight")
        ):
            wanted = wanted.mT
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        assert np.array_equal(found, wanted.numpy()), parameter


def arch_of(config: PretrainedConfig) -> gguf.MODEL_ARCH:
    return gguf.MODEL_ARCH[config.model_type.removesuffix("_text").upper()]


def reordered(name: str, value: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for module, key in heads.items():
        if module in name and config.model_type == "llama":
            count = getattr(config, key)
            size = len(value) // count // 2
            return value.reshape(count, 2, size, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if "query_key_value" in name:
        assert config.multi_query  # with one head of keys, queries come first as they are
    return value


@pytest.mark.parametrize("name", ["llama", "phi 3"])
def test_transformers_reads_the_same_model(name: str, made: Make) -> None:
    folder, ids = made(name).gguf, torch.arange(20)[None]
    stock = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32)
    own = qexport.load(folder, device="cpu", dtype=torch.float32, check=False)
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, own(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["gemma 2", "gemma 3 linear"])
def test_transformers_reads_the_same_weights_of_gemma(name: str, made: Make) -> None:
    """It does not read which layers see a window, scaled rotary embeddings, and what queries are divided by."""
    folder = made(name).gguf
    stock = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32).state_dict()
    with open_stored(folder, dtype=torch.float32) as own:
        for parameter in own.specs():
            assert torch.equal(stock[parameter], own.read(parameter)), parameter


WINDOWS: Mapping[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "the family's": (
        gguf_folders.CONFIGS["gemma 3 linear"],
        {
            "attention.sliding_window": 16, "rope.freq_base_swa": 20000.0, "rope.freq_base": 500000.0,
            "rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "final_logit_softcapping": 20.0,
        },
    ),
    "every second": (
        gguf_folders.CONFIGS["gemma 3"],
        {
            "attention.sliding_window": 16, "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 10000.0,
            "rope.freq_base": 1000000.0,
        },
    ),
    "none": (
        Gemma3TextConfig(**factories.GROUPED, query_pre_attn_scalar=16, layer_types=["full_attention"] * 2),
        {"rope.freq_base": 1000000.0},
    ),
    "gemma 2": (
        gguf_folders.CONFIGS["gemma 2"],
        {
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 16,
            "rope.freq_base": 10000.0,
        },
    ),
    "phi 3": (
        gguf_folders.CONFIGS["phi 3"],
        {"attention.sliding_window": 0, "rope.scaling.original_context_length": 4096, "rope.freq_base": 10000.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WINDOWS)
def test_the_keys_of_windows_rotary_embeddings_and_bounds(case: str, tmp_path: Path) -> None:
    config, wanted = WINDOWS[case]
    layout = gguf_folders.layout("gguf", gguf_folders.checkpoint(config, tmp_path), gguf_folders.NONE)
    assert isinstance(layout.weights, GgufFiles)
    values = {key.partition(".")[2]: value for key, value in layout.weights.values.items()}
    found = {key: value for key, value in values.items() if key.startswith(("rope.", "attention.sl")) or "soft" in key}
    assert found == wanted | {"rope.dimension_count": 16}
    assert values["context_length"] == 256


def test_norms_that_are_nearly_zero_raise_no_alarm(tmp_path: Path, held_out: Path) -> None:
    """1 + 1e-7 in float32 is what the model multiplies by, and what the file has."""
    model = factories.build(factories.FAMILIES["gemma 3"])
    with torch.no_grad():
        model.get_parameter("model.norm.weight").copy_(torch.logspace(-9, -4, 64))
    base = gguf_folders.load(factories.save(model, tmp_path / "base"))
    records = list(gguf_folders.records(base, gguf_folders.NONE, tmp_path))
    gguf_folders.write(gguf_folders.layout("gguf", base, gguf_folders.NONE), tmp_path / "gguf", records, base)
    with open_stored(tmp_path / "gguf", dtype=torch.float32) as own:
        assert own.raised == {name for name in own.specs() if name.endswith("norm.weight")}
        assert not torch.equal(own.read("model.norm.weight"), base.weights.read("model.norm.weight").float())
    assert failed(tmp_path / "gguf", tmp_path / "base", held_out) == []
    changed = copied(tmp_path / "gguf", tmp_path / "changed", lambda path: rows_of(path, "output_norm.weight", larger))
    (fault,) = failed(changed, tmp_path / "base", held_out)
    assert "model.norm.weight" in fault.detail


def test_the_header_has_the_bytes_that_the_gguf_package_writes(tmp_path: Path, made: Make) -> None:
    with closing(GgufFile(made("llama").gguf / GGUF_NAME)) as file:
        metadata, tensors = file.metadata, file.tensors
        arrays = {key: file.array(key) for key in file.array_lengths}
    base = gguf_folders.checkpoint(factories.llama_config(), tmp_path / "base")
    files = gguf_folders.layout("gguf", base).weights
    assert isinstance(files, GgufFiles)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, value in list(files.values.items())[1:]:
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        values = np.zeros((*tensor.shape[:-1], tensor.row_bytes), np.uint8)
        writer.add_tensor(name, values, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, offsets = header_bytes(files.values, files.table)
    assert (tmp_path / "a.gguf").read_bytes()[: len(header)] == header
    assert offsets == {name: tensor.offset for name, tensor in tensors.items()}
    assert (made("llama").gguf / GGUF_NAME).read_bytes()[: len(header)] == header
    assert set(metadata) | set(arrays) == set(files.values)


def test_the_stretched_frequencies_of_llama_3_are_in_the_file(made: Make, tmp_path: Path) -> None:
    """What transformers divides its frequencies by."""
    folder, name = made("llama 3").gguf, "rope_freqs.weight"
    plain = ROPE_INIT_FUNCTIONS["llama3"](gguf_folders.CONFIGS["llama 3"], torch.device("cpu"))[0]
    with closing(GgufFile(folder / GGUF_NAME)) as file:
        found = torch.from_numpy(file.read_rows(name, 0, 1).view(np.float32)[0].copy())
    torch.testing.assert_close(500.0 ** -(torch.arange(0, 16, 2) / 16) / found, plain)
    assert found[[0, -1]].tolist() == [1.0, 8.0]
    changed = copied(folder, tmp_path / "changed", lambda path: rows_of(path, name, np.zeros_like))
    with pytest.raises(InputError, match=r"rope_freqs\.weight: other values"):
        inspect_artifact(changed)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_order_in_which_tensors_come_changes_no_byte(name: str, tmp_path: Path, made: Make) -> None:
    folders = made(name)
    base = gguf_folders.checkpoint(gguf_folders.CONFIGS[name], tmp_path / "base")
    gguf_folders.write(
        gguf_folders.layout("gguf", base), tmp_path / "again", list(folders.records.values())[::-1], base
    )
    for path in folders.gguf.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(folders.gguf)).read_bytes() == path.read_bytes()


def test_a_tensor_is_on_disk_as_soon_as_it_is_written(tmp_path: Path, made: Make) -> None:
    """None waits for another one: the file is written as a stream."""
    records = made("llama").records
    base = gguf_folders.checkpoint(factories.llama_config(), tmp_path / "base")
    with gguf_folders.layout("gguf", base).weights.writer(tmp_path) as writer:
        writer.write(records["model.layers.1.mlp.down_proj.weight"])
        assert set(writer.written()) == {"blk.1.ffn_down.weight"}
    with closing(GgufFile(made("llama").gguf / GGUF_NAME)) as file:
        tensor = file.tensors["blk.1.ffn_down.weight"]
        whole = file.read_rows("blk.1.ffn_down.weight", 0, tensor.rows).tobytes()
    assert (tmp_path / GGUF_NAME).read_bytes()[tensor.offset :] == whole


def test_weights_in_float16_stay_as_they_are(tmp_path: Path) -> None:
    base = gguf_folders.checkpoint(factories.llama_config(), tmp_path / "base", dtype=torch.float16)
    yielded = list(gguf_folders.records(base, gguf_folders.NONE, tmp_path))
    gguf_folders.write(gguf_folders.layout("gguf", base, gguf_folders.NONE), tmp_path / "gguf", yielded, base)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "gguf" / GGUF_NAME).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"F16"}
    with open_stored(tmp_path / "gguf", dtype=torch.float32) as own:
        for record in yielded:
            assert isinstance(record.value, torch.Tensor)
            assert np.array_equal(own.read(record.name).float().numpy(), record.value.float().numpy())


# Mixtures of experts.

STACKS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "mixtral": ("model.layers.1.block_sparse_moe", {"gate": "w1", "down": "w2", "up": "w3"}),
    "mixtral, none": ("model.layers.1.block_sparse_moe", {"gate": "w1", "down": "w2", "up": "w3"}),
    "qwen3 moe": ("model.layers.1.mlp", {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"}),
}


@pytest.mark.parametrize("name", STACKS)
def test_the_gguf_package_reads_the_experts_one_behind_the_other(name: str, made: Make) -> None:
    folders, (mixture, kinds) = made(name), STACKS[name]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folders.gguf / GGUF_NAME).tensors}
    for kind, own in kinds.items():
        tensor = tensors[f"blk.1.ffn_{kind}_exps.weight"]
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        wanted = [value_in(folders, f"{mixture}.experts.{expert}.{own}.weight") for expert in range(4)]
        assert np.array_equal(found, np.stack(wanted)), kind
    router = tensors["blk.1.ffn_gate_inp.weight"]
    assert router.tensor_type.name == "F32"
    assert np.array_equal(router.data, value_in(folders, f"{mixture}.gate.weight"))


def value_in(folders: gguf_folders.Made, parameter: str) -> Any:
    value = folders.records[parameter].value
    assert isinstance(value, torch.Tensor | GroupQuantized)
    return (value.dequantize() if isinstance(value, GroupQuantized) else value).float().numpy()


def test_an_expert_is_at_its_place_as_soon_as_it_is_written(tmp_path: Path, made: Make) -> None:
    """No expert waits for the others of its tensor."""
    folders = made("mixtral")
    name, part = "model.layers.1.block_sparse_moe.experts.2.w1.weight", "blk.1.ffn_gate_exps.weight[2]"
    with gguf_folders.layout("gguf", gguf_folders.load(folders.base)).weights.writer(tmp_path) as writer:
        writer.write(folders.records[name])
        assert set(writer.written()) == {part}
    with closing(GgufFile(folders.gguf / GGUF_NAME)) as file:
        tensor = file.tensors["blk.1.ffn_gate_exps.weight"]
        own = file.read_rows("blk.1.ffn_gate_exps.weight", tensor.rows // 2, tensor.rows // 4 * 3).tobytes()
    assert (tmp_path / GGUF_NAME).read_bytes()[tensor.offset + tensor.nbytes // 2 :] == own


def test_experts_that_an_interrupted_run_has_written_are_taken_as_written(tmp_path: Path, made: Make) -> None:
    folders = made("mixtral")
    weights = gguf_folders.layout("gguf", gguf_folders.load(folders.base)).weights
    records = list(folders.records.values())
    with weights.writer(tmp_path) as writer:
        for record in records[:15]:
            writer.write(record)
        written = writer.written()
    with weights.writer(tmp_path) as writer:
        writer.adopt(written)
        for record in records[15:]:
            writer.write(record)
        writer.finish()
    assert len([name for name in written if name.endswith("]")]) == 7
    assert (tmp_path / GGUF_NAME).read_bytes() == (folders.gguf / GGUF_NAME).read_bytes()
    rows_of(tmp_path / GGUF_NAME, "blk.0.ffn_gate_exps.weight", swapped(4))
    with weights.writer(tmp_path) as writer, pytest.raises(ResourceError, match="is damaged"):
        writer.adopt(written)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_a_loaded_mixture_computes_what_that_of_the_safetensors_layout_does(name: str, made: Make) -> None:
    folders, ids = made(name), torch.arange(20)[None]
    own, other = (
        qexport.load(folder, device="cpu", dtype=torch.float32, check=False)
        for folder in (folders.gguf, folders.safetensors)
    )
    with torch.no_grad():
        assert torch.equal(own(input_ids=ids).logits, other(input_ids=ids).logits)


def test_experts_are_read_from_several_files(made: Make, tmp_path: Path) -> None:
    folders = as_written(made("mixtral").base, tmp_path, gguf_folders.GPTQ, split_max_size="20KB")
    with (
        open_stored(folders.gguf, dtype=torch.float32) as own,
        open_stored(made("mixtral").gguf, dtype=torch.float32) as other,
    ):
        assert len(own.files) > 2
        assert all(torch.equal(own.read(name), other.read(name).float()) for name in other.specs())


def test_experts_of_one_type_may_have_several_numbers_of_bits(made: Make, tmp_path: Path) -> None:
    quantize = {**gguf_folders.GPTQ, "overrides": [{"modules": "*.experts.1.*", "bits": 2}]}
    folders = as_written(made("mixtral").base, tmp_path, quantize)
    with open_stored(folders.gguf, dtype=torch.float32) as own:
        assert {name.split(".")[5]: layer.bits for name, layer in own.layers.items() if "experts" in name} == {
            "0": 4, "1": 2, "2": 4, "3": 4,
        }  # fmt: skip
        with open_stored(folders.safetensors, dtype=torch.float32) as other:
            assert all(torch.equal(own.read(name), other.read(name).float()) for name in other.specs())


@pytest.mark.parametrize("change", [{"bits": 8}, {"dense": True}])
def test_experts_of_several_types_are_refused(change: Mapping[str, Any], made: Make) -> None:
    quantize = {**gguf_folders.GPTQ, "overrides": [{"modules": "*.0.*.experts.1.w2", **change}]}
    with pytest.raises(CompatibilityError, match="1 tensors of GGUF would have experts of several types") as caught:
        gguf_folders.layout("gguf", gguf_folders.load(made("mixtral").base), quantize)
    assert "experts.0.w2.weight in Q4_0 and model.layers.0.block_sparse_moe.experts.1.w2.weight in" in str(caught.value)
    assert "overrides" in str(caught.value)


def test_a_file_with_other_experts_than_the_model_is_refused(made: Make, tmp_path: Path) -> None:
    def fewer(path: Path) -> None:
        count = (4).to_bytes(8, "little")
        value_of(path, "blk.0.ffn_up_exps.weight", count, (3).to_bytes(8, "little"))

    folder = copied(made("mixtral").gguf, tmp_path / "changed", fewer)
    with pytest.raises(InputError, match="the model has 4 experts"):
        read_whole(folder)


def test_experts_that_were_swapped_on_disk_are_found_when_they_are_read_back(made: Make, tmp_path: Path) -> None:
    weights = gguf_folders.layout("gguf", gguf_folders.load(made("mixtral").base)).weights
    with weights.writer(tmp_path) as writer:
        for record in made("mixtral").records.values():
            writer.write(record)
        written = writer.finish()
    weights.read_back(tmp_path, written)
    rows_of(tmp_path / GGUF_NAME, "blk.0.ffn_down_exps.weight", swapped(4))
    with pytest.raises(QexportError, match="not those written"):
        weights.read_back(tmp_path, written)


# What is lossy, on request.


def as_written(folder: Path, tmp_path: Path, quantize: Mapping[str, Any], **settings: Any) -> gguf_folders.Made:
    """One pass into both layouts, the first with its settings."""
    base = gguf_folders.load(folder)
    yielded = list(gguf_folders.records(base, quantize, tmp_path))
    gguf_folders.write(gguf_folders.layout("gguf", base, quantize, **settings), tmp_path / "gguf", yielded, base)
    gguf_folders.write(gguf_folders.layout("safetensors", base, quantize), tmp_path / "safetensors", yielded, base)
    found = {record.name: record for record in yielded}
    return gguf_folders.Made(tmp_path / "gguf", tmp_path / "safetensors", folder, found)


def test_asymmetric_codes_differ_by_less_than_a_hundredth_of_a_step(made: Make, tmp_path: Path, held_out: Path) -> None:
    quantize = {**gguf_folders.GPTQ, "group_size": 64, "sym": False}
    folders = as_written(made("llama").base, tmp_path, quantize, inexact="allow")
    worst = 0.0
    with open_stored(folders.gguf, dtype=torch.float32) as own:
        assert {(layer.bits, layer.group_size) for layer in own.layers.values()} == {(4, 64)}
        for name, record in folders.records.items():
            if isinstance(record.value, GroupQuantized):
                scales = record.value.scales.t().float()[:, record.value.g_idx.long()]
                worst = max(worst, float(((own.read(name) - record.value.dequantize()) / scales).abs().max()))
    assert 0 < worst <= LARGEST_SHIFT
    assert failed(folders.gguf, folders.base, held_out) == []
    layout = gguf_folders.layout("gguf", gguf_folders.load(folders.base), quantize, inexact="allow")
    assert any("Q4_1 rounds the minima" in note for note in layout.notes)


def test_ends_in_8_bits_are_those_of_the_gguf_package(made: Make, tmp_path: Path, held_out: Path) -> None:
    ends = {"token_embedding_type": "q8_0", "output_tensor_type": "q8_0"}
    folders = as_written(made("llama").base, tmp_path, gguf_folders.GPTQ, **ends)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folders.gguf / GGUF_NAME).tensors}
    for parameter, name in (("model.embed_tokens", "token_embd"), ("lm_head", "output")):
        value = folders.records[f"{parameter}.weight"].value
        assert isinstance(value, torch.Tensor)
        wanted = gguf.quantize(value.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(np.asarray(tensors[f"{name}.weight"].data), wanted)
    assert failed(folders.gguf, folders.base, held_out) == []
    ids = torch.arange(20)[None]
    model = qexport.load(folders.gguf, device="cpu", dtype=torch.float32, check=False)
    stock = AutoModelForCausalLM.from_pretrained(folders.gguf, gguf_file=GGUF_NAME, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_tied_head_has_no_type_of_its_own(tmp_path: Path) -> None:
    base = gguf_folders.checkpoint(factories.llama_config(tie_word_embeddings=True), tmp_path)
    with pytest.raises(CompatibilityError, match="no output head of its own") as caught:
        gguf_folders.layout("gguf", base, output_tensor_type="q8_0")
    assert "token_embedding_type" in str(caught.value)


# What cannot be carried.

REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "nf4": ({"method": "nf4"}, "GGUF has no type with these values"),
    "int8": ({"method": "int8"}, "set scales: float16"),
    "w8a8": ({"method": "w8a8"}, "set scales: float16"),
    "asymmetric": ({**gguf_folders.GPTQ, "sym": False}, "set sym: true; or inexact: allow"),
    "asymmetric, 8 bits": ({**gguf_folders.GPTQ, "sym": False, "bits": 8}, "no type for 8 bits with zero points"),
    "act-order": ({**gguf_folders.GPTQ, "desc_act": True, "static_groups": False}, "no order of columns"),
    "group 16": ({**gguf_folders.GPTQ, "group_size": 16}, "a group_size of 16"),
    "asymmetric, 3 bits": ({**gguf_folders.GPTQ, "sym": False, "bits": 3}, "no type for 3 bits with zero points"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gguf_folders.checkpoint(factories.llama_config(), tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("case", REFUSED)
def test_a_method_without_an_exact_type_is_refused_before_any_work(case: str, llama: Any) -> None:
    quantize, words = REFUSED[case]
    with pytest.raises(CompatibilityError, match=words) as caught:
        gguf_folders.layout("gguf", llama, quantize)
    assert "leave" in str(caught.value)


def gemma2(**changes: Any) -> Gemma2Config:
    return Gemma2Config(**{**factories.FAMILIES["gemma 2"].to_dict(), **changes})


def gemma3(**changes: Any) -> Gemma3TextConfig:
    return Gemma3TextConfig(**{**factories.FAMILIES["gemma 3"].to_dict(), **changes})


def neox(**changes: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(**{**factories.FAMILIES["gpt-neox"].to_dict(), **changes})


def moe(**changes: Any) -> PretrainedConfig:
    return factories.qwen3_moe_config(**{"decoder_sparse_step": 1, "norm_topk_prob": True} | changes)


def phi3(**changes: Any) -> Phi3Config:
    return Phi3Config(**{**factories.FAMILIES["phi 3"].to_dict(), **changes})


MODELS: Mapping[str, tuple[PretrainedConfig, str]] = {
    "falcon rw": (factories.falcon_rw_config(), "alibi is True"),
    "falcon h1": (factories.falcon_h1_config(), "does not know the family falcon_h1"),
    "activation": (factories.llama_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "rope": (
        factories.llama_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type is 'dynamic'",
    ),
    "rope of another family": (
        factories.qwen2_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type is 'linear'",
    ),
    "qwen3 with biases": (
        Qwen3Config(**{**factories.FAMILIES["qwen3"].to_dict(), "attention_bias": True}),
        "attention_bias is True",
    ),
    "query divisor": (gemma3(query_pre_attn_scalar=32), "query_pre_attn_scalar is 32, and llama.cpp takes 16"),
    "query divisor of 62 blocks": (
        gemma3(num_hidden_layers=62, layer_types=None, head_dim=8, query_pre_attn_scalar=8),
        "llama.cpp takes 16",
    ),
    "no bounds": (gemma2(attn_logit_softcapping=None), "attn_logit_softcapping is None, and llama.cpp always caps"),
    "no bounds of predictions": (gemma2(final_logit_softcapping=None), "final_logit_softcapping is None"),
    "bounds of attention": (gemma3(attn_logit_softcapping=50.0), "and llama.cpp does not cap"),
    "another gelu": (gemma2(hidden_activation="gelu"), "hidden_activation is 'gelu'"),
    "both directions": (gemma2(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
    "every other pattern": (
        gemma3(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"]),
        "not every n-th layer",
    ),
    "gemma 2 without windows": (gemma2(layer_types=["full_attention"] * 2), "no layer has a sliding window"),
    "a window of nothing": (gemma3(sliding_window=0), "sliding_window is 0"),
    "a scaled window": (
        gemma3(
            rope_parameters={
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            }
        ),
        "the rotary embedding of layers with a sliding window",
    ),
    "gemma 2 with a head of its own": (gemma2(tie_word_embeddings=False), "llama.cpp has no place"),
    "gpt-neox without biases": (neox(attention_bias=False), "attention_bias is False"),
    "gpt-neox with another activation": (neox(hidden_act="relu"), "hidden_act is 'relu'"),
    "gpt-2 with another activation": (factories.gpt2_config(activation_function="gelu"), "computes 'gelu_new'"),
    "gpt-2 with another divisor": (factories.gpt2_config(scale_attn_weights=False), "scale_attn_weights is False"),
    "gpt-2 with a divisor by layer": (
        factories.gpt2_config(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx is True",
    ),
    "weights of experts as they are": (
        moe(norm_topk_prob=False),
        "norm_topk_prob is False, and llama.cpp computes True",
    ),
    "blocks without experts": (moe(decoder_sparse_step=2), "decoder_sparse_step is 2"),
    "a block without experts": (moe(mlp_only_layers=[1]), r"mlp_only_layers is \[1\]"),
    "longrope": (
        phi3(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 128,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
            }
        ),
        "rope_type is 'longrope'",
    ),
    "a part rotates": (
        phi3(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor is not 1",
    ),
    "no window": (factories.mistral_config(sliding_window=0), "sliding_window is 0"),
    "windows": (factories.qwen2_config(use_sliding_window=True), "use_sliding_window is True"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_llama_cpp_does_not_compute_is_refused(case: str, tmp_path: Path) -> None:
    config, words = MODELS[case]
    with pytest.raises(CompatibilityError, match=words):
        gguf_folders.layout("gguf", gguf_folders.checkpoint(config, tmp_path), gguf_folders.NONE)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    layout = gguf_folders.layout("gguf", gguf_folders.checkpoint(factories.mistral_config(), tmp_path))
    assert isinstance(layout.weights, GgufFiles)
    assert layout.weights.values["llama.context_length"] == 16
    assert "up to 16 tokens" in layout.notes[0]


# Tokenizers.

Change = Callable[[dict[str, Any]], None]
BOS = {"id": "<|start|>", "type_id": 0}


def template(*single: dict[str, Any]) -> dict[str, Any]:
    special = {"<|start|>": {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}}
    return {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": special}


def files(change: Change = lambda _: None, **settings: Any) -> dict[str, bytes]:
    content = json.loads(factories.tokenizer().backend_tokenizer.to_str())
    change(content)
    config = {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": "{{ messages }}", **settings}
    return {"tokenizer.json": json.dumps(content).encode(), "tokenizer_config.json": json.dumps(config).encode()}


def steps(*parts: dict[str, Any]) -> Change:
    return lambda content: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": list(parts)})


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WITHOUT = {**BYTES, "use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def ignoring_merges(content: dict[str, Any]) -> None:
    steps(split(LLAMA3), WITHOUT)(content)
    content["model"]["ignore_merges"] = True


NAMED: Mapping[str, Change] = {
    "gpt-2": lambda _: None,
    "smollm": steps({"type": "Digits", "individual_digits": True}, BYTES),
    "llama-bpe": ignoring_merges,
    "qwen2": steps(split(QWEN2), WITHOUT),
    "falcon": steps(
        {"type": "Punctuation", "behavior": "Contiguous"},
        {key: value for key, value in BYTES.items() if key != "use_regex"},
        {"type": "Digits", "individual_digits": False},
        split("[0-9][0-9][0-9]"),
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_pre_tokenizer_is_named_by_its_structure(name: str) -> None:
    values = gguf_tokenizer(files(NAMED[name]), {}, factories.VOCABULARY).values
    assert values["tokenizer.ggml.pre"] == name
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (False, False)


def test_what_the_header_says_of_the_tokenizer() -> None:
    fast = factories.tokenizer()
    generation = {"generation_config.json": json.dumps({"eos_token_id": [0, 5]}).encode()}
    around = {"post_processor": template({"SpecialToken": BOS}, {"Sequence": {}})}
    values = gguf_tokenizer(
        files(lambda content: content.update(around)) | generation, {"bos_token_id": 7}, factories.VOCABULARY + 2
    ).values
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert tokens[:-2] == fast.convert_ids_to_tokens(list(range(factories.VOCABULARY)))
    assert tokens[-2:] == ["[PAD384]", "[PAD385]"]
    assert kinds == [3, 3, *[1] * (factories.VOCABULARY - 2), 5, 5]
    merges = json.loads(fast.backend_tokenizer.to_str())["model"]["merges"]
    assert values["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    numbers = {key.split(".")[-1]: value for key, value in values.items() if key.endswith("_id")}
    assert numbers == {"bos_token_id": 1, "eos_token_id": 0, "padding_token_id": 0, "eot_token_id": 5}
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.chat_template"] == "{{ messages }}"


TOKENIZERS: Mapping[str, tuple[Change, str]] = {
    "another regex": (steps(split(r"\p{L}+"), WITHOUT), "pre_tokenizer"),
    "a space before": (lambda c: c.update(pre_tokenizer={**BYTES, "add_prefix_space": True}), "pre_tokenizer"),
    "no pre-tokenizer": (lambda c: c.update(pre_tokenizer=None), "pre_tokenizer"),
    "a normalizer": (lambda c: c.update(normalizer={"type": "Lowercase"}), "normalizer: Lowercase"),
    "unigram": (lambda c: c["model"].update(type="Unigram"), "not byte-level BPE"),
    "bytes": (lambda c: c["model"].update(byte_fallback=True), "byte_fallback"),
    "suffix": (lambda c: c["model"].update(end_of_word_suffix="</w>"), "a prefix or suffix"),
    "merges are ignored": (lambda c: c["model"].update(ignore_merges=True), "ignore_merges is True"),
    "decoder": (lambda c: c.update(decoder={"type": "WordPiece"}), "decoder"),
    "a token takes spaces": (lambda c: c["added_tokens"][0].update(rstrip=True), "has rstrip"),
    "two tokens before": (
        lambda c: c.update(post_processor=template({"SpecialToken": BOS}, {"SpecialToken": BOS}, {"Sequence": {}})),
        "post_processor",
    ),
    "another processor": (lambda c: c.update(post_processor={"type": "BertProcessing"}), "post_processor"),
    "another token behind": (
        lambda c: c.update(post_processor=template({"Sequence": {}}, {"SpecialToken": BOS})),
        "the token behind a text is not eos_token",
    ),
    "more tokens than rows": (lambda c: c["model"]["vocab"].update(new=900), "the number 900"),
    "a text twice": (lambda c: c["added_tokens"][0].update(content="a"), "the same text"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(case: str) -> None:
    change, words = TOKENIZERS[case]
    with pytest.raises(CompatibilityError, match=words) as caught:
        gguf_tokenizer(files(change), {}, factories.VOCABULARY)
    assert "leave the layout gguf out" in str(caught.value)


def test_other_refusals_of_tokenizers() -> None:
    with pytest.raises(CompatibilityError, match=r"no tokenizer\.json"):
        gguf_tokenizer({}, {}, 3)
    with pytest.raises(CompatibilityError, match="no token ends a text"):
        gguf_tokenizer(files(eos_token=None), {}, factories.VOCABULARY)
    with pytest.raises(CompatibilityError, match="add_bos_token of tokenizer_config"):
        gguf_tokenizer(files(add_bos_token=True), {}, factories.VOCABULARY)
    with pytest.raises(InputError, match="malformed"):
        gguf_tokenizer(files(lambda c: c["model"].update(merges=3)), {}, factories.VOCABULARY)


def test_numbers_that_stand_for_no_token_are_left_out() -> None:
    """-1 is a common padding token of older checkpoints."""
    generation = {"generation_config.json": json.dumps({"eos_token_id": [-1, 9999, 5, 6, 7]}).encode()}
    given, config = files(pad_token=None) | generation, {"pad_token_id": -1, "bos_token_id": 9999}
    found = gguf_tokenizer(given, config, factories.VOCABULARY)
    numbers = {key.split(".")[-1]: value for key, value in found.values.items() if key.endswith("_id")}
    assert numbers == {"eos_token_id": 0, "eot_token_id": 5}
    assert "4 tokens" in found.notes[0]


def test_text_in_another_normal_form_is_left_to_users() -> None:
    (note,) = gguf_tokenizer(files(lambda c: c.update(normalizer={"type": "NFC"})), {}, factories.VOCABULARY).notes
    assert "NFC" in note


# Faults in a finished folder.


def larger(rows: Rows) -> Rows:
    return (rows.view(np.float32) * np.float32(1.1)).view(np.uint8)


FAULTS: Mapping[str, tuple[Callable[[Path], None], str, str]] = {
    "scales rolled": (lambda p: rows_of(p, "blk.1.ffn_up.weight", rolled), "weights", "model.layers.1.mlp.up_proj"),
    "keys half-rotated": (
        lambda p: rows_of(p, "blk.0.attn_k.weight", half_rotated(2)), "weights", "model.layers.0.self_attn.k_proj",
    ),
    "a layer zero": (
        lambda p: rows_of(p, "blk.0.ffn_down.weight", np.zeros_like), "weights", "model.layers.0.mlp.down_proj",
    ),
    "a norm changed": (
        lambda p: rows_of(p, "output_norm.weight", larger),
        "weights", "model.norm.weight",
    ),
    "rope base": (
        lambda p: value_of(p, "rope.freq_base", np.float32(10000.0).tobytes(), np.float32(5000.0).tobytes()),
        "config", "llama.rope.freq_base: 5000.0 in place of 10000.0",
    ),
    "a merge": (
        lambda p: value_of(p, "tokenizer.ggml.merges", "Ġ t".encode(), "Ġ q".encode()),
        "tokenizer", "tokenizer.ggml.merges: entry",
    ),
    "beginning of text": (
        lambda p: value_of(p, "add_bos_token", b"\x07\0\0\0\0", b"\x07\0\0\0\1"), "tokenizer", "add_bos_token: True",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.write_text(tmp_path_factory.mktemp("text") / "held.jsonl", passages=12, seed=3)


def failed(folder: Path, base: Path, held_out: Path) -> list[CheckResult]:
    settings = qexport.VerifySettings(text=str(held_out), windows=4, max_windows=4, sequence_length=32, profile="off")
    report = qexport.verify(folder, qexport.LoadSettings(base=str(base)), settings)
    return [check for check in report.checks if not check.passed]


@pytest.mark.parametrize(
    "name", ["llama", "llama, 2", "llama, 3", "llama, int8", "llama, w8a8", "gpt-2", "mixtral", "qwen3 moe"]
)
def test_a_sound_folder_passes(name: str, made: Make, held_out: Path) -> None:
    assert failed(made(name).gguf, made(name).base, held_out) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_file_is_named_by_a_gate(fault: str, made: Make, held_out: Path, tmp_path: Path) -> None:
    change, gate, words = FAULTS[fault]
    folder = copied(made("llama").gguf, tmp_path / "changed", change)
    found = failed(folder, made("llama").base, held_out)
    assert [check.gate for check in found] == [gate]
    assert words in found[0].detail


OF_MIXTURES: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "two experts swapped": (
        lambda p: rows_of(p, "blk.1.ffn_down_exps.weight", swapped(4)), "model.layers.1.block_sparse_moe.experts.0.w2",
    ),
    "a row of the router": (
        lambda p: rows_of(p, "blk.0.ffn_gate_inp.weight", first_row_larger), "model.layers.0.block_sparse_moe.gate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", OF_MIXTURES)
def test_a_fault_of_a_mixture_is_named_by_a_gate(fault: str, made: Make, held_out: Path, tmp_path: Path) -> None:
    change, words = OF_MIXTURES[fault]
    folder = copied(made("mixtral").gguf, tmp_path / "changed", change)
    (found,) = failed(folder, made("mixtral").base, held_out)
    assert (found.gate, words in found.detail) == ("weights", True)


def one_step_larger(rows: Rows) -> Rows:
    """The codes of Q4_0 plus 1, as if another number had been added to codes of fewer bits."""
    found = rows.reshape(len(rows), -1, Q4_0_BYTES).copy()
    found[:, :, 2:] += 0x11
    return found


def test_codes_of_3_bits_with_another_zero_are_a_fault(made: Make, held_out: Path, tmp_path: Path) -> None:
    def change(path: Path) -> None:
        rows_of(path, "blk.1.ffn_up.weight", one_step_larger)

    folder = copied(made("llama, 3").gguf, tmp_path / "changed", change)
    (found,) = failed(folder, made("llama, 3").base, held_out)
    assert (found.gate, "model.layers.1.mlp.up_proj" in found.detail) == ("weights", True)


@pytest.mark.parametrize(("bits", "told", "agrees"), [(3, 3, True), (3, 2, False), (3, 8, False), (4, 3, False)])
def test_the_bits_of_the_manifest_are_those_that_the_codes_need(bits: int, told: int, agrees: bool, made: Make) -> None:
    with open_stored(made(f"llama, {bits}").gguf, dtype=torch.float32) as own:
        records = [
            LayerRecord.uncalibrated(name, layer.method, told, layer.group_size) for name, layer in own.layers.items()
        ]
        with nullcontext() if agrees else pytest.raises(InputError, match=f"stored are {bits} bits"):
            refuse_other_layers(records, own)


def test_codes_that_are_all_zero_tell_no_bits(made: Make, tmp_path: Path) -> None:
    """Their layer has 2 bits to the reader, whatever it was quantized with."""

    def change(path: Path) -> None:
        for block in (0, 1):
            rows_of(path, f"blk.{block}.ffn_up.weight", all_eight)

    with open_stored(copied(made("llama").gguf, tmp_path / "changed", change), dtype=torch.float32) as own:
        assert {layer.bits for name, layer in own.layers.items() if "up_proj" in name} == {2}
        records = [
            LayerRecord.uncalibrated(name, layer.method, 4, layer.group_size) for name, layer in own.layers.items()
        ]
        refuse_other_layers(records, own)


def all_eight(rows: Rows) -> Rows:
    found = rows.reshape(len(rows), -1, Q4_0_BYTES).copy()
    found[:, :, 2:] = 0x88
    return found


def test_the_plan_says_what_2_and_3_bits_take(made: Make) -> None:
    base = gguf_folders.load(made("llama").base)
    layouts = {bits: gguf_folders.layout("gguf", base, {**gguf_folders.GPTQ, "bits": bits}) for bits in (2, 3, 4)}
    assert len({layout.weights.total_bytes for layout in layouts.values()}) == 1
    said = {bits: [note for note in layout.notes if "4.5 bits per weight" in note] for bits, layout in layouts.items()}
    assert [note[:24] for notes in said.values() for note in notes] == [
        "codes of 2 bits take the",
        "codes of 3 bits take the",
    ]


def test_a_header_that_contradicts_the_files_beside_it_is_refused_by_inspect(made: Make, tmp_path: Path) -> None:
    assert inspect_artifact(made("llama").gguf).method == "GGUF, Q4_0"
    folder = copied(made("llama").gguf, tmp_path / "changed", FAULTS["rope base"][0])
    with pytest.raises(InputError, match=r"contradicts config\.json"):
        inspect_artifact(folder)


def damaged_scale(rows: Rows) -> Rows:
    rows[0, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    return rows


UNREADABLE: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "a scale is NaN": (lambda p: rows_of(p, "blk.0.ffn_down.weight", damaged_scale), "NaN or Inf"),
    "another type": (
        lambda p: value_of(p, "blk.1.ffn_up.weight", b"\x02\0\0\0\x40", b"\x02\0\0\0\x20"), "shape",
    ),
    "a tensor misses": (lambda p: value_of(p, "", b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "missing"),
    "cut short": (lambda p: os.truncate(p, p.stat().st_size - 64), "is outside the file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_file_that_is_not_an_artifact_is_refused(fault: str, made: Make, tmp_path: Path) -> None:
    change, words = UNREADABLE[fault]
    folder = copied(made("llama").gguf, tmp_path / "changed", change)
    with pytest.raises(InputError, match=words):
        read_whole(folder)


def read_whole(folder: Path) -> None:
    with open_stored(folder, dtype=torch.float32) as source:
        source.check_complete()
        for name in source.specs():
            source.read(name)


def test_what_is_not_as_written_is_found_when_it_is_read_back(made: Make, tmp_path: Path) -> None:
    base = gguf_folders.checkpoint(factories.llama_config(), tmp_path / "base")
    layout = gguf_folders.layout("gguf", base)
    target = tmp_path / "out"
    target.mkdir()
    with layout.weights.writer(target) as writer:
        for record in made("llama").records.values():
            writer.write(record)
        written = writer.finish()
    rows_of(target / GGUF_NAME, "blk.0.ffn_down.weight", np.zeros_like)
    with pytest.raises(QexportError, match="not those written"):
        layout.weights.read_back(target, written)
    value_of(target / GGUF_NAME, "rope.freq_base", np.float32(10000.0).tobytes(), np.float32(1.0).tobytes())
    with pytest.raises(QexportError, match="the header is not the model's"):
        layout.check(target)


def test_the_group_is_found_where_it_is_several_blocks(tmp_path: Path) -> None:
    folders = gguf_folders.make(factories.llama_config(), tmp_path, {**gguf_folders.GPTQ, "group_size": 64})
    with open_stored(folders.gguf, dtype=torch.float32) as own:
        assert isinstance(own, GgufWeights)
        assert {layer.group_size for layer in own.layers.values()} == {64}


def test_programs_for_other_files_are_told_apart(made: Make) -> None:
    settings = {name: RuntimeSettings(runtime=name) for name in NAMES}
    with open_stored(made("llama").gguf, dtype=torch.float32) as own:
        assert [name for name, each in settings.items() if misfit(each, own) is None] == ["llama.cpp"]
    with open_stored(made("llama").safetensors, dtype=torch.float32) as other:
        assert misfit(settings["llama.cpp"], other) == "llama.cpp loads folders of the layout gguf"


def test_launch_files_name_the_file(made: Make) -> None:
    launch = made("llama").gguf / "launch"
    texts = {path.name: path.read_text() for path in launch.iterdir()}
    assert set(texts) == {"README.md", "llama-server.sh", "Modelfile", "generate.py"}
    assert all(GGUF_NAME in text for text in texts.values())
    assert "--ctx-size 256" in texts["llama-server.sh"]
    compile(texts["generate.py"], "generate.py", "exec")
    assert len(texts["generate.py"].splitlines()) <= 12
