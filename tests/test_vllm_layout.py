"""What the layout vllm refuses, what it writes, and what its launch files say."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from ruamel.yaml import YAML
from transformers import PretrainedConfig

import factories
import vllm_folders
from qexport.architectures.architecture import Architecture
from qexport.artifact.names import label
from qexport.errors import CompatibilityError
from qexport.export import SafetensorsSettings, VllmSettings
from qexport.export.layouts import SafetensorsLayout
from qexport.export.vllm.families import SplitLinear, degrees
from qexport.export.vllm.launch import VllmLaunch, launch_files, max_model_len
from qexport.export.vllm.layout import VllmLayout
from qexport.quantizing.fp8 import Fp8
from qexport.quantizing.int8 import Int8
from qexport.quantizing.nf4 import Nf4
from quantized_models import QuantizedModel, gptq_method
from vllm_folders import CONFIGS, Form, layout, llama

Q0, DOWN0, UP0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1"
EXPERTS = tuple(f"model.layers.0.block_sparse_moe.experts.{each}.w1" for each in range(4))
ALL_UP0 = (UP0, "model.layers.0.mlp.gate_proj")
ALL_Q0 = tuple(f"model.layers.0.self_attn.{each}_proj" for each in "qkv")


@pytest.mark.parametrize(
    ("model", "form", "words"),
    [
        (llama(method=gptq_method(sym=False)), "gptq", "format: compressed-tensors"),
        (llama(method=gptq_method(desc_act=True, group_size=16)), "compressed-tensors", "static_groups"),
        (llama(method=gptq_method(bits=8)), "gptq", "method w8a8"),
        (llama(method=gptq_method(bits=2)), "compressed-tensors", "use bits: 4"),
        (llama(method=gptq_method(group_size=16)), "gptq", "group_size 16"),
        (llama(special={"lm_head": (4, 32)}), "gptq", "lm_head"),
        (llama(special={Q0: None}), "gptq", "one layer, which cannot be quantized in two ways"),
        (llama(special={UP0: (4, 64)}), "compressed-tensors", "cannot be quantized in two ways"),
        (llama(special={Q0: None}), "gptq", "q_proj (unquantized), k_proj (4 bits, groups of 32, symmetric), v_proj"),
        (llama(special={Q0: None}), "gptq", "*.self_attn.[qkv]_proj"),
        (
            QuantizedModel(factories.build(factories.mixtral_config()), special=dict.fromkeys(EXPERTS, (4, 64))),
            "gptq",
            "vLLM looks for model.layers.0.block_sparse_moe.experts and finds 4 bits, groups of 32",
        ),
        (QuantizedModel(factories.build(factories.falcon_config(ffn_hidden_size=128))), "gptq", "ffn_hidden_size"),
        (QuantizedModel(factories.build(factories.gpt2_config())), "gptq", "turns GPT-2's matrices around"),
        (
            QuantizedModel(factories.build(factories.mixtral_config()), special={EXPERT: None}),
            "compressed-tensors",
            "takes all experts for quantized",
        ),
    ],
)
def test_what_vllm_would_not_serve_is_refused_with_the_way_out(model: QuantizedModel, form: Form, words: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        layout(model, form)
    assert words in str(caught.value)


@pytest.mark.parametrize("method", [Nf4(method="nf4"), Int8(method="int8")])
def test_bitsandbytes_is_refused(method: Nf4 | Int8) -> None:
    model = llama(special={})
    with pytest.raises(CompatibilityError, match="vLLM") as caught:
        layout(model, outputs=method.plan(model.checkpoint))
    assert "dropped bitsandbytes in 0.28" in str(caught.value)


@pytest.mark.parametrize("strategy", ["channel", "block"])
@pytest.mark.parametrize(("skipped", "refused"), [("*.k_proj", True), ("*.gate_proj", True), ("*.o_proj", False)])
def test_layers_in_fp8_that_vllm_joins_are_quantized_together(
    strategy: Literal["channel", "block"], skipped: str, refused: bool
) -> None:
    model = QuantizedModel(factories.build(CONFIGS["blocks"]()))
    outputs = Fp8(strategy=strategy, skip_modules=[skipped]).plan(model.checkpoint)
    if not refused:
        assert layout(model, outputs=outputs).quantization
        return
    with pytest.raises(CompatibilityError, match="cannot be quantized in two ways"):
        layout(model, outputs=outputs)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (factories.llama_config(hidden_size=192, intermediate_size=256), "q_proj: 192 outputs are no multiple of 128"),
        (factories.llama_config(hidden_size=256, intermediate_size=192), "gate_proj: 192 outputs are no multiple of"),
        (factories.falcon_config(hidden_size=256), "blocks of layers that are stored joined were not tried"),
        (factories.mixtral_config(), "outputs of an expert are no multiple of 128"),
    ],
    ids=["q", "gate", "falcon", "experts"],
)
def test_blocks_of_fp8_do_not_span_joined_layers(config: PretrainedConfig, words: str) -> None:
    model = QuantizedModel(factories.build(config))
    with pytest.raises(CompatibilityError) as caught:
        layout(model, outputs=Fp8(strategy="block").plan(model.checkpoint))
    assert words in str(caught.value)
    assert "strategy: channel" in str(caught.value.mend)


@pytest.mark.parametrize(
    ("dtype", "changes", "words"),
    [
        (torch.float32, {}, "merge.dtype"),
        (torch.float16, {"model_type": "gemma2"}, "does not run gemma2 in float16"),
        (torch.bfloat16, {"architectures": ["GPTNeoXForCausalLM"]}, "has no class in vLLM"),
    ],
)
def test_dtypes_and_families_that_vllm_does_not_run_are_refused(
    dtype: torch.dtype, changes: Mapping[str, Any], words: str
) -> None:
    model = QuantizedModel(factories.build(factories.llama_config(), dtype=dtype))
    changed = replace(model.checkpoint, architecture=Architecture({**model.checkpoint.config, **changes}))
    with pytest.raises(CompatibilityError) as caught:
        VllmLayout(VllmSettings(layout="vllm"), model.outputs, model.structure, changed)
    assert words in str(caught.value)


def test_a_base_without_a_tokenizer_is_refused_by_the_plan() -> None:
    model = llama(special={})
    bare = replace(model.checkpoint, files={})
    with pytest.raises(CompatibilityError) as caught:
        VllmLayout(VllmSettings(layout="vllm"), model.outputs, model.structure, bare)
    assert "tokenizer.json" in str(caught.value)


def test_all_problems_are_in_one_message() -> None:
    with pytest.raises(CompatibilityError) as caught:
        layout(llama(method=gptq_method(bits=8, sym=False, group_size=16)))
    assert all(words in str(caught.value) for words in ("bits 8", "sym: false", "group_size 16"))


@pytest.mark.parametrize(
    ("model", "form"),
    [
        (llama(special={DOWN0: None}), "gptq"),
        (llama(special={DOWN0: (4, 64)}), "gptq"),
        (llama(method=gptq_method(group_size=-1)), "gptq"),
        (llama(method=gptq_method(sym=False)), "compressed-tensors"),
        (llama(special=dict.fromkeys(ALL_UP0, (4, 64))), "compressed-tensors"),
        (llama(special=dict.fromkeys(ALL_UP0, (4, 64))), "gptq"),
        (llama(special=dict.fromkeys(ALL_Q0, None) | dict.fromkeys(ALL_UP0, (4, 64))), "gptq"),
        (llama(special=dict.fromkeys(ALL_Q0, None) | dict.fromkeys(ALL_UP0, (4, 64))), "compressed-tensors"),
    ],
)
def test_what_vllm_reads_is_written_and_passes(model: QuantizedModel, form: Form, tmp_path: Path) -> None:
    made = layout(model, form)
    writer = made.weights.writer(tmp_path)
    for record in model.records():
        writer.write(record)
    writer.finish()
    made.write_files(tmp_path, model.checkpoint)
    made.check(tmp_path)


def test_gptq_weights_are_those_of_the_safetensors_layout() -> None:
    model = llama()
    plain = SafetensorsLayout(SafetensorsSettings(layout="safetensors"), model.outputs, model.structure)
    assert layout(model).weights.equal(plain.weights)
    assert not layout(model, "compressed-tensors").weights.equal(plain.weights)


def test_several_schemes_name_their_modules(tmp_path: Path) -> None:
    quantization = layout(llama(special=dict.fromkeys(ALL_UP0, (4, 64))), "compressed-tensors").quantization
    assert quantization is not None
    groups = quantization["config_groups"].values()
    named = [name for group in groups for name in group["targets"]]
    assert len(groups) == 2
    assert len(named) == len(set(named)) == 14
    assert quantization["ignore"] == ["lm_head"]


def test_the_launch_files_are_what_their_readers_parse(tmp_path: Path) -> None:
    folder = vllm_folders.write(tmp_path / "a", "gptq") / "launch"
    yaml = YAML(typ="safe")
    [service] = yaml.load((folder / "compose.yaml").read_text())["services"].values()
    assert service["command"][:2] == ["--model", "/model"]
    assert service["command"][service["command"].index("--max-model-len") + 1] == "256"
    kserve = yaml.load((folder / "kserve.yaml").read_text())
    assert (kserve["kind"], kserve["metadata"]["name"]) == ("InferenceService", "tiny")
    [container] = kserve["spec"]["predictor"]["containers"]
    assert container["args"][:2] == ["--model", "/mnt/models"]
    arguments = json.loads((folder / "triton/tiny/1/model.json").read_text())
    assert arguments == {"model": "/model", "dtype": "bfloat16", "max_model_len": 256, "tensor_parallel_size": 1}
    assert parse_pbtxt((folder / "triton/tiny/config.pbtxt").read_text()) == {
        "backend": "vllm",
        "instance_group": [{"count": 1, "kind": "KIND_MODEL"}],
    }
    subprocess.run(["sh", "-n", folder / "vllm-serve.sh"], check=True)
    assert all(str(tmp_path) not in path.read_text() for path in folder.rglob("*") if path.is_file())


def parse_pbtxt(text: str) -> dict[str, Any]:
    """Enough of protobuf's text format for a small model configuration."""
    tokens = text.replace(":", " : ").split()

    def message() -> dict[str, Any]:
        fields: dict[str, Any] = {}
        while tokens and tokens[0] != "}":
            name = tokens.pop(0)
            fields[name] = value() if tokens[0] == ":" or tokens[0] in "[{" else None
        return fields

    def value() -> Any:
        token = tokens.pop(0)
        if token == ":":
            return value()
        if token == "{":
            inner = message()
            assert tokens.pop(0) == "}"
            return inner
        if token == "[":
            items = []
            while tokens[0] != "]":
                items.append(value())
            tokens.pop(0)
            return items
        return token.strip('"') if not token.isdigit() else int(token)

    parsed = message()
    assert not tokens
    return parsed


def test_a_script_serves_the_folder_above_it(tmp_path: Path) -> None:
    """With a stand-in for vllm on the PATH that prints its arguments."""
    folder = vllm_folders.write(tmp_path / "a b", "gptq")
    echo = tmp_path / "bin" / "vllm"
    echo.parent.mkdir()
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$VLLM_CPU_INT4_W4A8"\n')
    echo.chmod(0o755)
    run = subprocess.run(
        ["sh", folder / "launch" / "vllm-serve.sh", "--enforce-eager"],
        env={"PATH": f"{echo.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    *words, rounds = run.stdout.splitlines()
    assert rounds == "0", "with 4-bit codes in bfloat16"
    assert words[0] == "serve"
    assert Path(words[1]).resolve() == folder
    assert words[-1] == "--enforce-eager"
    assert dict(zip(words[2:-1:2], words[3:-1:2], strict=True)) == {
        "--served-model-name": "tiny",
        "--dtype": "bfloat16",
        "--max-model-len": "256",
        "--tensor-parallel-size": "1",
        "--port": "8000",
    }


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("falcon-7b", "falcon-7b"),
        ("smollm2-135m-release-notes-1.4.0+gptq-4bit", "smollm2-135m-release-notes-1-4-0-gptq-4bit"),
        ("Ünïcode", "n-code"),
        ("___", "model"),
        ("x" * 80, "x" * 44 + "-d929cdee"),
        ("6B-chat", "model-6b-chat"),
        ("0" * 80, "model-" + "0" * 38 + "-4c7f3da0"),
    ],
)
def test_names_are_ones_that_kubernetes_takes(origin: str, name: str) -> None:
    assert label(origin) == name


def test_the_length_is_the_smallest_that_the_config_says() -> None:
    assert max_model_len({"max_position_embeddings": 4096, "seq_length": 2048}) == 2048
    assert max_model_len({}) is None
    files = launch_files(
        VllmLaunch(
            name="tiny",
            image="a:1",
            triton_image="b:1",
            max_model_len=None,
            dtype="float16",
            degrees=[1],
            rounded_by_amx=False,
        )
    )
    assert all(b"max-model-len" not in content and b"max_model_len" not in content for content in files.values())


@pytest.mark.parametrize(
    ("config", "group_size", "expected"),
    [
        ({"num_attention_heads": 71, "model_type": "falcon", "multi_query": True}, 64, [1]),
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, 128, [1, 2, 4, 8, 16]),
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, 1024, [1, 2, 4]),
        ({"num_attention_heads": 32, "num_key_value_heads": 8, "mamba_d_ssm": 1}, 128, [1]),
    ],
)
def test_degrees_leave_whole_heads_and_groups(config: dict[str, Any], group_size: int, expected: list[int]) -> None:
    linears = [
        SplitLinear("a.q_proj", 4096, 4096, group_size, True),
        SplitLinear("a.o_proj", 4096, 4096, group_size, True),
        SplitLinear("a.down_proj", 4096, 8192, group_size, True),
    ]
    assert degrees(config, linears) == expected


@pytest.mark.parametrize(
    ("linear", "expected"),
    [
        (SplitLinear("a.o_proj", 64, 256, None, False), [1, 2, 4, 8, 16]),
        (SplitLinear("a.o_proj", 64, 256, 64, False), [1, 2, 4]),  # whole groups
        (SplitLinear("a.o_proj", 64, 32, None, True), [1, 2, 4]),  # whole words
        (SplitLinear("a.up_proj", 32, 64, 64, True), [1, 2, 4]),  # whole words of the outputs' zero points
        (SplitLinear("a.up_proj", 32, 64, 64, False), [1, 2, 4, 8, 16]),
        (SplitLinear("a.up_proj", 24, 64, None, False), [1, 2, 4, 8]),
        (SplitLinear("a.k_proj", 3, 64, None, True), [1, 2, 4, 8, 16]),  # goes by the heads
        (SplitLinear("a.k_proj", 256, 256, 128, False, 128), [1, 2]),  # whole blocks
        (SplitLinear("a.up_proj", 512, 256, 128, False, 128), [1, 2, 4]),
    ],
)
@pytest.mark.parametrize("others", [(), (SplitLinear("b.up_proj", 4096, 4096, None, True),)])
def test_every_layer_must_be_divisible(
    linear: SplitLinear, others: tuple[SplitLinear, ...], expected: list[int]
) -> None:
    assert degrees({"num_attention_heads": 16, "num_key_value_heads": 16}, [linear, *others]) == expected


@pytest.mark.parametrize(
    ("heads", "shared", "expected"),
    [(12, 12, [1, 2, 3, 4, 6, 12]), (12, 4, [1, 2, 4, 12]), (12, 3, [1, 3, 6, 12]), (12, 1, [1, 2, 3, 4, 6, 12])],
)
def test_heads_of_keys_are_divided_or_copied_whole(heads: int, shared: int, expected: list[int]) -> None:
    assert degrees({"num_attention_heads": heads, "num_key_value_heads": shared}, []) == expected


def test_notes_say_what_the_kernels_want() -> None:
    notes = " ".join(layout(llama()).notes)
    assert "AVX-512" in notes
    assert "--dtype float16" in notes
    uneven = QuantizedModel(factories.build(factories.llama_config(intermediate_size=104)), gptq_method(group_size=-1))
    assert "multiples of 32" in " ".join(layout(replace(uneven)).notes)
