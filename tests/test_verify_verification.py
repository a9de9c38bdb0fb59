"""The whole verification against whole models in transformers, and the faults that it must see."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import factories
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import CheckResult, find_figure
from qexport.errors import InputError, NumericalError
from qexport.progress import Notice, Progress, ProgressCallback, silent
from qexport.quantizing.rounding import NearestSource, rounding_of
from qexport.reading.stored_model import open_stored
from qexport.tensors import TensorSpec
from qexport.text.documents import Documents
from qexport.text.prompts import Prompt, PromptSet, encode_prompts
from qexport.text.windows import HeldOut, make_held_out
from qexport.verifying import TaskSettings, VerifySettings
from qexport.verifying import predictors as predicting
from qexport.verifying.divergence import compare
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.memory import Way, choose_way, drafting_memory, needed_memory
from qexport.verifying.predictors import predictors
from qexport.verifying.reference import Preparation, Reference
from qexport.verifying.verification import Measurement, check_config, check_headers, check_parameters, verify
from quantized_models import QuantizedModel, Tensors, dequantized, gptq_method

CPU = torch.device("cpu")
PROMPTS = [Prompt("miller", "The miller opened"), Prompt("total", "Total: 12 boxes")]


@cache
def shared_tokenizer() -> PreTrainedTokenizerFast:
    return factories.tokenizer()


@cache
def held_out() -> HeldOut:
    items = tuple(f"{index}. {text}" for index in range(4) for text in factories.TEXT)
    return make_held_out(
        Documents(items, "held-out.jsonl"),
        shared_tokenizer(),
        windows=7,
        sequence_length=32,
        vocab_size=factories.VOCABULARY,
    )


def reference_of(
    reference: Checkpoint,
    *,
    dtype: torch.dtype = torch.bfloat16,
    prompts: Sequence[Prompt] = (),
    windows: int = 7,
    tasks: TaskSettings | None = None,
) -> Reference:
    encoded = encode_prompts(PromptSet(tuple(prompts), "prompts.jsonl"), shared_tokenizer()) if prompts else None
    return Reference(
        merged=reference,
        base=reference,
        adapter=None,
        changed=frozenset(),
        nearest=lambda grids, transposed: NearestSource(reference.weights, grids, transposed),
        rounding_of=rounding_of,
        prepared=Preparation({}),
        held_out=held_out(),
        prompts=encoded,
        open_tokenizer=shared_tokenizer,
        settings=VerifySettings(text="held-out.jsonl", max_new_tokens=4, windows=windows, tasks=tasks),
        dtype=dtype,
        device=CPU,
    )


def measure(
    reference: Checkpoint, artifact: Path, *, progress: ProgressCallback = silent, **options: Any
) -> Measurement:
    against = reference_of(reference, **options)
    with open_stored(artifact, dtype=against.dtype) as stored:
        check_parameters(reference, stored)
        return verify(stored, against, lambda figures: [], progress=progress)


def refuse_headers(reference: Checkpoint, artifact: Path) -> None:
    with open_stored(artifact, dtype=torch.bfloat16) as stored:
        check_headers(reference, stored)


def config_check(reference: Checkpoint, artifact: Path) -> CheckResult:
    with open_stored(artifact, dtype=torch.bfloat16) as stored:
        return check_config(reference, stored)


def value(found: Measurement, name: str = "mean_kl") -> float:
    figure = find_figure(found.figures, name)
    assert figure is not None
    return figure.value


def with_its_codes(model: QuantizedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A whole model whose quantized weights are what the codes stand for; its buffers keep float32."""
    copy = factories.build(model.model.config, dtype=torch.float32)
    weights = {record.name: dequantized(record, dtype) for record in model.records()}
    return filled(copy, weights, dtype)


def filled(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].to(dtype)
    return model


CONFIGS: Mapping[str, PretrainedConfig] = {
    "llama": factories.llama_config(),
    "qwen2 tied": factories.qwen2_config(),
    "mistral sliding": factories.mistral_config(),
    "falcon 7b": factories.falcon_config(),
    "falcon 40b": factories.falcon_40b_config(),
}


def whole_model_figures(reference: PreTrainedModel, artifact: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Perplexities, mean KL and top-1 agreement from whole models, with the head in float32."""
    logits = []
    for model in (reference, artifact):
        with torch.no_grad():
            hidden = torch.cat([model.base_model(part)[0] for part in windows.split(3)])[:, :-1].float()
        head = model.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        logits.append(functional.linear(hidden, head.weight.detach().float()).double().flatten(0, 1))
    targets = windows[:, 1:].flatten()
    p, q = (functional.log_softmax(each, -1) for each in logits)
    return [
        float(functional.cross_entropy(logits[0], targets).exp()),
        float(functional.cross_entropy(logits[1], targets).exp()),
        float(functional.kl_div(q, p, reduction="batchmean", log_target=True)),
        float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    ]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float32), ("falcon 40b", torch.float32), *((name, torch.bfloat16) for name in CONFIGS)],
    ids=str,
)
def test_the_figures_are_those_of_whole_models(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "BATCH_TOKENS", 3 * 32)
    model = QuantizedModel(factories.build(CONFIGS[name]))
    model.write(tmp_path / "a")
    found = measure(model.checkpoint, tmp_path / "a", dtype=dtype)
    reference = factories.build(CONFIGS[name], dtype=torch.float32)
    reference = filled(reference, dict(model.model.named_parameters()), dtype)
    expected = whole_model_figures(reference, with_its_codes(model, dtype), held_out().input_ids)
    names = ("reference_perplexity", "artifact_perplexity", "mean_kl", "top1_agreement")
    assert [value(found, name) for name in names] == pytest.approx(expected, rel=1e-5)
    assert value(found) > 1e-3
    assert found.tokens.kl.shape == (7, 31)
    assert all((figure.n, figure.tokens) == (7, 7 * 31) for figure in found.figures)


@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "falcon 7b"])
def test_an_artifact_that_equals_its_reference_has_exactly_no_divergence(name: str, tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(CONFIGS[name]))
    model.write(tmp_path / "a")
    same = replace(model, model=with_its_codes(model, torch.bfloat16))
    found = measure(same.checkpoint, tmp_path / "a", prompts=PROMPTS if name == "llama" else [])
    assert not found.tokens.kl.any()
    assert value(found) == value(found, "decisive_flips") == 0.0
    assert value(found, "top1_agreement") == value(found, "perplexity_ratio") == 1.0
    assert [block.relative_error for block in found.block_drift] == [0.0, 0.0]
    if found.generations:
        assert found.generations.identical == found.generations.prompts == 2


def test_the_same_figures_come_from_one_and_two_threads(tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path / "a")
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(measure(model.checkpoint, tmp_path / "a"))
    torch.set_num_threads(threads)
    assert found[0].figures == found[1].figures
    assert found[0].block_drift == found[1].block_drift
    assert torch.equal(found[0].tokens.kl, found[1].tokens.kl)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, changes: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "fault",
    [
        lambda tensors: tensors[f"{DOWN}.qweight"].copy_(tensors[f"{DOWN}.qweight"].flip(0)),
        lambda tensors: [tensor.sub_(0x11111111) for name, tensor in tensors.items() if name.endswith(".qzeros")],
        lambda tensors: [tensor.mul_(2) for name, tensor in tensors.items() if name.endswith(".scales")],
        lambda tensors: tensors["model.layers.0.input_layernorm.weight"].zero_(),
        lambda tensors: tensors["lm_head.weight"].copy_(tensors["lm_head.weight"].roll(1, 0)),
        lambda tensors: tensors["model.norm.weight"].neg_(),
    ],
    ids=["codes", "zero points of v2", "scales", "layer norm", "head", "final norm"],
)
def test_a_damaged_artifact_shows_in_the_divergence(
    fault: Callable[[dict[str, torch.Tensor]], object], tmp_path: Path
) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()), gptq_method(sym=False))
    model.write(tmp_path / "a")
    intact = measure(model.checkpoint, tmp_path / "a")
    edit_tensors(tmp_path / "a", fault)
    damaged = measure(model.checkpoint, tmp_path / "a")
    assert value(damaged) > 3 * value(intact)
    assert value(damaged, "reference_perplexity") == value(intact, "reference_perplexity")


@pytest.mark.parametrize("side", ["artifact", "reference"])
def test_logits_that_are_not_finite_are_an_error(side: str, tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path / "a")
    tensors = {name: model.checkpoint.weights.read(name) for name in model.checkpoint.weights.specs()}
    if side == "artifact":
        edit_tensors(tmp_path / "a", lambda saved: saved["lm_head.weight"].fill_(3e38))
    else:
        tensors["lm_head.weight"].fill_(3e38)
    with pytest.raises(NumericalError, match="logits hold NaN or Inf"):
        measure(replace(model.checkpoint, weights=Tensors(tensors)), tmp_path / "a")


class Watched(Tensors):
    """Tells of every read."""

    reads: list[str]

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        object.__setattr__(self, "reads", [])

    def specs(self) -> Mapping[str, TensorSpec]:
        return super().specs()

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return super().read(name)


def test_the_models_take_turns_block_by_block_and_each_block_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "BATCH_TOKENS", 64)
    model = QuantizedModel(factories.build(factories.llama_config(num_hidden_layers=3)))
    sources = [Watched(dict(model.model.state_dict())) for _ in range(2)]
    ours, theirs = (
        BlockRunner(model.checkpoint.architecture, source, dtype=torch.bfloat16, device=CPU) for source in sources
    )
    left: list[int] = []
    counts: list[int] = []

    def finished(blocks: int) -> None:
        left.append(sum(not p.is_meta for runner in (ours, theirs) for p in runner._model.parameters()))
        for source in sources:
            read = [name for name in source.reads if ".layers." in name]
            assert {name.split(".")[2] for name in read} == {str(index) for index in range(blocks)}
            assert len(read) == len(set(read))

    batches, drift = run_in_lockstep((ours, theirs), held_out().input_ids, finished)
    assert left == [0, 0, 0]
    assert drift == [0.0, 0.0, 0.0]
    with predictors((ours, theirs), batches) as models:
        (figures,) = compare(models, [(0, 1)], held_out().input_ids, counts.append)
    assert counts == [2, 4, 6, 7]
    assert figures.kl.shape == (7, 31)
    assert all(parameter.is_meta for parameter in ours._model.parameters())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_tied_head_or_norm_of_the_artifacts_own_is_used(name: str) -> None:
    model = QuantizedModel(factories.build(CONFIGS["qwen2 tied"]))
    tensors = dict(model.model.state_dict())
    changed = tensors | {name: tensors[name].roll(1, 0)}
    ours, theirs = (
        BlockRunner(model.checkpoint.architecture, Tensors(each), dtype=torch.bfloat16, device=CPU)
        for each in (tensors, changed)
    )
    (batches, _), _ = run_in_lockstep((ours, ours), held_out().input_ids, lambda _: None)
    theirs.embed(held_out().input_ids[:1], 1)
    with predictors((ours, theirs), (batches, batches)) as models:
        (figures,) = compare(models, [(0, 1)], held_out().input_ids, lambda _: None)
    assert float(figures.kl.mean()) > 1e-4


def test_a_head_that_another_config_changes_is_not_taken_for_the_references() -> None:
    model = QuantizedModel(factories.build(factories.llama_config(rms_norm_eps=1e-6)))
    config = {**model.checkpoint.config, "rms_norm_eps": 1.0}
    ours, theirs = (
        BlockRunner(Architecture(each), model.checkpoint.weights, dtype=torch.float32, device=CPU)
        for each in (model.checkpoint.config, config)
    )
    (batches, _), _ = run_in_lockstep((ours, ours), held_out().input_ids, lambda _: None)
    theirs.embed(held_out().input_ids[:1], 1)
    with predictors((ours, theirs), (batches, batches)) as models:
        (figures,) = compare(models, [(0, 1)], held_out().input_ids, lambda _: None)
    assert float(figures.kl.mean()) > 1e-4


def test_an_artifact_with_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(InputError, match="extra: unexpected"):
        measure(model.checkpoint, tmp_path / "a")


def test_an_artifact_of_another_model_is_refused(tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    QuantizedModel(factories.build(factories.llama_config(rms_norm_eps=1e-3, intermediate_size=64))).write(
        tmp_path / "a"
    )
    with pytest.raises(InputError, match=r"intermediate_size is 64, not 128\n +rms_norm_eps is"):
        refuse_headers(model.checkpoint, tmp_path / "a")
    with pytest.raises(InputError, match=r"shape \[64, 64\], the model requires \[128, 64\]"):
        measure(model.checkpoint, tmp_path / "a")


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 1}, {"hidden_size": 32}, {"num_key_value_heads": 4}, {"vocab_size": 100}],
    ids=lambda changes: next(iter(changes)),
)
def test_weights_that_are_not_those_of_their_own_config_are_refused(changes: dict[str, int], tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path / "a")
    edit_config(tmp_path / "a", changes)
    with pytest.raises(InputError, match="not the model that it claims to be"):
        measure(model.checkpoint, tmp_path / "a")


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation"])
def test_an_artifact_whose_config_would_load_code_is_told_and_not_obeyed(tmp_path: Path, key: str) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path / "a")
    assert config_check(model.checkpoint, tmp_path / "a").passed
    intact = measure(model.checkpoint, tmp_path / "a")
    edit_config(tmp_path / "a", {key: "org/name"})
    with pytest.raises(InputError, match=key):
        refuse_headers(model.checkpoint, tmp_path / "a")
    check = config_check(model.checkpoint, tmp_path / "a")
    assert (check.gate, check.passed) == ("config", False)
    assert key in check.detail
    assert measure(model.checkpoint, tmp_path / "a").figures == intact.figures


def test_progress_counts_every_step(tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path / "a")
    events: list[Progress | Notice] = []
    found = measure(model.checkpoint, tmp_path / "a", prompts=PROMPTS, progress=events.append)
    steps = [event for event in events if isinstance(event, Progress)]
    finished = [step for step in steps if step.detail]
    assert [step.done for step in finished] == list(range(1, 8))  # two blocks, one batch, two prompts of two models
    assert all(step.done <= step.total for step in steps)
    assert (finished[-1].done, finished[-1].total) == (7, 7)
    assert finished[-1].tokens == 2 * 3 * held_out().input_ids.numel()
    assert found.unconfirmed == []


@pytest.mark.parametrize("way", ["drafted", "blocks"])
def test_prompts_of_a_model_that_does_not_fit_are_continued_block_by_block(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path / "a")
    options: Mapping[str, Any] = {"prompts": PROMPTS, "dtype": torch.float32}
    whole = measure(model.checkpoint, tmp_path / "a", **options)

    monkeypatch.setattr("qexport.verifying.memory.needed_memory", lambda runner: 1 << 30)
    free = 1 << 29 if way == "drafted" else 1000
    monkeypatch.setattr("qexport.verifying.whole_models.available_memory", lambda device: free)
    events: list[Progress | Notice] = []
    found = measure(model.checkpoint, tmp_path / "a", progress=events.append, **options)
    assert found.generations == whole.generations
    assert found.figures == whole.figures
    assert found.unconfirmed == []
    (note,) = found.notes
    assert "continued block by block" in note
    assert ("drafted" in note) == (way == "drafted")
    assert "for the reference" in note
    assert "prompts are continued block by block; the whole model needs" in next(
        event.text for event in events if isinstance(event, Notice)
    )
    steps = [event for event in events if isinstance(event, Progress)]
    assert steps[-1].done == steps[-1].total


def test_tasks_need_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path / "a")
    monkeypatch.setattr("qexport.verifying.whole_models.available_memory", lambda device: 1000.0)
    events: list[Progress | Notice] = []
    found = measure(model.checkpoint, tmp_path / "a", tasks=TaskSettings(tasks=["x"]), progress=events.append)
    assert found.unconfirmed == ["tasks (the model does not fit in memory)"]
    assert "not measured: tasks" in next(event.text for event in events if isinstance(event, Notice))


@pytest.mark.parametrize("tied", [True, False])
def test_the_way_to_continue_follows_from_what_is_free(tied: bool, tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.llama_config(num_hidden_layers=20, tie_word_embeddings=tied)))
    model.write(tmp_path / "a")
    runner = BlockRunner(model.architecture, model.checkpoint.weights, dtype=torch.bfloat16, device=CPU)
    parameters = {name: parameter.numel() for name, parameter in model.model.named_parameters()}
    block = sum(count for name, count in parameters.items() if ".layers.0." in name)
    outside, head = (
        sum(count for name, count in parameters.items() if ".layers." not in name),
        factories.VOCABULARY * 64,
    )
    with open_stored(tmp_path / "a", dtype=torch.bfloat16) as stored:
        stored_bytes = (tmp_path / "a" / "model.safetensors").stat().st_size
        drafting = drafting_memory(runner, stored)
        assert drafting == int((stored_bytes + 2 * (outside + block) + 2 * 4 * head) * 1.25)
        whole = needed_memory(runner)
        assert drafting < whole
        free = [drafting - 1, drafting, whole - 1, whole]
        assert [choose_way(runner, stored, each) for each in free] == ["blocks", "drafted", "drafted", "whole"]
