"""What programs that generate text need besides the graph: genai_config.json, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import PretrainedConfig

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.structure import parse_config
from qexport.export.onnx.tracing import Cache
from qexport.tensors.strict_files import parse_json
from qexport.text.file_names import GENERATION_CONFIG

_NUMBERS: Final = 1 << 31
"""onnxruntime-genai reads 32-bit integers."""

_SAMPLING: Final = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class Generation:
    """What a program that generates text needs besides the graph.

    Attributes:
        ends: the tokens that end a text, in ascending order; may be empty.
        begin: the token that begins a text, or None.
        padding: the token that pads a batch, or None.
        sampling: `do_sample`, `temperature` and similar values of generation_config.json.
    """

    ends: tuple[int, ...]
    begin: int | None
    padding: int | None
    sampling: Mapping[str, bool | int | float]


def generation(checkpoint: Checkpoint) -> Generation:
    """Read from generation_config.json; tokens also from config.json. Values that are not token ids are ignored.

    Raises:
        InputError: generation_config.json is not valid JSON.
    """
    own = parse_json(checkpoint.files.get(GENERATION_CONFIG, b"{}"), where=GENERATION_CONFIG)
    configs = [own if isinstance(own, dict) else {}, checkpoint.config]

    def tokens(key: str) -> list[int]:
        return next((found for config in configs if (found := _tokens(config.get(key)))), [])

    return Generation(
        ends=tuple(sorted(set(tokens("eos_token_id")))),
        begin=next(iter(tokens("bos_token_id")), None),
        padding=next(iter(tokens("pad_token_id")), None),
        sampling={key: configs[0][key] for key in _SAMPLING if _usable(configs[0].get(key))},
    )


def _tokens(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int and 0 <= token < _NUMBERS]


def _usable(value: Any) -> bool:
    """Whether the runtime can read the value. NaN and infinity fail the comparison."""
    return isinstance(value, (bool, int, float)) and -_NUMBERS < value < _NUMBERS


FILE_NAME: Final = "genai_config.json"

TYPES: Final[Mapping[str, str]] = {
    "falcon": "decoder",
    "falcon_h1": "decoder",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "gpt2": "decoder",
    "gpt_neox": "decoder",
    "llama": "llama",
    "mistral": "mistral",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""The runtime's name for each `model_type`. `decoder` is its name for any graph with our inputs, used for families that
have no name there, and for gpt2, since its `gpt2` requires other inputs.
"""

_STATES: Final = {"conv_state": "conv_names", "recurrent_state": "recurrent_names"}


def genai_config(config: Mapping[str, Any], cache: Cache, generation: Generation) -> dict[str, Any] | None:
    """The content of genai_config.json; None for a family that was not tested with the runtime.

    Past and present do not share a buffer of keys and values: the runtime would take memory for the longest text that
    the model allows before the first token.

    Args:
        config: the content of config.json.
        cache: the tensors of each layer's cache.
        generation: tokens and sampling.
    """
    model_type = TYPES.get(str(config.get("model_type")))
    if model_type is None:
        return None
    parsed = parse_config(config)
    context = int(parsed.max_position_embeddings)
    tokens = {
        "bos_token_id": generation.begin,
        "eos_token_id": _one_or_list(generation.ends),
        "pad_token_id": padding_token(generation),
    }
    model = {key: value for key, value in tokens.items() if value is not None} | {
        "context_length": context,
        "decoder": _decoder(parsed, cache),
        "type": model_type,
        "vocab_size": int(parsed.vocab_size),
    }
    search = {"do_sample": False, "num_beams": 1, **generation.sampling, "max_length": context}
    return {"model": model, "search": search | {"past_present_share_buffer": False}}


def padding_token(generation: Generation) -> int:
    """The token that pads a batch: the model's, else one that ends a text, else token 0."""
    return next((token for token in (generation.padding, *generation.ends) if token is not None), 0)


def genai_notes(config: Mapping[str, Any], cache: Cache) -> list[str]:
    """Warnings about batches in the runtime, which pads them on the right; empty if the model supports that."""
    if str(config.get("model_type")) not in TYPES:
        return []
    if any(not tensor.grows for tensors in cache for tensor in tensors):
        return [_ONE_LENGTH.format("the mamba states would go on through the padding")]
    if window := _window(parse_config(config)):
        return [_ONE_LENGTH.format(f"past {window} tokens the sliding window would count the padding")]
    return []


_ONE_LENGTH: Final = "onnxruntime-genai: batch only prompts of equal length; it fills up on the right, and {}."


def _decoder(parsed: PretrainedConfig, cache: Cache) -> dict[str, Any]:
    key = cache[0][0]
    states = {_STATES[tensor.name]: tensor.name for tensor in cache[0] if tensor.name in _STATES}
    kept = {"key_names": "key", "value_names": "value"} | states
    return {
        "filename": "model.onnx",
        "head_size": key.shape[2],
        "hidden_size": int(parsed.hidden_size),
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{role}": f"past_key_values.%d.{name}" for role, name in kept.items()},
        "num_attention_heads": int(parsed.num_attention_heads),
        "num_hidden_layers": len(cache),
        "num_key_value_heads": key.shape[0],
        "outputs": {"logits": "logits"} | {f"present_{role}": f"present.%d.{name}" for role, name in kept.items()},
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
    }


def _one_or_list(tokens: tuple[int, ...]) -> int | list[int] | None:
    return tokens[0] if len(tokens) == 1 else list(tokens) or None


def _window(parsed: PretrainedConfig) -> int | None:
    """How many tokens a layer can see at most; None if every layer sees all."""
    window = getattr(parsed, "sliding_window", None)
    kinds = getattr(parsed, "layer_types", None) or ["sliding_attention"]
    return int(window) if window and "sliding_attention" in kinds else None
