"""Files beside an artifact's weights: those that a loader would read are refused, all others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import factories
from qexport.artifact.stray_files import refuse_stray_files, stray_files
from qexport.errors import InputError
from qexport.formats.gptq.second_config import second_config_differences
from qexport.pipeline.inspection import inspect_artifact
from quantized_models import QuantizedModel

READ = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "model-00001-of-00009.safetensors",
    "second.safetensors", "consolidated.safetensors", "consolidated.00.pth", "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "pytorch_model.bin.index.fp16.json",
    "model.safetensors.index.fp16.json", "model.fp16.safetensors", "model-q4.gguf", "old.ckpt", "tf_model.h5",
    "flax_model.msgpack", "decoder.onnx", "MODEL.SAFETENSORS", "hf_quant_config.json", "custom_generate/generate.py",
)  # fmt: skip
NOT_READ = (
    "README.md", "LICENSE", "USE_POLICY.md", "banner.png", "figures/loss.svg", "original/consolidated.00.pth",
    "original/params.json", "onnx/model.onnx", ".gitattributes", "training_args.bin", "optimizer.pt", "rng_state_0.pth",
    "trainer_state.json", "config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "launch/tgi.env",
    "modeling_falcon.py", "notebook.ipynb",
)  # fmt: skip


def test_what_a_loader_reads_is_named_and_nothing_else() -> None:
    assert stray_files([*READ, *NOT_READ], []).keys() == set(READ)
    assert stray_files([*READ, *NOT_READ], READ) == {}


@given(st.lists(st.sampled_from([*READ, *NOT_READ]), unique=True), st.lists(st.sampled_from(READ), unique=True))
def test_the_artifacts_own_weights_are_never_strays(names: list[str], weights: list[str]) -> None:
    assert stray_files(names, weights).keys() == (set(names) - set(weights)) & set(READ)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("foreign") / "a"
    QuantizedModel(factories.build(factories.falcon_config())).write(made, max_shard_size="40KB")
    assert len(list(made.glob("*.safetensors"))) > 1
    return made


def test_a_folder_with_shards_and_what_hubs_have_beside_them_is_inspected(folder: Path) -> None:
    written = [folder / name for name in NOT_READ if not (folder / name).exists()]
    for path in written:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    try:
        assert inspect_artifact(folder).quantized_layers == 8
    finally:
        for path in written:
            path.unlink()


@pytest.mark.parametrize("name", READ)
def test_each_stray_file_is_refused_by_name(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"{}")
    try:
        with pytest.raises(InputError, match="a loader would read beside the artifact") as caught:
            refuse_stray_files(folder, [each.name for each in folder.glob("model-*-of-*") if each != path])
        assert name in str(caught.value)
    finally:
        path.unlink()


def second(**changes: Any) -> dict[str, Any]:
    return {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "quant_method": "gptq", **changes}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: config.update(bits=8), "bits is 8, in config.json 4"),
        (lambda config: config.pop("group_size"), "group_size is None, in config.json 64"),
        (lambda config: config.update(desc_act=True), "desc_act is True, in config.json False"),
        (lambda config: config.update(lm_head=None, pack_dtype="int64"), "pack_dtype is 'int64', in config.json None"),
        (lambda config: config.update(dynamic={"-:a": {}}), "dynamic is {'-:a': {}}, in config.json None"),
        (lambda config: config.update(lm_head=True), "lm_head is True, in config.json None"),
        (lambda config: config.update(damp_percent=0.5), "damp_percent is 0.5, in config.json 0.1"),
    ],
)  # fmt: skip
def test_a_second_config_that_says_something_else_is_named_by_key(
    change: Callable[[dict[str, Any]], object], told: str
) -> None:
    other = second()
    change(other)
    assert second_config_differences(second(damp_percent=0.1), other) == [told]


def test_a_second_config_may_leave_out_defaults_and_say_who_made_it() -> None:
    other = second(checkpoint_format="gptq", dynamic={}, lm_head=False, meta={"quantizer": "x"}, true_sequential=True)
    del other["sym"], other["quant_method"]
    assert second_config_differences(second(model_name_or_path="a"), {**other, "model_name_or_path": "b"}) == []
    assert second_config_differences(None, other) == [
        "config.json has no quantization_config, so some loaders read GPTQ codes and others none"
    ]
