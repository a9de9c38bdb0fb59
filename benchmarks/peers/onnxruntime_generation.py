"""A graph with onnxruntime alone, on the CPU. Usage: onnxruntime_generation.py JOB RESULT

Folders of the layout `onnx` and those of onnxruntime-genai's builder run through the same loop.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generation import job, measure

sys.path.pop(0)  # files here have the names of packages

import numpy as np
import onnxruntime as ort

STATE = "past_key_values."
Values = dict[str, ort.OrtValue]
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Graph:
    """One graph for prefill and decoding, batch 1. The states stay onnxruntime's own values between the steps."""

    def __init__(self, folder: Path, threads: int, *, shared: bool) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.shared = shared
        self.config = folder / "genai_config.json"

    def generate(self, prompt: list[int], count: int) -> Iterator[int]:
        """Greedy tokens. The end of the text is not looked for."""
        room = len(prompt) + count if self.shared else 0
        states = {name: self._empty(value, room) for name, value in self.inputs.items() if name.startswith(STATE)}
        tokens, total = np.array([prompt], np.int64), 0
        for _ in range(count):
            start, total = total, total + tokens.shape[1]
            inputs = {
                "input_ids": tokens,
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(start, total, dtype=np.int64)[None],
            }
            feeds = {
                name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items() if name in self.inputs
            }
            logits, states = (self._appended if self.shared else self._grown)(feeds, states)
            tokens = logits.numpy()[:, -1].argmax(-1)[:, None]
            yield int(tokens[0, 0])

    def _grown(self, feeds: Values, states: Values) -> tuple[ort.OrtValue, Values]:
        """Logits and the states, in new memory."""
        values = self.session.run_with_ort_values(None, feeds | states)
        outputs = dict(zip(self.outputs, values, strict=True))
        return outputs["logits"], {name: outputs[re.sub(f"^{STATE}", "present.", name)] for name in states}

    def _appended(self, feeds: Values, states: Values) -> tuple[ort.OrtValue, Values]:
        """Logits and the states, in the memory of the past."""
        binding = self.session.io_binding()
        binding.bind_output("logits", "cpu")
        for name, value in (feeds | states).items():
            binding.bind_ortvalue_input(name, value)
        for name, value in states.items():
            binding.bind_ortvalue_output(re.sub(f"^{STATE}", "present.", name), value)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0], states

    def _empty(self, value: Any, room: int) -> ort.OrtValue:
        """Before the first token: room for positions of keys and values, zeros where the size is fixed."""
        _, *sizes = value.shape
        if isinstance(sizes[-1], str):  # the builder leaves it open
            sizes[-1] = json.loads(self.config.read_text())["model"]["decoder"]["head_size"]
        shape = [1, *(room if isinstance(size, str) else size for size in sizes)]
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, DTYPES[value.type]))


def main() -> None:
    """Opens the graph, measures."""
    todo = job()
    graph = Graph(Path(todo["folder"]), todo["threads"], shared=todo.get("shared", False))
    measure(graph.generate, todo)


if __name__ == "__main__":
    main()
