"""Each rule of the TGI contract, with the fault that it is for planted into a good folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import factories
from qexport.errors import QexportError
from qexport.export.served import Rule, Server
from qexport.export.tgi.rules import TGI
from qexport.export.tgi.served import ServedByTgi
from qexport.quantizing.fp8 import Fp8
from qexport.quantizing.nf4 import Nf4
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.w8a8 import W8a8
from qexport.tensors import TensorSpec
from quantized_models import gptq_method
from tgi_folders import TgiModel, failed, falcon, falcon_40b, llama

Plant = Callable[[Path], None]

MODELS = {
    "gptq": TgiModel(llama()),
    "desc_act": TgiModel(llama(), gptq_method(desc_act=True)),
    "one group": TgiModel(llama(), gptq_method(group_size=-1)),
    "16-bit": TgiModel(llama(), NoQuantization(method="none")),
    "w8a8": TgiModel(llama(), W8a8(method="w8a8")),
    "fp8": TgiModel(llama(), Fp8()),
    "nf4": TgiModel(llama(), Nf4(method="nf4")),
    "falcon": TgiModel(falcon()),
    "falcon 40b": TgiModel(falcon_40b()),
}

UP = "model.layers.0.mlp.up_proj"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {name: made.write(root / name) for name, made in MODELS.items()}


def config(name: str = "config.json", *, within: str | None = None, drop: str | None = None, **changes: Any) -> Plant:
    """Changes keys of a JSON file, or of one object in it."""

    def plant(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        place = content[within] if within else content
        place.update(changes)
        if drop:
            del place[drop]
        (folder / name).write_text(json.dumps(content))

    return plant


def quantization(**changes: Any) -> Plant:
    """The same in both configs of GPTQ."""

    def plant(folder: Path) -> None:
        config(within="quantization_config", **changes)(folder)
        config("quantize_config.json", **changes)(folder)

    return plant


def without(name: str) -> Plant:
    return lambda folder: (folder / name).unlink()


def file(name: str, content: str) -> Plant:
    def plant(folder: Path) -> None:
        (folder / name).write_text(content)

    return plant


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Plant:
    """All tensors in one file, changed."""

    def plant(folder: Path) -> None:
        content: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            content |= load_file(path)
            path.unlink()
        change(content)
        save_file(content, folder / "model.safetensors")

    return plant


def replace_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    return tensors(lambda content: content.update({name: change(content[name]).contiguous()}))


def settings(key: str, value: str) -> Plant:
    def plant(folder: Path) -> None:
        path = folder / "launch" / "tgi.env"
        lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}=")]
        path.write_text("\n".join([*lines, f"{key}={value}"]))

    return plant


def rename_shard(folder: Path) -> None:
    first = min(folder.glob("*.safetensors"))
    first.rename(folder / f"training-{first.name}")


def second_copy(folder: Path) -> None:
    first = min(folder.glob("*.safetensors"))
    shutil.copyfile(first, folder / first.name.replace("model", "another"))


def other_set(folder: Path) -> None:
    save_file({"unrelated": torch.zeros(1)}, folder / "model.safetensors")


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


def truncate(folder: Path) -> None:
    first = min(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])


def make_dense(content: dict[str, torch.Tensor]) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del content[f"{UP}.{part}"]
    content[f"{UP}.weight"] = torch.zeros(256, 128, dtype=torch.float16)


def rename_template(folder: Path) -> None:
    config("tokenizer_config.json", drop="chat_template")(folder)


def other_templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()


def take_for_neox(folder: Path) -> None:
    config(model_type="gpt_neox")(folder)


FAULTS: list[tuple[str, str, Plant]] = [
    ("config.json is a JSON object", "gptq", file("config.json", "{")),
    ("config.json is a JSON object", "gptq", file("config.json", '{"a": 1, "a": 2}')),
    ("config.json has counts where the launcher parses counts", "gptq", config(intermediate_size=[256, 256])),
    ("config.json has counts where the launcher parses counts", "gptq", config(max_position_embeddings=-1)),
    ("config.json has counts where the launcher parses counts", "gptq", config(num_experts_per_tok=True)),
    ("the family has a model", "gptq", config(model_type="falcon_h1")),
    ("the quantization method is one that is served prequantized", "16-bit",
     config(quantization_config={"quant_method": "bitsandbytes"})),
    ("a quantized model is run by TGI's own model", "gptq", config(model_type="qwen3")),
    ("a quantized model is run by TGI's own model", "nf4", config(model_type="qwen3")),
    ("torch_dtype is given", "gptq", config(drop="torch_dtype")),
    ("tie_word_embeddings is given", "gptq", config(drop="tie_word_embeddings")),
    ("rope_theta is given", "gptq", config(drop="rope_theta")),
    ("rope_theta is given", "gptq", config(rope_theta=10000.0)),
    ("rope_scaling is given", "gptq", config(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5})),
    ("Falcon's config leaves nothing to defaults", "falcon", config(drop="parallel_attn")),
    ("Falcon's heads of keys and values are counted", "falcon", config(num_kv_heads=4)),
    ("Falcon's layer norms are counted", "falcon 40b", config(num_ln_in_parallel_attn=None)),
    ("Falcon's layer norms are counted", "falcon 40b", config(num_ln_in_parallel_attn=1)),
    ("Falcon's variant is one that TGI reads correctly", "falcon", config(multi_query=False)),
    ("Falcon's variant is one that TGI reads correctly", "falcon 40b", config(parallel_attn=False)),
    ("Falcon's variant is one that TGI reads correctly", "falcon", config(num_hidden_layers=80)),
    ("there is a fast tokenizer", "gptq", without("tokenizer.json")),
    ("tokenizer_config.json can be parsed", "gptq", without("tokenizer_config.json")),
    ("tokenizer_config.json can be parsed", "gptq", config("tokenizer_config.json", eos_token=["<|end|>"])),
    ("tokenizer_config.json can be parsed", "gptq", config("tokenizer_config.json", add_bos_token="yes")),
    ("the tokenizer's class is known", "gptq", config("tokenizer_config.json", tokenizer_class="TokenizersBackend")),
    ("the special tokens can be read", "gptq", config("tokenizer_config.json", extra_special_tokens=["<a>"])),
    ("the chat template is in tokenizer_config.json", "gptq", rename_template),
    ("the chat template is in tokenizer_config.json", "gptq", other_templates),
    ("the chat template is in tokenizer_config.json", "gptq",
     config("tokenizer_config.json", chat_template=[{"a": "b"}])),
    ("there are weights", "gptq", no_weights),
    ("no file of weights has a reserved word in its name", "gptq", rename_shard),
    ("the files of weights can be opened", "gptq", truncate),
    ("each tensor is in one file", "gptq", second_copy),
    ("there is one set of weights", "gptq", other_set),
    ("nothing beside the weights is read", "gptq", file("adapter_config.json", "{}")),
    ("nothing beside the weights is read", "gptq", file("pytorch_model.bin", "")),
    ("nothing beside the weights is read", "gptq", second_copy),
    ("every layer is complete", "gptq", config(num_hidden_layers=3)),
    ("every layer is complete", "16-bit", tensors(lambda content: content.pop(f"{UP}.weight"))),
    ("the output head is there", "gptq", tensors(lambda content: content.pop("lm_head.weight"))),
    ("the folder is not an adapter", "gptq", file("adapter_config.json", "{}")),
    ("GPTQ: config.json gives bits, group_size, sym and desc_act", "gptq",
     config(within="quantization_config", drop="desc_act")),
    ("GPTQ: both configs say the same", "gptq", config("quantize_config.json", sym=False)),
    ("GPTQ: both configs say the same", "gptq", file("quantize_config.json", "{}")),
    ("GPTQ: zero points are stored less one", "gptq", quantization(checkpoint_format="gptq_v2")),
    ("GPTQ: bits and groups are the same everywhere", "gptq", quantization(dynamic={"^a$": {"bits": 8}})),
    ("GPTQ: bits and groups are the same everywhere", "gptq", quantization(modules_to_not_convert=[UP])),
    ("GPTQ: bits and groups are the same everywhere", "gptq", quantization(lm_head=True)),
    ("GPTQ: bits and groups are the same everywhere", "gptq", quantization(modules_in_block_to_quantize=[["q_proj"]])),
    ("GPTQ: every module has qweight, qzeros, scales and g_idx", "gptq",
     tensors(lambda content: content.pop(f"{UP}.g_idx"))),
    ("GPTQ: the tensors have the dtypes and shapes of config.json", "gptq",
     replace_tensor(f"{UP}.scales", lambda scales: scales.bfloat16())),
    ("GPTQ: the tensors have the dtypes and shapes of config.json", "gptq", quantization(group_size=64)),
    ("GPTQ: every linear of the blocks is quantized", "gptq", tensors(make_dense)),
    ("GPTQ: a kernel takes every layer", "falcon", quantization(sym=True)),
    ("GPTQ: joined layers have the same g_idx", "desc_act",
     replace_tensor(f"{K}.g_idx", lambda g_idx: g_idx.flip(0))),
    ("quantized tensors of the family are read correctly", "gptq", take_for_neox),
    ("head and embedding are 16-bit", "gptq",
     tensors(lambda content: content.update({"lm_head.qweight": content.pop(f"{UP}.qweight")}))),
    ("weights are 16-bit where nothing says otherwise", "gptq", config(drop="quantization_config")),
    ("weights are 16-bit where nothing says otherwise", "16-bit",
     replace_tensor(f"{UP}.weight", lambda weight: weight.to(torch.uint8))),
    ("compressed-tensors: the config is one of 8-bit weights", "w8a8",
     config(within="quantization_config", format="pack-quantized")),
    ("compressed-tensors: the config is one of 8-bit weights", "w8a8",
     config(within="quantization_config", quantization_status="initialized")),
    ("compressed-tensors: the config is one of 8-bit weights", "fp8",
     config(within="quantization_config", format="int-quantized")),
    ("compressed-tensors: every 8-bit weight has its scales", "fp8",
     tensors(lambda content: content.pop(f"{UP}.weight_scale"))),
    ("compressed-tensors: what is not quantized is ignored", "fp8",
     replace_tensor(f"{UP}.weight", lambda weight: weight.half())),
    ("compressed-tensors: the kernel takes every layer", "fp8",
     replace_tensor(f"{UP}.weight", lambda weight: weight[:-8])),
    ("compressed-tensors: what is not quantized is ignored", "w8a8",
     replace_tensor(f"{UP}.weight", lambda weight: weight.half())),
    ("compressed-tensors: every 8-bit weight has its scales", "w8a8",
     tensors(lambda content: content.pop(f"{UP}.weight_scale"))),
    ("compressed-tensors: every 8-bit weight has its scales", "w8a8",
     replace_tensor(f"{UP}.weight_scale", lambda scale: scale.reshape(1, -1))),
    ("compressed-tensors: the kernel takes every layer", "w8a8",
     replace_tensor(f"{UP}.weight", lambda weight: weight[:-8])),
    ("compressed-tensors: the kernel takes every layer", "w8a8",
     replace_tensor(f"{Q}.weight", lambda weight: weight.half())),
    ("launch: NUM_SHARD is a degree that works", "falcon", settings("NUM_SHARD", "2")),
    ("launch: NUM_SHARD is a degree that works", "gptq", settings("NUM_SHARD", "3")),
    ("launch: the dtype is one that the launcher knows", "16-bit", settings("DTYPE", "float32")),
    ("launch: the dtype is one that the launcher knows", "gptq", config(torch_dtype="float32")),
    ("launch: dtype and method do not exclude each other", "gptq", settings("DTYPE", "float16")),
    ("launch: QUANTIZE fits the weights", "gptq", settings("QUANTIZE", "bitsandbytes-nf4")),
    ("launch: QUANTIZE fits the weights", "16-bit", settings("QUANTIZE", "gptq")),
    ("launch: the token limits fit together", "gptq", settings("MAX_INPUT_TOKENS", "256")),
    ("launch: the token limits fit together", "gptq", settings("MAX_BATCH_PREFILL_TOKENS", "1")),
    ("launch: the token limits fit together", "gptq", settings("MAX_TOTAL_TOKENS", "many")),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "base", "plant"), FAULTS, ids=[f"{rule} ({base})" for rule, base, _ in FAULTS])
def test_a_planted_fault_is_caught_by_its_rule(
    rule: str, base: str, plant: Plant, good: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(good[base], tmp_path / "copy")
    assert failed(folder) == {}
    plant(folder)
    found = failed(folder)
    assert rule in found
    assert found[rule].source
    assert found[rule].detail != "as required"


def test_every_rule_has_a_planted_fault_and_a_name_of_its_own() -> None:
    names = [rule.name for rule in TGI.rules]
    assert len(set(names)) == len(names)
    assert {rule for rule, _, _ in FAULTS} == set(names)


def test_every_folder_is_held_against_every_rule(good: Mapping[str, Path], tmp_path: Path) -> None:
    for folder in (*good.values(), tmp_path):
        assert [check.name for check in TGI.check(folder)] == [rule.name for rule in TGI.rules]


def broken(
    folder: Path,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    specs: Mapping[str, TensorSpec | None] | None = None,
    **changes: Any,
) -> set[str]:
    """The rules that a good folder breaks with other values in its configs, launch files or headers; None removes."""
    found = ServedByTgi.on_disk(folder)
    files: dict[str, bytes] = dict(found.files)
    files["config.json"] = json.dumps({**found.config, **changes}).encode()
    files["tokenizer_config.json"] = json.dumps({**found.tokenizer_config, **(tokenizer or {})}).encode()
    settings = {**(found.environment or {}), **(environment or {})}
    files["launch/tgi.env"] = "".join(f"{key}={value}\n" for key, value in settings.items()).encode()
    tensors = {name: spec for name, spec in {**found.tensors, **(specs or {})}.items() if spec}
    weights = replace(found.weights, specs=tensors)
    served = ServedByTgi(files, weights, folder)
    return {rule.name for rule in TGI.rules if not rule.check(served).passed}


def without_tensors(folder: Path, *ends: str) -> dict[str, None]:
    return dict.fromkeys(name for name in _read(folder).tensors if name.endswith(ends))


@pytest.mark.parametrize(
    "key",
    ["max_position_embeddings", "n_positions", "max_seq_len", "n_embd", "hidden_size", "intermediate_size",
     "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "num_experts_per_tok"],
)  # fmt: skip
def test_whatever_the_launcher_counts_must_be_a_count(key: str, good: Mapping[str, Path]) -> None:
    rule = "config.json has counts where the launcher parses counts"
    values: list[tuple[Any, bool]] = [
        (-1, False), (1.5, False), (True, False), ("7", False), ([7], False), (None, True), (0, True), (7, True),
    ]  # fmt: skip
    for value, is_count in values:
        changes: dict[str, Any] = {key: value}
        assert (rule not in broken(good["gptq"], **changes)) == is_count, value


KEPT: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}),
    ("gptq", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}, "rope_scaling": {"rope_type": "yarn"}}),
    ("gptq", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}, "rope_scaling": {"type": "yarn"}}),
    ("gptq", {"tokenizer": {"bos_token": {"content": "<|start|>"}, "eos_token": None, "add_eos_token": False}}),
    ("gptq", {"tokenizer": {"chat_template": [{"name": "default", "template": "x"}]}}),
]


@pytest.mark.parametrize(("base", "changes"), KEPT, ids=str)
def test_what_tgi_reads_as_well_breaks_no_rule(base: str, changes: dict[str, Any], good: Mapping[str, Path]) -> None:
    assert broken(good[base], **changes) == set()


TEMPLATES = [{"name": "default", "template": "x"}, {"name": "tools"}]
BROKEN: list[tuple[str, str, dict[str, Any]]] = [
    ("rope_theta is given", "gptq", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    (
        "rope_scaling is given",
        "gptq",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 5e5}}},
    ),
    ("tokenizer_config.json can be parsed", "gptq", {"tokenizer": {"bos_token": 5}}),
    ("tokenizer_config.json can be parsed", "gptq", {"tokenizer": {"eos_token": {"text": "<|end|>"}}}),
    ("tokenizer_config.json can be parsed", "gptq", {"tokenizer": {"add_eos_token": "yes"}}),
    ("the chat template is in tokenizer_config.json", "gptq", {"tokenizer": {"chat_template": TEMPLATES}}),
]


@pytest.mark.parametrize(("rule", "base", "changes"), BROKEN, ids=str)
def test_a_value_that_tgi_does_not_read_breaks_its_rule(
    rule: str, base: str, changes: dict[str, Any], good: Mapping[str, Path]
) -> None:
    assert broken(good[base], **changes) == {rule}


def test_what_the_layout_writes_breaks_no_rule(good: Mapping[str, Path]) -> None:
    assert {name: failed(folder) for name, folder in good.items()} == {name: {} for name in good}


def test_the_head_of_gpt_neox_has_a_name_of_its_own_and_falcons_is_its_embedding(good: Mapping[str, Path]) -> None:
    rule = "the output head is there"
    head = TensorSpec((384, 128), torch.float16)
    assert rule in broken(good["16-bit"], model_type="gpt_neox")
    assert rule not in broken(good["16-bit"], model_type="gpt_neox", specs={"embed_out.weight": head})
    assert broken(good["falcon"], tie_word_embeddings=False) == set()
    assert broken(good["gptq"], specs={"lm_head.weight": None}, tie_word_embeddings=True) == set()


def test_a_folder_that_says_it_is_quantized_and_has_no_codes_breaks_a_rule(good: Mapping[str, Path]) -> None:
    codes = without_tensors(good["gptq"], ".qweight", ".qzeros", ".scales", ".g_idx")
    assert "GPTQ: every linear of the blocks is quantized" in broken(good["gptq"], specs=codes)
    rows = without_tensors(good["w8a8"], "_proj.weight", "_proj.weight_scale")
    assert "compressed-tensors: every 8-bit weight has its scales" in broken(good["w8a8"], specs=rows)


@pytest.mark.parametrize(
    ("shape", "dtype", "read"),
    [
        ((256, 1), torch.float32, True),
        ((256,), torch.float32, True),
        ((256, 1), torch.bfloat16, True),
        ((256, 1), torch.int32, False),
        ((1, 256), torch.float32, False),
    ],
)
def test_int8_scales_are_numbers_for_each_row(
    shape: tuple[int, ...], dtype: torch.dtype, read: bool, good: Mapping[str, Path]
) -> None:
    scales = {f"{UP}.weight_scale": TensorSpec(shape, dtype)}
    expected = set() if read else {"compressed-tensors: every 8-bit weight has its scales"}
    assert broken(good["w8a8"], specs=scales) == expected


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({}, True),
        ({"quantization_status": "frozen"}, True),
        ({"config_groups": {}}, False),
        ({"config_groups": {"group_0": {"weights": INT8}}}, True),
        *(({"config_groups": {"group_0": {"weights": INT8 | {key: value}}}}, False)
          for key, value in (("num_bits", 4), ("type", "float"), ("symmetric", False), ("dynamic", True))),
    ],
)  # fmt: skip
def test_int8_configs_say_what_tgis_loader_asks_for(
    changes: dict[str, Any], read: bool, good: Mapping[str, Path]
) -> None:
    quantization = {**_read(good["w8a8"]).quantization, **changes}
    expected = set() if read else {"compressed-tensors: the config is one of 8-bit weights"}
    assert broken(good["w8a8"], quantization_config=quantization) == expected


@pytest.mark.parametrize(
    ("base", "environment", "rules"),
    [
        ("16-bit", {"DTYPE": "bfloat16"}, set()),
        ("16-bit", {"QUANTIZE": "bitsandbytes-nf4", "DTYPE": "bfloat16"}, set()),
        ("gptq", {"MAX_INPUT_TOKENS": "100", "MAX_TOTAL_TOKENS": "101", "MAX_BATCH_PREFILL_TOKENS": "100"}, set()),
        ("gptq", {"MAX_INPUT_TOKENS": "100", "MAX_TOTAL_TOKENS": "100"}, {"launch: the token limits fit together"}),
        ("gptq", {"MAX_INPUT_TOKENS": "100", "MAX_BATCH_PREFILL_TOKENS": "99"},
         {"launch: the token limits fit together"}),
    ],
)  # fmt: skip
def test_launch_settings_may_go_as_far_as_tgi_does(
    base: str, environment: dict[str, str], rules: set[str], good: Mapping[str, Path]
) -> None:
    assert broken(good[base], environment=environment) == rules


def test_a_folder_beside_the_weights_is_not_looked_into(good: Mapping[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good["gptq"], tmp_path / "copy")
    shutil.copyfile(min(folder.glob("*.safetensors")), folder / "launch" / "model.safetensors")
    assert failed(folder) == {}


def test_a_falcon_with_alibi_is_not_held_against_the_rules_of_tgis_own_falcon(tmp_path: Path) -> None:
    """Transformers runs it, with defaults that are its own; without ALiBi the same folder breaks them."""
    folder = TgiModel(factories.falcon_rw_config(), NoQuantization(method="none")).write(tmp_path / "rw")
    config(drop="parallel_attn", num_kv_heads=3)(folder)
    assert failed(folder) == {}
    config(alibi=False)(folder)
    assert {"Falcon's config leaves nothing to defaults", "Falcon's heads of keys and values are counted"} <= set(
        failed(folder)
    )


def test_a_folder_as_transformers_writes_it_fails_for_what_is_known_to_break_tgi(tmp_path: Path) -> None:
    factories.save(factories.build(falcon_40b()), tmp_path)
    config(num_ln_in_parallel_attn=None)(tmp_path)
    assert set(failed(tmp_path)) == {
        "torch_dtype is given",
        "rope_theta is given",
        "Falcon's layer norms are counted",
        "the tokenizer's class is known",
        "the chat template is in tokenizer_config.json",
    }


ODD = st.sampled_from([None, True, -1, 0, 7, 1.5, "", "x", [], [1], {}, {"x": 1}, {"full_attention": 3}])


@given(data=st.data())
def test_a_malformed_config_is_a_failed_check_and_never_a_crash(data: st.DataObject, good: Mapping[str, Path]) -> None:
    found = deepcopy(_read(good[data.draw(st.sampled_from(sorted(good)))]))
    places = [(config, key) for config in _objects(found.config) for key in config]
    config, key = data.draw(st.sampled_from(places))
    config[key] = data.draw(ODD)
    assert [rule.check(found).name for rule in TGI.rules] == [rule.name for rule in TGI.rules]


_read = cache(ServedByTgi.on_disk)


def _objects(value: Any) -> list[dict[str, Any]]:
    """A JSON object and all objects in it."""
    if not isinstance(value, dict):
        return []
    return [value, *(inner for item in value.values() for inner in _objects(item))]


def test_failed_checks_are_listed_with_their_sources(tmp_path: Path) -> None:
    kept = Rule[ServedByTgi]("a", "x.py", lambda model: iter(()))
    small = Rule[ServedByTgi]("b", "y.py", lambda model: iter(["too small"]))
    gone = Rule[ServedByTgi]("c", "z.py", lambda model: iter(["gone"]))
    Server("S", ServedByTgi, [kept]).refuse_folder(tmp_path)
    with pytest.raises(QexportError, match="2 of 3 demands of S are not met") as caught:
        Server("S", ServedByTgi, [kept, small, gone]).refuse_folder(tmp_path)
    assert str(caught.value.where).split() == ["b:", "too", "small", "(y.py)", "c:", "gone", "(z.py)"]


def test_the_documentation_lists_every_rule_with_its_source() -> None:
    page = (Path(__file__).parent.parent / "docs/tgi.md").read_text().partition("## The contract")[2]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", page, flags=re.MULTILINE)[1:]
    stated = {name: source.replace("`", "").replace(", ", ": ") for name, source in rows if name != "---"}
    assert stated == {rule.name: rule.source for rule in TGI.rules}
