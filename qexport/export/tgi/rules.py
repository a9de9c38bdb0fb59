"""The rules of TGI's launcher and router (config.json, tokenizer files, launch settings), and the list of all rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from qexport.export.served import CONFIG, Rules, Server
from qexport.export.tgi.families import FALCON_KEYS, NEW_CLASSES, TOKENIZER, Backend, backend
from qexport.export.tgi.kernels import degrees
from qexport.export.tgi.served import ServedByTgi
from qexport.export.tgi.weight_rules import MODELS, NOT_QUANTIZED, WEIGHT_RULES, WEIGHTS
from qexport.text.file_names import CHAT_TEMPLATE, TEMPLATES_FOLDER, TOKENIZER_CONFIG

_LAUNCHER: Final = "launcher/src/main.rs"
_ROUTER: Final = "router/src/lib.rs"
_CLI: Final = "server/text_generation_server/cli.py"
_ROTARY: Final = "server/text_generation_server/layers/rotary.py"
_FALCON: Final = "server/text_generation_server/models/custom_modeling/flash_rw_modeling.py"
_TRANSFORMERS: Final = "transformers 4.51: configuration_utils.py"

_VLLM: Final = "serve it with vLLM: choose the layout vllm"
_COUNTS: Final = (
    "max_position_embeddings", "n_positions", "max_seq_len", "n_embd", "hidden_size", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "num_experts_per_tok",
)  # fmt: skip
_METHODS: Final = ("gptq", "compressed-tensors")
_LAYERS_OF_FALCON_180B: Final = 80
_TOKEN_LIMITS: Final = ("MAX_INPUT_TOKENS", "MAX_TOTAL_TOKENS", "MAX_BATCH_PREFILL_TOKENS")

_RULES: Final = Rules[ServedByTgi]()
_rule: Final = _RULES.rule


@_rule("config.json is a JSON object", _LAUNCHER)
def _config(model: ServedByTgi) -> Iterator[str]:
    if reason := model.json_fault(CONFIG):
        yield reason


@_rule("config.json has counts where the launcher parses counts", _LAUNCHER)
def _config_counts(model: ServedByTgi) -> Iterator[str]:
    """If one of these is not a count, the launcher ignores the whole config with its quantization."""
    for key in _COUNTS:
        value = model.config.get(key)
        if value is not None and (type(value) is not int or value < 0):
            yield f"{key} is {value!r}"


@_rule("the family has a model", MODELS, _VLLM)
def _family(model: ServedByTgi) -> Iterator[str]:
    if backend(model.config) is None:
        yield f"no model for {model.config.get('model_type')}, neither in TGI 3.3 nor in transformers 4.51"


@_rule("the quantization method is one that is served prequantized", _LAUNCHER)
def _method(model: ServedByTgi) -> Iterator[str]:
    """With `bitsandbytes` the launcher would quantize the packed codes again."""
    if model.config.get("quantization_config") is not None and model.method not in _METHODS:
        yield f"quant_method is {model.quantization.get('quant_method')!r}; known: {', '.join(_METHODS)}"


@_rule("a quantized model is run by TGI's own model", MODELS, NOT_QUANTIZED)
def _own_model(model: ServedByTgi) -> Iterator[str]:
    """`bitsandbytes` (LLM.int8) is the only method that TGI passes on to transformers."""
    runs, flag = backend(model.config), (model.environment or {}).get("QUANTIZE")
    method = model.method or (flag if flag != "bitsandbytes" else None)
    if method and runs is not Backend.OWN:
        by = runs.value if runs else "nothing in TGI"
        yield f"{model.config.get('model_type')} is run by {by}, which takes 16-bit weights, not {method}"


@_rule("torch_dtype is given", _TRANSFORMERS)
def _dtype(model: ServedByTgi) -> Iterator[str]:
    if model.config.get("torch_dtype") not in ("float16", "bfloat16", "float32"):
        yield f"torch_dtype is {model.config.get('torch_dtype')!r}"


@_rule("tie_word_embeddings is given", _TRANSFORMERS)
def _tied(model: ServedByTgi) -> Iterator[str]:
    if not isinstance(model.config.get("tie_word_embeddings"), bool):
        yield f"tie_word_embeddings is {model.config.get('tie_word_embeddings')!r}, and its default differs"


@_rule("rope_theta is given", _ROTARY)
def _rope_theta(model: ServedByTgi) -> Iterator[str]:
    """The pinned transformers does not know `rope_parameters`; without `rope_theta` TGI uses 10,000."""
    parameters = model.config.get("rope_parameters")
    if isinstance(parameters, dict):
        main = parameters.get("full_attention", parameters)
        if model.config.get("rope_theta") != main.get("rope_theta"):
            yield f"rope_theta is {model.config.get('rope_theta')!r}, rope_parameters say {main.get('rope_theta')!r}"


@_rule("rope_scaling is given", _ROTARY)
def _rope_scaling(model: ServedByTgi) -> Iterator[str]:
    parameters = model.config.get("rope_parameters")
    if isinstance(parameters, dict):
        kind = parameters.get("full_attention", parameters).get("rope_type", "default")
        scaling = model.config.get("rope_scaling") or {}
        if kind != "default" and kind not in (scaling.get("rope_type"), scaling.get("type")):
            yield f"rope_parameters say {kind!r}, rope_scaling is {model.config.get('rope_scaling')!r}"


def _is_falcon(model: ServedByTgi) -> bool:
    return model.config.get("model_type") == "falcon" and not model.config.get("alibi")


@_rule("Falcon's config leaves nothing to defaults", _FALCON)
def _falcon_keys(model: ServedByTgi) -> Iterator[str]:
    if _is_falcon(model):
        yield from (f"{key} is missing" for key in FALCON_KEYS if model.config.get(key) is None)


@_rule("Falcon's heads of keys and values are counted", _FALCON)
def _falcon_kv_heads(model: ServedByTgi) -> Iterator[str]:
    config = model.config
    if _is_falcon(model) and not config.get("new_decoder_architecture"):
        wanted = 1 if config.get("multi_query") else config.get("num_attention_heads")
        if config.get("num_kv_heads") != wanted:
            yield f"num_kv_heads is {config.get('num_kv_heads')!r}, not {wanted}"


@_rule("Falcon's layer norms are counted", _FALCON)
def _falcon_norms(model: ServedByTgi) -> Iterator[str]:
    """TGI loads layer norms according to this number, which has no default."""
    if not _is_falcon(model) or not model.config.get("new_decoder_architecture"):
        return
    stored = 2 if any(name.endswith(".ln_attn.weight") for name in model.tensors) else 1
    if model.config.get("num_ln_in_parallel_attn") != stored:
        given = model.config.get("num_ln_in_parallel_attn")
        yield f"num_ln_in_parallel_attn is {given!r}, the weights have {stored}"


@_rule("Falcon's variant is one that TGI reads correctly", _FALCON, _VLLM)
def _falcon_variant(model: ServedByTgi) -> Iterator[str]:
    config = model.config
    if not _is_falcon(model) or any(config.get(key) is None for key in FALCON_KEYS):
        return
    new = config["new_decoder_architecture"]
    if not new and not config["multi_query"]:
        yield "multi_query: false: queries, keys and values are stored head by head; TGI reads them one after another"
    if new and not config["parallel_attn"]:
        yield "parallel_attn: false is not known together with new_decoder_architecture"
    two_norms = new and config.get("num_ln_in_parallel_attn") == 2
    if config["num_hidden_layers"] == _LAYERS_OF_FALCON_180B and not two_norms:
        yield "80 layers are taken for Falcon-180B, with two layer norms in a layer"


@_rule(
    "there is a fast tokenizer",
    "router/src/server.rs",
    "AutoTokenizer.from_pretrained(BASE).save_pretrained(BASE) writes a tokenizer.json into the base",
)
def _tokenizer(model: ServedByTgi) -> Iterator[str]:
    if TOKENIZER not in model.files:
        yield f"there is no {TOKENIZER}, which the router counts tokens with"


@_rule("tokenizer_config.json can be parsed", _ROUTER)
def _tokenizer_config(model: ServedByTgi) -> Iterator[str]:
    if reason := model.json_fault(TOKENIZER_CONFIG):
        yield reason
    for key in ("bos_token", "eos_token"):
        if not _is_token(model.tokenizer_config.get(key)):
            yield f"{key} is neither a string nor an object with content"
    for key in ("add_bos_token", "add_eos_token"):
        if not isinstance(model.tokenizer_config.get(key), bool | None):
            yield f"{key} is neither true nor false"


def _is_token(value: Any) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    return value is None or isinstance(content, str)


@_rule("the tokenizer's class is known", "transformers 4.51: tokenization_auto.py")
def _tokenizer_class(model: ServedByTgi) -> Iterator[str]:
    if (name := model.tokenizer_config.get("tokenizer_class")) in NEW_CLASSES:
        yield f"transformers 4.51 has no {name}"


@_rule("the special tokens can be read", "transformers 4.51: tokenization_utils_base.py")
def _special_tokens(model: ServedByTgi) -> Iterator[str]:
    if not isinstance(model.tokenizer_config.get("extra_special_tokens"), dict | None):
        yield "extra_special_tokens must be an object for transformers 4.51"


@_rule("the chat template is in tokenizer_config.json", _ROUTER)
def _chat_template(model: ServedByTgi) -> Iterator[str]:
    template = model.tokenizer_config.get("chat_template")
    if CHAT_TEMPLATE in model.files and not template:
        yield f"the template is in {CHAT_TEMPLATE} only, which the router does not read"
    elif any(name.startswith(f"{TEMPLATES_FOLDER}/") for name in model.files) and not isinstance(template, list):
        yield f"the templates in {TEMPLATES_FOLDER} are missing"
    elif isinstance(template, list) and not all(
        isinstance(item, dict) and {"name", "template"} <= item.keys() for item in template
    ):
        yield "a list of templates must give each a name"


@_rule("the folder is not an adapter", _CLI)
def _no_adapter(model: ServedByTgi) -> Iterator[str]:
    if "adapter_config.json" in model.files:
        yield "adapter_config.json makes TGI take the folder for an adapter"


@_rule("launch: NUM_SHARD is a degree that works", WEIGHTS)
def _shards(model: ServedByTgi) -> Iterator[str]:
    if not model.environment or model.json_fault(CONFIG) or not model.linears:
        return
    working = [str(degree) for degree in degrees(model.config, model.linears, model.codes)]
    if model.environment.get("NUM_SHARD") not in working:
        yield f"NUM_SHARD is {model.environment.get('NUM_SHARD')}; these work: {', '.join(working)}"


@_rule("launch: the dtype is one that the launcher knows", _LAUNCHER, "set merge.dtype to bfloat16")
def _launch_dtype(model: ServedByTgi) -> Iterator[str]:
    if model.environment is not None:
        dtype = model.environment.get("DTYPE", model.config.get("torch_dtype"))
        if dtype not in ("float16", "bfloat16"):
            yield f"TGI serves 16-bit weights, not {dtype}"


@_rule("launch: dtype and method do not exclude each other", _CLI)
def _dtype_or_method(model: ServedByTgi) -> Iterator[str]:
    environment = model.environment or {}
    method = environment.get("QUANTIZE") or model.method
    if "DTYPE" in environment and method and not method.startswith("bitsandbytes"):
        yield f"DTYPE and {method} exclude each other"


@_rule("launch: QUANTIZE fits the weights", _LAUNCHER)
def _flag_fits(model: ServedByTgi) -> Iterator[str]:
    if model.environment is None:
        return
    flag = model.environment.get("QUANTIZE")
    if model.method and flag != model.method:
        yield f"QUANTIZE is {flag}, the weights are {model.method}"
    if not model.method and flag is not None and not flag.startswith("bitsandbytes"):
        yield f"QUANTIZE is {flag}, the weights are 16-bit"


@_rule("launch: the token limits fit together", _LAUNCHER)
def _token_limits(model: ServedByTgi) -> Iterator[str]:
    if model.environment is None:
        return
    values = [model.environment.get(key, "") for key in _TOKEN_LIMITS]
    if not all(value.isascii() and value.isdigit() for value in values):
        yield f"{', '.join(_TOKEN_LIMITS)} must be counts"
        return
    most_input, most_total, prefill = map(int, values)
    if most_input >= most_total:
        yield f"MAX_INPUT_TOKENS {most_input} must be less than MAX_TOTAL_TOKENS {most_total}"
    if prefill < most_input:
        yield f"MAX_BATCH_PREFILL_TOKENS {prefill} must be at least MAX_INPUT_TOKENS {most_input}"


TGI: Final = Server("TGI 3.3", ServedByTgi, (*_RULES, *WEIGHT_RULES))
