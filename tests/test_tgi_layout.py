"""The tgi layout: what it writes for TGI 3.3, and what it refuses before any work."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

import factories
from qexport.architectures.structure import parse_config
from qexport.errors import CompatibilityError, QexportError
from qexport.export import SafetensorsSettings, TgiSettings
from qexport.export.layouts import SafetensorsLayout, make_layout
from qexport.export.tgi.families import ServedLinear, tgi_config, tgi_tokenizer_files
from qexport.export.tgi.kernels import Codes, choose_sym, fault, kernel
from qexport.export.tgi.launch import ENVIRONMENT
from qexport.export.tgi.rules import TGI
from qexport.export.tgi.served import ServedByTgi
from qexport.quantizing.fp8 import Fp8
from qexport.quantizing.int8 import Int8
from qexport.quantizing.nf4 import Nf4
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.w8a8 import W8a8
from qexport.tensors.safetensors_folder import SafetensorsFolder
from quantized_models import QuantizedModel, gptq_method
from tgi_folders import TgiModel, failed, falcon, falcon_40b, llama, tokenizer_files

SMALL: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=factories.VOCABULARY, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
NEOX = GPTNeoXConfig(**(SMALL | {"num_key_value_heads": None, "rotary_pct": 0.5}))
NONE = NoQuantization(method="none")
NF4 = Nf4(method="nf4")
INT8 = Int8(method="int8")
W8A8 = W8a8(method="w8a8")
FP8 = Fp8()

FALCON_7B = [
    ServedLinear((name,), ((out_features, in_features),), row, False)
    for name, out_features, in_features, row in (
        ("query_key_value", 4672, 4544, False), ("dense", 4544, 4544, True),
        ("dense_h_to_4h", 18176, 4544, False), ("dense_4h_to_h", 4544, 18176, True),
    )
]  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def settings_of(folder: Path) -> dict[str, str]:
    lines = (folder / "launch" / ENVIRONMENT).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("config", [llama(), falcon(), falcon_40b()], ids=["llama", "falcon", "falcon 40b"])
@pytest.mark.parametrize(
    "method", [gptq_method(), NONE, NF4, INT8, W8A8, FP8], ids=["gptq", "none", "nf4", "int8", "w8a8", "fp8"]
)
def test_every_method_gives_a_folder_that_keeps_every_rule(
    config: PretrainedConfig, method: Any, tmp_path: Path
) -> None:
    made = TgiModel(config, method)
    folder = made.write(tmp_path / "out")
    made.layout.check(folder)
    assert failed(folder) == {}


def test_a_broken_folder_is_refused_with_the_rule_and_its_source(tmp_path: Path) -> None:
    made = TgiModel(llama())
    folder = made.write(tmp_path / "out")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(QexportError, match=r"1 of \d+ demands of TGI") as caught:
        made.layout.check(folder)
    assert (
        caught.value.where
        == "there is a fast tokenizer: there is no tokenizer.json, which the router counts tokens with "
        "(router/src/server.rs)"
    )


def test_marlin_stays_where_it_takes_every_layer_and_sym_goes_where_it_does_not() -> None:
    marlin, exllama = TgiModel(llama()).layout, TgiModel(falcon()).layout
    assert marlin.quantization is not None
    assert exllama.quantization is not None
    assert (marlin.quantization["sym"], exllama.quantization["sym"]) == (True, False)
    assert marlin.notes[0] == "TGI computes with marlin (sym: true): Marlin takes every layer"
    assert exllama.notes[0].startswith("TGI computes with exllama (sym: false): Marlin takes no ")


def test_a_joined_layer_counts_as_one() -> None:
    """k_proj and v_proj of 64 outputs would be refused alone."""
    joined = ServedLinear(("q_proj", "k_proj", "v_proj"), ((128, 64), (64, 64), (64, 64)), False, False)
    alone = ServedLinear(("k_proj",), ((64, 64),), False, False)
    codes = Codes(4, 32, sym=True, desc_act=False)
    assert fault(codes, joined) is None
    assert fault(codes, alone) is not None
    assert fault(codes, joined, 2) is None
    assert fault(codes, joined, 4) is not None


def test_falcon_7b_is_served_by_exllama_at_4_bits_and_by_nothing_at_8() -> None:
    four, reason = choose_sym(Codes(4, 64, sym=True, desc_act=False), FALCON_7B)
    assert not four.sym
    assert "4672 x 4544" in reason
    assert [fault(four, linear) for linear in FALCON_7B] == [None] * 4
    assert {kernel(four, linear) for linear in FALCON_7B} == {"exllama"}
    eight, _ = choose_sym(Codes(8, 64, sym=True, desc_act=False), FALCON_7B)
    assert "reads past the end of 4544 inputs" in str(fault(eight, FALCON_7B[0]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "marlin"), ({"bits": 8}, "marlin"), ({"desc_act": True}, "marlin"), ({"group_size": -1}, "marlin"),
        ({"sym": False}, "exllama"), ({"group_size": 256}, "exllama"),
        ({"sym": False, "desc_act": True}, "triton"), ({"sym": False, "bits": 8}, "triton"), ({"bits": 2}, "triton"),
        ({"bits": 3}, None), ({"sym": False, "group_size": 48}, None),
    ],
)  # fmt: skip
def test_the_kernel_follows_the_codes(changes: dict[str, Any], expected: str | None) -> None:
    linear = ServedLinear(("o_proj",), ((768, 768),), True, False)
    codes = Codes(**({"bits": 4, "group_size": 64, "sym": True, "desc_act": False} | changes))
    assert (None if fault(codes, linear) else kernel(codes, linear)) == expected


def test_a_packed_layer_never_goes_to_exllama() -> None:
    linear = ServedLinear(("qkv_proj",), ((768, 256),), False, True)
    assert kernel(Codes(4, 64, sym=False, desc_act=False), linear) == "triton"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (TgiModel(llama(), gptq_method(bits=3)), "no kernel of TGI takes 3 bits"),
        (TgiModel(llama(), special={"lm_head": (4, 32)}), "lm_head: TGI reads it as 16-bit weights"),
        (TgiModel(llama(), special={"model.layers.0.mlp.up_proj": None}), "up_proj: TGI reads every linear"),
        (TgiModel(llama(), special={"model.layers.0.mlp.up_proj": (8, 32)}), "the same bits and groups everywhere"),
        (TgiModel(falcon(), gptq_method(bits=8)), "reads past the end of 192 inputs"),
        (TgiModel(falcon(), gptq_method(desc_act=True)), "Triton"),
        (TgiModel(factories.llama_config(hidden_size=96), gptq_method(group_size=16, sym=False)), "groups of 16"),
        (TgiModel(NEOX), "multiplied in the wrong order"),
        (TgiModel(NEOX, W8A8), "multiplied in the wrong order"),
        (TgiModel(llama(), Fp8(strategy="block")), "quant_method is 'fp8'"),
        (TgiModel(Qwen3Config(**SMALL, head_dim=32)), "takes 16-bit weights"),
        (TgiModel(Qwen3Config(**SMALL, head_dim=32), NF4), "takes 16-bit weights"),
        (TgiModel(MixtralConfig(**SMALL, num_local_experts=2)), "experts have their own kernels and names"),
        (TgiModel(factories.falcon_config(alibi=True)), "takes 16-bit weights"),
        (TgiModel(factories.falcon_config(multi_query=False), NONE), "head by head"),
        (TgiModel(factories.llama_config(hidden_size=72, intermediate_size=136), W8A8), "not multiples of 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_tgi_does_not_serve_is_refused_before_any_work(made: TgiModel, reason: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        _ = made.layout
    assert reason in str(caught.value)
    assert caught.value.mend


def test_weights_in_float32_are_refused_before_any_work() -> None:
    model = QuantizedModel(factories.build(llama(), dtype=torch.float32))
    checkpoint = replace(model.checkpoint, files=tokenizer_files())
    for outputs in (model.outputs, NONE.plan(checkpoint)):
        with pytest.raises(CompatibilityError, match="16-bit weights, not float32") as caught:
            make_layout(TgiSettings(layout="tgi"), outputs, model.structure, checkpoint)
        assert caught.value.mend == "set merge.dtype to bfloat16"


@pytest.mark.parametrize("model_type", ["falcon_h1", "smollm3"])
def test_families_newer_than_the_pinned_transformers_are_refused(model_type: str) -> None:
    made = TgiModel(llama(), NONE)
    config = json.dumps({**made.checkpoint.config, "model_type": model_type}).encode()
    planned = ServedByTgi.planned({"config.json": config}, made.layout.weights.specs)
    with pytest.raises(CompatibilityError, match=f"no model for {model_type}") as caught:
        TGI.refuse_plan(planned)
    assert "choose the layout vllm" in str(caught.value.mend)


def test_w8a8_layers_that_tgi_joins_must_be_quantized_together() -> None:
    settings = W8a8(method="w8a8", skip_modules=["*.k_proj"])
    with pytest.raises(CompatibilityError, match="would not serve") as caught:
        _ = TgiModel(llama(), settings).layout
    assert "joins these layers, and only model.layers.0.self_attn.k_proj is not quantized" in str(caught.value)


def test_a_w8a8_layer_that_stands_alone_may_stay_dense(tmp_path: Path) -> None:
    settings = W8a8(method="w8a8", skip_modules=["*.o_proj"])
    assert failed(TgiModel(llama(), settings).write(tmp_path / "out")) == {}


@pytest.mark.parametrize(
    ("config", "runs"),
    [
        (Qwen3Config(**SMALL, head_dim=32), "TGI's attention"),
        (factories.falcon_config(alibi=True), "slow, on one GPU"),
    ],
    ids=["qwen3", "falcon with alibi"],
)
def test_families_without_a_model_of_tgi_are_served_in_16_bits_and_said_to_be(
    config: PretrainedConfig, runs: str, tmp_path: Path
) -> None:
    made = TgiModel(config, NONE)
    assert any(runs in note for note in made.layout.notes)
    assert failed(made.write(tmp_path / "out")) == {}


@pytest.mark.parametrize(
    ("method", "flag", "note"),
    [
        (NF4, "bitsandbytes-nf4", "always with double quantization and blocks of 64"),
        (Nf4(method="nf4", quant_type="fp4"), "bitsandbytes-fp4", "bitsandbytes-fp4"),
        (INT8, "bitsandbytes", "a threshold of 6.0"),
    ],
)  # fmt: skip
def test_what_only_the_server_can_quantize_is_merged_weights_and_a_flag(
    method: Nf4 | Int8, flag: str, note: str, tmp_path: Path
) -> None:
    made = TgiModel(llama(), method)
    assert made.layout.quantization is None
    assert note in made.layout.notes[0]
    folder = made.write(tmp_path / "out")
    assert "quantization_config" not in read(folder / "config.json")
    assert settings_of(folder)["QUANTIZE"] == flag
    assert settings_of(folder)["DTYPE"] == "bfloat16"
    assert made.layout.card.text == "the merged weights, not quantized"
    assert any("TGI quantizes every linear by itself" in note for note in made.layout.card.serving)


@pytest.mark.parametrize("method", [NF4, INT8], ids=["nf4", "int8"])
def test_merged_weights_lie_as_the_base_has_them_also_where_codes_would_be_transposed(
    method: Any, tmp_path: Path
) -> None:
    """GPT-2's matrices are [in, out], and its linears not square."""
    made = TgiModel(factories.gpt2_config(), method)
    with SafetensorsFolder(made.write(tmp_path / "out")) as weights:
        assert weights.specs() == made.checkpoint.weights.specs()


def test_double_quantization_has_no_flag_and_the_notes_say_so() -> None:
    plain = TgiModel(llama(), Nf4(method="nf4", double_quant=False)).layout.notes[0]
    double = TgiModel(llama(), Nf4(method="nf4", double_quant=True)).layout.notes[0]
    assert "not what the recipe asks for" in plain
    assert "not what the recipe asks for" not in double


@pytest.mark.parametrize("method", [gptq_method(), W8A8, NONE], ids=["gptq", "w8a8", "none"])
def test_the_weights_are_those_of_the_safetensors_layout(method: Any) -> None:
    made = TgiModel(llama(), method)
    settings = SafetensorsSettings(layout="safetensors", max_shard_size="200KB")
    other = SafetensorsLayout(settings, made.outputs, made.model.structure).weights
    assert made.layout.weights.equal(other)
    assert made.layout.weights.specs == other.specs


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (llama(), {"rope_theta": 5e5, "tie_word_embeddings": False, "head_dim": 32}),
        (falcon(), {"rope_theta": 10000.0, "num_kv_heads": 1, "parallel_attn": True, "multi_query": True}),
        (falcon_40b(), {"num_kv_heads": 2, "num_ln_in_parallel_attn": 2, "new_decoder_architecture": True}),
        (factories.falcon_40b_config(num_ln_in_parallel_attn=1), {"num_ln_in_parallel_attn": 1}),
        (NEOX, {"rotary_pct": 0.5, "rotary_emb_base": 10000}),
        (
            factories.llama_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}),
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            Gemma3TextConfig(**SMALL | {"num_hidden_layers": 6, "sliding_window_pattern": 3}),
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3},
        ),
        (Phi3Config(**SMALL | {"partial_rotary_factor": 0.5}), {"partial_rotary_factor": 0.5}),
        (GPT2Config(n_embd=32, n_head=2), {"n_embd": 32, "tie_word_embeddings": True}),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_the_config_says_everything_in_older_words_and_means_the_same(
    config: PretrainedConfig, expected: dict[str, Any]
) -> None:
    original = json.loads(config.to_json_string())
    made = tgi_config(original)
    assert {key: made[key] for key in expected} == expected
    after, before = parse_config(made).to_dict(), parse_config(original).to_dict()
    told_otherwise = {"num_kv_heads", "num_ln_in_parallel_attn", "dtype", "partial_rotary_factor"}
    assert {key: after.get(key) for key in before if key not in told_otherwise} == {
        key: value for key, value in before.items() if key not in told_otherwise
    }


def test_a_config_of_transformers_4_keeps_its_words() -> None:
    original = {
        "model_type": "llama",
        "hidden_size": 64,
        "rope_theta": 7.0,
        "rope_scaling": {"type": "linear", "factor": 2},
    }
    made = tgi_config(original)
    assert (made["rope_theta"], made["rope_scaling"]) == (7.0, {"type": "linear", "factor": 2})
    assert "rope_parameters" not in made


def test_the_tokenizer_config_is_in_older_words() -> None:
    files = tokenizer_files() | {"additional_chat_templates/tools.jinja": b"{{ tools }}"}
    config = json.loads(files["tokenizer_config.json"]) | {"extra_special_tokens": ["<a>"]}
    made = json.loads(
        tgi_tokenizer_files({**files, "tokenizer_config.json": json.dumps(config).encode()})["tokenizer_config.json"]
    )
    assert made["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert made["additional_special_tokens"] == ["<a>"]
    assert not {"extra_special_tokens", "backend"} & made.keys()
    assert [item["name"] for item in made["chat_template"]] == ["default", "tools"]
    assert made["chat_template"][0]["template"] == files["chat_template.jinja"].decode()


def test_a_class_and_a_template_that_older_readers_know_stay() -> None:
    config = b'{"tokenizer_class": "LlamaTokenizerFast", "chat_template": "x"}'
    made = json.loads(
        tgi_tokenizer_files({"tokenizer.json": b"{}", "tokenizer_config.json": config})["tokenizer_config.json"]
    )
    assert made == json.loads(config)


def test_a_base_without_a_fast_tokenizer_is_refused_before_any_work() -> None:
    made = TgiModel(llama())
    without = replace(made.checkpoint, files={"tokenizer.model": b""})
    with pytest.raises(CompatibilityError, match="fast tokenizer"):
        make_layout(TgiSettings(layout="tgi"), made.outputs, made.model.structure, without)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (TgiModel(llama()), [1, 2]),
        (TgiModel(llama(), NONE), [1, 2]),
        (TgiModel(falcon()), [1]),
        (TgiModel(falcon(), NONE), [1]),
        (TgiModel(factories.falcon_config(hidden_size=71 * 8, num_attention_heads=71), NONE), [1]),
        (TgiModel(falcon_40b()), [1, 2]),
        (TgiModel(llama(), gptq_method(group_size=-1)), [1, 2]),
        (TgiModel(llama(), gptq_method(group_size=128)), [1]),
    ],
    ids=["llama", "llama 16-bit", "falcon", "falcon 16-bit", "71 heads", "falcon 40b", "one group", "wide groups"],
)
def test_shards_follow_from_heads_groups_and_kernels(made: TgiModel, expected: list[int], tmp_path: Path) -> None:
    assert made.layout.notes[-1].endswith(f": {', '.join(map(str, expected))}")
    folder = made.write(tmp_path / "out")
    assert f"`NUM_SHARD` may be: {', '.join(map(str, expected))}." in (folder / "launch/README.md").read_text()


def test_the_launch_files_agree_with_each_other(tmp_path: Path) -> None:
    folder = TgiModel(llama()).write(tmp_path / "out")
    settings = settings_of(folder)
    assert settings == {
        "MODEL_ID": "/models/tiny", "QUANTIZE": "gptq", "NUM_SHARD": "1", "MAX_INPUT_TOKENS": "192",
        "MAX_TOTAL_TOKENS": "256", "MAX_BATCH_PREFILL_TOKENS": "192",
    }  # fmt: skip
    deployment, service = YAML(typ="safe").load_all((folder / "launch/kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    container = pod["spec"]["containers"][0]
    assert {item["name"]: item["value"] for item in container["env"]} == settings
    assert container["image"] == TgiSettings().image
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }
    compose = YAML(typ="safe").load((folder / "launch/compose.yaml").read_text())["services"]["tgi"]
    assert compose["env_file"] == [ENVIRONMENT]
    assert compose["image"] == TgiSettings().image
    assert compose["volumes"] == ["${MODEL_FOLDER:-..}:/models/tiny:ro"]


def test_the_docker_run_command_is_a_shell_script_that_names_everything(tmp_path: Path) -> None:
    script = (TgiModel(llama()).write(tmp_path / "out") / "launch/docker-run.sh").read_text()
    command = shlex.split(script.partition("exec ")[2])
    assert command[:2] == ["docker", "run"]
    assert command[command.index("--env-file") + 1] == f"$here/{ENVIRONMENT}"
    assert command[command.index("-v") + 1] == "$folder:/models/tiny:ro"
    assert command[-1] == TgiSettings().image


def test_memory_counts_weights_as_the_server_holds_them(tmp_path: Path) -> None:
    """The cache is the same; nf4 takes a quarter of the 16-bit linears, int8 half."""
    needed = {method.method: TgiModel(llama(), method).layout.launch.gpu_bytes(1) for method in (NONE, NF4, INT8)}
    linears = sum(
        linear.out_features * linear.in_features
        for block in TgiModel(llama()).model.structure.linears.values()
        for linear in block
    )
    assert needed["none"] - needed["int8"] == linears
    assert needed["none"] - needed["nf4"] == pytest.approx(linears * 1.5, rel=0.02)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(7)
    first, second = (TgiModel(llama()).write(tmp_path / name) for name in ("a", "b"))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
