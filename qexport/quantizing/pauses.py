"""A block's forward that stops at chosen layers, the layers of each stop, and activations offloaded to the disk."""

from __future__ import annotations

import ctypes
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from greenlet import greenlet
from torch import Tensor, nn


class OffloadFile:
    """Holds the bytes of offloaded tensors, and restores them in place. A context manager.

    The tensor objects stay: their storage is emptied, and filled again before it is used. The file is as large as what
    is offloaded for one block.

    Args:
        folder: where the file is made. It has no name there, and is closed at the end of the context, even if forwards
            that an error has stopped still refer to it: a program may go on after the error.
    """

    def __init__(self, folder: Path) -> None:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by __exit__
        assert isinstance(file, io.FileIO)
        self._file = file
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Frees the disk. What is still offloaded is lost."""
        self._file.close()

    def empty(self) -> None:
        """Makes the whole file free again; every offloaded tensor must have been restored."""
        self._end = 0

    def offload(self, tensor: Tensor) -> Callable[[], None]:
        """Empties the tensor's storage and returns the function that fills it again.

        Raises:
            OSError: the disk is full.
        """
        storage = tensor.untyped_storage()
        place, size = self._end, storage.nbytes()
        self._end += size
        self._write(storage.cpu(), place)
        storage.resize_(0)

        def restore() -> None:
            storage.resize_(size)
            if storage.device.type == "cpu":
                self._read(storage, place)
            else:
                storage.copy_(self._read(torch.UntypedStorage(size), place))

        return restore

    def _write(self, storage: torch.UntypedStorage, place: int) -> None:
        self._file.seek(place)
        content = _view(storage)
        while content:
            content = content[self._file.write(content) :]

    def _read(self, storage: torch.UntypedStorage, place: int) -> torch.UntypedStorage:
        self._file.seek(place)
        content = _view(storage)
        while content:
            content = content[self._file.readinto(content) :]
        return storage


def _view(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a CPU storage. Not through numpy: a storage that has been shared with numpy cannot be resized."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


class PausedForward(greenlet):
    """One batch's forward, run on its own stack until the next module that `pausing_at` names.

    A greenlet and not a thread: everything stays on one operating system thread, with one pool of workers for torch.
    """

    def __init__(self, forward: Callable[[], None]) -> None:
        super().__init__(forward)
        self._restore: list[Callable[[], None]] = []

    def advance(self) -> tuple[Any, ...]:
        """Continues to the next module that pauses, and returns the arguments of its call."""
        args = self._go_on()
        assert isinstance(args, tuple), "the forward ended before the expected module"
        return args

    def offload(self, file: OffloadFile, tensors: Iterable[Tensor]) -> None:
        """Moves tensors that only this forward needs out of memory, until it continues."""
        for tensor in tensors:
            self._restore.append(file.offload(tensor))

    def finish(self) -> None:
        """Continues to the end."""
        self._go_on()
        assert self.dead, "the forward paused once more than expected"

    def _go_on(self) -> object:
        while self._restore:  # the last one first: two of the tensors may share a storage
            self._restore.pop()()
        return self.switch()


@contextmanager
def pausing_at(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Makes every `PausedForward` stop before each of these modules. Other forwards do not stop."""

    def pause(_: nn.Module, args: tuple[Any, ...]) -> None:
        current = greenlet.getcurrent()
        if isinstance(current, PausedForward) and current.parent is not None:
            current.parent.switch(args)

    hooks = [module.register_forward_pre_hook(pause) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Group:
    """Layers whose inputs are known when a forward is about to call one module.

    Attributes:
        stop: that module: the first of the layers, or an `ExpertStop`.
        members: the names of the layers that share an input, one tuple for each input.
        experts: for an `ExpertStop`, the expert of each of `members`.
    """

    stop: nn.Module
    members: tuple[tuple[str, ...], ...]
    experts: tuple[int, ...] | None = None

    def inputs(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The input of each of `members` [..., tokens, in], from what `stop` is called with."""
        if self.experts is None:
            return [args[0]]
        states, counts = args
        parts = states.split(list(counts))
        return [parts[expert] for expert in self.experts]


def find_groups(
    layers: Mapping[str, nn.Module], of_experts: Sequence[Group], forward: Callable[[], None]
) -> list[Group]:
    """Runs a forward once, and returns the groups in the order of its calls. Layers of a group get the same tensor.

    Args:
        layers: the modules to group, by name.
        of_experts: the groups of the block's experts, which are known beforehand.
        forward: runs the block.
    """
    inputs: list[Tensor | None] = []
    groups: list[Group] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            for index, seen in enumerate(inputs):
                if seen is args[0]:
                    groups[index] = Group(groups[index].stop, ((*groups[index].members[0], name),))
                    return
            inputs.append(args[0])
            groups.append(Group(layer, ((name,),)))

        return hook

    def note_experts(group: Group) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, __: tuple[Any, ...]) -> None:
            inputs.append(None)
            groups.append(group)

        return hook

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    hooks += [group.stop.register_forward_pre_hook(note_experts(group)) for group in of_experts]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return groups
