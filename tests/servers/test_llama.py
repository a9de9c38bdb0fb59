"""llama.cpp, in an environment of its own, computes GGUF folders as we read them; its converter gives the same tensors.

`make test-llama` runs this; `QEXPORT_LLAMA_PYTHON` names that environment's interpreter, `QEXPORT_LLAMA_CONVERTER` the
folder of llama.cpp's converter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import factories
import gguf_folders
import qexport
import sentencepiece_tokenizers as tiny
import vllm_artifacts as artifacts
from gguf_faults import (
    Change,
    Rows,
    copied,
    first_row_larger,
    half_rotated,
    rolled,
    rows_of,
    smaller,
    swapped,
    value_of,
)
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.figures import find_figure
from qexport.artifact.names import GGUF_NAME
from qexport.artifact.served import RuntimeFacts
from qexport.errors import CompatibilityError
from qexport.export import GgufSettings
from qexport.gates.serving import decide_served, fidelity_limit, limits_of_runtime
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.progress import Steps, silent
from qexport.reading.stored_model import open_stored
from qexport.runtimes import RuntimeSettings, ServedDtype
from qexport.runtimes.child import ChildRuntime
from qexport.tensors.gguf_file import GgufFile
from qexport.text.torture import TORTURE
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Reference
from qexport.verifying.served import check_tokenizer, measure_served
from references import make_reference
from test_gguf_layout import NAMED

PYTHON = os.environ.get("QEXPORT_LLAMA_PYTHON", "")
CONVERTER = os.environ.get("QEXPORT_LLAMA_CONVERTER", "")

pytestmark = pytest.mark.skipif(not PYTHON, reason="QEXPORT_LLAMA_PYTHON names no interpreter")


def settings(dtype: ServedDtype | None = None) -> RuntimeSettings:
    return RuntimeSettings(runtime="llama.cpp", python=PYTHON, dtype=dtype)


def report_of(
    made: gguf_folders.Made, text: Path, *dtypes: ServedDtype | None, folder: Path | None = None, longest: int = 16
) -> Any:
    """`qexport verify --through llama.cpp`; no window is longer than the sliding window of the tiny Mistral."""
    chosen = VerifySettings(
        text=str(text), windows=32, max_windows=32, sequence_length=longest, profile="off",
        through=[settings(dtype) for dtype in dtypes],
    )  # fmt: skip
    return qexport.verify(folder or made.gguf, qexport.LoadSettings(base=str(made.base)), chosen)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.write_text(tmp_path_factory.mktemp("text") / "held.jsonl", passages=60, seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., gguf_folders.Made]:
    found: dict[tuple[str, str], gguf_folders.Made] = {}

    def make(family: str, method: str = "gptq") -> gguf_folders.Made:
        quantize = gguf_folders.GPTQ if method == "gptq" else gguf_folders.NONE
        if (family, method) not in found:
            folder = tmp_path_factory.mktemp("made")
            found[family, method] = gguf_folders.make(gguf_folders.CONFIGS[family], folder, quantize)
        return found[family, method]

    return make


# Every family.


def test_all_tensors_are_those_of_the_converter(made: Callable[..., gguf_folders.Made], tmp_path: Path) -> None:
    """Configurations of Falcon 7B, GPT-NeoX and GPT-2 are given with keys of older files, which the converter reads."""
    families = [family for family in gguf_folders.CONFIGS if family not in ("gemma 2", "phi 3")]  # see below
    for family in families:
        model = Path(shutil.copytree(made(family, "none").base, tmp_path / family))
        config = json.loads((model / "config.json").read_text())
        if config.get("multi_query") and not config.get("new_decoder_architecture"):
            (model / "config.json").write_text(json.dumps(config | {"num_kv_heads": 1}))
        if config["model_type"] == "gpt_neox":
            (model / "config.json").write_text(json.dumps(config | {"rotary_pct": 0.25}))
        if config["model_type"] == "gpt2":
            (model / "config.json").write_text(json.dumps(config | {"n_ctx": config["n_positions"]}))
    convert({tmp_path / family: tmp_path / f"{family}.gguf" for family in families}, tmp_path / "jobs.json")
    for family in families:
        assert_same_file(made(family, "none").gguf / GGUF_NAME, tmp_path / f"{family}.gguf")


def convert(models: Mapping[Path, Path], jobs: Path) -> None:
    """llama.cpp's converter, for some folders."""
    jobs.write_text(json.dumps([[str(model), str(file), "gpt-2"] for model, file in models.items()]))
    script = Path(__file__).with_name("convert_with_llama.py")
    run = subprocess.run([PYTHON, script, CONVERTER, jobs], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


NOT_WRITTEN = {
    "general.basename",
    "general.version",
    "general.size_label",
    "general.sampling.temp",
    "tokenizer.ggml.add_sep_token",
}
"""Keys of the converter that say nothing of the model, or what llama.cpp takes for granted."""


def assert_same_file(path: Path, others: Path) -> None:
    with closing(GgufFile(path)) as own, closing(GgufFile(others)) as other:
        assert own.tensors.keys() == other.tensors.keys()
        for name, tensor in other.tensors.items():
            assert (own.tensors[name].shape, own.tensors[name].kind) == (tensor.shape, tensor.kind), name
            assert np.array_equal(own.read_rows(name, 0, tensor.rows), other.read_rows(name, 0, tensor.rows)), name
        assert other.metadata.keys() - own.metadata.keys() <= NOT_WRITTEN
        differing = {key for key, value in other.metadata.items() if own.metadata.get(key, value) != value}
        assert differing <= {"general.name", *(["llama.context_length"] if "mistral" in others.name else [])}
        assert [key for key in other.array_lengths if own.array(key) != other.array(key)] == []


SENTENCEPIECE: Mapping[str, tuple[str, tiny.Style]] = {
    "mistral": ("mistral", tiny.LLAMA2),
    "gemma 2": ("gemma 2", tiny.GEMMA),
    "gemma 3": ("gemma 3 linear", tiny.GEMMA),
    "phi 3": ("phi 3", tiny.PHI3),
}
"""Families whose published models have a tokenizer of SentencePiece."""


def trained_base(case: str, folder: Path) -> Path:
    """A model with tokenizer.model, as SentencePiece has trained it, and tokenizer.json, as transformers makes it."""
    family, style = SENTENCEPIECE[case]
    folder.mkdir()
    text, script = folder / "lines.txt", Path(__file__).with_name("train_with_sentencepiece.py")
    documents = [json.loads(line)["text"] for line in artifacts.TEXT.read_text(encoding="utf-8").splitlines()[:60]]
    text.write_text("\n".join([*documents, *TORTURE.values()]).replace("\0", ""), encoding="utf-8")
    options = json.dumps({"prefix": style.prefix, "special": style.special, "found": style.found})
    run = subprocess.run([PYTHON, script, text, folder, options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    pieces = json.loads((folder / "pieces.json").read_text(encoding="utf-8"))
    plain = pieces[len(style.special) + len(style.found) + 256 :]
    joined, letters = ([piece for piece in plain if (len(piece) > 1) is several] for several in (True, False))
    content = tiny.styled(style, tiny.content(style, joined, letters))
    assert list(content["model"]["vocab"]) == pieces
    config = gguf_folders.CONFIGS[family]
    values = {**config.to_dict(), "vocab_size": len(pieces) + 2, "bos_token_id": 1, "eos_token_id": 2}
    factories.build(type(config)(**values)).save_pretrained(folder)
    tiny.fast(content).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["added_tokens_decoder"] = {str(token.pop("id")): token for token in content["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", SENTENCEPIECE)
def test_scores_and_types_are_those_of_sentencepiece(case: str, tmp_path: Path) -> None:
    folder = trained_base(case, tmp_path / "base")
    convert({folder: tmp_path / f"{case}.gguf"}, tmp_path / "jobs.json")
    base = gguf_folders.load(folder)
    records = list(gguf_folders.records(base, gguf_folders.NONE, tmp_path))
    gguf_folders.write(gguf_folders.layout("gguf", base, gguf_folders.NONE), tmp_path / "gguf", records, base)
    assert_same_file(tmp_path / "gguf" / GGUF_NAME, tmp_path / f"{case}.gguf")


@pytest.mark.parametrize("case", SENTENCEPIECE)
def test_a_sound_folder_with_a_tokenizer_of_sentencepiece_is_confirmed(case: str, text: Path, tmp_path: Path) -> None:
    """With windows longer than the sliding windows, but for Mistral."""
    base = gguf_folders.load(trained_base(case, tmp_path / "base"))
    records = list(gguf_folders.records(base, gguf_folders.GPTQ, tmp_path))
    gguf_folders.write(gguf_folders.layout("gguf", base), tmp_path / "gguf", records, base)
    made = gguf_folders.Made(tmp_path / "gguf", tmp_path / "gguf", tmp_path / "base", {})
    report = report_of(made, text, "float32", longest=16 if case == "mistral" else 48)
    assert [check.detail for record in report.served for check in record.checks if not check.passed] == []
    assert report.verdict == "pass", [gate.reason for gate in report.gates if gate.verdict != "pass"]
    exact = figure_of(report.served[0].figures, "fidelity_kl")
    print(f"\n{case}: fidelity in float32 {exact:.2g}", file=sys.stderr)
    assert exact < (1e-6 if case in GELU else 1e-9)


GELU = ("falcon 7b", "falcon 40b", "gpt-neox", "gpt-2", "gemma 2", "gemma 3", "gemma 3 linear")
"""Models whose activation llama.cpp takes from a table."""


MIXTURES = ("mixtral", "qwen3 moe")
"""Models of which llama.cpp computes nothing in float32 but a file that is in float32: see below."""


@pytest.mark.parametrize("family", [family for family in gguf_folders.CONFIGS if family not in ("qwen2", *MIXTURES)])
def test_a_sound_folder_is_confirmed(family: str, made: Callable[..., gguf_folders.Made], text: Path) -> None:
    report = report_of(made(family), text, None, "float32")
    assert report.verdict == "pass", [gate.reason for gate in report.gates if gate.verdict != "pass"]
    assert {reader.partition(" (")[0] for reader in report.readers[1:]} == {"llama.cpp", "llama.cpp float32"}
    served, exact = (figure_of(record.figures, "fidelity_kl") for record in report.served)
    assert exact < (1e-6 if family in GELU else 1e-9)
    assert served > exact
    assert [check.passed for record in report.served for check in record.checks] == [True, True]
    print(f"\n{family}: fidelity as served {served:.2g}, in float32 {exact:.2g}", file=sys.stderr)


BY_LAYER: Mapping[str, Any] = {
    **gguf_folders.GPTQ,
    "overrides": [
        {"modules": "*.0.mlp.*", "bits": 3},
        {"modules": "*.1.self_attn.*", "bits": 8},
        {"modules": "*.1.mlp.down_proj", "dense": True},
    ],
}
METHODS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "int8": ({"method": "int8", "scales": "float16"}, {}),
    "w8a8": ({"method": "w8a8", "scales": "float16"}, {}),
    "asymmetric": ({**gguf_folders.GPTQ, "sym": False}, {"inexact": "allow"}),
    "2 bits": ({**gguf_folders.GPTQ, "bits": 2}, {}),
    "3 bits": ({**gguf_folders.GPTQ, "bits": 3}, {}),
    "by layer": (BY_LAYER, {}),
    "several files": (gguf_folders.GPTQ, {"split_max_size": "40KB"}),
    "ends": (gguf_folders.GPTQ, {"token_embedding_type": "q8_0", "output_tensor_type": "q8_0"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_sound_folder_of_each_method_is_confirmed(method: str, text: Path, tmp_path: Path) -> None:
    quantize, settings = METHODS[method]
    base = gguf_folders.checkpoint(factories.llama_config(), tmp_path / "base")
    records = list(gguf_folders.records(base, quantize, tmp_path))
    gguf_folders.write(gguf_folders.layout("gguf", base, quantize, **settings), tmp_path / "gguf", records, base)
    made = gguf_folders.Made(tmp_path / "gguf", tmp_path / "gguf", tmp_path / "base", {})
    report = report_of(made, text, None, "float32")
    assert report.verdict == "pass", [gate.reason for gate in report.gates if gate.verdict != "pass"]
    served, exact = (figure_of(record.figures, "fidelity_kl") for record in report.served)
    assert exact < 1e-9 < served
    print(f"\n{method}: fidelity as served {served:.2g}, in float32 {exact:.2g}", file=sys.stderr)


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL"]
)
def test_what_llama_cpp_quantizes_is_read_as_it_computes_it(kind: str, text: Path, tmp_path: Path) -> None:
    """All gates pass but those on quality, which a tiny model with random weights need not pass."""
    config = factories.llama_config(hidden_size=256, intermediate_size=512)
    made = gguf_folders.make(config, tmp_path, gguf_folders.NONE)
    script, file = Path(__file__).with_name("quantize_with_llama.py"), tmp_path / f"{kind}.gguf"
    command = [PYTHON, str(script), str(made.gguf / GGUF_NAME), str(file), kind]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    report = report_of(made, text, "float32", folder=file)
    assert [check.detail for check in report.checks if not check.passed] == []
    assert [check.detail for record in report.served for check in record.checks if not check.passed] == []
    exact = figure_of(report.served[0].figures, "fidelity_kl")
    print(f"\n{kind}: {report.subject.method}, fidelity in float32 {exact:.2g}", file=sys.stderr)
    assert exact < 1e-9


def figure_of(figures: Any, name: str) -> float:
    found = find_figure(figures, name)
    assert found is not None
    return found.value


def test_transformers_own_tokenizer_of_qwen2_is_not_the_one_in_the_file(
    made: Callable[..., gguf_folders.Made], text: Path
) -> None:
    """It splits digits whatever tokenizer.json says, so the tiny model's tokenizer is another one in llama.cpp."""
    report = report_of(made("qwen2"), text, "float32")
    assert [gate.name for gate in report.gates if gate.verdict != "pass"] == ["tokenizer through llama.cpp float32"]


@pytest.mark.parametrize("method", ["none", "gptq"])
def test_the_facts_say_what_is_rounded(method: str, made: Callable[..., gguf_folders.Made], tmp_path: Path) -> None:
    folder = made("llama", method).gguf
    with ChildRuntime(settings(), folder, longest=40) as runtime:
        assert runtime.facts.dtype == ("q8_0" if method == "gptq" else "bfloat16")
        assert runtime.facts.version == "0.3.36"
        assert runtime.facts.kernels == (
            {"q4_0": 14, "bf16": 2, "f32": 5} if method == "gptq" else {"bf16": 16, "f32": 5}
        )
    with ChildRuntime(settings("float32"), folder, longest=40) as runtime:
        assert (runtime.facts.dtype, runtime.facts.arguments["cache"]) == ("float32", "f32")
        assert runtime.facts.arguments["repacked"] == "none"


# Tokenizers.

BEGIN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}},
}


def trained(structure: Any, *, ignore_merges: bool, begin: bool) -> PreTrainedTokenizerFast:
    """A vocabulary for one structure, from this repository's text."""
    bpe = Tokenizer(models.BPE())
    content = json.loads(bpe.to_str()) | {"pre_tokenizer": structure, "decoder": {"type": "ByteLevel"} | BYTES}
    bpe = Tokenizer.from_str(json.dumps(content))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|end|>", "<|start|>"], initial_alphabet=alphabet, show_progress=False
    )
    lines = artifacts.TEXT.read_text(encoding="utf-8").splitlines()[:60]
    bpe.train_from_iterator([*(json.loads(line)["text"] for line in lines), *TORTURE.values()], trainer)
    content = json.loads(bpe.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    content |= {"post_processor": BEGIN} if begin else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|end|>", bos_token="<|start|>"
    )


BYTES = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize("name", NAMED)
def test_llama_cpp_makes_the_same_tokens(name: str, tmp_path: Path) -> None:
    content: dict[str, Any] = json.loads(factories.tokenizer().backend_tokenizer.to_str())
    NAMED[name](content)
    ignores = bool(content["model"].get("ignore_merges"))
    tokenizer = trained(content["pre_tokenizer"], ignore_merges=ignores, begin=name == "llama-bpe")
    model = factories.build(factories.llama_config(vocab_size=len(tokenizer) + 3))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = gguf_folders.load(tmp_path / "base")
    records = list(gguf_folders.records(base, gguf_folders.NONE, tmp_path))
    gguf_folders.write(gguf_folders.layout("gguf", base, gguf_folders.NONE), tmp_path / "gguf", records, base)
    lines = artifacts.TEXT.read_text(encoding="utf-8").splitlines()[60:]
    texts = [
        *TORTURE.values(),
        *(json.loads(line)["text"] for line in lines),
        "a<|end|>b <|start|>",
        " 1 12 1234567 x9",
    ]
    with ChildRuntime(settings(), tmp_path / "gguf", longest=40) as runtime:
        found = runtime.tokenized(texts)
    assert found is not None
    wanted = [tokenizer(text)["input_ids"] for text in texts]
    assert [text for text, one, other in zip(texts, wanted, found, strict=True) if one != other] == []
    assert all(row[:1] == [1] for row in found) == (name == "llama-bpe")


GEMMA = os.environ.get("QEXPORT_GEMMA", "")


@pytest.mark.skipif(not GEMMA, reason="QEXPORT_GEMMA names no file")
def test_llama_cpp_makes_the_tokens_of_a_real_gemma(tmp_path: Path) -> None:
    """262,144 tokens that SentencePiece has trained, as transformers reads them from Gemma's GGUF file."""
    files = load_checkpoint(LoadSettings(base=GEMMA)).files
    config = gguf_folders.CONFIGS["gemma 3"]
    values = {**config.to_dict(), "vocab_size": 262144, "bos_token_id": 2, "eos_token_id": 1}
    factories.build(type(config)(**values)).save_pretrained(tmp_path / "base")
    for name, content in files.items():
        if "config" not in name or name.startswith("tokenizer"):
            (tmp_path / "base" / name).write_bytes(content)
    base = gguf_folders.load(tmp_path / "base")
    records = list(gguf_folders.records(base, gguf_folders.NONE, tmp_path))
    gguf_folders.write(gguf_folders.layout("gguf", base, gguf_folders.NONE), tmp_path / "gguf", records, base)
    lines = artifacts.TEXT.read_text(encoding="utf-8").splitlines()
    texts = [*TORTURE.values(), *(json.loads(line)["text"] for line in lines)]
    tokenizer = open_tokenizer(base)
    with ChildRuntime(settings(), tmp_path / "gguf", longest=40) as runtime:
        found = runtime.tokenized(texts)
    assert found is not None
    wanted = [tokenizer(text)["input_ids"] for text in texts]
    assert [text for text, one, other in zip(texts, wanted, found, strict=True) if one != other] == []
    print(f"\nGemma: {sum(map(len, wanted))} tokens of {len(texts)} texts", file=sys.stderr)


# Faults in what is served.


TINY: Mapping[str, Change] = {
    "a layer zero": lambda path: rows_of(path, "blk.1.ffn_down.weight", np.zeros_like),
    "scales of a layer rolled": lambda path: rows_of(path, "blk.1.ffn_up.weight", rolled),
    "an output projection x 0.9": lambda path: rows_of(path, "blk.0.attn_output.weight", smaller),
    "keys half-rotated": lambda path: rows_of(path, "blk.1.attn_k.weight", half_rotated(2)),
    "rope base": lambda path: value_of(
        path, "rope.freq_base", np.float32(10000.0).tobytes(), np.float32(5000.0).tobytes()
    ),
}


@pytest.mark.parametrize("fault", TINY)
def test_a_fault_shows_in_float32(
    fault: str, made: Callable[..., gguf_folders.Made], text: Path, tmp_path: Path
) -> None:
    """Served is a copy with the fault; our reader reads the sound folder."""
    folder, base = made("llama").gguf, gguf_folders.load(made("llama").base)
    reference = make_reference(base, VerifySettings(text=str(text), windows=8, max_windows=8, sequence_length=48))
    found = measured(copied(folder, tmp_path / "served", TINY[fault]), folder, reference, "float32")
    assert found.failed == ["fidelity_kl through llama.cpp float32"]


def lowered(rows: Rows) -> Rows:
    """Norms without the 1 that Gemma adds."""
    return (rows.view(np.float32) - np.float32(1)).view(np.uint8)


def number(key: str, old: Any, new: Any) -> Change:
    return lambda path: value_of(path, key, old.tobytes(), new.tobytes())


OF_GEMMA: Mapping[str, Change] = {
    "a norm without 1": lambda path: rows_of(path, "blk.2.ffn_norm.weight", lowered),
    "longer windows": number("attention.sliding_window", np.uint32(16), np.uint32(64)),
    "rope base of windows": number("rope.freq_base_swa", np.float32(2e4), np.float32(1e4)),
    "rope scaling": number("rope.scaling.factor", np.float32(8), np.float32(4)),
    "bounds": number("final_logit_softcapping", np.float32(20), np.float32(10)),
}


@pytest.mark.parametrize("fault", OF_GEMMA)
def test_a_fault_of_gemma_shows_in_float32(
    fault: str, made: Callable[..., gguf_folders.Made], text: Path, tmp_path: Path
) -> None:
    """All of them are in the header or the norms, which no gate on the codes sees."""
    folder, base = made("gemma 3 linear").gguf, gguf_folders.load(made("gemma 3 linear").base)
    reference = make_reference(base, VerifySettings(text=str(text), windows=8, max_windows=8, sequence_length=48))
    found = measured(copied(folder, tmp_path / "served", OF_GEMMA[fault]), folder, reference, "float32")
    assert found.failed == ["fidelity_kl through llama.cpp float32"]


@pytest.mark.parametrize("family", MIXTURES)
def test_a_sound_mixture_is_confirmed_as_it_is_served(
    family: str, made: Callable[..., gguf_folders.Made], text: Path
) -> None:
    report = report_of(made(family), text, None)
    assert report.verdict == "pass", [gate.reason for gate in report.gates if gate.verdict != "pass"]
    served = figure_of(report.served[0].figures, "fidelity_kl")
    print(f"\n{family}: fidelity as served {served:.2g}", file=sys.stderr)


def test_a_mixture_is_not_said_to_be_computed_in_float32(
    made: Callable[..., gguf_folders.Made],
) -> None:
    with (
        pytest.raises(CompatibilityError, match="rounds the inputs of a mixture's experts"),
        ChildRuntime(settings("float32"), made("mixtral").gguf, longest=40),
    ):
        pass


OF_MIXTURES: Mapping[str, Change] = {
    "sound": lambda path: None,
    "two experts swapped": lambda path: rows_of(path, "blk.1.ffn_down_exps.weight", swapped(4)),
    "a row of the router": lambda path: rows_of(path, "blk.0.ffn_gate_inp.weight", first_row_larger),
    "one expert used": number("expert_used_count", np.uint32(2), np.uint32(1)),
}


@pytest.mark.parametrize("fault", OF_MIXTURES)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_that_llama_cpp_has_dequantized_is_computed_in_float32(
    family: str, fault: str, made: Callable[..., gguf_folders.Made], text: Path, tmp_path: Path
) -> None:
    """llama.cpp's quantizer dequantizes the file, since its BLAS backend does not compute the products of experts."""
    folder, base = made(family).gguf, gguf_folders.load(made(family).base)
    reference = make_reference(base, VerifySettings(text=str(text), windows=8, max_windows=8, sequence_length=48))
    changed = copied(folder, tmp_path / "changed", OF_MIXTURES[fault])
    served = copied(folder, tmp_path / "served", Path.unlink)
    script = Path(__file__).with_name("quantize_with_llama.py")
    command = [PYTHON, str(script), str(changed / GGUF_NAME), str(served / GGUF_NAME), "F32"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    found = measured(served, folder, reference, "float32")
    if fault == "sound":
        assert (found.failed, found.undecided) == ([], [])
        assert found.value("fidelity_kl") < 1e-9
    else:
        assert found.failed == ["fidelity_kl through llama.cpp float32"]


def test_a_merge_that_was_changed_shows_in_the_tokens(
    made: Callable[..., gguf_folders.Made], text: Path, tmp_path: Path
) -> None:
    def change(path: Path) -> None:
        value_of(path, "tokenizer.ggml.merges", "Ġ t".encode(), "Ġ q".encode())

    folder, base = made("llama").gguf, gguf_folders.load(made("llama").base)
    reference = make_reference(base, VerifySettings(text=str(text), windows=8, max_windows=8, sequence_length=48))
    found = measured(copied(folder, tmp_path / "served", change), folder, reference, "float32")
    assert found.failed == ["tokenizer through llama.cpp float32"]


def test_a_file_that_llama_cpp_does_not_load_is_refused(made: Callable[..., gguf_folders.Made], tmp_path: Path) -> None:
    def change(path: Path) -> None:
        value_of(path, "general.architecture", b"llama", b"lhama")

    folder = copied(made("llama").gguf, tmp_path / "served", change)
    with (
        pytest.raises(CompatibilityError, match=r"llama\.cpp cannot load the artifact"),
        ChildRuntime(settings(), folder, longest=40),
    ):
        pass


class Found:
    """What was measured of llama.cpp."""

    def __init__(self, facts: RuntimeFacts, figures: Any, checks: Any, label: str) -> None:
        limits = limits_of_runtime(fidelity_limit(facts.dtype, None, "bfloat16"), rounds=False)
        gates = decide_served([], figures, limits, label, checks)
        self.failed = [gate.name for gate in gates if gate.verdict == "fail"]
        self.undecided = [gate.name for gate in gates if gate.verdict == "undecided"]
        self.facts, self.figures = facts, figures

    def value(self, name: str) -> float:
        return figure_of(self.figures, name)


def measured(served: Path, folder: Path, reference: Reference, dtype: ServedDtype | None = None) -> Found:
    """How far llama.cpp with one folder is from our reading of another."""
    chosen = settings(dtype)
    with (
        ChildRuntime(chosen, served, longest=129) as runtime,
        open_stored(folder, dtype=torch.float32) as artifact,
    ):
        figures = measure_served(runtime, artifact, reference, lambda figures: [], Steps(silent))
        found = Found(runtime.facts, figures, check_tokenizer(runtime, reference), chosen.label)
    names = ("mean_kl", "fidelity_kl", "fidelity_top1", "fidelity_continuations", "kl_over_reading")
    values = ", ".join(f"{name} {found.value(name):.3g}" for name in names)
    print(f"\n{served.name} in {found.facts.dtype}: {values}; {found.facts.kernels}", file=sys.stderr)
    return found


# SmolLM2 with an adapter, as it is served.

SETTINGS = VerifySettings(
    text=str(artifacts.ROOT / "calibration" / "heldout.jsonl"),
    windows=24,
    max_windows=24,
    sequence_length=64,
    profile="off",
)


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    return artifacts.smollm2(artifacts.ADAPTER)


@pytest.fixture(scope="module")
def folder(smollm2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "gguf"
    artifacts.write(smollm2, artifacts.GPTQ, {folder: GgufSettings()})
    return folder


@pytest.fixture(scope="module")
def reference(smollm2: Checkpoint) -> Reference:
    return make_reference(smollm2, SETTINGS)


@pytest.mark.smollm2
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_smollm2_is_confirmed(dtype: ServedDtype | None, folder: Path, reference: Reference) -> None:
    found = measured(folder, folder, reference, dtype)
    assert (found.failed, found.undecided) == ([], [])
    assert dtype is None or found.value("fidelity_kl") < 1e-9
    assert found.value("fidelity_continuations") > 0.98


SERVED: Mapping[str, Change] = {
    "a layer zero": lambda path: rows_of(path, "blk.3.ffn_down.weight", np.zeros_like),
    "scales of a layer rolled": lambda path: rows_of(path, "blk.3.ffn_up.weight", rolled),
    "keys half-rotated": lambda path: rows_of(path, "blk.3.attn_k.weight", half_rotated(3)),
    "rope base": lambda path: value_of(path, "rope.freq_base", np.float32(1e5).tobytes(), np.float32(1e4).tobytes()),
}


@pytest.mark.smollm2
@pytest.mark.parametrize("fault", SERVED)
def test_a_fault_shows_as_it_is_served(fault: str, folder: Path, reference: Reference, tmp_path: Path) -> None:
    found = measured(copied(folder, tmp_path / fault, SERVED[fault]), folder, reference)
    assert found.failed == ["fidelity_kl through llama.cpp"]
