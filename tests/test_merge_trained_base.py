"""An adapter that was trained on 4 bits: the base as bitsandbytes and transformers load it, and merges onto it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

import adapters
import factories
from qexport.architectures.architecture import Architecture
from qexport.artifact.manifest import Manifest
from qexport.artifact.report import Report
from qexport.errors import CompatibilityError, NumericalError, RecipeError
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.merge import MergeSettings, TrainedOn
from qexport.merge.merging import Merged, merge
from qexport.merge.trained_base import TrainedSource, quantized_layers
from qexport.pipeline import plan, run
from qexport.recipe import Recipe, load_recipe

NF4 = TrainedOn(quant_type="nf4", double_quant=True)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("skip", [None, ["lm_head", "down_proj"], ["lm_head", r"model.layers.1"]], ids=str)
@pytest.mark.parametrize("name", factories.FAMILIES)
def test_the_layers_are_those_that_transformers_replaces(name: str, skip: list[str] | None) -> None:
    architecture = Architecture(factories.FAMILIES[name].to_dict())
    model = architecture.empty_model()
    wanted = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    skipped = HfQuantizer.get_modules_to_not_convert(model, skip, list(model._keep_in_fp32_modules or ()))
    replace_with_bnb_linear(model, skipped, wanted)
    replaced = {path for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    head = {architecture.structure.head} if architecture.structure.tied else set()  # its weight is the embedding's
    how = NF4.model_copy(update={"skip_modules": skip})
    naming = architecture.naming
    assert quantized_layers(architecture, how).keys() == {naming.files[f"{path}.weight"] for path in replaced - head}
    assert ("falcon" in name and name not in ("falcon h1", "falcon 3")) == (not replaced)


def test_what_transformers_4_quantized() -> None:
    falcon = Architecture(factories.falcon_config().to_dict())
    older = NF4.model_copy(update={"transformers": 4})
    expected = {f"{linear.name}.weight" for linear in falcon.structure.block_linears}
    assert quantized_layers(falcon, older).keys() == expected
    with pytest.raises(CompatibilityError, match="experts") as caught:
        quantized_layers(Architecture(factories.mixtral_config().to_dict()), older)
    assert caught.value.where == "merge.trained_on.transformers"


def load_in_4bit(folder: Path, how: TrainedOn) -> PreTrainedModel:
    """The live model, as training loaded it."""
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=how.quant_type,
        bnb_4bit_use_double_quant=how.double_quant,
        bnb_4bit_compute_dtype=how.compute_dtype or torch.float32,
        llm_int8_skip_modules=how.skip_modules,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=how.dtype or "auto")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its forward would repack the weights in place
    assert isinstance(model, PreTrainedModel)
    return model


def live_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The values that each parameter stands for, by bitsandbytes' own reading."""
    return {
        name: functional.dequantize_4bit(value.data, value.quant_state)
        if isinstance(value, Params4bit)
        else value.detach()
        for name, value in model.named_parameters()
    }


CASES: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "llama nf4": (factories.llama_config(), {}),
    "llama fp4": (factories.llama_config(), {"quant_type": "fp4", "double_quant": False}),
    "llama, modules skipped": (factories.llama_config(), {"skip_modules": ["lm_head", "v_proj"]}),
    "llama in float16": (factories.llama_config(), {"dtype": "float16"}),
    "llama tied": (factories.llama_config(tie_word_embeddings=True), {}),
    "gpt2": (factories.gpt2_config(), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_base_has_the_live_weights_bit_for_bit(tmp_path: Path, case: str) -> None:
    config, changes = CASES[case]
    factories.save(factories.build(config), tmp_path)
    how = TrainedOn.model_validate({"quant_type": "nf4", "double_quant": True} | changes)
    stored = load_checkpoint(LoadSettings(base=str(tmp_path)))
    layers = quantized_layers(stored.architecture, how)
    source = TrainedSource(stored.weights, layers, how)
    live, names = live_weights(load_in_4bit(tmp_path, how)), stored.architecture.naming.files
    assert layers
    for path, value in live.items():
        if names[path] not in source.specs():
            continue  # a tied head
        found = source.read(names[path])
        expected = value.t() if layers.get(names[path]) else value
        assert source.specs()[names[path]].dtype == found.dtype == expected.dtype
        assert torch.equal(found, expected), path
        assert (names[path] in layers) != torch.equal(found, stored.weights.read(names[path]).to(found.dtype)), path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, an adapter that is small beside the steps of 4 bits, and texts."""
    model = factories.build(factories.llama_config())
    factories.save(model, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=4, target_modules=ALL_LINEAR)
    adapters.save_adapter(model, config, tmp_path / "adapter", spread=0.01)
    factories.write_text(tmp_path / "held-out.jsonl", seed=2)
    factories.write_text(tmp_path / "calibration.jsonl", seed=1)
    return tmp_path


def merged_onto(folder: Path, **settings: Any) -> Merged:
    checkpoint = load_checkpoint(LoadSettings(base=str(folder / "base")))
    return merge(checkpoint, folder / "adapter", MergeSettings(**settings), adapter_origin=adapters.ORIGIN)


def test_the_merge_is_peft_s_over_the_live_weights(folder: Path) -> None:
    merged = merged_onto(folder, base="as_trained", trained_on=NF4)
    live = live_weights(load_in_4bit(folder / "base", NF4))
    plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    plain.load_state_dict(live, strict=False)
    for name, value in adapters.merge_with_peft(plain, folder / "adapter").items():
        assert torch.equal(merged.checkpoint.weights.read(name), value), name
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged.base.weights.read(name), live[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_layers_are_those_that_bitsandbytes_multiplies_with(folder: Path, dtype: str) -> None:
    how = NF4.model_copy(update={"compute_dtype": dtype})
    merged = merged_onto(folder, base="as_trained", trained_on=how)
    live = load_in_4bit(folder / "base", how)
    for path, module in live.named_modules():
        if isinstance(module, Linear4bit):
            unit = torch.eye(module.in_features, dtype=getattr(torch, dtype))
            assert torch.equal(module(unit).t(), merged.base.weights.read(f"{path}.weight")), path


def test_the_unrounded_merge_computes_what_base_and_adapter_do_in_peft(folder: Path) -> None:
    how = NF4.model_copy(update={"compute_dtype": "float32"})
    merged = merged_onto(folder, base="as_trained", trained_on=how).unrounded.weights
    live = PeftModel.from_pretrained(load_in_4bit(folder / "base", how), str(folder / "adapter")).eval()
    torch.nn.Module.to(live, torch.float32)
    wide = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    wide.load_state_dict({name: merged.read(name) for name in merged.specs()})
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        assert torch.allclose(live(ids).logits, wide(ids).logits, atol=2e-5)


def recipe(folder: Path, merging: dict[str, Any], quantize: dict[str, Any], **more: Any) -> Recipe:
    content = {
        "load": {"base": "./base", "adapter": "./adapter"},
        "merge": merging,
        "quantize": quantize,
        "export": [{"layout": "safetensors"}],
        "output": "./out",
    }
    (folder / "recipe.yaml").write_text(json.dumps(content | more))
    return load_recipe(folder / "recipe.yaml")


AS_TRAINED = {"base": "as_trained", "trained_on": {"quant_type": "nf4", "double_quant": True}}


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_same_code_book_is_refused_with_what_would_be_left(folder: Path, double_quant: bool) -> None:
    with pytest.raises(CompatibilityError, match=r"only \d\.\d% of the adapter's change is left") as caught:
        plan(recipe(folder, AS_TRAINED, {"method": "nf4", "double_quant": double_quant}))
    assert "merge.base: stored" in str(caught.value.mend)


@pytest.mark.parametrize(
    "quantize",
    [
        {"method": "nf4", "quant_type": "fp4"},
        {"method": "nf4", "block_size": 128},
        {"method": "nf4", "skip_modules": ["*_proj"], "force_modules": []},
        {"method": "int8"},
    ],
    ids=["fp4", "other blocks", "none of its layers", "int8"],
)
def test_other_methods_are_accepted(folder: Path, quantize: dict[str, Any]) -> None:
    if "skip_modules" in quantize:  # all but one layer, which the adapter leaves alone
        adapters.save_adapter(
            factories.build(factories.llama_config()), LoraConfig(target_modules=["q_proj"]), folder / "adapter"
        )
        quantize = {"method": "nf4", "skip_modules": ["*.q_proj"]}
    lines = plan(recipe(folder, AS_TRAINED, quantize)).lines()
    assert any("NF4 codes in blocks of 64, double quantization, dequantized, as in training" in line for line in lines)


def test_a_run_proves_the_merge_and_says_which_base(folder: Path) -> None:
    verify = {"text": "held-out.jsonl", "sequence_length": 32, "windows": 4, "max_windows": 4, "profile": "off"}
    result = run(recipe(folder, AS_TRAINED, {"method": "int8"}, verify=verify), device="cpu")
    assert result.folder is not None
    report, manifest = Report.read(result.folder), Manifest.read(result.folder)
    gates = {gate.name: gate.verdict for gate in report.gates}
    assert gates["merge"] == "pass"
    words = "NF4 codes in blocks of 64, double quantization, dequantized, as in training"
    assert (report.reference.base.read_as, manifest.base.read_as) == (words, words)
    assert words in (result.folder / "README.md").read_text()
    assert words in (result.folder / "report" / "report.html").read_text()
    stored = run(recipe(folder, {}, {"method": "int8"}, verify=verify, output="./stored"), device="cpu")
    assert stored.folder is not None
    assert Report.read(stored.folder).identity.base_sha256 != report.identity.base_sha256


def test_falcon_was_trained_on_the_stored_weights(tmp_path: Path) -> None:
    model = factories.build(factories.falcon_config())
    factories.save(model, tmp_path / "base")
    adapters.save_adapter(model, LoraConfig(target_modules=["query_key_value"]), tmp_path / "adapter")
    with pytest.raises(CompatibilityError, match="transformers 5 quantizes no layer of this model") as caught:
        merged_onto(tmp_path, base="as_trained", trained_on=NF4)
    assert "merge.base: stored" in str(caught.value.mend)
    assert "transformers: 4" in str(caught.value.mend)


def test_settings_that_contradict_one_another() -> None:
    with pytest.raises(ValidationError, match="needs trained_on"):
        MergeSettings(base="as_trained")
    with pytest.raises(ValidationError, match="only for base: as_trained"):
        MergeSettings(trained_on=NF4)


def test_a_base_without_an_adapter_was_not_trained(folder: Path) -> None:
    checkpoint = load_checkpoint(LoadSettings(base=str(folder / "base")))
    with pytest.raises(RecipeError, match="no adapter"):
        merge(checkpoint, None, MergeSettings(base="as_trained", trained_on=NF4))


def test_a_base_that_training_cannot_have_loaded(tmp_path: Path) -> None:
    model = factories.build(factories.llama_config())
    model.model.norm.weight.data.fill_(1e38)
    factories.save(model, tmp_path)
    stored = load_checkpoint(LoadSettings(base=str(tmp_path)))
    source = TrainedSource(stored.weights, {}, NF4.model_copy(update={"dtype": "float16"}))
    with pytest.raises(NumericalError, match="loaded in float16") as caught:
        source.read("model.norm.weight")
    assert caught.value.mend == "correct merge.trained_on.dtype"


CARD = """- quant_method: bitsandbytes
- load_in_8bit: False
- load_in_4bit: True
- bnb_4bit_quant_type: fp4
- bnb_4bit_use_double_quant: False
"""


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        ("name", ("its base is named base-unsloth-bnb-4bit", "quant_type: nf4, double_quant: true")),
        ("config", ("the base that it names is quantized with bitsandbytes", "quant_type: nf4, double_quant: false")),
        ("card", ("its card says load_in_4bit: True", "quant_type: fp4, double_quant: false")),
        ("gptq", ("its base is named base-GPTQ-Int4", None)),
        ("nothing", None),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_signs_of_a_quantized_base_are_noted_and_make_no_other_base(
    folder: Path, evidence: str, said: tuple[str, str | None] | None
) -> None:
    names = {
        "name": "unsloth/base-unsloth-bnb-4bit",
        "config": str(folder / "x" / "base"),
        "gptq": "org/base-GPTQ-Int4",
    }
    adapters.edit_config(folder / "adapter", base_model_name_or_path=names.get(evidence, "org/base"))
    if evidence == "config":
        (folder / "x" / "base").mkdir(parents=True)
        quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": False}
        (folder / "x" / "base" / "config.json").write_text(json.dumps({"quantization_config": quantized}))
    if evidence == "card":
        (folder / "adapter" / "README.md").write_text(CARD)
    found = merged_onto(folder, strict_base=True).adapter
    assert found is not None
    if said is None:
        assert found.notes == ()
        return
    (note,) = found.notes
    assert said[0] in note
    assert (f"set merge.base: as_trained and merge.trained_on: {{{said[1]}}}" in note) == (said[1] is not None)
    assert str(folder) not in note
    again = merged_onto(folder, base="as_trained", trained_on=NF4).adapter
    assert again is not None
    assert again.notes == ()
