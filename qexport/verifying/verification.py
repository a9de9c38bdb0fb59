"""The finished artifact, read back from disk, held against the merged reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedTokenizerBase

from qexport.architectures.runner import BlockRunner
from qexport.architectures.structure import describe
from qexport.artifact.manifest import Comparison, Gate, Generations, Verification
from qexport.progress import Notice, Progress, Reporter, silent
from qexport.reading.artifact_source import ArtifactSource
from qexport.tensors import CalibrationSet, Checkpoint
from qexport.text.prompts import Prompt, encode_prompt
from qexport.verifying.config_comparison import refuse_other_config
from qexport.verifying.continuation import greedy_settings
from qexport.verifying.divergence import TokenFigures, compare
from qexport.verifying.generation import GenerationFigures, compare_generations
from qexport.verifying.lockstep import run_in_lockstep, windows_at_once
from qexport.verifying.memory import available_memory, needed_memory
from qexport.verifying.settings import VerifySettings

_GENERATIONS: Final = "greedy generations (the model does not fit in memory)"


def verify(
    reference: Checkpoint,
    artifact: Path,
    windows: CalibrationSet,
    prompts: Sequence[Prompt],
    settings: VerifySettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    device: torch.device,
    report: Reporter = silent,
) -> Verification:
    """Measures perplexity, KL divergence and top-1 agreement, and continues the prompts where the model fits in memory.

    Both models run block by block; a failed gate is recorded, not raised. docs/verification.md defines every figure.

    Args:
        reference: the merged model, read from its source again.
        artifact: the folder, in the safetensors layout.
        windows: held-out tokens; see `qexport.text.windows`.
        prompts: what both models continue greedily; may be empty.
        settings: the recipe's `verify`.
        tokenizer: the model's.
        dtype: what the blocks compute in: the merged model's dtype.
        device: where to compute.
        report: is told of each step.

    Raises:
        InputError: the artifact cannot be read, or is not a quantized form of the reference.
        NumericalError: logits hold NaN or Inf.
    """
    with ArtifactSource(artifact, dtype=dtype) as source:
        refuse_other_config(reference.config, source.config)
        ours = BlockRunner(reference.config, reference.weights, dtype=dtype, device=device)
        source.check_complete(ours.structure)
        theirs = BlockRunner(source.config, source, dtype=dtype, device=device)
        generates = bool(prompts) and _fits_in_memory(ours, report)
        steps = _Steps(report, _step_count(ours, windows.input_ids, len(prompts) if generates else 0))
        figures = _measure(ours, theirs, windows.input_ids, steps)
        generations = None
        if generates:
            greedy = greedy_settings(reference, tokenizer, max_new_tokens=settings.max_new_tokens)
            inputs = [encode_prompt(tokenizer, prompt) for prompt in prompts]
            found = compare_generations(
                ours, theirs, prompts, inputs, tokenizer, greedy, lambda: steps.finished("continuing the prompts")
            )
            generations = _generations(found, prompts)
    unconfirmed = [_GENERATIONS] if prompts and not generates else []
    return _verification(figures, windows, settings, generations, unconfirmed)


def check_headers(reference: Checkpoint, artifact: Path) -> None:
    """Holds the artifact's config.json and headers against the reference; reads no weights.

    Raises:
        InputError: the artifact cannot be read, or is not a form of the reference.
    """
    with ArtifactSource(artifact, dtype=torch.float32) as source:
        refuse_other_config(reference.config, source.config)
        source.check_complete(describe(reference.config))


@dataclass
class _Steps:
    """The blocks, then the batches whose predictions are compared, then the continuations of both models."""

    report: Reporter
    total: int
    done: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.report(Progress("verify", 0, self.total, "step"))

    def finished(self, detail: str, tokens: int = 0) -> None:
        self.done += 1
        self.tokens += tokens
        self.report(Progress("verify", self.done, self.total, "step", detail, self.tokens))


def _step_count(runner: BlockRunner, input_ids: torch.Tensor, prompts: int) -> int:
    windows, length = input_ids.shape
    return len(runner.structure.blocks) + math.ceil(windows / windows_at_once(length)) + 2 * prompts


def _measure(reference: BlockRunner, artifact: BlockRunner, input_ids: torch.Tensor, steps: _Steps) -> TokenFigures:
    def ran(blocks: int) -> None:
        steps.finished(f"block {blocks} of both models", tokens=2 * input_ids.numel())

    def compared(windows: int) -> None:
        steps.finished(f"predictions in {windows} windows")

    ours, theirs = run_in_lockstep((reference, artifact), input_ids, ran)
    return compare(reference, artifact, (ours, theirs), input_ids, compared)


def _verification(
    figures: TokenFigures,
    windows: CalibrationSet,
    settings: VerifySettings,
    generations: Generations | None,
    unconfirmed: list[str],
) -> Verification:
    return Verification(
        reference_perplexity=figures.reference_perplexity,
        artifact_perplexity=figures.artifact_perplexity,
        mean_kl=figures.mean_kl,
        top1_agreement=figures.top1_agreement,
        tokens=figures.kl.numel(),
        windows=windows.input_ids.shape[0],
        sequence_length=windows.input_ids.shape[1],
        text_sha256=windows.sha256,
        generations=generations,
        gates=judge(figures.mean_kl, settings),
        readers=[f"qexport {version('qexport')}"],
        unconfirmed=unconfirmed,
    )


def _generations(figures: GenerationFigures, prompts: Sequence[Prompt]) -> Generations:
    comparisons = [
        Comparison(
            id=prompt.id,
            prompt=prompt.prompt,
            reference=result.reference,
            artifact=result.artifact,
            first_difference=result.first_difference,
        )
        for prompt, result in zip(prompts, figures.prompts, strict=True)
    ]
    identical = sum(result.identical for result in figures.prompts)
    return Generations(
        prompts=len(prompts), identical=identical, max_new_tokens=figures.max_new_tokens, comparisons=comparisons
    )


def judge(mean_kl: float, settings: VerifySettings) -> list[Gate]:
    """The gates that the recipe sets."""
    if settings.max_kl is None:
        return []
    return [Gate(name="max_kl", value=mean_kl, limit=settings.max_kl, passed=mean_kl <= settings.max_kl)]


def _fits_in_memory(runner: BlockRunner, report: Reporter) -> bool:
    needed, available = needed_memory(runner), available_memory(runner.device)
    if needed > available:
        sizes = f"it needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        report(Notice(f"no greedy generations: the whole model does not fit in memory ({sizes})"))
    return needed <= available
