"""A model's forward pass, one block at a time, with the memory of one block.

The model is on the meta device. Its own forward runs with every block's forward replaced: first by one that
records what the model passes to each block (masks, position embeddings: they may differ per layer), at the end
by one that returns the last hidden states. So embeddings, masks, final norm and head are the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import PreTrainedModel

from qexport.architectures.lazy_model import LazyModel, at_least_float32, inputs_in

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments that a block takes besides the hidden states."""


class _AllRecordedError(Exception):
    """Ends the model's forward once the last block has been recorded."""


@dataclass
class Batch:
    """Some windows that go through the model together.

    Attributes:
        hidden: the hidden states [windows, sequence_length, hidden_size], the input of the next block.
        calls: for each block, its arguments besides the hidden states.
    """

    hidden: Tensor
    calls: Sequence[Call]


class BlockRunner(LazyModel):
    """Runs a model block by block from a source of weights.

    Bit for bit equal to the whole model in float32, and in bfloat16 up to the head, which computes in float32. On CPUs
    without bfloat16 instructions, large layers in bfloat16 sum in another order; see `qexport.architectures.devices`.
    """

    def embed(self, input_ids: Tensor, batch_size: int) -> list[Batch]:
        """The hidden states before the first block.

        Args:
            input_ids: int64 [windows, sequence_length], without padding, not longer than `Structure.positions`.
            batch_size: windows per batch; the last batch may be smaller.
        """
        return self.embed_batches(input_ids.split(batch_size))

    def embed_batches(self, input_ids: Iterable[Tensor]) -> list[Batch]:
        """The same for windows that are batches already, whose lengths may differ from batch to batch."""
        return list(self.embedded(input_ids))

    @torch.no_grad()
    def embedded(self, input_ids: Iterable[Tensor]) -> Iterator[Batch]:
        """The same one batch after the other, so that not all of them need to be in memory."""
        before: Batch | None = None
        outside = [name for name in self.structure.outside if not name.startswith(f"{self.structure.head}.")]
        with self._loaded(outside):
            for ids in input_ids:
                batch = self._record(ids.to(self.device))
                if before and _same(batch.calls, before.calls):
                    batch.calls = before.calls
                before = batch
                yield batch

    @torch.no_grad()
    def forward(self, index: int, block: nn.Module, batch: Batch) -> None:
        """Runs one block and replaces the batch's hidden states by its output."""
        batch.hidden = _output(block, batch.hidden, batch.calls[index])

    @torch.enable_grad()
    def gradients(
        self, index: int, block: nn.Module, batch: Batch, upstream: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradients of a scalar through one block, whose input the batch's hidden states are.

        Args:
            index: of the block.
            block: the block with its weights.
            batch: is not changed.
            upstream: the scalar's gradient with respect to the block's output.
            names: parameters of the block by their names in files.

        Returns:
            The gradient with respect to the block's input, and those of the parameters. Experts that no token has
            reached have zeros.
        """
        parts = {name: self._naming.parts[name] for name in names}
        leaves = {part.parameter: self._state(part.parameter).requires_grad_() for part in parts.values()}
        hidden = batch.hidden.detach().requires_grad_()
        output = _output(block, hidden, batch.calls[index])
        of_hidden, *found = torch.autograd.grad(output, [hidden, *leaves.values()], upstream, materialize_grads=True)
        by_path = dict(zip(leaves, found, strict=True))
        return of_hidden, {name: part.of(by_path[part.parameter]) for name, part in parts.items()}

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last block's hidden states [..., tokens, hidden_size] to float32 logits. It has gradients
        where grad mode is on.

        The final norm computes in the runner's dtype; the head's product and what follows it in float32.
        """
        skip = () if self.structure.tied else (f"{self.structure.embedding}.",)
        names = [name for name in self.structure.outside if not name.startswith(skip)]
        owner = self.structure.embedding if self.structure.tied else self.structure.head
        wide = {f"{owner}.weight", f"{self.structure.head}.bias"}  # in the narrow dtype they would be there as well
        with self._loaded(names, wide=wide), inputs_in(self._head, at_least_float32(self.dtype)):
            yield self._tail

    @contextmanager
    def head_inputs(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last block's hidden states to the inputs of the output head, in the runner's dtype."""
        skip = (f"{self.structure.embedding}.", f"{self.structure.head}.")
        names = [name for name in self.structure.outside if not name.startswith(skip)]
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _AllRecordedError

        def run(hidden: Tensor) -> Tensor:
            try:
                self._tail(hidden)
            except _AllRecordedError:
                return seen.pop()
            raise AssertionError("the model's forward did not reach its output head")

        hook = self._head.register_forward_pre_hook(stop)
        try:
            with self._loaded(names):
                yield run
        finally:
            hook.remove()

    def _tail(self, hidden: Tensor) -> Tensor:
        hidden = hidden.reshape(-1, *hidden.shape[-2:])
        output = (hidden,) if self._returns_tuple else hidden
        with _replaced(self._layers, [lambda *_, **__: output] * len(self._layers)):
            logits = self._model(inputs_embeds=hidden, use_cache=False).logits
        assert isinstance(logits, Tensor)
        return logits

    def _record(self, ids: Tensor) -> Batch:
        hidden: list[Tensor] = []
        calls: list[Call] = []

        def recorder(index: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                given = kwargs.pop("hidden_states", None)
                if given is None:
                    given, args = args[0], args[1:]
                hidden.append(given)
                calls.append((args, kwargs))
                if index == 0:
                    self._returns_tuple = self.architecture.returns_tuples(lambda: self._probe(given, calls[0]))
                if index == len(self._layers) - 1:
                    raise _AllRecordedError
                return (given,) if self._returns_tuple else given

            return record

        with _replaced(self._layers, [recorder(index) for index in range(len(self._layers))]):
            try:
                self._model(input_ids=ids, use_cache=False)
            except _AllRecordedError:
                return Batch(hidden[0], calls)
        raise AssertionError("the model's forward did not reach its last block")

    def _probe(self, hidden: Tensor, call: Call) -> bool:
        """Whether the blocks return tuples, in a run on the meta device."""
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), call)
        block = self._layers[0]
        with _experts_of_fixed_shapes(self._model), _on_meta(block):
            return isinstance(type(block).forward(block, hidden.to("meta"), *args, **kwargs), tuple)


@contextmanager
def _replaced(layers: nn.ModuleList, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _on_meta(block: nn.Module) -> Iterator[None]:
    """Moves a block's computed buffers to the meta device for a while."""
    before = [(module, leaf, buffer) for module in block.modules() for leaf, buffer in module._buffers.items()]
    for module, leaf, buffer in before:
        module._buffers[leaf] = None if buffer is None else buffer.to("meta")
    try:
        yield
    finally:
        for module, leaf, buffer in before:
            module._buffers[leaf] = buffer


@contextmanager
def _experts_of_fixed_shapes(model: PreTrainedModel) -> Iterator[None]:
    """Makes experts compute in the one way whose shapes do not depend on the data."""
    before = model.get_experts_implementation()
    if before[""] is not None:
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        if before[""] is not None:
            model.set_experts_implementation(before)


def _output(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    args, kwargs = call
    output = block(hidden, *args, **kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _same(ours: Sequence[Call], theirs: Sequence[Call]) -> bool:
    """Whether two recordings hold the same values, so that one of them can be dropped."""
    left, left_spec = tree_flatten(ours)
    right, right_spec = tree_flatten(theirs)
    return left_spec == right_spec and all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _equal(ours: Any, theirs: Any) -> bool:
    if ours is theirs:
        return True
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.shape == theirs.shape and torch.equal(ours, theirs)
    return type(ours) is type(theirs) and not isinstance(ours, Tensor) and bool(ours == theirs)
