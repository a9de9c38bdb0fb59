"""The architectures that vLLM has a class for, the linears that it joins, and the tensor-parallel degrees that work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

VERSION: Final = "0.32"
"""The version of vLLM. Facts in this package come from the sources of 0.32.0, and were tested with it."""

ARCHITECTURES: Final = frozenset(
    {
        "AXK1ForCausalLM", "AfmoeForCausalLM", "ApertusForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM",
        "BailingMoeV2_5ForCausalLM", "BailingMoeV3ForCausalLM", "BloomForCausalLM", "ChatGLMForConditionalGeneration",
        "ChatGLMModel", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM", "CohereForCausalLM", "DbrxForCausalLM",
        "DeciLMForCausalLM", "DeepseekForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM", "DeepseekV4ForCausalLM", "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM",
        "Exaone4ForCausalLM", "ExaoneForCausalLM", "ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM", "FalconForCausalLM",
        "FalconH1ForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "Gemma2ForCausalLM",
        "Gemma3ForCausalLM", "Gemma3nForCausalLM", "Gemma4ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM",
        "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "Glm5NextForCausalLM", "GlmMoeDsaForCausalLM",
        "GptOssForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM",
        "GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM", "GraniteSWAForCausalLM", "HCXVisionV2ForCausalLM",
        "HYV3ForCausalLM", "HYV4ForCausalLM", "HrmTextForCausalLM", "HyperCLOVAXForCausalLM", "IQuestCoderForCausalLM",
        "IQuestLoopCoderForCausalLM", "InklingForCausalLM", "InklingForConditionalGeneration", "InternLM2ForCausalLM",
        "InternLM3ForCausalLM", "JambaForCausalLM", "K2HorizonForCausalLM", "KimiLinearForCausalLM", "LLaMAForCausalLM",
        "LagunaForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Llama4ForCausalLM", "LlamaForCausalLM",
        "LongcatFlashForCausalLM", "LongcatFlashNgramForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM",
        "MiMoForCausalLM", "MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "MiniCPM3ForCausalLM", "MiniCPMForCausalLM",
        "MiniMaxM2ForCausalLM", "MiniMaxM3SparseForCausalLM", "Ministral3ForCausalLM", "MistralForCausalLM",
        "MistralLarge3ForCausalLM", "MixtralForCausalLM", "MuseGlimmerForCausalLM", "NemotronForCausalLM",
        "NemotronHForCausalLM", "NemotronHPuzzleForCausalLM", "OPTForCausalLM", "OlmoHybridForCausalLM",
        "OlmoeForCausalLM", "OrionForCausalLM", "PanguEmbeddedForCausalLM", "PanguProMoEV2ForCausalLM",
        "PanguUltraMoEForCausalLM", "Param2MoEForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM", "Plamo3ForCausalLM",
        "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen4ExpForCausalLM", "Rnj1ForCausalLM", "SarvamMLAForCausalLM",
        "SarvamMoEForCausalLM", "SolarForCausalLM", "StableLmForCausalLM", "Step1ForCausalLM", "Step3TextForCausalLM",
        "Step3p5ForCausalLM", "TeleChat2ForCausalLM", "TeleChat3ForCausalLM", "TeleFLMForCausalLM", "Zamba2ForCausalLM",
    }
)  # fmt: skip
"""The text generation models of `vllm/model_executor/models/registry.py`; `tests/servers` compares the two.

vLLM runs other architectures through transformers, which was not tested.
"""


LAST_JOINED: Final = ("v_proj", "up_proj")
"""The last of the modules that become one layer (`qexport.architectures.joined`)."""

STORED_JOINED: Final = ("qkv_proj", "query_key_value", "gate_up_proj", "c_attn")
"""Modules that files hold as one, and vLLM as the parts that it would join."""


LARGEST_DEGREE: Final = 16

ROW: Final = ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "w2")
"""Layers that are split along their inputs; the others are split along their outputs."""

_KEYS_AND_VALUES: Final = ("k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn")
_PACKED: Final = 8


@dataclass(frozen=True)
class SplitLinear:
    """The properties of a linear layer that decide how it can be split.

    Attributes:
        name: the module path.
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        group_size: inputs per scale; None for one scale per row, or an unquantized layer.
        packed: whether eight codes are in one word.
        block_rows: outputs per scale.
    """

    name: str
    out_features: int
    in_features: int
    group_size: int | None
    packed: bool
    block_rows: int = 1

    def fits(self, degree: int) -> bool:
        """Whether each of `degree` GPUs gets whole rows or columns, groups and words."""
        leaf = self.name.rpartition(".")[2]
        if leaf in ROW:
            whole = self.in_features % (degree * (self.group_size or 1)) == 0
            return whole and (not self.packed or self.in_features % (degree * _PACKED) == 0)
        if leaf in _KEYS_AND_VALUES and self.block_rows == 1:
            return True
        return self.out_features % (degree * (_PACKED if self.packed else self.block_rows)) == 0


def heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """The number of query heads and of key heads, as vLLM counts them."""
    count = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return count, 1 if config.get("multi_query", True) else count
    return count, int(config.get("num_key_value_heads") or config.get("num_kv_heads") or count)


def degrees(config: Mapping[str, Any], linears: Iterable[SplitLinear]) -> list[int]:
    """The tensor-parallel degrees from 1 to 16 that work; only 1 if there are mixers other than attention."""
    count, shared = heads(config)
    if any(key.startswith(("mamba_", "ssm_")) for key in config):
        return [1]
    known = list(linears)
    return [
        degree
        for degree in range(1, LARGEST_DEGREE + 1)
        if degree == 1
        or (
            count % degree == 0
            and (shared % degree == 0 or degree % shared == 0)
            and all(linear.fits(degree) for linear in known)
        )
    ]
