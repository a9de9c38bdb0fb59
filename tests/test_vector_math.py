"""MKL's vector functions are called on one thread first: two threads at once may get other bits in the first call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import factories
from qexport.architectures.devices import VECTOR_MATH, start_vector_math
from qexport.pipeline import run
from qexport.recipe import load_recipe


class FirstCalls(TorchDispatchMode):
    """The number of threads at the first call of each function and dtype on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.threads: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func).split(".")[1].rstrip("_")
        if name in VECTOR_MATH and args[0].device.type == "cpu" and args[0].dtype in (torch.float32, torch.float64):
            self.threads.setdefault((name, args[0].dtype), torch.get_num_threads())
        return func(*args, **(kwargs or {}))


def test_a_run_calls_each_on_one_thread_first(tmp_path: Path) -> None:
    """Attention and state-space layers, quantized with calibration and verified."""
    factories.save(factories.build(factories.falcon_h1_config()), tmp_path / "base")
    held_out = str(factories.write_text(tmp_path / "held-out.jsonl", seed=2))
    text = str(factories.write_text(tmp_path / "text.jsonl", seed=1))
    calibration = {"source": text, "samples": 2, "sequence_length": 16}
    recipe = tmp_path / "recipe.yaml"
    values = {
        "load": {"base": "./base"},
        "quantize": {"method": "gptq", "group_size": 16, "calibration": calibration},
        "export": [{"layout": "safetensors"}],
        "verify": {"text": held_out, "windows": 2, "sequence_length": 16, "profile": "off"},
        "output": "./out",
    }
    recipe.write_text(json.dumps(values))
    start_vector_math.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with FirstCalls() as first:
            run(load_recipe(recipe), device="cpu")
    finally:
        torch.set_num_threads(threads)
    assert ("cos", torch.float32) in first.threads
    assert {name: count for name, count in first.threads.items() if count != 1} == {}
