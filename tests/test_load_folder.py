"""Base models from folders: what is read, and every refusal with its fault planted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, HrmTextConfig, PretrainedConfig

import factories
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.digests import FileDigests
from qexport.errors import CompatibilityError, InputError, QexportError, RecipeError
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.progress import Notice, Progress
from qexport.reading.folders import artifact_place

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": factories.llama_config,
    "qwen2 tied": factories.qwen2_config,
    "mistral": factories.mistral_config,
    "falcon 7b tied": factories.falcon_config,
    "falcon 40b": factories.falcon_40b_config,
}


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.save(factories.build(factories.llama_config()), tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture(scope="session")
def saved_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.save(factories.build(factories.qwen2_config()), tmp_path_factory.mktemp("saved") / "tied")


@pytest.fixture
def model(saved_llama: Path, tmp_path: Path) -> Path:
    """A copy of a tiny Llama that a test may damage."""
    return Path(shutil.copytree(saved_llama, tmp_path / "model"))


@pytest.fixture
def tied(saved_tied: Path, tmp_path: Path) -> Path:
    """A copy of a tiny Qwen2 with tied embeddings that a test may damage."""
    return Path(shutil.copytree(saved_tied, tmp_path / "tied"))


def load(folder: Path | str, **settings: Any) -> Checkpoint:
    return load_checkpoint(LoadSettings(base=str(folder), **settings))


def refusal(folder: Path | str, error: type[QexportError] = InputError, **settings: Any) -> str:
    with pytest.raises(error) as caught:
        load(folder, **settings)
    return str(caught.value)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("shard_size", ["50GB", "60KB"])
def test_every_tensor_equals_what_was_saved(family: str, shard_size: str, tmp_path: Path) -> None:
    built = factories.build(CONFIGS[family]())
    checkpoint = load(factories.save(built, tmp_path / "model", max_shard_size=shard_size))
    expected = {name: tensor for name, tensor in built.state_dict().items() if name not in built.all_tied_weights_keys}
    assert list(checkpoint.weights.specs()) == list(expected)
    for name, tensor in expected.items():
        spec, read = checkpoint.weights.specs()[name], checkpoint.weights.read(name)
        assert (spec.shape, spec.dtype) == (tuple(tensor.shape), tensor.dtype) == (tuple(read.shape), read.dtype)
        assert torch.equal(read, tensor)


def test_files_travel_byte_for_byte_and_nothing_else_travels(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_bytes(b"{{ 1 }}\r\n")
    (model / "modeling_evil.py").write_text("raise SystemExit")
    (model / "merges.txt").write_bytes(b"#version: 0.2\r\n")
    checkpoint = load(model)
    assert set(checkpoint.files) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "additional_chat_templates/tool.jinja",
    }
    for name, content in checkpoint.files.items():
        assert content == (model / name).read_bytes()


def test_the_origin_has_the_folders_name_and_the_digest_of_every_file_read(tmp_path: Path, saved_llama: Path) -> None:
    folder = tmp_path / "my model"
    shutil.copytree(saved_llama, folder)
    origin = load(folder).origin
    assert (origin.kind, origin.name, origin.revision) == ("folder", "my model", None)
    assert set(origin.sha256) == {path.name for path in folder.iterdir()}
    for name, digest in origin.sha256.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert str(tmp_path) not in repr(origin)


def test_a_plan_waits_for_no_digest_of_the_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: FileDigests, path: Path) -> str:
        raise AssertionError("a file was hashed")

    monkeypatch.setattr(FileDigests, "_digest", never)
    assert "model.safetensors" in load(model).origin.sha256


def test_keys_that_load_code_are_dropped_at_every_depth_and_told(model: Path) -> None:
    evil = {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
        "_attn_implementation": "org/kernel",
        "trust_remote_code": True,
        "vision": {"auto_map": {"AutoConfig": "x.Y"}, "custom_pipelines": {}, "keep": [{"auto_map": 1, "b": 2}]},
        "_name_or_path": "/home/somebody/model",
    }
    change_config(model, **evil)
    events: list[Progress | Notice] = []
    config = load_checkpoint(LoadSettings(base=str(model)), progress=events.append).config
    assert not {"auto_map", "_attn_implementation", "trust_remote_code", "_name_or_path"} & set(config)
    assert config["vision"] == {"keep": [{"b": 2}]}
    assert config["hidden_size"] == 64
    told = [event.text for event in events if isinstance(event, Notice)]
    assert len(told) == 1
    assert "auto_map" in told[0]
    assert "custom_pipelines" in told[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "llama", "model_type": "llama"}', "'model_type' appears twice"),
        (b"[1]", "must hold a JSON object, not list"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{}", "model_type must name"),
        (b'{"model_type": 3}', "model_type must name"),
        (b" " * (1 << 22) + b"{}", "more than 4194304 bytes"),
    ],
)
def test_a_malformed_config_is_refused(model: Path, content: bytes, message: str) -> None:
    (model / "config.json").write_bytes(content)
    assert message in refusal(model)


def test_a_config_of_the_wrong_types_is_an_input_error(model: Path) -> None:
    change_config(model, hidden_size="wide")
    assert "hidden_size: 'wide' is not a whole number" in refusal(model)


def test_infinities_are_kept_as_transformers_writes_them(model: Path) -> None:
    change_config(model, limits=[0.0, float("inf")], others={"low": -float("inf"), "none": float("nan")})
    assert "Infinity" in (model / "config.json").read_text()
    config = load(model).config
    assert config["limits"] == [0.0, {"__float__": "Infinity"}]
    assert config["others"] == {"low": {"__float__": "-Infinity"}, "none": {"__float__": "NaN"}}


def test_a_config_with_more_layers_than_tensors_is_refused_before_the_model_is_built(model: Path) -> None:
    change_config(model, num_hidden_layers=500)
    assert "500 layers cannot come from 21 tensors" in refusal(model)


def test_a_base_of_which_a_part_is_quantized_is_refused(model: Path) -> None:
    change_config(model, text_config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert "16-bit model" in refusal(model)


def test_an_unknown_family_is_a_compatibility_error(model: Path) -> None:
    change_config(model, model_type="never-heard-of")
    assert "never-heard-of" in refusal(model, CompatibilityError)


def test_a_family_whose_weights_are_reshaped_in_an_unknown_way_is_refused(model: Path) -> None:
    config = HrmTextConfig(hidden_size=32, num_attention_heads=2, vocab_size=64, num_hidden_layers=2)
    (model / "config.json").write_text(config.to_json_string())
    assert "transformers makes model.L_module.layers.0.self_attn.q_proj.weight with Chunk" in refusal(
        model, CompatibilityError
    )


def test_missing_unexpected_misshapen_and_mistyped_tensors_are_listed_together(model: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.9.extra.weight"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(3, 64, dtype=torch.bfloat16)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.float64)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.int8)

    change_weights(model, damage)
    message = refusal(model)
    assert "5 tensors" in message
    assert "model.norm.weight: missing" in message
    assert "model.safetensors: model.layers.9.extra.weight: unexpected" in message
    assert "model.safetensors: lm_head.weight: shape [3, 64], but config.json requires [384, 64]" in message
    assert "model.layers.0.mlp.up_proj.weight: float64, but" in message
    assert "model.layers.1.mlp.up_proj.weight: int8, but" in message


def test_a_checkpoint_without_the_models_prefix_is_taken_for_the_model_as_transformers_does(tmp_path: Path) -> None:
    """The hub's `gpt2` is such a one, with masks among its weights."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    model = factories.build(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.zeros(1)

    change_weights(tmp_path, strip)
    weights = load(tmp_path).weights
    assert list(weights.specs()) == [name for name in model.state_dict() if name != "lm_head.weight"]
    for name in weights.specs():
        assert torch.equal(weights.read(name), model.state_dict()[name])
    change_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["wte.weight"] + 1}))
    assert "two different tensors" in refusal(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update({"wpe.weight": torch.full((16, 32), torch.nan)}))
    change_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["wte.weight"].clone()}))
    with pytest.raises(InputError, match=r"model\.safetensors: wpe\.weight"):
        load(tmp_path).weights.read("transformer.wpe.weight")


def test_a_checkpoint_that_lacks_the_models_prefix_in_some_names_is_refused_with_the_reason(model: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_weights(model, damage)
    assert "lack the prefix 'model'" in refusal(model)


def test_outdated_buffers_are_passed_over(model: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    change_weights(model, add)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in load(model).weights.specs()


def test_buffers_that_the_models_class_passes_over_are_passed_over(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    factories.build(config).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.zeros(1)}))
    assert "transformer.h.0.attn.bias" not in load(tmp_path).weights.specs()


def store_tied_copy(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def store(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"].clone())

    return store


def test_an_equal_copy_of_a_tied_head_is_accepted_and_not_shown(tied: Path) -> None:
    change_weights(tied, store_tied_copy(lambda weight: weight))
    specs = load(tied).weights.specs()
    assert "lm_head.weight" not in specs
    assert "model.embed_tokens.weight" in specs


def test_a_copy_of_a_tied_head_that_differs_in_its_last_bit_is_refused(tied: Path) -> None:
    def flip(weight: torch.Tensor) -> torch.Tensor:
        weight.view(torch.int16).view(-1)[-1] ^= 1
        return weight

    change_weights(tied, store_tied_copy(flip))
    assert "ties lm_head.weight to model.embed_tokens.weight" in refusal(tied)


def test_a_copy_of_a_tied_head_in_another_dtype_is_refused(tied: Path) -> None:
    change_weights(tied, store_tied_copy(lambda weight: weight.float()))
    assert "two different tensors" in refusal(tied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_found_when_its_tensor_is_read(model: Path, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value

    change_weights(model, plant)
    weights = load(model).weights
    weights.read("model.layers.0.mlp.down_proj.weight")
    with pytest.raises(InputError, match=f"1 of 8192 values are NaN or Inf\nwhere: .*model.safetensors: {name}"):
        weights.read(name)


def test_a_tensor_that_the_model_does_not_have_cannot_be_read(model: Path) -> None:
    with pytest.raises(InputError, match="no tensor with this name"):
        load(model).weights.read("model.layers.7.mlp.down_proj.weight")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(model: Path, name: str) -> None:
    (model / name).rename(model.parent / "outside")
    (model / name).symlink_to("../outside")
    assert "leads out of the model's folder" in refusal(model)


def test_a_templates_folder_that_is_a_link_out_of_the_folder_is_refused(model: Path) -> None:
    (model.parent / "outside").mkdir()
    (model.parent / "outside" / "secret.jinja").write_text("secret")
    (model / "additional_chat_templates").symlink_to("../outside")
    assert "leads out of the model's folder" in refusal(model)


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickles" in refusal(model)


@pytest.mark.parametrize(
    ("planted", "hint"),
    [
        ("adapter_config.json", "name it as load.adapter"),
        ("x.gguf", "pkg:package/file.gguf"),
        ("x.txt", "was saved to"),
    ],
)
def test_a_folder_without_a_config_says_what_it_may_be(tmp_path: Path, planted: str, hint: str) -> None:
    (tmp_path / planted).write_text("{}")
    message = refusal(tmp_path)
    assert "holds no config.json" in message
    assert hint in message


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf"])
def test_a_place_that_does_not_exist_is_not_called_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="there is no such file or folder"):
        artifact_place(tmp_path / name)


@pytest.mark.parametrize("base", ["./absent", "absent", "/absent/model", "a/b/c", "org/na me", "-a/b", "pkg:os", ""])
def test_a_base_that_is_nothing_known_is_refused(base: str) -> None:
    refusal(base)


def test_a_file_in_place_of_a_folder_is_refused(model: Path) -> None:
    assert "is a file, not a folder" in refusal(model / "config.json")


def test_a_revision_of_a_local_folder_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert "local path 'model'" in refusal("model", RecipeError, revision="main")
