"""The launch files of the layout onnx: the script says what transformers says, the Triton repository is the graph."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from tokenizers import Tokenizer
from transformers import PretrainedConfig

import factories
import onnx_served
from onnx_served import PROMPT, OnnxFolder
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.artifact.names import label
from qexport.export.onnx.chat import ChatTurn
from qexport.export.onnx.genai import Generation, generation
from qexport.export.onnx.launch import OnnxLaunch, launch_files
from qexport.export.onnx.traced_cache import CacheTensor
from qexport.export.onnx.triton import triton_inputs, triton_outputs
from quantized_models import QuantizedModel

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": factories.FAMILIES["llama"],
    "falcon-h1": factories.FAMILIES["falcon h1"],
}
ROUND: dict[str, Any] = {"before": "<|start|>user\n", "after": "<|end|>\n<|start|>assistant\n", "stripped": False}
"""What the chat template of `factories.tokenizer` writes around a message."""
KEPT = CacheTensor("key", (2, None, 16), torch.float16), CacheTensor("recurrent_state", (8, 8, 16), torch.float32)
FIGURES = OnnxLaunch(
    name="tiny", triton_image="a:1", inputs=triton_inputs([KEPT, KEPT]),
    outputs=triton_outputs([KEPT, KEPT], torch.float16, 384),
    data_files=["model.onnx.data"], ends=[0, 7], tokenizer=True,
)  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnnxFolder:
    return onnx_served.write(tmp_path_factory.mktemp("onnx") / "a b", CONFIGS[request.param])


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "launch/generate.py", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def generated(folder: Path, *arguments: str) -> str:
    run = started(folder, *arguments)
    assert run.returncode == 0, run.stderr
    return run.stdout.removesuffix("\n")


def transformers_text(folder: OnnxFolder, new: int, ends: list[int], *, chat: bool = False) -> tuple[list[int], str]:
    tokenizer = factories.tokenizer()
    message = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) if chat else PROMPT
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    tokens = folder.model.generate(  # type: ignore[operator]
        **prompt, max_new_tokens=new, do_sample=False, eos_token_id=ends or None, pad_token_id=0
    )[0, prompt["input_ids"].shape[1] :]
    return tokens.tolist(), str(tokenizer.decode(tokens, skip_special_tokens=True))


def test_the_script_says_what_transformers_says(folder: OnnxFolder) -> None:
    tokens, text = transformers_text(folder, 24, list(folder.generation.ends))
    assert len(set(tokens)) > 4
    assert generated(folder.path, "--plain", PROMPT, "24") == text


def test_the_script_answers_in_the_chat_template(folder: OnnxFolder) -> None:
    _, text = transformers_text(folder, 24, list(folder.generation.ends), chat=True)
    assert text != transformers_text(folder, 24, list(folder.generation.ends))[1]
    assert generated(folder.path, PROMPT, "24") == text


def test_the_script_of_a_fused_graph_appends_to_one_memory(tmp_path: Path) -> None:
    fused = onnx_served.write(tmp_path / "folder", factories.llama_config(), "fused")
    script = fused.path / "launch" / "generate.py"
    grown, figures = generated(fused.path, "--plain", PROMPT, "24"), FIGURES.model_copy(update={"appends": True})
    assert "bind_ortvalue_output" not in script.read_text()
    figures = figures.model_copy(update={"chat": ChatTurn(**ROUND), "ends": list(fused.generation.ends)})
    script.write_bytes(launch_files(figures)["launch/generate.py"])
    assert "bind_ortvalue_output" in script.read_text()
    assert generated(fused.path, "--plain", PROMPT, "24") == grown == transformers_text(fused, 24, figures.ends)[1]


@pytest.mark.parametrize("chat", [True, False])
def test_the_script_says_where_nothing_is_generated(chat: bool, folder: OnnxFolder) -> None:
    tokens, _ = transformers_text(folder, 1, [], chat=chat)
    with script_with(folder, ends=tokens):
        run = started(folder.path, *([] if chat else ["--plain"]), PROMPT, "24")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("Nothing was generated")
    assert ("--plain" in run.stderr) is chat


@contextmanager
def script_with(folder: OnnxFolder, **changes: Any) -> Iterator[None]:
    """Inside, the folder has a script with other figures."""
    script = folder.path / "launch" / "generate.py"
    kept = script.read_bytes()
    figures = FIGURES.model_copy(update={"chat": ChatTurn(**ROUND), **changes})
    script.write_bytes(launch_files(figures)["launch/generate.py"])
    try:
        yield
    finally:
        script.write_bytes(kept)


def test_a_script_without_a_template_continues_texts(folder: OnnxFolder) -> None:
    expected = generated(folder.path, "--plain", PROMPT, "8")
    with script_with(folder, chat=None, ends=list(folder.generation.ends)):
        assert generated(folder.path, PROMPT, "8") == expected


def test_the_script_minds_no_truncation_or_padding_of_training(folder: OnnxFolder) -> None:
    file = folder.path / "tokenizer.json"
    kept, expected = file.read_bytes(), generated(folder.path, PROMPT, "8")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(file))
    try:
        assert generated(folder.path, PROMPT, "8") == expected
    finally:
        file.write_bytes(kept)


@pytest.mark.parametrize("arguments", [[], [""], ["--plain"]])
def test_the_script_says_how_it_is_called_where_there_is_no_text(folder: OnnxFolder, arguments: list[str]) -> None:
    run = started(folder.path, *arguments)
    assert run.returncode == 1
    assert run.stderr.startswith("Answers a message")
    assert "Traceback" not in run.stderr


def test_the_script_stops_at_an_end(folder: OnnxFolder) -> None:
    tokens, _ = transformers_text(folder, 24, [])
    end = next(token for index, token in enumerate(tokens) if index >= 3 and token not in tokens[:index])
    with script_with(folder, ends=[end, 383 if end != 383 else 382]):
        before = factories.tokenizer().decode(tokens[: tokens.index(end)], skip_special_tokens=True)
        assert generated(folder.path, "--plain", PROMPT, "24") == before


def test_the_script_needs_three_packages_and_few_lines() -> None:
    script = launch_files(FIGURES.model_copy(update={"chat": ChatTurn(**ROUND)}))["launch/generate.py"].decode()
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(script))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"sys", "pathlib", "numpy", "onnxruntime", "tokenizers"}
    assert len(script.splitlines()) <= 55
    assert "launch/generate.py" not in launch_files(FIGURES.model_copy(update={"tokenizer": False}))
    assert b"no tokenizer.json" in launch_files(FIGURES.model_copy(update={"tokenizer": False}))["launch/README.md"]


@pytest.mark.parametrize(("ends", "expected"), [((0, 7), {0, 7}), ((), set()), ((5,), {5})])
def test_the_ends_are_written_in_as_numbers(ends: tuple[int, ...], expected: set[int]) -> None:
    tree = ast.parse(launch_files(FIGURES.model_copy(update={"ends": list(ends)}))["launch/generate.py"])
    [assignment] = [node for node in tree.body if isinstance(node, ast.Assign) and "ends" in ast.dump(node.targets[0])]
    assert isinstance(assignment.value, ast.Tuple)
    written = assignment.value.elts[1]
    assert (set() if isinstance(written, ast.Call) else ast.literal_eval(written)) == expected


TRITON = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16"}


def test_triton_is_told_the_graphs_own_inputs_and_outputs(folder: OnnxFolder) -> None:
    config = parse_pbtxt((folder.path / "launch/triton/tiny/config.pbtxt").read_text())
    session = folder.session()
    assert (config["backend"], config["max_batch_size"]) == ("onnxruntime", 0)
    for key, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        assert config[key] == [
            {
                "name": value.name,
                "data_type": TRITON[value.type],
                "dims": [size if isinstance(size, int) else -1 for size in value.shape],
            }
            for value in values
        ]


def test_triton_is_told_each_dtype() -> None:
    config = parse_pbtxt(launch_files(FIGURES)["launch/triton/tiny/config.pbtxt"].decode())
    kinds = {value["name"]: (value["data_type"], value["dims"]) for value in config["input"] + config["output"]}
    assert kinds["position_ids"] == ("TYPE_INT64", [-1, -1])
    assert kinds["logits"] == ("TYPE_FP16", [-1, -1, 384])
    assert kinds["past_key_values.1.key"] == kinds["present.1.key"] == ("TYPE_FP16", [-1, 2, -1, 16])
    state = ("TYPE_FP32", [-1, 8, 8, 16])
    assert kinds["past_key_values.0.recurrent_state"] == kinds["present.0.recurrent_state"] == state
    assert len(kinds) == 12


def parse_pbtxt(text: str) -> dict[str, Any]:
    """By protobuf's own parser, for the fields that we use of Triton's `ModelConfig` (model_config.proto)."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(TRITON.values()):
        types.value.add(name=name, number=number)
    tensor, model = file.message_type.add(name="Tensor"), file.message_type.add(name="ModelConfig")
    once, often = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED
    tensor.field.add(name="name", number=1, type=kind.TYPE_STRING, label=once)
    tensor.field.add(name="data_type", number=2, type=kind.TYPE_ENUM, label=once, type_name=".inference.DataType")
    tensor.field.add(name="dims", number=3, type=kind.TYPE_INT64, label=often)
    model.field.add(name="backend", number=1, type=kind.TYPE_STRING, label=once)
    model.field.add(name="max_batch_size", number=2, type=kind.TYPE_INT32, label=once)
    for number, name in ((3, "input"), (4, "output")):
        model.field.add(name=name, number=number, type=kind.TYPE_MESSAGE, label=often, type_name=".inference.Tensor")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    text_format.Parse(text, config)
    parsed = {"backend": config.backend, "max_batch_size": config.max_batch_size}
    for name in ("input", "output"):
        parsed[name] = [
            {"name": each.name, "data_type": list(TRITON.values())[each.data_type], "dims": list(each.dims)}
            for each in getattr(config, name)
        ]
    return parsed


def test_the_readmes_commands_make_a_repository_that_opens(folder: OnnxFolder, tmp_path: Path) -> None:
    readme = (folder.path / "launch/README.md").read_text()
    commands = [line.strip() for line in readme.splitlines() if line.startswith(("    mkdir", "    cp"))]
    assert len(commands) == 2
    artifact = tmp_path / "artifact"
    shutil.copytree(folder.path, artifact)
    before = sorted(path for path in artifact.rglob("*"))
    subprocess.run(["sh", "-eu", "-c", "\n".join(commands)], cwd=artifact, check=True)
    assert sorted(path for path in artifact.rglob("*")) == before
    version = tmp_path / "triton" / "tiny" / "1"
    assert (version.parent / "config.pbtxt").is_file()
    opened = onnxruntime.InferenceSession(str(version / "model.onnx" / "model.onnx"))
    assert [value.name for value in opened.get_inputs()] == [value.name for value in folder.session().get_inputs()]


@pytest.mark.parametrize(
    "origin", ["../../etc/passwd", 'a"; rm -rf ~; "', "x/$(id)`id`", "Ünïcode\n", "..", "-rf", '"""', "}\nbackend: {"]
)
def test_a_hostile_name_stays_in_its_place(origin: str) -> None:
    name = label(origin)
    files = launch_files(FIGURES.model_copy(update={"name": name}))
    plain = launch_files(FIGURES)
    assert set(files) == {path.replace("/tiny/", f"/{name}/") for path in plain}
    assert all(".." not in path and "//" not in path for path in files)
    assert name.replace("-", "").isalnum()
    assert name[0].isalpha()
    assert files[f"launch/triton/{name}/config.pbtxt"] == plain["launch/triton/tiny/config.pbtxt"]
    assert files["launch/generate.py"] == plain["launch/generate.py"]
    assert f"the model `{name}`" in files["launch/README.md"].decode()


def checkpoint(generation_config: bytes, **changes: Any) -> Checkpoint:
    made = QuantizedModel(factories.build(factories.llama_config())).checkpoint
    return replace(
        made, files={"generation_config.json": generation_config}, architecture=Architecture({**made.config, **changes})
    )


def test_generation_config_comes_before_the_config() -> None:
    own = b'{"eos_token_id": [9, 3, 9], "do_sample": true, "temperature": 0.6, "top_k": 20, "max_length": 7}'
    assert generation(checkpoint(own, eos_token_id=1, bos_token_id=4)) == Generation(
        (3, 9), 4, 0, {"do_sample": True, "temperature": 0.6, "top_k": 20}
    )
    assert generation(replace(checkpoint(b"{}", eos_token_id=1), files={})) == Generation((1,), 0, 0, {})


@pytest.mark.parametrize(
    "value", ['"0}; import os"', "true", "-1", "1.5", "null", "[]", '["x", null]', "{}", "9" * 400]
)
def test_what_is_no_token_reaches_no_script(value: str) -> None:
    made = checkpoint(
        f'{{"eos_token_id": {value}, "temperature": "x", "top_p": NaN, "top_k": 1{"0" * 400}}}'.encode(),
        eos_token_id=None,
    )
    assert generation(made).ends == ()
    assert generation(made).sampling == {}
