"""A graph of the layout onnx with OpenVINO, on the CPU, in float32. Usage: openvino_generation.py JOB RESULT

Without the two settings it would compute in bfloat16 and round activations to 8 bits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from generation import job, measure

sys.path.pop(0)  # files here have the names of packages

import numpy as np
import openvino as ov

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
STATE = "past_key_values."


def main() -> None:
    """Compiles the graph, measures."""
    todo = job()
    settings = {**EXACT, "INFERENCE_NUM_THREADS": todo["threads"]}
    model = ov.Core().compile_model(Path(todo["folder"]) / "model.onnx", "CPU", settings)
    request = model.create_infer_request()
    shapes = {value.get_any_name(): value.get_partial_shape() for value in model.inputs}
    states = {name: shape for name, shape in shapes.items() if name.startswith(STATE)}

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        past = {
            name: ov.Tensor(np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32))
            for name, shape in states.items()
        }
        tokens, total = np.array([prompt], np.int64), 0
        for _ in range(count):
            start, total = total, total + tokens.shape[1]
            inputs = {
                "input_ids": tokens,
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(start, total, dtype=np.int64)[None],
            }
            request.infer({name: array for name, array in inputs.items() if name in shapes} | past)
            tokens = request.get_tensor("logits").data[:, -1].argmax(-1)[:, None]
            past = {name: _copied(request.get_tensor(name.replace(STATE, "present."))) for name in states}
            yield int(tokens[0, 0])

    measure(generate, todo)


def _copied(tensor: ov.Tensor) -> ov.Tensor:
    """The next step writes where this one has written."""
    return ov.Tensor(tensor.data.copy())


if __name__ == "__main__":
    main()
