"""Prompts of every length and in several parts, through graphs of the layout onnx, against transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onnx_exports import CONFIGS, FAMILIES, deviation, exported, greedy, prompts, steps
from qexport.errors import InputError
from qexport.reading.onnx.model import OnnxCausalLM

CHUNK = 16
"""`mamba_chunk_size` of the tiny Falcon-H1, whose graph knows no chunks."""


@dataclass(frozen=True)
class Both:
    graph: OnnxCausalLM
    reference: PreTrainedModel


@cache
def both(family: str, attention: str = "plain") -> Both:
    return Both(exported(family, "gptq", attention=attention).model(), reference(family))


@cache
def reference(family: str) -> PreTrainedModel:
    """Attention changes none of the weights, as test_onnx_layout.py has it."""
    return exported(family, "gptq").reference()


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[mask.bool()]


def in_parts(model: OnnxCausalLM, ids: Tensor, mask: Tensor, bounds: list[int]) -> Tensor:
    """The same prompt, each part with the cache of those before."""
    positions, past, found = (mask.cumsum(1) - 1).clamp(min=0), None, []
    for start, end in zip([0, *bounds], [*bounds, ids.shape[1]], strict=True):
        output = model(
            input_ids=ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
            past_key_values=past, use_cache=True,
        )  # fmt: skip
        past = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1)[mask.bool()]


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_token_begins_a_text(family: str, attention: str) -> None:
    """No past, one token, one row: sizes that tracing might have taken for constants."""
    ids, mask = prompts()[0][:1, :1], torch.ones((1, 1), dtype=torch.int64)
    assert_continued_alike(family, attention, ids, mask)


def assert_continued_alike(family: str, attention: str, ids: Tensor, mask: Tensor) -> None:
    """Logits of the prompt, then of eight tokens with a cache, and what `generate` says."""
    tokens, expected = continued(family, tuple(map(tuple, ids.tolist())), tuple(map(tuple, mask.tolist())))
    graph = both(family, attention).graph
    assert deviation(steps(graph, ids, mask, tokens[:, :8]), expected) < 1e-4
    assert torch.equal(greedy(graph, ids, mask), tokens)


Rows = tuple[tuple[int, ...], ...]


@cache
def continued(family: str, ids: Rows, mask: Rows) -> tuple[Tensor, list[Tensor]]:
    """Tokens and logits of the reference."""
    given, seen = torch.tensor(ids), torch.tensor(mask)
    tokens = greedy(reference(family), given, seen)
    return tokens, steps(reference(family), given, seen, tokens[:, :8])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_comes_in_parts(family: str) -> None:
    """Several new tokens with a past; the first part of a row may be padding alone."""
    models, (ids, mask) = both(family), prompts()
    expected = whole(models.reference, ids, mask)
    for bounds in ([16], [33], [1, 2, 20]):
        assert deviation([in_parts(models.graph, ids, mask, bounds)], [expected]) < 1e-4, bounds


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_attention_takes_a_prompt_in_parts_one_row_at_a_time(family: str) -> None:
    models, (ids, mask) = both(family, "fused"), prompts()
    for row in range(3):
        given = ids[row : row + 1], mask[row : row + 1]
        expected = whole(models.reference, *given)
        for bounds in ([17], [35, 38]):
            assert deviation([in_parts(models.graph, *given, bounds)], [expected]) < 1e-4, (row, bounds)


def test_fused_attention_refuses_a_batch_in_parts() -> None:
    """As the settings and the manifest's notes say; a wrong answer would be worse."""
    ids, mask = prompts()
    with pytest.raises(InputError, match="cannot run the graph"):
        in_parts(both("llama", "fused").graph, ids, mask, [16])


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_falcon_h1_knows_no_chunks(length: int, attention: str) -> None:
    ids, mask = prompts(length)
    mask[2, :] = 1 if length < 2 else mask[2, :]
    assert_continued_alike("falcon h1", attention, ids, mask)


def test_sliding_windows_leave_old_tokens_out() -> None:
    """What lies before the window changes nothing, although the cache keeps it."""
    models, (ids, _) = both("mistral"), prompts()
    ids, mask = ids[:1], torch.ones((1, 40), dtype=torch.int64)
    other = ids.clone()
    other[0, 0] += 1
    first, second = (whole_graph(models.graph, each, mask) for each in (ids, other))
    changed = (first - second).abs().amax(1) > 0
    blocks = CONFIGS["mistral"].num_hidden_layers
    assert bool(changed[:16].all())
    assert not bool(changed[blocks * 16 :].any())


def whole_graph(model: OnnxCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits[0]
    return logits
