"""The workers of a pass: this process, or several. `Execution` is all that a pass sees of them.

A pass makes objects on the workers (`host`), calls their methods, and gets their results; a result may be the argument
of a further call before it is there. Functions without a state of their own are dealt out (`map`). What a pass makes of
it must not depend on the number of workers: sums go from worker to worker in one order, results come back in theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Concatenate, Final, Generic, ParamSpec, TypeVar

from qexport.errors import ResourceError

T = TypeVar("T")
Value = TypeVar("Value")
Item = TypeVar("Item")
Params = ParamSpec("Params")

ATTEMPTS: Final = 3
"""How often a piece of work is begun, if workers go."""


class Later(ABC, Generic[Value]):
    """The result of a call."""

    @property
    @abstractmethod
    def argument(self) -> Value:
        """What stands for the result in the arguments of another call, and nowhere else."""

    @abstractmethod
    def result(self) -> Value:
        """Waits for the call.

        Raises:
            WorkerLostError: the worker has gone.
            Exception: what the call has raised.
        """


class Hosted(ABC, Generic[T]):
    """An object on a worker, whose calls are carried out one after the other."""

    @abstractmethod
    def call(
        self, method: Callable[Concatenate[T, Params], Value], *args: Params.args, **kwargs: Params.kwargs
    ) -> Later[Value]:
        """Calls a method of the object's class.

        Args:
            method: the method, as an attribute of the class.
            args: its arguments; `Later.argument` where one is the result of another call.
            kwargs: likewise.
        """


class Execution(ABC):
    """Some workers. A context manager where they must be stopped.

    Attributes:
        workers: how many there are.
        apart: whether they are other processes, which hold their own copies of everything.
    """

    workers: int
    apart: bool

    @abstractmethod
    def host(self, make: Callable[..., T], arguments: Sequence[tuple[object, ...]]) -> list[Hosted[T]]:
        """Makes objects, one for each tuple of arguments, each on a worker of its own.

        Args:
            make: the object's class.
            arguments: for each object.
        """

    @abstractmethod
    def once(self, value: Value) -> Later[Value]:
        """A value that is the argument of several calls, and is sent to each worker once."""

    @abstractmethod
    def map(
        self,
        function: Callable[Concatenate[Item, Params], Value],
        items: Iterable[Item],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> Iterator[Value]:
        """The results of a function, in the order of the items, of which a few are computed ahead.

        Args:
            function: without a state of its own.
            items: its first argument.
            args: its other arguments, the same for all items.
            kwargs: likewise.
        """

    @abstractmethod
    def renew(self, hosted: Sequence[Hosted[T]]) -> None:
        """Makes the objects anew whose workers have gone, with their first arguments."""


class WorkerLostError(ResourceError):
    """A worker has gone: its process was killed, or its machine."""


def begun_anew(work: Callable[[], Value], renew: Callable[[WorkerLostError], None]) -> Value:
    """The result of a piece of work, which begins anew if a worker goes meanwhile.

    Args:
        work: all of it.
        renew: what is done before it begins anew. It may raise the error that it is given, to give up.

    Raises:
        WorkerLostError: workers went in each attempt.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return work()
        except WorkerLostError as error:
            renew(error)
    return work()
