"""ONNX Runtime, with options under which it computes exactly what the graph says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from qexport.errors import InputError, RecipeError
from qexport.reading.onnx.graph import GRAPH_NAME, read_graph

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
"""Most are ONNX Runtime's defaults today; later versions or other builds may have different ones."""

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
        shape: the sizes; None for one that is known only when the graph runs.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]


class Session:
    """A loaded graph. Made by `open_session`.

    Attributes:
        provider: the execution provider, `CPUExecutionProvider` or `CUDAExecutionProvider`.
        version: of ONNX Runtime.
        device: of inputs and outputs.
        inputs: by name, in the graph's order.
        outputs: likewise.
    """

    def __init__(self, session: Any, device: torch.device) -> None:
        self._session = session
        self.device = device
        self.provider: str = session.get_providers()[0]
        self.version: str = onnxruntime.__version__
        self.inputs: Mapping[str, Value] = {value.name: _value(value) for value in session.get_inputs()}
        self.outputs: Mapping[str, Value] = {value.name: _value(value) for value in session.get_outputs()}

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Runs the graph and fetches only the given outputs.

        Args:
            inputs: every input, contiguous, on the session's device.
            outputs: contiguous tensors of the right shape and dtype on the same device, to be filled.

        Raises:
            InputError: ONNX Runtime cannot run the graph with these inputs.
        """
        binding = self._session.io_binding()
        with _runtime_errors("run"):
            for name, tensor in inputs.items():
                binding.bind_input(name, *self._buffer(tensor))
            for name, tensor in outputs.items():
                binding.bind_output(name, *self._buffer(tensor))
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _buffer(self, tensor: torch.Tensor) -> tuple[str, int, type[np.generic], tuple[int, ...], int]:
        """The arguments that bind a tensor; the binding does not keep the tensor alive."""
        assert tensor.is_contiguous()
        assert tensor.device == self.device, f"{tensor.device} is not {self.device}"
        return self.device.type, self.device.index or 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


def open_session(folder: Path, *, device: torch.device) -> Session:
    """Loads an ONNX artifact's graph and weights into ONNX Runtime.

    It computes with as many threads as torch. The file is trusted: check it with `qexport.reading.onnx.graph.Graph`
    first.

    Args:
        folder: the artifact.
        device: `cpu`, or a CUDA device.

    Raises:
        InputError: ONNX Runtime cannot load the graph, or its CUDA provider is missing or does not start.
    """
    options = _options()
    device = torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device("cpu")
    providers: list[Any] = [CPU]
    if device.type == "cuda":
        _refuse_without_cuda(onnxruntime.get_available_providers())
        providers = [(CUDA, {"device_id": str(device.index), "use_tf32": "0"}), CPU]
    session = _loaded(folder, options, providers)
    if device.type == "cuda":
        _refuse_without_cuda(session.get_providers())
    return Session(session, device)


def refuse_unloadable(folder: Path) -> None:
    """Refuses a graph whose operators or types ONNX Runtime's CPU provider does not accept. Weights are not prepacked,
    so memory does not grow with them.

    Raises:
        InputError: ONNX Runtime cannot load the graph.
    """
    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    _loaded(folder, options, [CPU])


def _loaded(folder: Path, options: Any, providers: list[Any]) -> Any:
    """ONNX Runtime's session. It gets the graph's bytes, since it calls any that it cannot read a malformed graph, and
    finds the weights by their paths.
    """
    graph = read_graph(folder / GRAPH_NAME)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    with _runtime_errors("load"):
        return onnxruntime.InferenceSession(graph, options, providers=providers)


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
    """Refuses to run without CUDA; ONNX Runtime itself would fall back to the CPU."""
    if CUDA not in providers:
        raise InputError(
            f"ONNX Runtime has no CUDA provider here, only {', '.join(providers)}",
            where="device cuda",
            mend="install qexport[gpu] instead of qexport[onnx], and the CUDA that it needs; or use the device cpu",
        )


def _value(value: Any) -> Value:
    if value.type not in _TYPES:
        raise InputError(f"{value.type} is not supported for an input or output", where=f"{GRAPH_NAME}: {value.name}")
    return Value(_TYPES[value.type], tuple(size if isinstance(size, int) else None for size in value.shape))


@contextmanager
def _runtime_errors(action: str) -> Iterator[None]:
    """Turns ONNX Runtime's exceptions into one error. They have no common base class."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"ONNX Runtime {onnxruntime.__version__} cannot {action} the graph: {error}",
            where=GRAPH_NAME,
            mend="compare the version with the manifest's, or export the model again",
        ) from error
