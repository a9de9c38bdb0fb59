"""qexport's reader of finished artifacts: what it reads, and what it refuses to believe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import factories
from qexport.architectures.architecture import Architecture
from qexport.errors import InputError
from qexport.formats.gptq.reading import GptqRules
from qexport.formats.stored_weight import Scheme
from qexport.reading.safetensors_weights import SafetensorsWeights
from quantized_models import QuantizedModel, dequantized, gptq_method

DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.1.mlp.up_proj"


def quantized_model(**options: Any) -> QuantizedModel:
    return QuantizedModel(factories.build(factories.llama_config()), **options)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "model",
    [
        quantized_model(),
        quantized_model(method=gptq_method(bits=3, sym=False)),
        quantized_model(method=gptq_method(bits=8, group_size=-1)),
        quantized_model(method=gptq_method(bits=2, sym=False, desc_act=True)),
        quantized_model(special={DOWN: (8, 16), UP: None}),
        quantized_model(special={"lm_head": (4, 32)}),
    ],
    ids=["w4", "w3 asymmetric", "w8 rows", "w2 act-order", "overrides", "lm_head"],
)
def test_every_parameter_is_read_as_it_was_written(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexport.reading.quantized_linear._ROWS_AT_ONCE", 48)
    model.write(tmp_path / "artifact", max_shard_size="40KB")
    with SafetensorsWeights(tmp_path / "artifact", dtype=torch.bfloat16) as source:
        source.check_complete(model.structure)
        assert source.specs().keys() == model.structure.parameters.keys()
        for record in model.records():
            expected = dequantized(record)
            read = source.read(record.name)
            assert torch.equal(read, expected), record.name
            assert (tuple(read.shape), read.dtype) == (
                source.specs()[record.name].shape,
                source.specs()[record.name].dtype,
            )
        assert "quantization_config" not in source.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(bits=8), "expected torch.int32"),
        (lambda config: config.update(group_size=16), "expected torch.int32"),
        (lambda config: config.update(dynamic={f"^{DOWN}$": {"bits": 8}}), "expected torch.int32"),
    ],
)
def test_codes_that_contradict_the_config_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    quantized_model().write(tmp_path / "a")
    edit_config(tmp_path / "a", change)
    with SafetensorsWeights(tmp_path / "a", dtype=torch.bfloat16) as source, pytest.raises(InputError, match=message):
        source.read(f"{DOWN}.weight")


def test_asymmetric_zero_points_that_are_called_symmetric_are_refused(tmp_path: Path) -> None:
    quantized_model(method=gptq_method(sym=False)).write(tmp_path / "a")
    edit_config(tmp_path / "a", lambda config: config.update(sym=True))
    with (
        SafetensorsWeights(tmp_path / "a", dtype=torch.bfloat16) as source,
        pytest.raises(InputError, match="says sym"),
    ):
        source.read(f"{DOWN}.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(checkpoint_format=None), "checkpoint_format is None"),
        (lambda config: config.update(checkpoint_format="marlin"), "marlin"),
        (lambda config: config.update(quant_method="hqq"), "quant_method is 'hqq'"),
        (lambda config: config.update(bits="4"), "bits must be given, with type int"),
        (lambda config: config.update(bits=True), "bits must be given, with type int"),
        (lambda config: config.update(bits=5), "5 bits in groups of 32 are not supported"),
        (lambda config: config.pop("sym"), "sym must be given"),
        (lambda config: config.update(dynamic=["x"]), "dynamic must map"),
        (lambda config: config.update(dynamic={"(": {}}), "not a regular expression"),
        (lambda config: config.update(dynamic={"-:(a+)+b": {}}), "a pattern that repeats"),
        (lambda config: config.update(dynamic={"^a$": {"bits": None}}), "bits must be given"),
    ],
)
def test_a_quantization_config_that_cannot_be_followed_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    quantized_model().write(tmp_path / "a")
    edit_config(tmp_path / "a", change)
    with pytest.raises(InputError, match=message):
        SafetensorsWeights(tmp_path / "a", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{DOWN}.g_idx"), "lacks g_idx"),
        (lambda tensors: tensors.update({f"{DOWN}.weight": torch.zeros(64, 128)}), "both unquantized and quantized"),
    ],
)
def test_half_a_module_or_one_and_a_half_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    quantized_model().write(tmp_path / "a")
    edit_tensors(tmp_path / "a", change)
    with pytest.raises(InputError, match=message):
        SafetensorsWeights(tmp_path / "a", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [f"{DOWN}.scales", "model.norm.weight"])
def test_nan_in_the_artifact_is_refused(tmp_path: Path, name: str) -> None:
    quantized_model().write(tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors[name].view(-1)[3:4].fill_(torch.nan))
    with (
        SafetensorsWeights(tmp_path / "a", dtype=torch.bfloat16) as source,
        pytest.raises(InputError, match="NaN") as caught,
    ):
        source.read(name.replace(".scales", ".weight"))
    assert f"model.safetensors: {name}" in str(caught.value)


def test_a_missing_an_unexpected_and_a_misshapen_parameter_are_listed_at_once(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
        tensors["model.embed_tokens.weight"] = torch.zeros(8, 64)

    model = quantized_model()
    model.write(tmp_path / "a")
    edit_tensors(tmp_path / "a", change)
    with SafetensorsWeights(tmp_path / "a", dtype=torch.bfloat16) as source, pytest.raises(InputError) as caught:
        source.check_complete(model.structure)
    for problem in (
        "model.norm.weight: missing",
        "model.extra.weight: unexpected",
        "embed_tokens.weight: shape [8, 64]",
    ):
        assert problem in str(caught.value)


def test_a_linear_that_is_dense_though_its_config_says_quantized_is_told_and_the_other_way_round(
    tmp_path: Path,
) -> None:
    model = quantized_model(special={DOWN: None})
    model.write(tmp_path / "a")
    edit_config(tmp_path / "a", lambda config: config.update(dynamic={f"-:^{UP}$": {}}))
    with SafetensorsWeights(tmp_path / "a", dtype=torch.bfloat16) as source, pytest.raises(InputError) as caught:
        source.check_complete(model.structure)
    assert f"{DOWN}: unquantized, but quantized according to the config" in str(caught.value)
    assert f"{UP}: quantized, but unquantized according to the config" in str(caught.value)


def test_a_dense_folder_is_read_as_it_is(tmp_path: Path) -> None:
    model = factories.build(factories.llama_config())
    factories.save(model, tmp_path / "a")
    with SafetensorsWeights(tmp_path / "a", dtype=torch.bfloat16) as source:
        source.check_complete(Architecture(source.config).structure)
        assert not source.quantized
        for name, tensor in model.state_dict().items():
            assert torch.equal(source.read(name), tensor)


def test_the_first_rule_that_matches_holds() -> None:
    common = {"quant_method": "gptq", "checkpoint_format": "gptq"} | vars(Scheme(4, 64, sym=True, desc_act=False))
    dynamic = {r"-:^a\.(0|1)\.q$": {}, r"+:^a\.(1|2)\.q$": {"bits": 8}, r"a\.3": {"group_size": -1}}
    rules = GptqRules(common | {"dynamic": dynamic})
    assert rules.scheme("a.0.q") is None
    assert rules.scheme("a.1.q") is None
    assert rules.scheme("a.2.q") == Scheme(8, 64, sym=True, desc_act=False)
    assert rules.scheme("a.3.q") == Scheme(4, -1, sym=True, desc_act=False)
    assert rules.scheme("b.a.3.q") == Scheme(4, 64, sym=True, desc_act=False)
