"""What a runtime computes, compared with the reference and with our reading: oracles, and faults in what is served."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

import factories
import trained_models
from qexport.artifact.figures import Figure, GateResult, find_figure
from qexport.artifact.served import RuntimeFacts, through, verdict_through
from qexport.errors import InputError, NumericalError
from qexport.gates.limits import Limit
from qexport.gates.serving import decide_served, fidelity_limit, limits_of_runtime, unless_waived
from qexport.progress import Steps, silent
from qexport.quantizing.rounding import NearestSource
from qexport.reading.stored_model import open_stored
from qexport.text.documents import Documents
from qexport.text.windows import HeldOut, make_held_out
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Preparation, Reference
from qexport.verifying.served import check_tokenizer, judge_continuations, measure_served, own_reading
from quantized_models import QuantizedModel, dequantized

CPU = torch.device("cpu")
LABEL = "vllm float32"
LIMIT = fidelity_limit("float32", None, "bfloat16")
OF_RUNTIME = limits_of_runtime(LIMIT, rounds=False)


class Whole:
    """A whole model of transformers as a runtime."""

    def __init__(self, model: PreTrainedModel, *, padding: int = 0) -> None:
        self.model: Any = model
        self._padding = padding
        self.facts = RuntimeFacts(name="vllm", version="1", kernels={}, dtype="float32", arguments={})

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        rows = self.model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        rows = torch.cat([rows, torch.full((len(rows), self._padding), -50.0)], 1)
        yield from rows.log_softmax(-1).split(20)

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
        ids = torch.tensor(prompts)
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        found: list[list[int]] = output[:, len(prompts[0]) :].tolist()
        return found


@cache
def quantized() -> QuantizedModel:
    return QuantizedModel(trained_models.trained())


@cache
def held_out() -> HeldOut:
    items = tuple(f"{index}. {text}" for index in range(4) for text in factories.TEXT)
    return make_held_out(
        Documents(items, "held-out.jsonl"),
        factories.tokenizer(),
        windows=6,
        sequence_length=48,
        vocab_size=factories.VOCABULARY,
    )


def reference() -> Reference:
    checkpoint = quantized().checkpoint
    return Reference(
        merged=checkpoint,
        base=checkpoint,
        adapter=None,
        changed=frozenset(),
        rounding_of=lambda matrix, codes: None,
        nearest=lambda grids, transposed: NearestSource(checkpoint.weights, grids, transposed),
        prepared=Preparation({}),
        held_out=held_out(),
        prompts=None,
        open_tokenizer=factories.tokenizer,
        settings=VerifySettings(text="held-out.jsonl", windows=6),
        dtype=torch.bfloat16,
        device=CPU,
    )


@cache
def sound() -> PreTrainedModel:
    """What the codes stand for, in float32."""
    model = factories.build(quantized().model.config, dtype=torch.float32)
    weights = {record.name: dequantized(record, torch.float32) for record in quantized().records()}
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].float()
    model.eval()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "artifact"
    quantized().write(path)
    return path


def measured(folder: Path, runtime: Whole) -> list[Figure]:
    with open_stored(folder, dtype=torch.float32) as artifact:
        return measure_served(runtime, artifact, reference(), lambda figures: gates(figures), Steps(silent))


def gates(figures: Sequence[Figure]) -> list[GateResult]:
    limits = [Limit("mean_kl", None, "at_most", 0.5, by_user=True)]
    return decide_served(limits, figures, OF_RUNTIME, LABEL)


def value(found: list[Figure], name: str) -> float:
    figure = find_figure(found, name)
    assert figure is not None
    return figure.value


def kl(one: PreTrainedModel, other: PreTrainedModel) -> float:
    with torch.no_grad():
        p, q = (each(held_out().input_ids).logits[:, :-1].double().log_softmax(-1) for each in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_both_comparisons_are_those_of_whole_models(folder: Path) -> None:
    other = damaged("o_proj x 0.9")
    found = measured(folder, Whole(other))
    merged = copy.deepcopy(quantized().model).float()
    assert value(found, "fidelity_kl") == pytest.approx(kl(sound(), other), rel=1e-4)
    assert value(found, "mean_kl") == pytest.approx(kl(merged, other), rel=0.02)  # the reference computes in bfloat16
    assert value(found, "mean_kl") > 20 * value(found, "fidelity_kl")


def test_a_sound_runtime_is_confirmed(folder: Path) -> None:
    found = measured(folder, Whole(sound(), padding=11))
    assert value(found, "fidelity_kl") < LIMIT / 100
    assert value(found, "fidelity_top1") == 1.0
    assert value(found, "fidelity_continuations") == 1.0
    assert abs(value(found, "kl_over_reading")) < 0.05
    decided = gates(found)
    assert [gate.name for gate in decided] == ["mean_kl through vllm float32", "fidelity_kl through vllm float32"]
    assert verdict_through(LABEL, decided) == "pass"


def test_sixteen_bits_keep_the_limit_of_their_dtype(folder: Path) -> None:
    found = measured(folder, Whole(torch.nn.Module.to(copy.deepcopy(sound()), torch.bfloat16)))
    assert LIMIT < value(found, "fidelity_kl") < fidelity_limit("bfloat16", None, "bfloat16")


def zero_layer(model: PreTrainedModel) -> None:
    model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()


def scaled_output(model: PreTrainedModel) -> None:
    model.get_parameter("model.layers.1.self_attn.o_proj.weight").mul_(0.9)


def rolled_rows(model: PreTrainedModel) -> None:
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.copy_(weight * weight.abs().amax(1, keepdim=True).roll(1, 0) / weight.abs().amax(1, keepdim=True))


def half_rotated_keys(model: PreTrainedModel) -> None:
    """Interleaved pairs in place of halves."""
    weight, size = model.get_parameter("model.layers.0.self_attn.k_proj.weight"), model.config.head_dim
    heads = weight.view(-1, 2, size // 2, weight.shape[1])
    weight.copy_(heads.transpose(1, 2).reshape(weight.shape).clone())


def other_rope(model: PreTrainedModel) -> None:
    model.get_submodule("model.rotary_emb").inv_freq.mul_(0.7)  # type: ignore[operator]


def untrained_rows(model: PreTrainedModel) -> None:
    """An adapter that is missing in one layer."""
    weight = model.get_parameter("model.layers.2.self_attn.v_proj.weight")
    weight.sub_(torch.outer(torch.ones(len(weight)), weight[0]) * 0.3)


FAULTS: dict[str, Callable[[PreTrainedModel], None]] = {
    "a layer zero": zero_layer,
    "o_proj x 0.9": scaled_output,
    "scales of a layer rolled": rolled_rows,
    "half-rotated keys": half_rotated_keys,
    "rope theta": other_rope,
    "a low-rank change missing": untrained_rows,
}


@cache
def damaged(fault: str) -> PreTrainedModel:
    model = copy.deepcopy(sound())
    with torch.no_grad():
        FAULTS[fault](model)
    return model


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_what_is_served_fails_fidelity(fault: str, folder: Path) -> None:
    found = measured(folder, Whole(damaged(fault)))
    decided = {gate.name: gate for gate in gates(found)}
    assert decided[through("fidelity_kl", LABEL)].verdict == "fail"
    assert value(found, "fidelity_kl") > 10 * LIMIT


def test_faults_that_quality_does_not_see_are_why_fidelity_is_measured(folder: Path) -> None:
    decided = {gate.name: gate for gate in gates(measured(folder, Whole(damaged("o_proj x 0.9"))))}
    assert decided[through("mean_kl", LABEL)].passed


def test_the_continuations_of_another_model_are_not_ours(folder: Path) -> None:
    found = measured(folder, Whole(damaged("a layer zero")))
    assert value(found, "fidelity_continuations") < 1.0


def test_a_smaller_vocabulary_is_refused(folder: Path) -> None:
    model = factories.build(factories.llama_config(vocab_size=factories.VOCABULARY - 8), dtype=torch.float32)

    class Clamped(Whole):
        def logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
            return super().logits([min(each, factories.VOCABULARY - 9) for each in ids])

    with pytest.raises(InputError, match=f"vllm has {factories.VOCABULARY - 8} tokens, the model"):
        measured(folder, Clamped(model))


@pytest.mark.parametrize("token", [factories.VOCABULARY, -1])
def test_tokens_that_the_model_does_not_have_are_refused(token: int, folder: Path) -> None:
    class Padded(Whole):
        def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
            return [[1, 2], [3, token], *([4] for _ in prompts[2:])]

    with open_stored(folder, dtype=torch.float32) as artifact:
        ours = own_reading(artifact, CPU)
        with pytest.raises(InputError, match=f"vllm gives the token {token}, the model has") as found:
            judge_continuations(Padded(sound()), ours, held_out().input_ids, [])
    assert "held-out window 1" in str(found.value)


def test_nan_is_refused(folder: Path) -> None:
    model = copy.deepcopy(sound())
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = torch.nan
    with pytest.raises(NumericalError, match="the log-probabilities of vllm hold NaN or Inf"):
        measured(folder, Whole(model))


def test_the_limit_follows_the_dtype_and_the_models_own_noise() -> None:
    assert [fidelity_limit(each, None, "bfloat16") for each in ("float32", "float16", "bfloat16", "fp8", "q8_0")] == [
        1e-6, 1e-4, 4e-3, 4e-3, 8e-3,
    ]  # fmt: skip
    assert fidelity_limit("bfloat16", 0.01, "bfloat16") == pytest.approx(0.04)
    assert fidelity_limit("float16", 0.01, "bfloat16") == pytest.approx(0.04 / 64)
    assert fidelity_limit("float32", 0.01, "bfloat16") == 1e-6
    assert fidelity_limit("bfloat16", 1e-9, "float32") == pytest.approx(4e-9 * 2.0**32)
    assert fidelity_limit("q8_0", 0.01, "bfloat16") == pytest.approx(0.04 * 2**0.6)


class Tokens:
    """A runtime with a tokenizer, or without."""

    def __init__(self, tokens: Callable[[str], list[int]] | None) -> None:
        self._tokens = tokens

    def tokenized(self, texts: Sequence[str]) -> list[list[int]] | None:
        return None if self._tokens is None else [self._tokens(text) for text in texts]


def test_a_runtimes_own_tokens_are_compared() -> None:
    own = factories.tokenizer()
    (sound,) = check_tokenizer(Tokens(lambda text: own(text)["input_ids"]), reference())
    assert (sound.gate, sound.passed) == ("tokenizer", True)
    (wrong,) = check_tokenizer(Tokens(lambda text: own(text.lower())["input_ids"]), reference())
    assert not wrong.passed
    assert "other tokens of" in wrong.detail
    assert check_tokenizer(Tokens(None), reference()) == []


def test_texts_that_the_reference_would_normalize_are_left_out() -> None:
    backend = Tokenizer.from_str(factories.tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    normalizing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    plain = factories.tokenizer()
    (found,) = check_tokenizer(
        Tokens(lambda text: plain(text)["input_ids"]), replace(reference(), open_tokenizer=lambda: normalizing)
    )
    assert found.passed


def test_a_limit_of_the_recipe_takes_the_place_of_ours() -> None:
    figure = Figure(
        name="fidelity_kl", value=0.5, low=0.4, high=0.6, sequence_low=0.4, sequence_high=0.6, n=9, unit="window"
    )
    (gate,) = decide_served([Limit("fidelity_kl", None, "at_most", 0.7, by_user=True)], [figure], OF_RUNTIME, LABEL)
    assert (gate.limit, gate.verdict) == (0.7, "pass")
    assert decide_served([], [figure], [], LABEL) == []
    (gate,) = decide_served([Limit("fidelity_kl", None, "at_most", 0.7, by_user=True)], [], [], LABEL)
    assert gate.verdict == "undecided"
    assert decide_served([Limit("mean_kl", None, "at_most", 0.7, by_user=True)], [], [], LABEL) == []
    assert verdict_through(LABEL, []) == "undecided"


@pytest.mark.parametrize(("drift", "failed"), [(-0.02, []), (0.4, ["at_most"]), (-0.9, ["at_least"])])
def test_where_activations_are_rounded_the_drift_may_be_no_other(drift: float, failed: list[str]) -> None:
    low, high = drift - 0.05, drift + 0.05
    figure = Figure(
        name="kl_over_reading",
        value=drift,
        low=low,
        high=high,
        sequence_low=low,
        sequence_high=high,
        n=9,
        unit="window",
    )
    limits = limits_of_runtime(None, rounds=True)
    decided = decide_served([], [figure], limits, "x")
    assert [gate.name for gate in decided if gate.verdict == "fail"] == [
        f"kl_over_reading {bound} through x" for bound in failed
    ]
    assert all(gate.verdict in ("pass", "fail") for gate in decided)
    waiving = VerifySettings(text="a.jsonl", profile="off", gates={"kl_over_reading": None})
    assert unless_waived(waiving, limits) == (
        [],
        ["the gate kl_over_reading is waived: verify.gates sets kl_over_reading to null"],
    )
