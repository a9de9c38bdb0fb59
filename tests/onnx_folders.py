"""ONNX artifacts made by hand, with packers that share no code with qexport's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from transformers import LlamaConfig

from qexport.formats.bitsandbytes.four_bit_tensors import flat_absmax
from qexport.tensors import (
    BlockQuantized,
    Float4Quantized,
    Float8Quantized,
    GroupQuantized,
    Quantized,
    RowQuantized,
    ValuesQuantized,
)

MICROSOFT = "com.microsoft"
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}


class Builder:
    """A graph that grows node by node; its weights go into `model.onnx.data`."""

    def __init__(self, accuracy_level: int = 0, *, nibbles: bool = False) -> None:
        self.accuracy_level, self.nibbles = accuracy_level, nibbles
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.data = bytearray()

    def add(self, op: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        output = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def named(self, output: str, value: str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [output]))

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """An initializer in the data file."""
        self.data += b"\0" * (-len(self.data) % 64)
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self.external(name, tensor, "model.onnx.data", len(self.data))
        self.data += content
        return name

    def external(self, name: str, tensor: Tensor, file: str, offset: int) -> None:
        proto = TensorProto(name=name, data_type=TYPES[tensor.dtype], dims=tensor.shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in {"location": file, "offset": offset, "length": tensor.nbytes}.items():
            proto.external_data.add(key=key, value=str(value))
        self.initializers.append(proto)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def write(self, folder: Path, config: Mapping[str, Any]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx.data").write_bytes(self.data)
        (folder / "model.onnx").write_bytes(self.model().SerializeToString())
        (folder / "config.json").write_text(json.dumps(dict(config)))
        return folder

    def linear(self, x: str, module: str, value: Tensor | Quantized, *, bias: Tensor | None = None) -> str:
        """`x` times a weight [out, in], as the contract stores it."""
        match value:
            case GroupQuantized():
                y = self._groups(x, module, value)
            case RowQuantized():
                y = self._rows(x, module, value)
            case BlockQuantized():
                y = self._bnb4(x, module, value)
            case Float8Quantized() | Float4Quantized():
                raise AssertionError("no operator")
            case Tensor():
                wide = self.wide(f"{module}.weight", value)
                y = self.add("MatMul", x, self.add("Transpose", wide, perm=[1, 0]))
            case ValuesQuantized():
                raise TypeError("a graph has codes")
        return y if bias is None else self.add("Add", y, self.wide(f"{module}.bias", bias))

    def wide(self, name: str, tensor: Tensor) -> str:
        """A parameter in its own dtype, and behind it in float32."""
        weight = self.weight(name, tensor)
        return weight if tensor.dtype == torch.float32 else self.add("Cast", weight, to=TensorProto.FLOAT)

    def _groups(self, x: str, module: str, value: GroupQuantized) -> str:
        if value.desc_act:
            order = value.g_idx.long().argsort(stable=True)
            x = self.add("Gather", x, self.weight(f"{module}.order", order), axis=-1)
            value = GroupQuantized(
                value.codes[:, order], value.scales, value.zeros, value.g_idx[order],
                value.bits, value.group_size, value.sym, desc_act=False,
            )  # fmt: skip
        block = next(size for size in (256, 128, 64, 32, 16) if value.group_size % size == 0 or size == 16)
        copies = -(-value.group_size // block)
        zeros = value.zeros.t().numpy().repeat(copies, 1)
        packed = None if value.sym else pack_bits(zeros, value.bits)
        scales = value.scales.t().float().repeat_interleave(copies, 1)
        return self._nbits(x, module, value.codes.numpy(), scales, packed, value.bits, block)

    def _rows(self, x: str, module: str, value: RowQuantized) -> str:
        codes = (value.codes.to(torch.int16) + 128).to(torch.uint8).numpy()
        scales = value.scales[:, None].repeat(1, -(-codes.shape[1] // 32))
        return self._nbits(x, module, codes, scales, None, 8, 32)

    def _nbits(
        self,
        x: str,
        module: str,
        codes: NDArray[np.uint8],
        scales: Tensor,
        zeros: NDArray[np.uint8] | None,
        bits: int,
        block: int,
    ) -> str:
        rows, columns = codes.shape
        blocks = -(-columns // block)
        padded = np.full((rows, blocks * block), 1 << bits - 1, np.uint8)
        padded[:, :columns] = codes
        shared = self.weight(f"{module}.scales", scales)
        attributes = dict(K=columns, N=rows, block_size=block, accuracy_level=self.accuracy_level)

        def node(codes: NDArray[np.uint8], zeros: NDArray[np.uint8] | None, bits: int, half: str = "") -> str:
            """`zeros` are packed."""
            qweight = torch.from_numpy(pack_bits(codes, bits)).reshape(rows, blocks, -1)
            inputs = [x, self.weight(f"{module}.qweight{half}", qweight), shared]
            if zeros is not None:
                inputs.append(self.weight(f"{module}.zero_points{half}", torch.from_numpy(zeros)))
            return self.add("MatMulNBits", *inputs, name=module + half, domain=MICROSOFT, bits=bits, **attributes)

        if not (self.nibbles and bits == 8):
            return node(padded, zeros, bits)
        whole = np.zeros((rows, blocks), np.uint8) if zeros is None else zeros
        high = node(padded // 16, None if zeros is None else pack_bits(whole // 16, 4), 4, "_high")
        low = node(padded % 16, pack_bits(whole % 16, 4), 4, "_low")
        return self.add("Add", self.add("Mul", high, self.constant(16.0, np.float32)), low)

    def _bnb4(self, x: str, module: str, value: BlockQuantized) -> str:
        rows, columns = value.spec.shape
        codes = self.weight(f"{module}.weight", value.codes)
        absmax = self.weight(f"{module}.weight.absmax", flat_absmax(value))
        kind = {"fp4": 0, "nf4": 1}[value.spec.quant_type]
        attributes = dict(K=columns, N=rows, block_size=value.spec.block_size, quant_type=kind)
        return self.add("MatMulBnb4", x, codes, absmax, name=module, domain=MICROSOFT, **attributes)

    def integers(self, x: str, module: str, value: RowQuantized) -> str:
        """W8A8: activations in symmetric int8, one scale a token."""
        codes = (value.codes.to(torch.int16) + 128).to(torch.uint8).t()
        largest = self.add("ReduceMax", self.add("Abs", x), self.constant([-1]), keepdims=1)
        scale = self.add("Div", largest, self.constant(127.0, np.float32))
        rounded = self.add("Round", self.add("Div", x, scale))
        shifted = self.add("Add", rounded, self.constant(128.0, np.float32))
        low, high = self.constant(1.0, np.float32), self.constant(255.0, np.float32)
        tokens = self.add("Cast", self.add("Clip", shifted, low, high), to=TensorProto.UINT8)
        middle = self.constant(128, np.uint8)
        sums = self.add("MatMulInteger", tokens, self.weight(f"{module}.qweight", codes), middle, middle, name=module)
        scales = self.weight(f"{module}.scales", value.scales)
        return self.add("Mul", self.add("Mul", self.add("Cast", sums, to=TensorProto.FLOAT), scale), scales)


def pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Rows of codes as rows of bytes, the earlier code in the lower bits."""
    planes = np.unpackbits(values[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(planes.reshape(len(values), -1), axis=1, bitorder="little")


def parameters(
    values: Mapping[str, Tensor | Quantized], config: Mapping[str, Any], folder: Path, *, nibbles: bool = False
) -> Path:
    """Only the parameters, each with an operator that reads it; the graph cannot run."""
    graph = Builder(nibbles=nibbles)
    for name, value in values.items():
        if isinstance(value, Tensor):
            graph.add("Identity", graph.weight(name, value))
        else:
            graph.linear("input_ids", name.removesuffix(".weight"), value)
    return graph.write(folder, config)


def llama(
    values: Mapping[str, Tensor | Quantized],
    config: LlamaConfig,
    folder: Path,
    *,
    integers: bool = False,
    accuracy_level: int = 0,
) -> Path:
    """A whole Llama with its cache; rows quantized for W8A8 where `integers` is set."""
    graph = _Llama(values, config, integers, accuracy_level)
    return graph.write(folder, config.to_dict())


class _Llama(Builder):
    def __init__(
        self, values: Mapping[str, Tensor | Quantized], config: LlamaConfig, integers: bool, accuracy_level: int
    ) -> None:
        super().__init__(accuracy_level)
        self.values, self.config, self.use_integers = values, config, integers
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.dim = config.head_dim or config.hidden_size // self.heads
        for name, size in {"input_ids": "sequence", "attention_mask": "total", "position_ids": "sequence"}.items():
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", size]))
        embedding = self.parameter("model.embed_tokens.weight")
        hidden = self.add("Gather", embedding, "input_ids")
        self.rotation()
        self.mask()
        for layer in range(config.num_hidden_layers):
            hidden = self.block(f"model.layers.{layer}", layer, hidden)
        logits = self.project("lm_head", self.norm("model.norm", hidden))
        self.named("logits", logits)
        shape: list[str | int | None] = ["batch", "sequence", config.vocab_size]
        self.outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))

    def parameter(self, name: str) -> str:
        value = self.values[name]
        assert isinstance(value, Tensor)
        return self.wide(name, value)

    def project(self, module: str, x: str) -> str:
        value, bias = self.values[f"{module}.weight"], self.values.get(f"{module}.bias")
        assert bias is None or isinstance(bias, Tensor)
        if self.use_integers and isinstance(value, RowQuantized):
            return self.integers(x, module, value)
        return self.linear(x, module, value, bias=bias)

    def rotation(self) -> None:
        theta: Any = (self.config.rope_parameters or {})["rope_theta"]
        frequencies = 1.0 / theta ** (np.arange(0, self.dim, 2, dtype=np.float32) / self.dim)
        where = self.add("Cast", self.add("Unsqueeze", "position_ids", self.constant([1, 3])), to=TensorProto.FLOAT)
        angles = self.add("Mul", where, self.constant(np.tile(frequencies, 2), np.float32))
        self.cos, self.sin = self.add("Cos", angles), self.add("Sin", angles)

    def mask(self) -> None:
        """[batch, 1, 1, sequence, total]: what each token may see."""
        seen = self.add("Gather", self.add("Shape", "attention_mask"), self.constant(1))
        new = self.add("Gather", self.add("Shape", "input_ids"), self.constant(1))
        zero, one = self.constant(0), self.constant(1)
        columns = self.add("Range", zero, seen, one)
        rows = self.add("Unsqueeze", self.add("Range", self.add("Sub", seen, new), seen, one), self.constant([1]))
        real = self.add("Cast", self.add("Unsqueeze", "attention_mask", self.constant([1, 2, 3])), to=TensorProto.BOOL)
        self.allowed = self.add("And", self.add("LessOrEqual", columns, rows), real)

    def norm(self, module: str, x: str) -> str:
        mean = self.add("ReduceMean", self.add("Mul", x, x), self.constant([-1]), keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, self.constant(self.config.rms_norm_eps, np.float32)))
        return self.add("Mul", self.add("Div", x, root), self.parameter(f"{module}.weight"))

    def split(self, x: str, heads: int) -> str:
        return self.add("Transpose", self.add("Reshape", x, self.constant([0, 0, heads, self.dim])), perm=[0, 2, 1, 3])

    def rotate(self, x: str) -> str:
        half, axis = self.constant([self.dim // 2]), self.constant([3])
        first = self.add("Slice", x, self.constant([0]), half, axis)
        second = self.add("Slice", x, half, self.constant([self.dim]), axis)
        turned = self.add("Concat", self.add("Neg", second), first, axis=3)
        return self.add("Add", self.add("Mul", x, self.cos), self.add("Mul", turned, self.sin))

    def cached(self, layer: int, name: str, x: str) -> str:
        shape: list[str | int | None] = ["batch", self.kv, f"past{layer}{name}", self.dim]
        past, present = f"past_key_values.{layer}.{name}", f"present.{layer}.{name}"
        self.inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, shape))
        self.outputs.append(
            helper.make_tensor_value_info(present, TensorProto.FLOAT, [shape[0], self.kv, None, self.dim])
        )
        self.named(present, self.add("Concat", past, x, axis=2))
        return self.add("Unsqueeze", present, self.constant([2]))

    def block(self, module: str, layer: int, hidden: str) -> str:
        x = self.norm(f"{module}.input_layernorm", hidden)
        query, key, value = (self.project(f"{module}.self_attn.{part}_proj", x) for part in "qkv")
        query = self.rotate(self.split(query, self.heads))
        grouped = self.add("Reshape", query, self.constant([0, self.kv, self.heads // self.kv, -1, self.dim]))
        keys = self.cached(layer, "key", self.rotate(self.split(key, self.kv)))
        values = self.cached(layer, "value", self.split(value, self.kv))
        scores = self.add("MatMul", grouped, self.add("Transpose", keys, perm=[0, 1, 2, 4, 3]))
        scaled = self.add("Mul", scores, self.constant(self.dim**-0.5, np.float32))
        masked = self.add("Where", self.allowed, scaled, self.constant(-1e30, np.float32))
        mixed = self.add("MatMul", self.add("Softmax", masked, axis=-1), values)
        heads = self.add("Reshape", mixed, self.constant([0, self.heads, -1, self.dim]))
        flat = self.add("Reshape", self.add("Transpose", heads, perm=[0, 2, 1, 3]),
                        self.constant([0, 0, self.heads * self.dim]))  # fmt: skip
        hidden = self.add("Add", hidden, self.project(f"{module}.self_attn.o_proj", flat))
        x = self.norm(f"{module}.post_attention_layernorm", hidden)
        gate, up = self.project(f"{module}.mlp.gate_proj", x), self.project(f"{module}.mlp.up_proj", x)
        inner = self.add("Mul", self.add("Mul", gate, self.add("Sigmoid", gate)), up)
        return self.add("Add", hidden, self.project(f"{module}.mlp.down_proj", inner))
