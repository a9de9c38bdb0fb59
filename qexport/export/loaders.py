"""Who can load an artifact: the table of what was tried, with the error or silent fault of those that cannot.

Tried on the CPU with transformers 5.23, bitsandbytes 0.50, gptqmodel 7.6.0 and optimum, compressed-tensors 0.17 with
transformers 5.19, and 0.20.1 with 5.23; see docs/artifact.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from qexport.artifact.names import gguf_names

Verdict = Literal["yes", "no", "wrong", "untried"]
"""`wrong`: it loads without an error and computes wrong values."""


@dataclass(frozen=True)
class Folder:
    """The properties that decide who can load an artifact.

    Attributes:
        quantization: the `quantization_config` in its config.json.
        shapes: [out, in] of each quantized module, by path.
        model_type: the family.
        head: the path of the output head.
        layout: the layout's name; None for a folder that another tool made.
        graph: whether the model is an ONNX graph.
        block_sizes: values per absmax of each module with bitsandbytes' 4-bit codes; not in config.json.
        gguf_files: the GGUF files that hold the model; 0 if it is stored in another way.
    """

    quantization: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    model_type: str
    head: str
    layout: str | None
    graph: bool = False
    block_sizes: Mapping[str, int] = field(default_factory=dict)
    gguf_files: int = 0

    @property
    def gguf(self) -> bool:
        """Whether the model is in GGUF files."""
        return self.gguf_files > 0

    def has_config(self, **values: Any) -> bool:
        """Whether the `quantization_config` has these values."""
        return self.quantization is not None and all(
            self.quantization.get(key) == value for key, value in values.items()
        )

    @property
    def method(self) -> str:
        """Its `quant_method`, `unquantized` if it has none, `onnx` for a graph, or `gguf`."""
        if self.graph or self.gguf:
            return "onnx" if self.graph else "gguf"
        return "unquantized" if self.quantization is None else str(self.quantization["quant_method"])

    @property
    def experts(self) -> bool:
        """Whether experts of a mixture are quantized."""
        return any(".experts." in module for module in self.shapes)

    def outputs_divisible_by(self, number: int) -> bool:
        """Whether the outputs of every quantized layer are a multiple of this number."""
        return all(shape[0] % number == 0 for shape in self.shapes.values())

    @property
    def blocks_cross_rows(self) -> bool:
        """Whether a block of bitsandbytes' 4-bit codes spans two rows of a matrix."""
        return any(self.shapes[module][1] % size != 0 for module, size in self.block_sizes.items())

    @property
    def misread_with_avx512(self) -> bool:
        """Whether this is true of a module; see the function of this name."""
        return any(misread_with_avx512(self.shapes[module], size) for module, size in self.block_sizes.items())


def misread_with_avx512(shape: tuple[int, ...], block_size: int) -> bool:
    """Whether bitsandbytes takes a wrong absmax for some values of a 4-bit matrix on x86 CPUs with AVX-512.

    Its kernel (`dequantizeBlockwise4bitCpu` in `csrc/cpu_ops.cpp`, tried with 0.50.2) counts the blocks of each row
    from the row's start, as if every row had the same whole number of blocks. It is used for matrices whose inputs are
    a multiple of 16. If torch computes with AVX-512, as it does by default on such CPUs, it is not used for block sizes
    of 2048 and more.

    Args:
        shape: [out, in] of the matrix.
        block_size: values per absmax, counted row after row.
    """
    rows, columns = shape
    crosses = columns % block_size != 0 and rows > 1 and rows * columns > block_size
    return crosses and columns % 16 == 0 and block_size < 2048


@dataclass(frozen=True)
class Loader:
    """One library or server, and whether it loads an artifact.

    Attributes:
        name: of the library or server.
        verdict: whether it loads the artifact.
        reason: why not, or a limitation.
    """

    name: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class _Row:
    name: str
    when: Callable[[Folder], bool]
    verdict: Verdict
    reason: str = ""


TRANSFORMERS: Final = "transformers"
GPTQMODEL: Final = "gptqmodel"
QEXPORT: Final = "qexport.load"
LLAMA_CPP: Final = "llama.cpp"
ONNXRUNTIME: Final = "onnxruntime"
OPENVINO: Final = "OpenVINO"
_WITH_GPTQMODEL: Final = "transformers + gptqmodel"
_WITH_BITSANDBYTES: Final = "transformers + bitsandbytes"
_WITH_COMPRESSED: Final = "transformers + compressed-tensors"
_WHOLE_BLOCKS: Final = "not on CPUs with AVX512-BF16, where it asks for inputs in multiples of the block size"
_TRIED_WITH_OPENVINO: Final = (
    "but for 4-bit GPTQ, whose graphs 2026.4 loads with `attention: plain`, not `fused`; it rounds activations unless "
    "told otherwise: docs/onnx.md"
)
_FP8_BLOCK: Final = 128
_AT_RANDOM: Final = "at random, with only a warning"


def _is(method: str, **config: Any) -> Callable[[Folder], bool]:
    return lambda folder: folder.method == method and folder.has_config(**config)


def _is_falcon(method: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.method == method and folder.model_type == "falcon"


def _is_plain(method: str) -> Callable[[Folder], bool]:
    """A family like Llama with nothing left out."""
    kept = {"modules_to_not_convert": None}
    return lambda folder: _is(method, **kept)(folder) and folder.model_type in ("llama", "mistral", "qwen2")


def _has_quantized_head(method: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.method == method and folder.head in folder.shapes


def _has_quantized_experts(method: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.method == method and folder.experts


def _has_other_bits(folder: Folder) -> bool:
    rules = (folder.quantization or {}).get("dynamic") or {}
    return folder.method == "gptq" and any(not rule.startswith("-:") for rule in rules)


def _has_packed_groups(key: str, value: object) -> Callable[[Folder], bool]:
    """Whether a config group of `pack-quantized` weights has a value."""

    def has(folder: Folder) -> bool:
        groups = (folder.quantization or {}).get("config_groups") or {}
        packed = folder.method == "compressed-tensors" and folder.has_config(format="pack-quantized")
        return packed and any((group.get("weights") or {}).get(key) == value for group in groups.values())

    return has


def _is_ragged(method: str, number: int, **config: Any) -> Callable[[Folder], bool]:
    return lambda folder: _is(method, **config)(folder) and not folder.outputs_divisible_by(number)


def _is_misread_with_avx512(folder: Folder) -> bool:
    return folder.method == "bitsandbytes" and folder.misread_with_avx512


def _has_blocks_across_rows(folder: Folder) -> bool:
    return folder.method == "bitsandbytes" and folder.blocks_cross_rows


def _blocks_of_sides(folder: Folder) -> set[tuple[int, int]]:
    """The sides of matrices in blocks of FP8, each with the number of its blocks."""
    sides = {side for shape in folder.shapes.values() for side in shape} if folder.method == "fp8" else set()
    return {(side, -(-side // _FP8_BLOCK)) for side in sides}


def _has_undivided_blocks(folder: Folder) -> bool:
    return any(side % blocks for side, blocks in _blocks_of_sides(folder))


def _has_misread_blocks(folder: Folder) -> bool:
    """Transformers takes the side over the number of blocks for the size of a block (`Fp8Dequantize`, 5.23)."""
    return any(blocks > 1 and side % _FP8_BLOCK for side, blocks in _blocks_of_sides(folder))


def _is_float4(folder: Folder) -> bool:
    return any(folder.has_config(format=f"{kind}-pack-quantized") for kind in ("nvfp4", "mxfp4"))


def _in_layout(name: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.layout == name


def _always(_: Folder) -> bool:
    return True


def _is_graph(folder: Folder) -> bool:
    return folder.graph


def _is_gguf(folder: Folder) -> bool:
    return folder.gguf


def _is_split_gguf(folder: Folder) -> bool:
    return folder.gguf_files > 1


def _is_gguf_of(model_type: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.gguf and folder.model_type == model_type


def _is_unquantized(folder: Folder) -> bool:
    return folder.method == "unquantized"


_TABLE: Final = (
    _Row(ONNXRUNTIME, _is_graph, "yes"),
    _Row(OPENVINO, _is_graph, "untried", _TRIED_WITH_OPENVINO),
    _Row(LLAMA_CPP, _is_gguf, "yes"),
    _Row(TRANSFORMERS, _is_split_gguf, "no", "it reads one GGUF file, and the model is in several"),
    _Row(TRANSFORMERS, _is_gguf_of("qwen3"), "untried", "it reads the file, but not how wide the heads are"),
    _Row(TRANSFORMERS, _is_gguf, "yes", 'with gguf_file="model.gguf", dequantized'),
    _Row(TRANSFORMERS, _is_unquantized, "yes"),
    _Row(_WITH_GPTQMODEL, _is_falcon("gptq"), "wrong", f"it fills the quantized layers {_AT_RANDOM}"),
    _Row(_WITH_GPTQMODEL, _has_quantized_head("gptq"), "wrong", f"it fills the quantized head {_AT_RANDOM}"),
    _Row(_WITH_GPTQMODEL, _has_quantized_experts("gptq"), "untried", "experts are quantized"),
    _Row(_WITH_GPTQMODEL, _has_other_bits, "no", "it supports only one number of bits and one group size"),
    _Row(_WITH_GPTQMODEL, _is_ragged("gptq", 16, bits=4), "no", "it requires outputs in multiples of 16"),
    _Row(_WITH_GPTQMODEL, _is("gptq"), "yes"),
    _Row(GPTQMODEL, _is("gptq", sym=False), "no", "it reads asymmetric codes only if it made them"),
    _Row(GPTQMODEL, _has_quantized_experts("gptq"), "untried", "experts are quantized"),
    _Row(GPTQMODEL, _is_ragged("gptq", 16, bits=4), "yes", "with backend=BACKEND.TORCH only"),
    _Row(GPTQMODEL, _is("gptq"), "yes"),
    _Row(_WITH_GPTQMODEL, _is_plain("awq"), "yes"),
    _Row(_WITH_GPTQMODEL, _is("awq"), "untried", "of AWQ, Llamas all of whose linears are quantized were tried"),
    _Row(_WITH_BITSANDBYTES, _is_falcon("bitsandbytes"), "no", "it does not take FalconLinear for a linear layer"),
    _Row(
        _WITH_BITSANDBYTES,
        _is_misread_with_avx512,
        "wrong",
        "on CPUs with AVX512, where it takes the scales of other blocks, because the block size does not divide a "
        "layer's inputs; on those with AVX512-BF16 its forward ends in an error",
    ),
    _Row(_WITH_BITSANDBYTES, _has_quantized_head("bitsandbytes"), "untried", "the head is quantized"),
    _Row(
        _WITH_BITSANDBYTES,
        _has_blocks_across_rows,
        "yes",
        _WHOLE_BLOCKS,
    ),
    _Row(
        _WITH_BITSANDBYTES,
        _is_ragged("bitsandbytes", 32, load_in_4bit=True),
        "yes",
        "not on CPUs with AVX512-BF16, where it requires outputs in multiples of 32",
    ),
    _Row(_WITH_BITSANDBYTES, _is("bitsandbytes"), "yes"),
    _Row(_WITH_COMPRESSED, _is_falcon("compressed-tensors"), "no", "it does not take FalconLinear for a linear layer"),
    _Row(_WITH_COMPRESSED, _is("compressed-tensors", format="int-quantized"), "yes"),
    _Row(_WITH_COMPRESSED, _is("compressed-tensors", format="float-quantized"), "yes"),
    _Row(_WITH_COMPRESSED, _is_float4, "yes", "with dtype=torch.bfloat16"),
    _Row(_WITH_COMPRESSED, _has_quantized_experts("compressed-tensors"), "untried", "experts are quantized"),
    _Row(
        _WITH_COMPRESSED,
        _has_packed_groups("symmetric", False),
        "no",
        "compressed-tensors 0.20 expects zero points of another shape; 0.17 reads them",
    ),
    _Row(_WITH_COMPRESSED, _has_packed_groups("actorder", "group"), "untried", "the groups are in activation order"),
    _Row(_WITH_COMPRESSED, _is("compressed-tensors", format="pack-quantized"), "yes"),
    _Row(_WITH_COMPRESSED, _is("compressed-tensors"), "untried"),
    _Row(TRANSFORMERS, _is_falcon("fp8"), "untried"),
    _Row(TRANSFORMERS, _has_quantized_experts("fp8"), "untried", "experts are quantized"),
    _Row(TRANSFORMERS, _has_undivided_blocks, "no", "without a GPU it cannot divide a matrix into its blocks"),
    _Row(TRANSFORMERS, _has_misread_blocks, "wrong", "without a GPU it takes blocks of another size than 128 x 128"),
    _Row(TRANSFORMERS, _is("fp8"), "yes", "dequantized to bfloat16 where there is no GPU"),
    _Row(QEXPORT, _is_graph, "yes", "with qexport[onnx]"),
    _Row(QEXPORT, _always, "yes"),
    _Row("vLLM", _is_graph, "no", "it reads safetensors files"),
    _Row("vLLM", _is_gguf, "untried", "it reads GGUF with a plugin"),
    _Row("vLLM", _is("bitsandbytes"), "no", "it has no support for bitsandbytes since 0.28"),
    _Row("vLLM", _is("gptq", sym=False), "no", "it refuses asymmetric GPTQ"),
    _Row("vLLM", _is("gptq", desc_act=True), "no", "it refuses desc_act"),
    _Row("vLLM", _is_float4, "untried", "it has no kernel for such codes on CPUs, and was not tried on GPUs"),
    _Row("vLLM", _in_layout("vllm"), "yes"),
    _Row("vLLM", _always, "untried", "the layout vllm is made for it"),
    _Row("TGI", _is_graph, "no", "it reads safetensors files"),
    _Row("TGI", _is_gguf, "no", "it reads safetensors files"),
    _Row("TGI", _in_layout("tgi"), "yes"),
    _Row("TGI", _is("bitsandbytes"), "no", "it quantizes by itself, from the 16-bit weights of the layout tgi"),
    _Row("TGI", _always, "no", "it needs config.json and tokenizer_config.json as the layout tgi writes them"),
)  # fmt: skip
"""The first row of a loader whose condition is true decides. A loader without such a row is not relevant."""


def loaders(folder: Folder) -> list[Loader]:
    """Every relevant loader, each once, with its verdict."""
    found: dict[str, Loader] = {}
    for row in _TABLE:
        if row.name not in found and row.when(folder):
            found[row.name] = Loader(row.name, row.verdict, row.reason)
    return list(found.values())


def stock_loaders(folder: Folder) -> list[str]:
    """The libraries, qexport aside, that load the artifact."""
    servers = ("vLLM", "TGI", QEXPORT)
    return [each.name for each in loaders(folder) if each.verdict == "yes" and each.name not in servers]


def warnings(folder: Folder) -> list[str]:
    """Warnings for users: loaders that read the artifact wrongly without an error, or refuse its block size."""
    found = loaders(folder)
    return [
        *(
            f"{loader.name} gets this artifact wrong: {loader.reason}; load it with qexport.load(path)"
            for loader in found
            if loader.verdict == "wrong"
        ),
        *(f"{loader.name} reads it, but {loader.reason}" for loader in found if loader.reason == _WHOLE_BLOCKS),
    ]


def python_lines(folder: Folder, path: str) -> tuple[str, str]:
    """Two lines of Python that load the artifact: with llama.cpp or transformers if it can, else with qexport."""
    if folder.gguf:
        return "from llama_cpp import Llama", f'model = Llama("{path}/{gguf_names(folder.gguf_files)[0]}", n_ctx=0)'
    works = {loader.name for loader in loaders(folder) if loader.verdict == "yes" and not loader.reason}
    if works & {TRANSFORMERS, _WITH_GPTQMODEL, _WITH_BITSANDBYTES, _WITH_COMPRESSED}:
        call = f'model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")'
        return "from transformers import AutoModelForCausalLM", call
    return "import qexport", f'model = qexport.load("{path}")'


def loading_section(folder: Folder) -> str:
    """The part of a model card that says which libraries load the artifact, and which do not."""
    first, second = python_lines(folder, "FOLDER")
    lines = ["## Loading", "", "```python", first, second, "```", ""]
    for verdict, label in _LABELS.items():
        named = [_named(loader) for loader in loaders(folder) if loader.verdict == verdict]
        lines += [f"- {label}: {'; '.join(named)}."] if named else []
    return "\n".join(lines) + "\n"


_LABELS: Final[Mapping[Verdict, str]] = {
    "yes": "Loads with",
    "wrong": "**Silently wrong** with",
    "no": "Does not load with",
    "untried": "Not tried with",
}


def _named(loader: Loader) -> str:
    return f"{loader.name} ({loader.reason})" if loader.reason else loader.name
