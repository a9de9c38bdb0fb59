"""Greedy continuations by both models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from qexport.architectures.runner import BlockRunner
from qexport.artifact.manifest import Comparison, Generations
from qexport.tensors import Checkpoint
from qexport.tensors.strict_json import parse_json
from qexport.text.prompts import Prompt, encode_prompt

_GENERATION_CONFIG: Final = "generation_config.json"


def compare_generations(
    reference: BlockRunner,
    artifact: BlockRunner,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    finished: Callable[[], None],
) -> Generations:
    """Lets one model after the other continue every prompt. Each is wholly in memory meanwhile.

    Args:
        reference: the merged model.
        artifact: the artifact.
        prompts: what to continue, through the model's chat template where it has one.
        tokenizer: the model's.
        settings: from `greedy_settings`.
        finished: is told of each continuation.
    """
    inputs = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    ours, theirs = (continue_all(runner, inputs, settings, finished) for runner in (reference, artifact))
    comparisons = [
        Comparison(
            id=prompt.id,
            prompt=prompt.shown,
            reference=_decode(tokenizer, own),
            artifact=_decode(tokenizer, other),
            first_difference=first_difference(own, other),
        )
        for prompt, own, other in zip(prompts, ours, theirs, strict=True)
    ]
    identical = sum(comparison.first_difference is None for comparison in comparisons)
    return Generations(
        prompts=len(prompts), identical=identical, max_new_tokens=settings.max_new_tokens, comparisons=comparisons
    )


def greedy_settings(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int
) -> GenerationConfig:
    """The likeliest token each time, up to one that the model's files call an end."""
    content = checkpoint.files.get(_GENERATION_CONFIG, b"{}")
    named = [parse_json(content, where=_GENERATION_CONFIG), checkpoint.config]
    ends = {token for config in named for token in _listed(config.get("eos_token_id"))}
    ends |= set(_listed(tokenizer.eos_token_id))
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )


@torch.no_grad()
def continue_all(
    runner: BlockRunner, inputs: Sequence[list[int]], settings: GenerationConfig, finished: Callable[[], None]
) -> list[list[int]]:
    """The new tokens for each prompt, one prompt at a time: padding would change the arithmetic."""
    continuations = []
    with runner.whole() as model:
        assert isinstance(model, GenerationMixin)
        for ids in inputs:
            prompt = torch.tensor([ids], device=runner.device)
            output = model.generate(  # type: ignore[misc]  # transformers gives self the type of a protocol
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
            assert isinstance(output, torch.Tensor)
            continuations.append(output[0, len(ids) :].tolist())
            finished()
    return continuations


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first index at which two sequences differ, or one of them has ended; None where they are equal."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    shorter = None if len(ours) == len(theirs) else min(len(ours), len(theirs))
    return next((index for index, (own, other) in pairs if own != other), shorter)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _listed(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]
