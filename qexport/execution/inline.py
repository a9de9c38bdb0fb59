"""Everything in this process, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Concatenate, Final, Generic

from qexport.execution.workers import Execution, Hosted, Item, Later, Params, T, Value


@dataclass(frozen=True)
class _Done(Later[Value]):
    value: Value

    @property
    def argument(self) -> Value:
        return self.value

    def result(self) -> Value:
        return self.value


@dataclass(frozen=True)
class _Here(Hosted[T], Generic[T]):
    object: T

    def call(
        self, method: Callable[Concatenate[T, Params], Value], *args: Params.args, **kwargs: Params.kwargs
    ) -> Later[Value]:
        return _Done(method(self.object, *args, **kwargs))


class _Inline(Execution):
    workers = 1
    apart = False

    def host(self, make: Callable[..., T], arguments: Sequence[tuple[object, ...]]) -> list[Hosted[T]]:
        return [_Here(make(*each)) for each in arguments]

    def once(self, value: Value) -> Later[Value]:
        return _Done(value)

    def map(
        self,
        function: Callable[Concatenate[Item, Params], Value],
        items: Iterable[Item],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> Iterator[Value]:
        return (function(item, *args, **kwargs) for item in items)

    def renew(self, hosted: Sequence[Hosted[T]]) -> None:
        """Does nothing: the only worker is here."""


INLINE: Final[Execution] = _Inline()
"""One worker: this process."""
