"""The main memory that each stage is expected to take: a fixed part, and the largest of the stage's needs.

Constants are in bytes, or in how many matrices are in memory at the same time.
"""

from __future__ import annotations

import math
from typing import Final

from qexport.architectures.devices import has_bfloat16_instructions
from qexport.architectures.memory import Budget
from qexport.pipeline.expected_sizes import RunSizes
from qexport.quantizing.asymmetry import TOKENS
from qexport.quantizing.gptq_pass import BATCH_TOKENS as GPTQ_BATCH_TOKENS
from qexport.quantizing.gptq_pass import HESSIAN_BYTES
from qexport.quantizing.importance import AT_A_TIME
from qexport.quantizing.importance_share import AT_HEAD
from qexport.quantizing.mixed import Mixed
from qexport.verifying import VerifySettings
from qexport.verifying.along import PORTION_TOKENS
from qexport.verifying.divergence import DOUBLES_AT_ONCE
from qexport.verifying.memory import HEADROOM
from qexport.verifying.predictors import BATCH_TOKENS, TOKENS_AT_ONCE
from qexport.verifying.prompt_batches import ROWS

_FIXED: Final = 425e6
"""The process before any weight: Python, torch, transformers, and the plan."""

_RAY: Final = 90e6
"""Ray's own libraries in the process of a worker."""

_GAPS: Final = 1.08
"""What malloc keeps between tensors of many sizes."""

_STATISTICS: Final = 30e6
"""What verification imports."""

_GENERATION: Final = 75e6
"""The same, and what transformers imports to continue prompts."""

_SQUARES: Final = 2
"""Matrices [in, in] in float32 while a Hessian is factorized: itself, and the copy that becomes its factor."""

_SOLVED: Final = 3
"""Matrices [out, in] in float32 while codes are found: the weights, the columns, and what is measured of them."""

_ROUNDED: Final = 4
"""The same while a matrix is rounded, or codes become weights again."""

_LOGITS: Final = 3
"""Copies of the logits of a batch's new tokens while they are checked."""

_LOGITS_BACK: Final = 6
"""The same, with their gradients."""

PREPARED: Final = 1024
"""Tokens on which the noise floor and the merge are measured."""


def choose_budget(sizes: RunSizes, limit: float) -> tuple[Budget, dict[str, int]]:
    """The least tight budget with which every stage keeps to a limit, else the tightest; and the bytes of each stage.

    Args:
        sizes: of the run.
        limit: bytes of the whole process.
    """
    for share in (math.inf, 0.5, 0.25, 0.0):
        chosen = Budget(limit, share * HESSIAN_BYTES, share * BATCH_TOKENS) if share < 1 else Budget(limit)
        stages = {name: round(_FIXED + _GAPS * need) for name, need in _needs(sizes, chosen).items()}
        if max(stages.values()) <= limit:
            break
    return chosen, stages


def _needs(sizes: RunSizes, chosen: Budget) -> dict[str, float]:
    """Bytes of each stage beyond the fixed part."""
    needs = {} if sizes.method is None else {"quantize": _quantizing(sizes, chosen)}
    if isinstance(sizes.method, Mixed):
        needs["measure"] = _choosing(sizes, sizes.method)
    if sizes.high_effort:
        needs["importance"] = _importance(sizes)
    if sizes.verify is not None:
        needs |= {"prepare": _preparing(sizes), "verify": _verifying(sizes, sizes.verify, chosen)}
        if _fits(sizes, chosen.limit):
            needs["prompts"] = _continuing(sizes)
        if sizes.runtimes:
            needs["through"] = _serving(sizes, sizes.verify, chosen)
    return needs


def memory_of_worker(sizes: RunSizes, workers: int, chosen: Budget) -> int:
    """Bytes of one of several workers at the peak.

    Args:
        sizes: of the run.
        workers: how many there are.
        chosen: what the run keeps to.
    """
    needs = [_quantizing_rows(sizes, workers)]
    if isinstance(sizes.method, Mixed):
        codes = _options(sizes.method) * sizes.block  # of a byte each
        needs.append(_choosing(sizes, sizes.method, workers) + _sent(sizes) + 2 * codes)
    if sizes.high_effort:
        needs.append(_importance(sizes, workers) + _sent(sizes))
    if sizes.verify is not None:
        needs.append(_comparing_windows(sizes, sizes.verify, workers, chosen))
    return round(_FIXED + _RAY + _GAPS * (max(needs) + _passing(sizes, workers)))


def _passing(sizes: RunSizes, workers: int) -> float:
    """What a pass of GPTQ sends through the cluster's shared memory, whose pages stay a worker's once it has read them:
    two blocks, and of the widest layer the Hessian and its factor; between several workers two sums as well.
    """
    if sizes.gptq is None:
        return 0.0
    square = 4 * max(linear.in_features for linear in sizes.linears) ** 2
    return 2.0 * sizes.block * sizes.bytes_ + (4 if workers > 1 else 2) * square


def _sent(sizes: RunSizes) -> float:
    """What is outside the blocks and a block, as they are sent and copied."""
    return 2.0 * (sizes.outside + sizes.block) * sizes.bytes_


def _quantizing_rows(sizes: RunSizes, workers: int) -> float:
    """What is outside the blocks, as it is sent and copied; the block; and of the group that takes most, the sums and
    the inputs of a worker's own windows in both models and as their difference, or what it solves its rows with. Pages
    of the cluster's shared memory count as a worker's once it has read them.
    """
    if sizes.gptq is None:
        return 3 * 4 * sizes.widest
    tokens, most = -(-sizes.calibration // workers), 0.0
    for linear in sizes.linears:
        square, rows = 4 * linear.in_features**2, 4 * linear.in_features * sizes.sharing(linear) / workers
        held = sizes.bytes_ * tokens * linear.in_features * (1 if linear.expert else 2 * sizes.streams - 1)
        most = max(most, held + 2 * square, 2 * square + _SOLVED * rows)
    return (2 * sizes.outside + sizes.block) * sizes.bytes_ + most + _summed(sizes)


def _comparing_windows(sizes: RunSizes, settings: VerifySettings, workers: int, chosen: Budget) -> float:
    """The hidden states of a worker's own windows in all models; what is outside the blocks, of two models as it is
    sent and of one copied; a block, and at the end the heads in float32 and pieces of all logits.
    """
    at_once = _at_once(settings, _first_tokens(settings), chosen)
    tokens = at_once * math.ceil(math.ceil(_first_tokens(settings) / at_once) / workers)
    hidden = sizes.compared * tokens * sizes.hidden * sizes.bytes_
    block = 2 * sizes.block * sizes.bytes_ + at_once * sizes.working
    heads = 4 * _heads(sizes) * sizes.head + _logits(sizes, sizes.compared)
    return _STATISTICS + hidden + 3 * sizes.outside * sizes.bytes_ + max(block, heads)


def _quantizing(sizes: RunSizes, chosen: Budget) -> float:
    """For GPTQ: the block, a batch's tensors and the largest factorization or solution; all else is on the disk."""
    tensor = sizes.bytes_ * max(sizes.counts.values())
    if sizes.gptq is None:
        return 1.3 * tensor + _ROUNDED * 4 * sizes.widest
    solved = 0.0
    for linear in sizes.linears:
        square, weights = 4 * linear.in_features**2, 4 * linear.in_features * sizes.sharing(linear)
        together = min(min(HESSIAN_BYTES, chosen.expert_hessians) - square, (sizes.experts - 1) * square)
        others = max(0.0, together) if linear.expert else 0.0
        targets = 0 if linear.expert else 2 * (sizes.streams - 1) * weights
        solved = max(solved, others + targets + weights + max(_SQUARES * square, 2 * square + (_SOLVED - 1) * weights))
    return max(tensor, sizes.block * sizes.bytes_ + solved) + _summed(sizes)


def _summed(sizes: RunSizes) -> float:
    """A batch's inputs of GPTQ's widest layer, in both models and as their difference; and, on a CPU without
    instructions for 16-bit values, a layer's inputs and outputs in a forward and the factors of a sum in float32.
    """
    widest = max((linear.in_features for linear in sizes.linears if not linear.expert), default=0)
    batch = min(sizes.calibration, GPTQ_BATCH_TOKENS)
    inputs = sizes.bytes_ * batch * widest * (2 * sizes.streams - 1)
    if sizes.bytes_ > 2 or has_bfloat16_instructions():
        return inputs
    forward = batch * max(linear.in_features + linear.out_features for linear in sizes.linears)
    return inputs + 4.0 * (forward + (2 * TOKENS * widest if sizes.streams == 2 else 0))


def _options(method: Mixed) -> int:
    """How many options a layer has that change it."""
    return sum(bits < 16 for bits in method.bits) * len(method.group_sizes)


def _choosing(sizes: RunSizes, method: Mixed, workers: int = 1) -> float:
    """The hidden states of three times the windows before every block, in 16 bits; and in float32 those of one block,
    and a block, its gradients and its change with each option, or a head with some copies of a window's logits. A
    worker has its own windows.
    """
    options, blocks = _options(method), len(sizes.blocks)
    tokens = -(-method.windows // workers) * method.window_tokens
    square = max(4 * linear.in_features**2 for linear in sizes.linears)
    hessians = sum({linear.in_features: 4 * linear.in_features**2 for linear in sizes.linears}.values()) + square
    block = 4 * sizes.block * (options + 2) + hessians + _SOLVED * 4 * sizes.widest
    head = 4 * sizes.head + _LOGITS_BACK * 4 * method.window_tokens * sizes.vocabulary
    return tokens * sizes.hidden * (3 * 2 * blocks + 5 * 4) + max(block, head)


def _importance(sizes: RunSizes, workers: int = 1) -> float:
    """What is found of each layer and token; the gradients between two blocks of the tokens that are on their way; and
    a block with what a batch's pass back needs of its forward, or a head with some copies of some tokens' logits. A
    worker has its own tokens.
    """
    own = min(-(-sizes.calibration // workers), AT_A_TIME)
    layers = [linear for linear in sizes.linears if not linear.expert]
    found = 2 * (own if workers > 1 else sizes.calibration) * len(sizes.blocks) * len(layers)
    between = 2 * own * sizes.hidden * sizes.bytes_
    passed = sum(linear.in_features + linear.out_features for linear in layers) + sizes.working / sizes.bytes_
    block = sizes.bytes_ * (sizes.block + 2 * GPTQ_BATCH_TOKENS * passed)
    return found + between + max(block, 4 * sizes.head + _LOGITS_BACK * 4 * AT_HEAD * sizes.vocabulary)


def _preparing(sizes: RunSizes) -> float:
    """Two models compared, in two dtypes or as the merge and its proof: one head beside another, or beside
    the logits of the first model, see `qexport.verifying.predictors.two_predictors`.
    """
    tokens = PREPARED
    wide = 8 if sizes.bytes_ == 4 else 4
    hidden = tokens * sizes.hidden * (sizes.bytes_ + wide)
    block = sizes.block * wide + 4 * sizes.widest + tokens * 2 * sizes.working
    head = max(sizes.head * (sizes.bytes_ + wide), wide * sizes.head + _logits(sizes, 2))
    beside = min(4 * tokens * sizes.vocabulary, wide * sizes.head)
    return _STATISTICS + hidden + max(block, head + beside)


def _verifying(sizes: RunSizes, settings: VerifySettings, chosen: Budget) -> float:
    """The hidden states of all models, one block, and at the end the head: two are compared with each other to find out
    whether one is enough, then that one is widened to float32, and then there are pieces of all logits.
    """
    along = max([settings.length_windows * max(sizes.lengths, default=0), *(each.along for each in sizes.continued)])
    together = min(PORTION_TOKENS, along)  # of two models
    tokens = max(_first_tokens(settings), 2 * together // sizes.compared)
    at_once = _at_once(settings, tokens, chosen)
    hidden = sizes.compared * tokens * sizes.hidden * sizes.bytes_
    block = sizes.block * sizes.bytes_ + _ROUNDED * 4 * sizes.widest + at_once * sizes.working
    heads = _heads(sizes)
    read = sizes.head * (4 * heads + sizes.bytes_)
    return _STATISTICS + hidden + max(block, read, 4 * heads * sizes.head + _logits(sizes, sizes.compared))


def _serving(sizes: RunSizes, settings: VerifySettings, chosen: Budget) -> float:
    """The reference beside a float32 reading of the artifact, block by block, and the logits of both and of the
    runtime, which is a process of its own.
    """
    tokens = _first_tokens(settings)
    at_once = _at_once(settings, tokens, chosen)
    hidden = tokens * sizes.hidden * (sizes.bytes_ + 4)
    block = 4 * (sizes.block + _ROUNDED * sizes.widest) + at_once * sizes.working * 4 / sizes.bytes_
    read = sizes.head * (4 * 2 + sizes.bytes_)
    return _STATISTICS + hidden + max(block, read, 4 * 2 * sizes.head + _logits(sizes, 3))


def _heads(sizes: RunSizes) -> int:
    """How many heads are in memory: the artifact has one of its own where it is quantized."""
    return 2 if sizes.structure.head in sizes.quantized else 1


def _at_once(settings: VerifySettings, tokens: int, chosen: Budget) -> int:
    """How many of these tokens go through a block at a time while models are compared."""
    return round(min(tokens, max(settings.sequence_length, min(BATCH_TOKENS, chosen.compared_tokens))))


def _first_tokens(settings: VerifySettings) -> int:
    """Tokens of the windows before the first look at the gates."""
    return settings.sequence_length * max(1, min(settings.windows, settings.max_windows))


def _continuing(sizes: RunSizes) -> float:
    """A whole model with its head in float32, and the logits of a batch of prompts."""
    logits = max(min(each.prompts, ROWS) * each.new_tokens * 4 * sizes.vocabulary for each in sizes.continued)
    return _GENERATION + sizes.whole + _LOGITS * logits


def _fits(sizes: RunSizes, limit: float) -> bool:
    """Whether there are prompts, and a whole model to continue them fits."""
    return bool(sizes.continued) and _FIXED + _GENERATION + HEADROOM * sizes.whole <= limit


def _logits(sizes: RunSizes, models: int) -> float:
    """Bytes of a piece of the logits of some models, and of what is computed from them in float64."""
    values = TOKENS_AT_ONCE * sizes.vocabulary
    return models * 4 * values + 2 * (models + 1) * 8 * min(values, DOUBLES_AT_ONCE)
