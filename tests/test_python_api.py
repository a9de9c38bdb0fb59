"""`qexport.quantize` and the page that describes the Python API."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import factories
import qexport
from adapters import load_adapter, save_adapter
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.loading.in_memory import save_model
from qexport.recipe import Recipe

PAGE = Path(__file__).parent.parent / "docs/python.md"
GPTQ = qexport.Gptq(bits=4, group_size=32)
SHORT: dict[str, Any] = {"samples": 4, "sequence_length": 32}
TEXTS = [f"Passage {number}. {factories.TEXT[number % len(factories.TEXT)]}" for number in range(40)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "base"
    return factories.save(factories.build(factories.llama_config()), folder)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    return save_adapter(AutoModelForCausalLM.from_pretrained(base), config, base.parent / "adapter")


@pytest.fixture(scope="module")
def other_adapter(base: Path) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return save_adapter(AutoModelForCausalLM.from_pretrained(base), config, base.parent / "other")


@pytest.fixture
def live(base: Path, adapter: Path) -> PeftModel:
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    whole = model.get_base_model()
    assert isinstance(whole, PreTrainedModel)
    whole.config._name_or_path = str(base)
    return model


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: value for name, value in content(folder).items() if name.endswith((".safetensors", "config.json"))}


def test_a_model_and_texts_in_memory_give_the_bytes_of_files(
    base: Path, adapter: Path, live: PeftModel, tmp_path: Path
) -> None:
    text = tmp_path / "calibration.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS))
    from_files = qexport.quantize(
        base, adapter=adapter, method=GPTQ, calibration=text, output=tmp_path / "files", **SHORT
    )
    from_memory = qexport.quantize(
        live, tokenizer=factories.tokenizer(), method=GPTQ, calibration=TEXTS, output=tmp_path / "memory", **SHORT
    )
    assert from_files.passed
    assert from_memory.passed
    assert weights(tmp_path / "memory") == weights(tmp_path / "files")
    assert content(tmp_path / "memory").keys() == content(tmp_path / "files").keys()
    one, other = from_memory.manifest, from_files.manifest
    assert (one.recipe, one.calibration, one.layers) == (other.recipe, other.calibration, other.layers)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["calibration.jsonl", "files", "files.sha256", "memory", "memory.sha256"]


def test_the_same_as_a_recipe(base: Path, adapter: Path, tmp_path: Path) -> None:
    text = factories.write_text(tmp_path / "text.jsonl")
    settings = qexport.CalibrationSettings(source=str(text), samples=4, sequence_length=32)
    recipe = Recipe(
        load=qexport.LoadSettings(base=str(base), adapter=str(adapter)),
        quantize=GPTQ.model_copy(update={"calibration": settings}),
        export=[qexport.SafetensorsSettings(), qexport.TgiSettings()],
        output=str(tmp_path / "recipe"),
    )
    qexport.run(recipe)
    qexport.quantize(
        str(base), adapter=str(adapter), method=GPTQ, calibration=settings,
        layouts=["safetensors", qexport.TgiSettings()], output=tmp_path / "call",
    )  # fmt: skip
    assert content(tmp_path / "recipe") == content(tmp_path / "call")


@pytest.mark.parametrize("in_memory", [False, True])
def test_several_adapters_give_the_artifact_of_a_recipe(
    base: Path, adapter: Path, other_adapter: Path, in_memory: bool, tmp_path: Path
) -> None:
    weighted = qexport.WeightedAdapter(path=str(other_adapter), weight=-0.5)
    merge = qexport.MergeSettings(combination="dare_ties", density=0.7, seed=3)
    recipe = Recipe(
        load=qexport.LoadSettings(base=str(base), adapters=[qexport.WeightedAdapter(path=str(adapter)), weighted]),
        merge=merge,
        quantize=qexport.Nf4(),
        export=[qexport.SafetensorsSettings()],
        output=str(tmp_path / "recipe"),
    )
    qexport.run(recipe)
    given: dict[str, Any] = {"adapters": [adapter, weighted], "merge": merge, "output": tmp_path / "call"}
    if in_memory:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        qexport.quantize(model, tokenizer=factories.tokenizer(), method=qexport.Nf4(), **given)
        assert weights(tmp_path / "recipe") == weights(tmp_path / "call")
    else:
        qexport.quantize(base, method=qexport.Nf4(), **given)
        assert content(tmp_path / "recipe") == content(tmp_path / "call")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        TrainableTokensConfig(token_indices=[1, 5], target_modules=["embed_tokens"]),
        LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[3], use_dora=True),
    ],
    ids=["modules_to_save", "embedding", "tokens", "dora with tokens"],
)
def test_base_and_adapter_in_memory_are_taken_apart_exactly(config: Any, tmp_path: Path) -> None:
    model = factories.build(factories.llama_config(tie_word_embeddings=False), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    saved = save_model(adapted, factories.tokenizer(), tmp_path)
    assert saved.adapter is not None
    again = AutoModelForCausalLM.from_pretrained(saved.base, dtype="auto").state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    merged: Any = load_adapter(AutoModelForCausalLM.from_pretrained(saved.base, dtype=torch.float32), saved.adapter)
    ids = torch.tensor([[1, 3, 5, 7]])
    live: Any = adapted.eval()
    assert torch.equal(merged(ids).logits, live(ids).logits)


def test_an_adapter_of_another_name_is_taken(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter), adapter_name="mine")
    saved = save_model(model, factories.tokenizer(), tmp_path)
    assert saved.adapter == tmp_path / "adapter" / "mine"
    assert (saved.adapter / "adapter_model.safetensors").exists()


def refused(model: PreTrainedModel | PeftModel | str, **arguments: Any) -> str:
    with pytest.raises(qexport.QexportError) as caught:
        qexport.quantize(model, **{"method": qexport.Nf4()} | arguments)
    return str(caught.value)


def test_what_cannot_be_taken_is_said_and_nothing_is_left(
    base: Path, adapter: Path, live: PeftModel, tmp_path: Path
) -> None:
    given = {"tokenizer": factories.tokenizer(), "output": tmp_path / "out"}
    assert "needs its tokenizer" in refused(live, output=tmp_path / "out")
    assert "already has an adapter" in refused(live, adapter=adapter, **given)
    assert "already has an adapter" in refused(live, adapters=[adapter], **given)
    assert "adapter and adapters exclude each other" in refused(
        str(base), adapter=adapter, adapters=[adapter], output=tmp_path / "out"
    )
    live.merge_adapter()
    assert "is merged into the base" in refused(live, **given)
    live.unmerge_adapter()
    live.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    whole: Any = live.base_model
    whole.set_adapter(["default", "second"])
    assert "one of 2 that are active" in refused(live, **given)
    assert "has its own tokenizer" in refused(str(base), **given)
    there = {"output": tmp_path / "out"}
    assert "no layout 'tgj'" in refused(str(base), layouts=["tgj"], **there)
    assert "is listed 2 times" in refused(str(base), layouts=["tgi", "tgi"], **there)
    assert "nf4 uses no calibration text" in refused(str(base), calibration=["a"], **there)
    assert "gptq needs calibration text" in refused(str(base), method=GPTQ, samples=3, **there)
    assert "calibration text 1" in refused(str(base), method=GPTQ, calibration=["a", object()], **there)
    assert "gptq needs calibration text" in refused(str(base), method=GPTQ, **there)
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_of_rows_and_held_out_texts(base: Path, tmp_path: Path) -> None:
    rows: Iterator[dict[str, Any]] = ({"text": text, "label": 0} for text in TEXTS)
    result = qexport.quantize(
        base, method=GPTQ, calibration=rows, output=tmp_path / "out", **SHORT,
        verify=[f"Held-out passage {number}. {factories.TEXT[number % 3]}" for number in range(400)],
    )  # fmt: skip
    assert result.reports["safetensors"].all_figures
    assert (result.artifact_path / MANIFEST_NAME).exists()


def test_every_example_of_the_page_runs(
    base: Path, adapter: Path, other_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").symlink_to(base)
    (tmp_path / "my-adapter").symlink_to(adapter)
    (tmp_path / "my-other-adapter").symlink_to(other_adapter)
    factories.write_text(tmp_path / "calibration.jsonl", passages=200)
    factories.write_text(tmp_path / "held-out.jsonl", passages=300, seed=1)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) > 4


def test_the_page_names_everything_that_is_public() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in qexport.__all__ if not re.search(rf"\bqexport\.{name}\b", text)] == []
