"""What headers tell of a folder, in each format, of any maker; and when there is a base to hold it against."""

from __future__ import annotations

import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import factories
import stored_models
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.gates.profiles import profile_of_layers
from qexport.loading.small_files import open_tokenizer
from qexport.pipeline.folders import ArtifactFolder, open_folder
from qexport.quantizing import profile_of_layer
from qexport.quantizing.rounding import NearestSource, rounding_of
from qexport.tensors import Origin
from qexport.text.windows import HeldOut
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Preparation, Reference
from quantized_models import QuantizedModel, Tensors

MODEL = factories.build(factories.llama_config())

EXPECTED: dict[str, tuple[str, set[tuple[str, int, int]], str]] = {
    "gptq": ("GPTQ, 4 bits, group_size 32, asymmetric", {("gptq", 4, 32)}, "tiny"),
    "nf4": ("NF4", {("nf4", 4, 64)}, "tiny-nf4"),
    "nf4 double": ("NF4, double quantization", {("nf4", 4, 64)}, "tiny-nf4"),
    "fp4": ("FP4", {("fp4", 4, 64)}, "tiny-nf4"),
    "int8": ("LLM.int8", {("int8", 8, 64), ("int8", 8, 128)}, "int8"),
    "w8a8": ("compressed-tensors, int-quantized", {("w8a8", 8, 64), ("w8a8", 8, 128)}, "w8a8"),
    "fp8": ("compressed-tensors, float-quantized", {("fp8", 8, 64), ("fp8", 8, 128)}, "fp8"),
    "fp8 blocks": ("FP8, blocks of 128 x 128", {("fp8", 8, 64), ("fp8", 8, 128)}, "fp8"),
    "nvfp4": ("compressed-tensors, nvfp4-pack-quantized", {("nvfp4", 4, 16)}, "tiny-nf4"),
    "mxfp4": ("compressed-tensors, mxfp4-pack-quantized", {("mxfp4", 4, 32)}, "tiny-mxfp4"),
    "w4a16": ("compressed-tensors, pack-quantized", {("gptq", 4, 32)}, "tiny"),
}
"""The method's name, each layer's method, bits and values that share a scale, and the profile that follows."""


def structure() -> Structure:
    return Architecture(MODEL.config.to_dict()).structure


def opened(folder: Path, **options: Any) -> ArtifactFolder:
    with open_folder(folder, Architecture(MODEL.config.to_dict()), torch.bfloat16, name="artifact", **options) as found:
        return found


@pytest.mark.parametrize("name", EXPECTED)
def test_each_format_tells_its_layers_and_its_profile(name: str, tmp_path: Path) -> None:
    stored_models.write(MODEL, tmp_path, stored_models.QUANTIZATIONS[name])
    found = opened(tmp_path)
    method, schemes, profile = EXPECTED[name]
    assert found.artifact.method == method
    assert {(layer.method, layer.bits, layer.group_size) for layer in found.layers} == schemes
    linears = {linear.name for block in structure().linears.values() for linear in block}
    assert {layer.name for layer in found.layers} == linears
    assert set(found.artifact.grids) == (linears if schemes == {("gptq", 4, 32)} else set())
    assert profile_of_layers(found.layers, found.sizes, profile_of_layer) == profile
    assert all(layer.loss is None and layer.tokens == 0 for layer in found.layers)


def test_an_unquantized_folder_has_no_layers_and_its_own_size(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    found = opened(tmp_path)
    parameters = sum(math.prod(shape) for shape in structure().parameters.values())
    assert (found.artifact.method, found.layers, dict(found.artifact.grids)) == ("unquantized", [], {})
    assert (found.sizes.parameters, found.sizes.total_bytes) == (parameters, 2 * parameters)
    assert found.sizes.bits_per_weight == 16
    assert profile_of_layers(found.layers, found.sizes, profile_of_layer) == "16bit"
    subject = found.subject()
    assert subject.reference_bytes == 2 * parameters
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert dict(subject.weights_sha256) == {"model.safetensors": digest}
    assert (subject.name, subject.layouts) == ("artifact", [])


def test_gptq_layers_of_other_bits_are_told_apart(tmp_path: Path) -> None:
    up = "model.layers.0.mlp.up_proj"
    QuantizedModel(MODEL, special={up: (8, 64)}).write(tmp_path)
    layers = {layer.name: (layer.bits, layer.group_size) for layer in opened(tmp_path).layers}
    assert layers.pop(up) == (8, 64)
    assert set(layers.values()) == {(4, 32)}


def test_codes_of_which_the_config_says_nothing_are_refused(tmp_path: Path) -> None:
    up = "model.layers.0.mlp.up_proj"
    QuantizedModel(MODEL).write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {f"-:{up}": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="unquantized according to the config"):
        opened(tmp_path)


def test_what_is_known_of_the_layers_is_kept(tmp_path: Path) -> None:
    stored_models.write(MODEL, tmp_path, stored_models.GPTQ)
    known = [layer.model_copy(update={"loss": 0.5}) for layer in opened(tmp_path).layers]
    again = opened(tmp_path, layers=known, layouts=["tgi"], digests={"model.safetensors": "ab"})
    assert again.layers == known
    assert again.subject().layouts == ["tgi"]
    assert again.subject().weights_sha256 == {"model.safetensors": "ab"}


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 64}, {"method": "w8a8"}, {"name": "model.other"}])
def test_records_that_are_not_those_of_the_weights_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A manifest that said 2 bits got the gates of 2 bits."""
    stored_models.write(MODEL, tmp_path, stored_models.GPTQ)
    first, *others = opened(tmp_path).layers
    for wrong in ([first.model_copy(update=change), *others], others, [first, first, *others]):
        with pytest.raises(InputError, match="the manifest's layers are not those of the artifact"):
            opened(tmp_path, layers=wrong)
    rounded = [first.model_copy(update={"method": "round_to_nearest"}), *others]
    assert opened(tmp_path, layers=rounded).stored == [first, *others]


def test_a_folder_without_weights_cannot_be_opened(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError):
        opened(tmp_path)


def checkpoint(tensors: dict[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint(Architecture(MODEL.config.to_dict()), Tensors(tensors), {}, Origin("folder", "base"))


def reference(merged: Checkpoint, base: Checkpoint, adapter: Origin | None) -> Reference:
    return Reference(
        merged=merged,
        base=base,
        adapter=adapter,
        changed=frozenset(),
        nearest=partial(NearestSource, merged.weights),
        rounding_of=rounding_of,
        prepared=Preparation({}),
        held_out=HeldOut(torch.zeros(1, 4, dtype=torch.int64), (None,), "0" * 64, "held-out.jsonl"),
        prompts=None,
        open_tokenizer=partial(open_tokenizer, merged),
        settings=VerifySettings(text="held-out.jsonl"),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


ADAPTER = Origin("folder", "adapter")


def test_the_base_runs_beside_the_merged_model_where_an_adapter_keeps_its_shapes() -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(8, 4)}
    base, grown = checkpoint(tensors), checkpoint({"model.embed_tokens.weight": torch.zeros(10, 4)})
    narrow = checkpoint({name: tensor.half() for name, tensor in tensors.items()})
    assert reference(narrow, base, ADAPTER).base_rival is base
    assert reference(grown, base, ADAPTER).base_rival is None  # an adapter that adds tokens
    assert reference(checkpoint({}), base, ADAPTER).base_rival is None
    assert reference(base, base, None).base_rival is None
