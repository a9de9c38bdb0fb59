"""Where a run computes: in this process, or on the workers of a Ray cluster. The recipe's `execution` is here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qexport.settings import Settings

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from qexport.execution.workers import Execution


class ExecutionSettings(Settings):
    """Workers of a Ray cluster (extra `ray`), which share the work. The artifact has the same bytes for any number."""

    workers: Annotated[int, Field(ge=1, le=4096)]
    """How many, each a process. On GPUs each has one."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Of each worker; by default this machine's processors, shared out."""

    address: str | None = None
    """A cluster that runs, `ray://host:port` or `auto`, whose machines see the output's folder at the same path;
    without it one is started on this machine, and stopped at the end."""


def on_workers(settings: ExecutionSettings | None, count: int) -> ExecutionSettings:
    """The same with so many workers."""
    others = {} if settings is None else settings.model_dump(exclude={"workers"})
    return ExecutionSettings(workers=count, **others)


def execution_of(settings: ExecutionSettings | None, device: torch.device) -> AbstractContextManager[Execution]:
    """The workers that a recipe asks for; without settings, this process.

    Args:
        settings: the recipe's `execution`.
        device: where each worker computes.

    Raises:
        RecipeError: Ray is not installed.
        CompatibilityError: a worker would compute other bits than this process.
        ResourceError: the cluster cannot be reached, or has too few processors.
    """
    from contextlib import nullcontext

    from qexport.execution.inline import INLINE

    if settings is None:
        return nullcontext(INLINE)
    try:
        from qexport.execution.ray_cluster import ray_cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        from qexport.errors import RecipeError

        raise RecipeError(
            "several workers need Ray, which is not installed",
            where="execution",
            mend="install qexport[ray], or leave execution out",
        ) from error
    from os import cpu_count

    threads = settings.threads or max(1, (cpu_count() or 1) // settings.workers)
    return ray_cluster(settings.workers, threads, settings.address, device)
