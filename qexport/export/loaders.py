"""Who can load an artifact: the table of what was tried, and what those who cannot say or silently do.

Tried on the CPU with transformers 5.23, bitsandbytes 0.50, gptqmodel 7.6.0 and optimum, compressed-tensors 0.17 with
transformers 5.19; see docs/artifact.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Verdict = Literal["yes", "no", "wrong", "untried"]
"""`wrong`: it loads without an error and computes something else."""


@dataclass(frozen=True)
class Folder:
    """What decides who can load an artifact.

    Attributes:
        quantization: the `quantization_config` in its config.json.
        shapes: [out, in] of each quantized module, by path.
        model_type: the family.
        head: the path of the output head.
        layout: the layout's name; None for a folder of another maker.
        graph: whether its model is an ONNX graph.
        block_sizes: values that share an absmax in each module with bitsandbytes' 4-bit codes, which its config.json
            does not say.
    """

    quantization: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    model_type: str
    head: str
    layout: str | None
    graph: bool = False
    block_sizes: Mapping[str, int] = field(default_factory=dict)

    def says(self, **values: Any) -> bool:
        """Whether the `quantization_config` has these values."""
        return self.quantization is not None and all(
            self.quantization.get(key) == value for key, value in values.items()
        )

    @property
    def method(self) -> str:
        """Its `quant_method`, `dense` where nothing is quantized, `onnx` for a graph."""
        if self.graph:
            return "onnx"
        return "dense" if self.quantization is None else str(self.quantization["quant_method"])

    @property
    def experts(self) -> bool:
        """Experts of a mixture are quantized."""
        return any(".experts." in module for module in self.shapes)

    def outputs_divisible_by(self, number: int) -> bool:
        """Whether every quantized layer has a multiple of so many outputs."""
        return all(shape[0] % number == 0 for shape in self.shapes.values())

    @property
    def blocks_cross_rows(self) -> bool:
        """Whether a block of bitsandbytes' 4-bit codes holds values of two rows of a matrix."""
        return any(self.shapes[module][1] % size != 0 for module, size in self.block_sizes.items())

    @property
    def misread_with_avx512(self) -> bool:
        """See the function of this name."""
        return any(misread_with_avx512(self.shapes[module], size) for module, size in self.block_sizes.items())


def misread_with_avx512(shape: tuple[int, ...], block_size: int) -> bool:
    """Whether bitsandbytes takes a wrong absmax for some values of a 4-bit matrix on x86 CPUs with AVX-512.

    Its kernel (`dequantizeBlockwise4bitCpu` in `csrc/cpu_ops.cpp`, tried with 0.50.2) counts the blocks of each row
    from the row's start, as if every row held the same whole number of blocks. It takes matrices whose inputs are a
    multiple of 16. Where torch computes with AVX-512, as it does by default on such CPUs, block sizes from 2048 on do
    not reach it.

    Args:
        shape: [out, in] of the matrix.
        block_size: values that share an absmax, counted row after row.
    """
    rows, columns = shape
    crosses = columns % block_size != 0 and rows > 1 and rows * columns > block_size
    return crosses and columns % 16 == 0 and block_size < 2048


@dataclass(frozen=True)
class Loader:
    """One reader and what it makes of an artifact.

    Attributes:
        name: of the library or server.
        verdict: whether it takes the artifact.
        reason: why not, or what to mind.
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
ONNXRUNTIME: Final = "onnxruntime"
_WITH_GPTQMODEL: Final = "transformers + gptqmodel"
_WITH_BITSANDBYTES: Final = "transformers + bitsandbytes"
_WITH_COMPRESSED: Final = "transformers + compressed-tensors"
_WHOLE_BLOCKS: Final = "not on CPUs with AVX512-BF16, where it asks for inputs in multiples of the block size"
_AT_RANDOM: Final = "at random, with only a warning"


def _is(method: str, **says: Any) -> Callable[[Folder], bool]:
    return lambda folder: folder.method == method and folder.says(**says)


def _is_falcon(method: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.method == method and folder.model_type == "falcon"


def _has_quantized_head(method: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.method == method and folder.head in folder.shapes


def _has_quantized_experts(method: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.method == method and folder.experts


def _has_other_bits(folder: Folder) -> bool:
    rules = (folder.quantization or {}).get("dynamic") or {}
    return folder.method == "gptq" and any(not rule.startswith("-:") for rule in rules)


def _is_ragged(method: str, number: int, **says: Any) -> Callable[[Folder], bool]:
    return lambda folder: _is(method, **says)(folder) and not folder.outputs_divisible_by(number)


def _is_misread_with_avx512(folder: Folder) -> bool:
    return folder.method == "bitsandbytes" and folder.misread_with_avx512


def _has_blocks_across_rows(folder: Folder) -> bool:
    return folder.method == "bitsandbytes" and folder.blocks_cross_rows


def _in_layout(name: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.layout == name


def _always(_: Folder) -> bool:
    return True


def _is_graph(folder: Folder) -> bool:
    return folder.graph


def _is_dense(folder: Folder) -> bool:
    return folder.method == "dense"


_TABLE: Final = (
    _Row(ONNXRUNTIME, _is_graph, "yes"),
    _Row(TRANSFORMERS, _is_dense, "yes"),
    _Row(_WITH_GPTQMODEL, _is_falcon("gptq"), "wrong", f"it fills the quantized layers {_AT_RANDOM}"),
    _Row(_WITH_GPTQMODEL, _has_quantized_head("gptq"), "wrong", f"it fills the quantized head {_AT_RANDOM}"),
    _Row(_WITH_GPTQMODEL, _has_quantized_experts("gptq"), "untried", "experts are quantized"),
    _Row(_WITH_GPTQMODEL, _has_other_bits, "no", "it takes one number of bits and one group size only"),
    _Row(_WITH_GPTQMODEL, _is_ragged("gptq", 16, bits=4), "no", "it asks for multiples of 16 outputs"),
    _Row(_WITH_GPTQMODEL, _is("gptq"), "yes"),
    _Row(GPTQMODEL, _is("gptq", sym=False), "no", "it reads only asymmetric codes of its own"),
    _Row(GPTQMODEL, _has_quantized_experts("gptq"), "untried", "experts are quantized"),
    _Row(GPTQMODEL, _is_ragged("gptq", 16, bits=4), "yes", "with backend=BACKEND.TORCH only"),
    _Row(GPTQMODEL, _is("gptq"), "yes"),
    _Row(_WITH_BITSANDBYTES, _is_falcon("bitsandbytes"), "no", "it does not know FalconLinear for a linear layer"),
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
        "not on CPUs with AVX512-BF16, where it asks for multiples of 32 outputs",
    ),
    _Row(_WITH_BITSANDBYTES, _is("bitsandbytes"), "yes"),
    _Row(_WITH_COMPRESSED, _is_falcon("compressed-tensors"), "no", "it does not know FalconLinear for a linear layer"),
    _Row(_WITH_COMPRESSED, _is("compressed-tensors", format="int-quantized"), "yes"),
    _Row(_WITH_COMPRESSED, _is("compressed-tensors"), "untried"),
    _Row(QEXPORT, _is_graph, "yes", "with qexport[onnx]"),
    _Row(QEXPORT, _always, "yes"),
    _Row("vLLM", _is_graph, "no", "it reads safetensors files"),
    _Row("vLLM", _is("bitsandbytes"), "no", "it has no reader for bitsandbytes since 0.28"),
    _Row("vLLM", _is("gptq", sym=False), "no", "it refuses asymmetric GPTQ"),
    _Row("vLLM", _is("gptq", desc_act=True), "no", "it refuses desc_act"),
    _Row("vLLM", _in_layout("vllm"), "yes"),
    _Row("vLLM", _always, "untried", "the layout vllm is made for it"),
    _Row("TGI", _is_graph, "no", "it reads safetensors files"),
    _Row("TGI", _in_layout("tgi"), "yes"),
    _Row("TGI", _is("bitsandbytes"), "no", "it quantizes by itself, from the 16-bit weights in the layout tgi"),
    _Row("TGI", _always, "no", "it wants the words of the layout tgi in config.json and tokenizer_config.json"),
)  # fmt: skip
"""The first row of a loader that holds decides. A loader without such a row has nothing to do with the artifact."""


def loaders(folder: Folder) -> list[Loader]:
    """Every loader that an artifact concerns, each once, with its verdict."""
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
    """What a user must be told: loaders that get the artifact wrong without an error, or refuse its block size."""
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
    """Two lines of Python that load the artifact: with transformers where it takes it, else with qexport."""
    works = {loader.name for loader in loaders(folder) if loader.verdict == "yes" and not loader.reason}
    if works & {TRANSFORMERS, _WITH_GPTQMODEL, _WITH_BITSANDBYTES, _WITH_COMPRESSED}:
        call = f'model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")'
        return "from transformers import AutoModelForCausalLM", call
    return "import qexport", f'model = qexport.load("{path}")'


def loading_section(folder: Folder) -> str:
    """The part of a model card that says how to load the artifact, and with what not."""
    first, second = python_lines(folder, "FOLDER")
    lines = ["## Loading", "", "```python", first, second, "```", ""]
    for verdict, words in _WORDS.items():
        named = [_named(loader) for loader in loaders(folder) if loader.verdict == verdict]
        lines += [f"- {words}: {'; '.join(named)}."] if named else []
    return "\n".join(lines) + "\n"


_WORDS: Final[Mapping[Verdict, str]] = {
    "yes": "Loads with",
    "wrong": "**Silently wrong** with",
    "no": "Does not load with",
    "untried": "Not tried with",
}


def _named(loader: Loader) -> str:
    return f"{loader.name} ({loader.reason})" if loader.reason else loader.name
