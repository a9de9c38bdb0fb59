"""ONNX Runtime, set to the arithmetic that the graph's file asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from qexport.errors import InputError, RecipeError
from qexport.reading.onnx.graph import GRAPH_NAME

try:
    import onnxruntime
except ImportError as missing:
    raise RecipeError(
        "running an ONNX artifact needs ONNX Runtime, which is not installed",
        mend="pip install 'qexport[onnx]', or 'qexport[gpu]' on a machine with CUDA",
    ) from missing

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"

_EXACT: Final = {
    # A DequantizeLinear before a MatMul becomes a MatMulNBits whose activations are rounded to int8 (level 4).
    "session.qdq_matmulnbits_accuracy_level": "0",
    "session.enable_quant_qdq_cleanup": "0",
    "optimization.enable_gelu_approximation": "0",
    "optimization.enable_cast_chain_elimination": "0",
    "mlas.enable_gemm_fastmath_arm64_bfloat16": "0",
    "mlas.use_lut_gemm": "0",
    "session.set_denormal_as_zero": "0",
    "session.load_model_format": "ONNX",
}
"""Most are ONNX Runtime's own defaults today; a later version, or a build of another maker, may have others."""

_NUMPY: Final[Mapping[torch.dtype, type[np.generic]]] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
}
_TYPES: Final = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int64)": torch.int64}
_ERRORS_ONLY: Final = 3


@dataclass(frozen=True)
class Value:
    """An input or an output of a graph.

    Attributes:
        dtype: float32, float16 or int64.
        shape: None for a size that is known only when the graph runs.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]


class Session:
    """A graph that is ready to run. Made by `open_session`.

    Attributes:
        provider: what computes: `CPUExecutionProvider` or `CUDAExecutionProvider`.
        version: ONNX Runtime's.
        device: where inputs and outputs lie.
        inputs: by name, in the graph's order.
        outputs: the same.
    """

    def __init__(self, session: Any, device: torch.device) -> None:
        self._session = session
        self.device = device
        self.provider: str = session.get_providers()[0]
        self.version: str = onnxruntime.__version__
        self.inputs: Mapping[str, Value] = {value.name: _value(value) for value in session.get_inputs()}
        self.outputs: Mapping[str, Value] = {value.name: _value(value) for value in session.get_outputs()}

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Runs the graph; only what the given outputs need is fetched.

        Args:
            inputs: every input, contiguous, on the session's device.
            outputs: tensors of the right shape and dtype, contiguous, on the same device, which are filled.

        Raises:
            InputError: ONNX Runtime cannot run the graph with these inputs.
        """
        binding = self._session.io_binding()
        with _told("run"):
            for name, tensor in inputs.items():
                binding.bind_input(name, *self._buffer(tensor))
            for name, tensor in outputs.items():
                binding.bind_output(name, *self._buffer(tensor))
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _buffer(self, tensor: torch.Tensor) -> tuple[str, int, type[np.generic], tuple[int, ...], int]:
        """What a binding takes of a tensor; it holds no reference."""
        assert tensor.is_contiguous()
        assert tensor.device == self.device, f"{tensor.device} is not {self.device}"
        return self.device.type, self.device.index or 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


def open_session(folder: Path, *, device: torch.device) -> Session:
    """Loads an ONNX artifact's graph and weights into ONNX Runtime.

    It computes with as many threads as torch. The file is trusted: look at it with `qexport.reading.onnx.graph.Graph`
    before.

    Args:
        folder: the artifact.
        device: `cpu`, or a CUDA device.

    Raises:
        InputError: ONNX Runtime cannot load the graph, or has no CUDA provider that starts where one is asked for.
    """
    options = _options()
    device = torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device("cpu")
    providers: list[Any] = [CPU]
    if device.type == "cuda":
        _refuse_without_cuda(onnxruntime.get_available_providers())
        providers = [(CUDA, {"device_id": str(device.index), "use_tf32": "0"}), CPU]
    with _told("load"):
        session = onnxruntime.InferenceSession(str(folder / GRAPH_NAME), options, providers=providers)
    if device.type == "cuda":
        _refuse_without_cuda(session.get_providers())
    return Session(session, device)


def refuse_unloadable(folder: Path) -> None:
    """Lets ONNX Runtime's CPU provider look at every operator and its types. Weights are not prepared, so memory does
    not grow with them.

    Raises:
        InputError: it cannot load the graph.
    """
    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    with _told("load"):
        onnxruntime.InferenceSession(str(folder / GRAPH_NAME), options, providers=[CPU])


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = _ERRORS_ONLY
    for key, value in _EXACT.items():
        options.add_session_config_entry(key, value)
    return options


def _refuse_without_cuda(providers: list[str]) -> None:
    """ONNX Runtime itself goes on with the CPU where CUDA does not start."""
    if CUDA not in providers:
        raise InputError(
            f"ONNX Runtime has no CUDA here; it has {', '.join(providers)}",
            where="device cuda",
            mend="install qexport[gpu] in place of qexport[onnx], and the CUDA that it needs; or take the device cpu",
        )


def _value(value: Any) -> Value:
    if value.type not in _TYPES:
        raise InputError(f"{value.type} is no type of a model's input or output", where=f"{GRAPH_NAME}: {value.name}")
    return Value(_TYPES[value.type], tuple(size if isinstance(size, int) else None for size in value.shape))


@contextmanager
def _told(action: str) -> Iterator[None]:
    """ONNX Runtime has an exception for each of its states; none has a base of its own."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"ONNX Runtime {onnxruntime.__version__} cannot {action} the graph: {error}",
            where=GRAPH_NAME,
            mend="compare the version with the manifest's, or export the model again",
        ) from error
