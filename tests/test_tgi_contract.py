"""Each rule of the TGI contract, with the fault that it is for planted into a good folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
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
from qexport.export.rules import Rule, Server
from qexport.export.tgi.rules import TGI
from qexport.export.tgi.served import ServedByTgi
from qexport.quantize.settings import Nf4Settings, NoneSettings, W8a8Settings
from quantized_models import gptq_method
from tgi_folders import TgiModel, failed, falcon, falcon_40b, llama

Plant = Callable[[Path], None]

MODELS = {
    "gptq": TgiModel(llama()),
    "desc_act": TgiModel(llama(), gptq_method(desc_act=True)),
    "16-bit": TgiModel(llama(), NoneSettings(method="none")),
    "w8a8": TgiModel(llama(), W8a8Settings(method="w8a8")),
    "nf4": TgiModel(llama(), Nf4Settings(method="nf4")),
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
    ("Falcon's variant is one that TGI reads rightly", "falcon", config(multi_query=False)),
    ("Falcon's variant is one that TGI reads rightly", "falcon 40b", config(parallel_attn=False)),
    ("Falcon's variant is one that TGI reads rightly", "falcon", config(num_hidden_layers=80)),
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
    ("every layer is complete", "gptq", config(num_hidden_layers=3)),
    ("every layer is complete", "16-bit", tensors(lambda content: content.pop(f"{UP}.weight"))),
    ("the output head is there", "gptq", tensors(lambda content: content.pop("lm_head.weight"))),
    ("the folder is no adapter", "gptq", file("adapter_config.json", "{}")),
    ("GPTQ: config.json gives bits, group_size, sym and desc_act", "gptq",
     config(within="quantization_config", drop="desc_act")),
    ("GPTQ: both configs say the same", "gptq", config("quantize_config.json", sym=False)),
    ("GPTQ: zero points are stored less one", "gptq", quantization(checkpoint_format="gptq_v2")),
    ("GPTQ: bits and groups are the same everywhere", "gptq", quantization(dynamic={"^a$": {"bits": 8}})),
    ("GPTQ: bits and groups are the same everywhere", "gptq", quantization(modules_to_not_convert=[UP])),
    ("GPTQ: bits and groups are the same everywhere", "gptq", quantization(lm_head=True)),
    ("GPTQ: every module has qweight, qzeros, scales and g_idx", "gptq",
     tensors(lambda content: content.pop(f"{UP}.g_idx"))),
    ("GPTQ: the tensors have the dtypes and shapes of config.json", "gptq",
     replace_tensor(f"{UP}.scales", lambda scales: scales.bfloat16())),
    ("GPTQ: the tensors have the dtypes and shapes of config.json", "gptq", quantization(group_size=64)),
    ("GPTQ: every linear of the blocks is quantized", "gptq", tensors(make_dense)),
    ("GPTQ: a kernel takes every layer", "falcon", quantization(sym=True)),
    ("GPTQ: joined layers have the same g_idx", "desc_act",
     replace_tensor(f"{K}.g_idx", lambda g_idx: g_idx.flip(0))),
    ("quantized tensors of the family are read rightly", "gptq", take_for_neox),
    ("head and embedding are 16-bit", "gptq",
     tensors(lambda content: content.update({"lm_head.qweight": content.pop(f"{UP}.qweight")}))),
    ("weights are 16-bit where nothing says otherwise", "gptq", config(drop="quantization_config")),
    ("weights are 16-bit where nothing says otherwise", "16-bit",
     replace_tensor(f"{UP}.weight", lambda weight: weight.to(torch.uint8))),
    ("compressed-tensors: the config is one of int8 weights", "w8a8",
     config(within="quantization_config", format="pack-quantized")),
    ("compressed-tensors: the config is one of int8 weights", "w8a8",
     config(within="quantization_config", quantization_status="initialized")),
    ("compressed-tensors: what is not quantized is ignored", "w8a8",
     replace_tensor(f"{UP}.weight", lambda weight: weight.half())),
    ("compressed-tensors: every int8 weight has its scales", "w8a8",
     tensors(lambda content: content.pop(f"{UP}.weight_scale"))),
    ("compressed-tensors: every int8 weight has its scales", "w8a8",
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
    assert found[rule].detail != "as demanded"


def test_every_rule_has_a_planted_fault_and_a_name_of_its_own() -> None:
    names = [rule.name for rule in TGI.rules]
    assert len(set(names)) == len(names)
    assert {rule for rule, _, _ in FAULTS} == set(names)


def test_every_folder_is_held_against_every_rule(good: Mapping[str, Path], tmp_path: Path) -> None:
    for folder in (*good.values(), tmp_path):
        assert [check.name for check in TGI.check(folder)] == [rule.name for rule in TGI.rules]


def test_a_folder_beside_the_weights_is_not_looked_into(good: Mapping[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good["gptq"], tmp_path / "copy")
    shutil.copyfile(min(folder.glob("*.safetensors")), folder / "launch" / "model.safetensors")
    assert failed(folder) == {}


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
