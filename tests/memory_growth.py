"""How much memory a process takes for some work, beyond what it had before, and a wide model that takes none."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import factories
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.memory import resident, return_freed_memory
from qexport.tensors import Origin, TensorSpec

LAYER = 3 * 192 * 3072
"""Weights of a layer of `wide_model`, without its attention."""


class Source:
    """A source that holds nothing: a tensor is made when it is read."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], make: Callable[[tuple[int, ...]], Tensor]) -> None:
        self._shapes, self._make = shapes, make

    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(shape, torch.bfloat16) for name, shape in self._shapes.items()}

    def read(self, name: str) -> Tensor:
        return self._make(self._shapes[name]).bfloat16()


def wide_model(layers: int, make: Callable[[tuple[int, ...]], Tensor]) -> Checkpoint:
    config = factories.llama_config(
        hidden_size=192, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2
    )
    architecture = Architecture(config.to_dict())
    return Checkpoint(architecture, Source(architecture.structure.parameters, make), {}, Origin("folder", "made"))


def growth(*works: Callable[[], object]) -> list[int]:
    """Calls each in turn in a fork of this process, where one thread computes.

    Returns:
        After each of them, the peak of the process so far, in bytes above what it began with. A fork's peak begins with
        what is resident, and freed memory is returned before, so that nothing finds room in what is counted already.
    """
    gc.collect()
    return_freed_memory()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = resident().peak
            found = []
            for work in works:
                work()
                found.append(resident().peak - before)
            os.write(writing, json.dumps(found).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return [int(each) for each in json.loads(answer)]
