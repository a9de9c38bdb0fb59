"""What computing in another dtype does by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import factories
import trained_models
from qexport.architectures.architecture import Checkpoint
from qexport.progress import Steps
from qexport.text.documents import read_documents
from qexport.text.windows import HeldOut, make_held_out
from qexport.verifying.reference import TOKENS, noise_floor
from quantized_models import QuantizedModel
from test_verify_verification import whole_model_figures

FIRST = TOKENS // trained_models.WINDOW
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    path = trained_models.write_held_out(tmp_path_factory.mktemp("text") / "held-out.jsonl", passages=120)
    return make_held_out(
        read_documents([str(path)]),
        trained_models.tokenizer(),
        windows=64,
        sequence_length=trained_models.WINDOW,
        vocab_size=factories.VOCABULARY,
    )


def floor(checkpoint: Checkpoint, held_out: HeldOut, dtype: torch.dtype) -> dict[str, float]:
    return dict(noise_floor(checkpoint, held_out.input_ids, dtype=dtype, device=CPU, steps=Steps(lambda _: None)))


def test_sixteen_bits_are_some_way_from_themselves_and_thirty_two_hardly(held_out: HeldOut) -> None:
    checkpoint = QuantizedModel(trained_models.trained()).checkpoint
    narrow, wide = floor(checkpoint, held_out, torch.bfloat16), floor(checkpoint, held_out, torch.float32)
    assert 1e-7 < narrow["mean_kl"] < 1e-3
    assert abs(wide["mean_kl"]) < 1e-9
    assert wide["top1_agreement"] == 1.0
    assert abs(wide["perplexity_ratio"] - 1) < 1e-5 < abs(narrow["perplexity_ratio"] - 1) < 0.02


def test_it_is_the_drift_between_whole_models_in_both_dtypes(held_out: HeldOut) -> None:
    """bfloat16 itself is not portable between processors, so the floor and whole models agree roughly."""
    model = trained_models.trained()
    found = floor(QuantizedModel(model).checkpoint, held_out, torch.bfloat16)
    wide = factories.build(model.config, dtype=torch.float32)
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected = whole_model_figures(model, wide, held_out.input_ids[:FIRST])
    names = ("reference_perplexity", "artifact_perplexity", "mean_kl", "top1_agreement")
    assert [found[name] for name in names if name != "mean_kl"] == pytest.approx(expected[:2] + expected[3:], rel=0.01)
    assert found["mean_kl"] == pytest.approx(expected[2], rel=0.2)


def test_only_the_first_windows_are_run(held_out: HeldOut, tmp_path: Path) -> None:
    checkpoint = QuantizedModel(trained_models.trained()).checkpoint
    first = HeldOut(held_out.input_ids[:FIRST], held_out.domains[:FIRST], "", "")
    assert len(held_out.domains) > FIRST
    assert floor(checkpoint, held_out, torch.bfloat16) == floor(checkpoint, first, torch.bfloat16)
