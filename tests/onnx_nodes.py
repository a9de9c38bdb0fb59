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
        graph = helper.make_graph(
            nodes,
            "one",
            [helper.make_tensor_value_info("x", _TYPES[dtype], None)],
            [helper.make_tensor_value_info("y", _TYPES[result or dtype], None)],
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

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (result,) = self._session.run(None, {"x": x.numpy()})
        return torch.from_numpy(np.asarray(result))

    def matrix(self, in_features: int, dtype: torch.dtype, rows: int) -> torch.Tensor:
        """[out, in]: what the node multiplies with, from products with `rows` unit vectors at a time."""
        units = torch.eye(in_features, dtype=dtype)
        return torch.cat([self(part) for part in units.split(rows)]).t()
