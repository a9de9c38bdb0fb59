"""Graphs of one node, run by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int32: TensorProto.INT32,
}


class OneNode:
    """`operator(x, *initializers)`, after Gather(x, order) where the initializers hold an order."""

    def __init__(
        self,
        operator: str,
        initializers: Mapping[str, torch.Tensor | None],
        *,
        dtype: torch.dtype,
        result: torch.dtype | None = None,
        domain: str = "com.microsoft",
        **attributes: Any,
    ) -> None:
        stored = {name: tensor for name, tensor in initializers.items() if tensor is not None}
        names = [name if tensor is not None else "" for name, tensor in initializers.items() if name != "order"]
        nodes, first = [], "x"
        if "order" in stored:
            nodes, first = [helper.make_node("Gather", ["x", "order"], ["sorted"], axis=-1)], "sorted"
        nodes.append(helper.make_node(operator, [first, *names], ["y"], domain=domain, **attributes))
        self._load(nodes, stored, _TYPES[dtype], _TYPES[result or dtype])

    def _load(self, nodes: Any, stored: Mapping[str, torch.Tensor], taken: int, given: int) -> None:
        graph = helper.make_graph(
            nodes,
            "one",
            [helper.make_tensor_value_info("x", taken, None)],
            [helper.make_tensor_value_info("y", given, None)],
            [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in stored.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    @staticmethod
    def pair(parts: Mapping[str, torch.Tensor], *, columns: int, block_size: int) -> OneNode:
        """`16 * MatMulNBits(x, high) + MatMulNBits(x, low)` in float32."""
        made, rows = object.__new__(OneNode), len(parts["scales"])
        initializers = {**parts, "factor": torch.tensor(16.0)}
        nodes, first = [], "x"
        if "order" in parts:
            nodes, first = [helper.make_node("Gather", ["x", "order"], ["sorted"], axis=-1)], "sorted"
        for half in ("high", "low"):
            zeros = f"zero_points_{half}" if f"zero_points_{half}" in parts else ""
            sizes: dict[str, Any] = {"K": columns, "N": rows, "bits": 4, "block_size": block_size, "accuracy_level": 0}
            inputs = [first, f"qweight_{half}", "scales", zeros]
            nodes.append(helper.make_node("MatMulNBits", inputs, [half], domain="com.microsoft", **sizes))
        nodes += [helper.make_node("Mul", ["high", "factor"], ["m"]), helper.make_node("Add", ["m", "low"], ["y"])]
        made._load(nodes, initializers, TensorProto.FLOAT, TensorProto.FLOAT)
        return made

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (result,) = self._session.run(None, {"x": x.numpy()})
        return torch.from_numpy(np.asarray(result))

    def matrix(self, in_features: int, dtype: torch.dtype, rows: int) -> torch.Tensor:
        """[out, in]: what the node multiplies with, from products with `rows` unit vectors at a time."""
        units = torch.eye(in_features, dtype=dtype)
        return torch.cat([self(part) for part in units.split(rows)]).t()
