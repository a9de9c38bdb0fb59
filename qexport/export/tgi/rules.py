"""The rules of TGI's launcher, router and model classes: configs, tokenizer, and which files there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from qexport.errors import listed
from qexport.export.contract import Rule
from qexport.export.tgi.config import FALCON_KEYS
from qexport.export.tgi.families import OWN_MODELS, Backend, backend
from qexport.export.tgi.folder import RESERVED_WORDS, ServedFolder
from qexport.export.tgi.refusals import falcon_faults
from qexport.export.tgi.tokenizer import NEW_CLASSES, TOKENIZER
from qexport.text.tokenizer_identity import CHAT_TEMPLATE, TEMPLATES_FOLDER, TOKENIZER_CONFIG

LAUNCHER: Final = "launcher/src/main.rs"
ROUTER: Final = "router/src/server.rs"
MODELS: Final = "server/text_generation_server/models/__init__.py"
MODELING: Final = "server/text_generation_server/models/custom_modeling"
FALCON: Final = f"{MODELING}/flash_rw_modeling.py"
HUB: Final = "server/text_generation_server/utils/hub.py"
WEIGHTS: Final = "server/text_generation_server/utils/weights.py"
PEFT: Final = "server/text_generation_server/cli.py"

_COUNTS: Final = (
    "max_position_embeddings", "n_positions", "max_seq_len", "n_embd", "hidden_size", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "num_experts_per_tok",
)  # fmt: skip
_METHODS: Final = ("gptq", "compressed-tensors")


def _config_readable(folder: ServedFolder) -> Iterator[str]:
    if "config.json" in folder.unreadable:
        yield folder.unreadable["config.json"]


def _config_counts(folder: ServedFolder) -> Iterator[str]:
    """The launcher parses these as counts, and drops the whole config with its quantization where one is not."""
    for key in _COUNTS:
        value = folder.config.get(key)
        if value is not None and (type(value) is not int or value < 0):
            yield f"{key} is {value!r}"


def _family(folder: ServedFolder) -> Iterator[str]:
    if backend(folder.config) is None:
        yield f"no model for model_type {folder.config.get('model_type')!r}"


def _method(folder: ServedFolder) -> Iterator[str]:
    """`bitsandbytes` would make the launcher quantize packed codes once more."""
    if folder.config.get("quantization_config") is not None and folder.method not in _METHODS:
        yield f"quant_method is {folder.quantization.get('quant_method')!r}; known: {', '.join(_METHODS)}"


def _own_model(folder: ServedFolder) -> Iterator[str]:
    if folder.method and backend(folder.config) is not Backend.OWN:
        yield f"{folder.method} is not taken for {folder.config.get('model_type')!r}, which transformers runs"


def _dtype(folder: ServedFolder) -> Iterator[str]:
    if folder.config.get("torch_dtype") not in ("float16", "bfloat16", "float32"):
        yield f"torch_dtype is {folder.config.get('torch_dtype')!r}"


def _tied(folder: ServedFolder) -> Iterator[str]:
    if not isinstance(folder.config.get("tie_word_embeddings"), bool):
        yield f"tie_word_embeddings is {folder.config.get('tie_word_embeddings')!r}, and its default differs"


def _rope_theta(folder: ServedFolder) -> Iterator[str]:
    """The pinned transformers does not know `rope_parameters`; without `rope_theta` TGI computes with 10,000."""
    parameters = folder.config.get("rope_parameters")
    if isinstance(parameters, dict):
        main = parameters.get("full_attention", parameters)
        if folder.config.get("rope_theta") != main.get("rope_theta"):
            yield f"rope_theta is {folder.config.get('rope_theta')!r}, rope_parameters say {main.get('rope_theta')!r}"


def _rope_scaling(folder: ServedFolder) -> Iterator[str]:
    parameters = folder.config.get("rope_parameters")
    if isinstance(parameters, dict):
        kind = parameters.get("full_attention", parameters).get("rope_type", "default")
        scaling = folder.config.get("rope_scaling") or {}
        if kind != "default" and kind not in (scaling.get("rope_type"), scaling.get("type")):
            yield f"rope_parameters say {kind!r}, rope_scaling is {folder.config.get('rope_scaling')!r}"


def _is_falcon(folder: ServedFolder) -> bool:
    return folder.config.get("model_type") == "falcon" and not folder.config.get("alibi")


def _falcon_keys(folder: ServedFolder) -> Iterator[str]:
    if _is_falcon(folder):
        yield from (f"{key} is missing" for key in FALCON_KEYS if folder.config.get(key) is None)


def _falcon_kv_heads(folder: ServedFolder) -> Iterator[str]:
    config = folder.config
    if _is_falcon(folder) and not config.get("new_decoder_architecture"):
        wanted = 1 if config.get("multi_query") else config.get("num_attention_heads")
        if config.get("num_kv_heads") != wanted:
            yield f"num_kv_heads is {config.get('num_kv_heads')!r}, not {wanted}"


def _falcon_norms(folder: ServedFolder) -> Iterator[str]:
    """The number of layer norms decides which ones are loaded, and has no default."""
    config = folder.config
    if not _is_falcon(folder) or not config.get("new_decoder_architecture"):
        return
    stored = 2 if any(name.endswith(".ln_attn.weight") for name in folder.tensors) else 1
    if config.get("num_ln_in_parallel_attn") != stored:
        yield f"num_ln_in_parallel_attn is {config.get('num_ln_in_parallel_attn')!r}, the weights have {stored}"


def _falcon_variant(folder: ServedFolder) -> Iterator[str]:
    if _is_falcon(folder) and all(folder.config.get(key) is not None for key in FALCON_KEYS):
        yield from falcon_faults({"num_ln_in_parallel_attn": None, **folder.config})


def _tokenizer(folder: ServedFolder) -> Iterator[str]:
    if not (folder.path / TOKENIZER).is_file():
        yield "there is none"


def _tokenizer_config(folder: ServedFolder) -> Iterator[str]:
    if TOKENIZER_CONFIG in folder.unreadable:
        yield folder.unreadable[TOKENIZER_CONFIG]
    for key in ("bos_token", "eos_token"):
        if not _is_token(folder.tokenizer_config.get(key)):
            yield f"{key} is neither a string nor an object with content"
    for key in ("add_bos_token", "add_eos_token"):
        if not isinstance(folder.tokenizer_config.get(key), bool | None):
            yield f"{key} is neither true nor false"


def _is_token(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))
    )


def _tokenizer_class(folder: ServedFolder) -> Iterator[str]:
    if (name := folder.tokenizer_config.get("tokenizer_class")) in NEW_CLASSES:
        yield f"transformers 4.51 has no {name}"


def _special_tokens(folder: ServedFolder) -> Iterator[str]:
    if not isinstance(folder.tokenizer_config.get("extra_special_tokens"), dict | None):
        yield "extra_special_tokens must be an object for transformers 4.51"


def _chat_template(folder: ServedFolder) -> Iterator[str]:
    template = folder.tokenizer_config.get("chat_template")
    if (folder.path / CHAT_TEMPLATE).is_file() and not template:
        yield f"the template is in {CHAT_TEMPLATE} only, which the router does not read"
    elif (folder.path / TEMPLATES_FOLDER).is_dir() and not isinstance(template, list):
        yield f"the templates in {TEMPLATES_FOLDER} are missing"
    elif isinstance(template, list) and not all(
        isinstance(item, dict) and {"name", "template"} <= item.keys() for item in template
    ):
        yield "a list of templates must give each a name"


def _weights_there(folder: ServedFolder) -> Iterator[str]:
    if not folder.tensors:
        yield "no *.safetensors in the folder itself"


def _reserved(folder: ServedFolder) -> Iterator[str]:
    for path in sorted(folder.path.glob("*.safetensors")):
        if any(word in path.name for word in RESERVED_WORDS):
            yield f"{path.name} would be skipped"


def _headers(folder: ServedFolder) -> Iterator[str]:
    for name, reason in folder.unreadable.items():
        if name.endswith(".safetensors"):
            yield f"{name}: {reason}"


def _once(folder: ServedFolder) -> Iterator[str]:
    if folder.twice:
        yield f"{len(folder.twice)} tensors are in two files: {listed(folder.twice, limit=3)}"


def _all_layers(folder: ServedFolder) -> Iterator[str]:
    """TGI asks for the same tensors in each of `num_hidden_layers` layers."""
    if not _known(folder):
        return
    count, layers = folder.config.get("num_hidden_layers"), folder.layers
    if sorted(layers) != list(range(count or 0)):
        yield f"num_hidden_layers is {count!r}, the weights have {len(layers)} layers"
    everything = set().union(*layers.values())
    for number, modules in sorted(layers.items()):
        yield from (f"layer {number} has no {module}" for module in sorted(everything - modules))


def _head(folder: ServedFolder) -> Iterator[str]:
    """Falcon's head and embedding stand in for each other; elsewhere the config decides which one is loaded."""
    name = "embed_out.weight" if folder.config.get("model_type") == "gpt_neox" else "lm_head.weight"
    untied = _known(folder) and not _is_falcon(folder) and not folder.config.get("tie_word_embeddings")
    if untied and name not in folder.tensors:
        yield f"tie_word_embeddings is false, and there is no {name}"


def _known(folder: ServedFolder) -> bool:
    """Whether the family is one of TGI's own, with layers that are all alike."""
    model = OWN_MODELS.get(str(folder.config.get("model_type")))
    return model is not None and bool(model.row) and backend(folder.config) is Backend.OWN


def _no_adapter(folder: ServedFolder) -> Iterator[str]:
    if (folder.path / "adapter_config.json").exists():
        yield "adapter_config.json makes TGI take the folder for an adapter"


def _shard_files(folder: ServedFolder) -> Iterator[str]:
    """Every file is loaded, so a set of shards must be alone: two sets have the same tensors, or a mixture of two."""
    names = {stored.file for stored in folder.tensors.values()}
    counts = {name.rpartition("-of-")[2] for name in names}
    if len(counts) > 1:
        yield f"files of more than one set: {', '.join(sorted(names))}"


GENERAL_RULES: Final = (
    Rule("config.json is a JSON object", LAUNCHER, _config_readable),
    Rule("config.json has counts where the launcher parses counts", LAUNCHER, _config_counts),
    Rule("the family has a model", MODELS, _family),
    Rule("the quantization method is one that is served prequantized", LAUNCHER, _method),
    Rule("a quantized model is run by TGI's own model", MODELS, _own_model),
    Rule("torch_dtype is given", "transformers 4.51: configuration_utils.py", _dtype),
    Rule("tie_word_embeddings is given", "transformers 4.51: configuration_utils.py", _tied),
    Rule("rope_theta is given", "server/text_generation_server/layers/rotary.py", _rope_theta),
    Rule("rope_scaling is given", "server/text_generation_server/layers/rotary.py", _rope_scaling),
    Rule("Falcon's config leaves nothing to defaults", FALCON, _falcon_keys),
    Rule("Falcon's heads of keys and values are counted", FALCON, _falcon_kv_heads),
    Rule("Falcon's layer norms are counted", FALCON, _falcon_norms),
    Rule("Falcon's variant is one that TGI reads rightly", FALCON, _falcon_variant),
    Rule("there is a fast tokenizer", ROUTER, _tokenizer),
    Rule("tokenizer_config.json can be parsed", "router/src/lib.rs", _tokenizer_config),
    Rule("the tokenizer's class is known", "transformers 4.51: tokenization_auto.py", _tokenizer_class),
    Rule("the special tokens can be read", "transformers 4.51: tokenization_utils_base.py", _special_tokens),
    Rule("the chat template is in tokenizer_config.json", "router/src/lib.rs", _chat_template),
    Rule("there are weights", HUB, _weights_there),
    Rule("no file of weights has a reserved word in its name", HUB, _reserved),
    Rule("the files of weights can be opened", WEIGHTS, _headers),
    Rule("each tensor is in one file", WEIGHTS, _once),
    Rule("there is one set of weights", WEIGHTS, _shard_files),
    Rule("every layer is complete", f"{MODELING}/flash_*_modeling.py", _all_layers),
    Rule("the output head is there", f"{MODELING}/flash_*_modeling.py", _head),
    Rule("the folder is no adapter", PEFT, _no_adapter),
)
