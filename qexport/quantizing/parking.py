"""Stopped forwards without their memory: what they hold is on the disk until an operation uses it.

A stopped forward keeps every tensor of its frames, many of which nothing will use again: in an attention query, key
and value until the output projection has been called. Its operations are what tells its tensors from the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from qexport.quantizing.activations import OffloadFile, Restore, stays
from qexport.quantizing.products import FixedProducts

_SMALLEST: Final = 1 << 16
"""Bytes of a storage that is worth a write. Smaller ones may also be read without an operation, as by `tolist`."""


@dataclass(frozen=True)
class _Copy:
    """A storage whose bytes are on the disk. The reference keeps its address from being used by another one."""

    storage: StorageWeakRef
    restore: Restore


class Parking(FixedProducts):
    """Forwards run inside it, and `park` frees the memory of what they have made and still hold.

    Each operation restores what it uses. A tensor that was not changed since it was written is not written again.

    Args:
        file: where the tensors are written. It must not be emptied while a forward of this object is stopped.
    """

    def __init__(self, file: OffloadFile) -> None:
        super().__init__()
        self._file = file
        self._made: dict[int, StorageWeakRef] = {}
        self._restored: dict[int, _Copy] = {}
        self._parked: dict[int, _Copy] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Restores the arguments, and notes new tensors."""
        used = self.restore((args, kwargs))
        if func._schema.is_mutable:  # type: ignore[attr-defined]
            for key in used & self._restored.keys():
                self._made[key] = self._restored.pop(key).storage
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in used:
                self._made[storage._cdata] = StorageWeakRef(storage)
        return result

    def restore(self, value: object) -> set[int]:
        """Brings tensors in tuples, lists and dicts back into memory, and returns what their storages are known by."""
        used = {tensor.untyped_storage()._cdata for tensor in _tensors(value)}
        for key in used & self._parked.keys():
            copy = self._restored[key] = self._parked.pop(key)
            if (storage := _alive(copy.storage)) is not None:
                copy.restore(storage)
        return used

    def hold(self, tensor: Tensor, restore: Restore) -> None:
        """Takes over a tensor that has been offloaded, which forwards use."""
        storage = tensor.untyped_storage()
        self._parked[storage._cdata] = _Copy(StorageWeakRef(storage), restore)

    def park(self, keep: object = ()) -> None:
        """Frees the memory of what was made or restored since the last call.

        Args:
            keep: tensors in tuples, lists and dicts that stay until the next call.
        """
        kept = {tensor.untyped_storage()._cdata for tensor in _tensors(keep)}
        for key in self._made.keys() - kept:
            made = self._made.pop(key)
            if (storage := _alive(made)) is not None and storage.nbytes() >= _SMALLEST:
                self._parked[key] = _Copy(made, self._file.offload(storage))
        for key in self._restored.keys() - kept:
            copy = self._restored.pop(key)
            if (storage := _alive(copy.storage)) is not None:
                if copy.restore is not stays:
                    storage.resize_(0)
                self._parked[key] = copy


def _alive(reference: StorageWeakRef) -> UntypedStorage | None:
    found: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(reference.cdata)
    return found


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
