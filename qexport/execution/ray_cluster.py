"""Workers of a Ray cluster: one that runs already, or one that is started here and stopped at the end."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, Final, Generic, cast

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util import register_serializer
from torch import Tensor, nn

from qexport.artifact import Environment, describe_environment
from qexport.errors import CompatibilityError, ResourceError
from qexport.execution.workers import ATTEMPTS, Execution, Hosted, Item, Later, Params, T, Value, WorkerLostError

_AHEAD: Final = 2
"""Items of `map` for each worker that are sent before the first result is taken."""

_START_SECONDS: Final = 180
"""Until all workers must have answered."""


class _Worker:
    """What runs in the process of a worker. It holds one object at a time."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        _send_tensors_as_bytes()
        self._object: Any = None

    def environment(self, device: str) -> tuple[str, Environment]:
        """The name of the machine, and what the bits depend on there."""
        return os.uname().nodename, describe_environment(torch.device(device))

    def make(self, factory: Callable[..., Any], *arguments: Any) -> None:
        with torch.no_grad():
            self._object = factory(*arguments)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return getattr(self._object, method)(*args, **kwargs)

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)


@dataclass(frozen=True)
class _Reference(Later[Value]):
    reference: Any

    @property
    def argument(self) -> Value:
        return cast(Value, self.reference)  # Ray replaces it by the result

    def result(self) -> Value:
        return cast(Value, _fetched(self.reference))


@dataclass
class _There(Hosted[T], Generic[T]):
    """An object of a worker.

    Attributes:
        worker: the number of the worker.
        actor: of the worker, when the object was made.
        made: its class and its arguments.
    """

    worker: int
    actor: Any
    made: tuple[Any, ...]

    def make(self) -> Any:
        """Begins to make the object, and returns the reference to the end of it."""
        return self.actor.make.remote(*self.made)

    def call(
        self, method: Callable[Concatenate[T, Params], Value], *args: Params.args, **kwargs: Params.kwargs
    ) -> Later[Value]:
        return _Reference(self.actor.call.remote(method.__name__, *args, **kwargs))


@dataclass(frozen=True)
class _Sent:
    """A call of `map`."""

    worker: int
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any


class RayExecution(Execution):
    """Actors of a Ray cluster.

    Args:
        actors: makes the actor of a worker.
        workers: how many there are.
    """

    apart = True

    def __init__(self, actor: Callable[[], Any], workers: int) -> None:
        self.workers, self._actor = workers, actor
        self._actors = [actor() for _ in range(workers)]

    def close(self) -> None:
        """Stops the workers."""
        for actor in self._actors:
            ray.kill(actor)

    def host(self, make: Callable[..., T], arguments: Sequence[tuple[object, ...]]) -> list[Hosted[T]]:
        """Makes objects, each on a worker of its own; a worker's earlier one is dropped."""
        hosted = [
            _There[T](number, self._actors[number], (make, *map(ray.put, own))) for number, own in enumerate(arguments)
        ]
        for begun in [each.make() for each in hosted]:
            _fetched(begun)
        return list(hosted)

    def once(self, value: Value) -> Later[Value]:
        """Puts a value into the cluster's shared memory."""
        return _Reference(ray.put(value))

    def map(
        self,
        function: Callable[Concatenate[Item, Params], Value],
        items: Iterable[Item],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> Iterator[Value]:
        """Deals items out in turn. One whose worker goes is sent again."""
        pending, given = deque[_Sent](), ([*map(ray.put, args)], {name: ray.put(each) for name, each in kwargs.items()})
        for number, item in enumerate(items):
            if len(pending) == _AHEAD * self.workers:
                yield self._taken(pending.popleft())
            pending.append(self._sent(number % self.workers, (function, ray.put(item), *given[0]), given[1]))
        while pending:
            yield self._taken(pending.popleft())

    def _sent(self, worker: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Sent:
        return _Sent(worker, args, kwargs, self._actors[worker].apply.remote(*args, **kwargs))

    def _taken(self, sent: _Sent) -> Any:
        for left in reversed(range(ATTEMPTS)):
            try:
                return _fetched(sent.result)
            except WorkerLostError:
                if not left:
                    raise
                self._renew_actor(sent.worker)
                sent = self._sent(sent.worker, sent.args, sent.kwargs)
        raise AssertionError("the last attempt returns or raises")

    def renew(self, hosted: Sequence[Hosted[T]]) -> None:
        """Makes the objects anew whose workers have gone."""
        for each in hosted:
            assert isinstance(each, _There)
            self._renew_actor(each.worker)
            if each.actor is not self._actors[each.worker]:
                each.actor = self._actors[each.worker]
                _fetched(each.make())

    def _renew_actor(self, worker: int) -> None:
        """Replaces an actor that has gone."""
        try:
            _fetched(self._actors[worker].environment.remote("cpu"))
        except WorkerLostError:
            self._actors[worker] = self._actor()

    def refuse_others(self, device: torch.device) -> None:
        """Refuses workers whose results have other bits than this process would have.

        Args:
            device: where each computes.

        Raises:
            CompatibilityError: a worker has other packages, or another CPU or GPU.
            ResourceError: a worker did not start.
        """
        own = describe_environment(device)
        try:
            found = ray.get([actor.environment.remote(str(device)) for actor in self._actors], timeout=_START_SECONDS)
        except (GetTimeoutError, RayActorError) as error:
            raise ResourceError(
                f"{self.workers} workers did not start within {_START_SECONDS} s",
                where="execution",
                mend="ask for fewer workers or threads, or look at the cluster with `ray status`",
            ) from error
        for name, environment in found:
            if environment != own:
                theirs, ours = environment.model_dump(), own.model_dump()
                differing = ", ".join(
                    f"{key} {theirs[key]}, here {ours[key]}" for key in ours if theirs[key] != ours[key]
                )
                raise CompatibilityError(
                    f"the worker on {name} would compute other bits: {differing}",
                    where="execution",
                    mend="use machines with the same packages and the same kind of processor",
                )


def _fetched(reference: Any) -> Any:
    """The value of a reference; what a call has raised is raised as it was."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RayActorError):  # of a call whose argument came from a lost worker
            raise _lost(error.cause) from None
        raise error.cause from None
    except RayActorError as error:
        raise _lost(error) from None


def _lost(error: Exception) -> WorkerLostError:
    return WorkerLostError(
        f"a worker has gone: {str(error).splitlines()[0]}",
        where="execution",
        mend="run again to go on; if it happens again, look for a lack of memory in the cluster's logs",
    )


@contextmanager
def ray_cluster(workers: int, threads: int, address: str | None, device: torch.device) -> Iterator[Execution]:
    """Workers of a Ray cluster, as long as the context lasts.

    Args:
        workers: how many.
        threads: of each.
        address: of a running cluster, `ray://host:port` or `auto`; None to start one on this machine.
        device: where each computes.

    Raises:
        CompatibilityError: a worker would compute other bits than this process.
        ResourceError: the cluster cannot be reached, or has too few processors.
    """
    connect(address, workers * threads)
    try:
        with closing(workers_of_cluster(workers, threads, device)) as found:
            yield found
    finally:
        ray.shutdown()


def connect(address: str | None, processors: int) -> None:
    """Connects this process to a cluster, or to one that is started on this machine with so many processors.

    Raises:
        ResourceError: it cannot be reached, or did not start.
    """
    for left in reversed(range(ATTEMPTS)):
        try:
            ray.init(
                address or "local",
                num_cpus=None if address else processors,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray raises a plain one where a start takes half a minute, as on a busy machine
            ray.shutdown()
            if left and not address:
                continue
            raise ResourceError(
                f"the Ray cluster cannot be reached: {str(error).splitlines()[0]}",
                where=f"execution.address: {address}" if address else "execution",
                mend="check that it runs, with `ray status`" if address else "try again when less is running",
            ) from error
        return


def workers_of_cluster(workers: int, threads: int, device: torch.device) -> RayExecution:
    """Workers of the cluster that this process is connected to; see `ray_cluster`."""
    _refuse_too_few(workers * threads)
    _send_tensors_as_bytes()
    kind = ray.remote(_Worker).options(
        num_cpus=threads, num_gpus=1 if device.type == "cuda" else 0, scheduling_strategy="SPREAD"
    )
    found = RayExecution(lambda: kind.remote(threads), workers)
    try:
        found.refuse_others(device)
    except BaseException:
        found.close()
        raise
    return found


def _refuse_too_few(processors: int) -> None:
    there = ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    if there < processors:
        raise ResourceError(
            f"the Ray cluster has {there:g} processors, and {processors} are asked for",
            where="execution",
            mend="ask for fewer workers or threads, or add machines",
        )


def _send_tensors_as_bytes() -> None:
    """Ray writes arrays into its shared memory as they are, but pickles tensors value by value of their storage."""
    for kind in (Tensor, nn.Parameter):
        register_serializer(kind, serializer=_as_array, deserializer=_as_tensor)


def _as_array(tensor: Tensor) -> tuple[Any, torch.dtype, tuple[int, ...]]:
    content = tensor.detach().cpu().contiguous()
    return content.view(-1).view(torch.uint8).numpy(), content.dtype, tuple(content.shape)


def _as_tensor(packed: tuple[Any, torch.dtype, tuple[int, ...]]) -> Tensor:
    """A copy: the shared memory may not be written to."""
    content, dtype, shape = packed
    found = torch.empty(shape, dtype=dtype)
    found.view(-1).view(torch.uint8).numpy()[:] = content
    return found
