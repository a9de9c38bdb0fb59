"""ONNX artifacts are verified through ONNX Runtime: figures against whole models, and faults that must show."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import factories
import onnx_folders
import qexport
import trained_models
from onnx_exports import traced_once
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.artifact.figures import Figure, find_figure
from qexport.artifact.manifest import Manifest
from qexport.artifact.report import Report
from qexport.errors import InputError, NumericalError, RecipeError
from qexport.gates.deciding_again import decide_again
from qexport.gates.profiles import PROFILES
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.pipeline import run
from qexport.pipeline.folders import ArtifactFolder, open_folder
from qexport.pipeline.inspection import inspect_artifact
from qexport.pipeline.result import Result
from qexport.pipeline.texts import read_evaluation
from qexport.pipeline.verification import verify
from qexport.quantizing import profile_of_layer
from qexport.reading.onnx.model import OnnxCausalLM
from qexport.reading.onnx.weights import OnnxWeights
from qexport.reading.stored_model import open_stored
from qexport.recipe import load_recipe
from qexport.reporting.html import report_html
from qexport.verifying import VerifySettings
from qexport.verifying.graphs import GraphRunner, WindowByWindow
from qexport.verifying.predictors import TOKENS_AT_ONCE
from qexport.verifying.verification import check_headers

CPU = torch.device("cpu")
GROUP = 64
GATES = {"mean_kl": {"at_most": 0.05}, "top1_agreement": {"at_least": 0.85}}
"""What the sound artifact keeps with room to spare."""

NO_LIMITS: dict[str, Any] = dict.fromkeys(PROFILES["16bit"].limits)
"""Null for what profiles limit, which leaves the built-in gates; `profile: off` would not."""


def with_own_limits(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with no limits but those that they name, unless they name a profile."""
    return values if "profile" in values else values | {"gates": NO_LIMITS | values["gates"]}


READER = f"onnxruntime {onnxruntime.__version__} (CPUExecutionProvider)"
PROMPTS = ("The", "def add(a, b):\n    return", "Un petit chat", "one two three four five")


class Sound:
    """A model and a text in a folder, and artifacts made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        trained_models.trained().save_pretrained(folder / "base")
        trained_models.tokenizer().save_pretrained(folder / "base")
        trained_models.write_held_out(folder / "held-out.jsonl", passages=400)
        trained_models.write_calibration(folder / "calibration.jsonl")
        rows = [json.dumps({"id": str(number), "prompt": prompt}) for number, prompt in enumerate(PROMPTS)]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")

    @property
    def load(self) -> LoadSettings:
        return LoadSettings(base=str(self.folder / "base"))

    @property
    def checkpoint(self) -> Checkpoint:
        return load_checkpoint(self.load)

    def settings(self, **changes: Any) -> VerifySettings:
        values: dict[str, Any] = dict(
            text=str(self.folder / "held-out.jsonl"), windows=32, max_windows=32,
            sequence_length=trained_models.WINDOW, gates=GATES,
        )  # fmt: skip
        return VerifySettings.model_validate(with_own_limits(values | changes))

    def verify(self, artifact: Path, **changes: Any) -> Report:
        return verify(artifact, self.load, self.settings(**changes), device="cpu")

    @cached_property
    def run(self) -> Result:
        """Two layouts from one pass, verified in the run."""
        calibration = {"source": str(self.folder / "calibration.jsonl"), "samples": 32, "sequence_length": 32}
        prompts = {"prompts": str(self.folder / "prompts.jsonl"), "max_new_tokens": 8}
        recipe = {
            "load": {"base": str(self.folder / "base")},
            "quantize": {"method": "gptq", "bits": 4, "group_size": GROUP, "calibration": calibration},
            "export": [{"layout": "safetensors"}, {"layout": "onnx"}],
            "verify": self.settings(**prompts).model_dump(mode="json", exclude_unset=True),
            "output": str(self.folder / "gptq"),
        }
        path = self.folder / "gptq.yaml"
        path.write_text(json.dumps(recipe))
        with traced_once():
            return run(load_recipe(path), device="cpu")

    @property
    def gptq(self) -> Path:
        return self.run.artifact_path / "onnx"

    @cached_property
    def dense(self) -> Path:
        """The model itself in a graph that is made by hand, with weights in bfloat16."""
        model = trained_models.trained()
        assert isinstance(model.config, LlamaConfig)
        folder = onnx_folders.llama(dict(model.state_dict()), model.config, self.folder / "dense")
        for path in (self.folder / "base").iterdir():
            if path.suffix != ".safetensors" and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
        return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def copy(sound: Sound, tmp_path: Path) -> Path:
    """The sound GPTQ artifact without its manifest, which would find most faults by their digests."""
    return factories.without_digests(shutil.copytree(sound.gptq, tmp_path / "copy"))


def value(report: Report, name: str = "mean_kl") -> float:
    return figure(report, name).value


def figure(report: Report, name: str) -> Figure:
    found = find_figure(report.figures, name)
    assert found is not None
    return found


def verdicts(report: Report) -> dict[str, str]:
    return {gate.name: gate.verdict for gate in report.gates}


def failed(report: Report) -> set[str]:
    return {name for name, verdict in verdicts(report).items() if verdict == "fail"}


def edit_graph(folder: Path, change: Callable[[onnx.GraphProto], object]) -> None:
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    change(model.graph)
    onnx.save_model(model, folder / "model.onnx")


def edit_weight(folder: Path, name: str, change: Callable[[np.ndarray[Any, Any]], object]) -> None:
    """Changes a float32 initializer where it lies in its data file."""
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    (found,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    place = {entry.key: entry.value for entry in found.external_data}
    assert found.data_type == TensorProto.FLOAT
    shape = tuple(found.dims)
    values = np.memmap(folder / place["location"], np.float32, "r+", int(place["offset"]), shape)
    change(values)
    values.flush()


def windows(sound: Sound, count: int) -> torch.Tensor:
    evaluation = read_evaluation(sound.settings(), open_tokenizer(sound.checkpoint), sound.checkpoint)
    return evaluation.held_out.input_ids[:count]


def plain_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """All windows at once in a session of its own, with no option set."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    positions = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy()), "position_ids": positions}
    for each in session.get_inputs()[3:]:
        feed[each.name] = np.zeros([len(ids), each.shape[1], 0, each.shape[3]], np.float32)
    return torch.from_numpy(session.run(["logits"], feed)[0])


def test_a_run_measures_the_graph_by_itself_and_the_other_layout_as_ever(sound: Sound) -> None:
    first, graph = sound.run.reports["safetensors"], sound.run.reports["onnx"]
    assert sound.run.passed
    names = ["config", "files", "tokenizer", "weights", "better_than_rtn", *GATES]
    assert verdicts(first) == dict.fromkeys(names, "pass")
    assert verdicts(graph) == dict.fromkeys([*names[:4], "graph", *names[4:]], "pass")
    assert (first.readers, graph.readers) == ([f"qexport {version('qexport')}"], [READER])
    assert graph.unconfirmed == []
    assert (len(first.block_drift), len(graph.block_drift)) == (trained_models.BLOCKS, 0)
    assert value(graph) == pytest.approx(value(first), rel=0.1)  # whose weights are rounded to bfloat16
    assert value(graph) != value(first)
    assert value(graph, "rtn_mean_kl") == value(first, "rtn_mean_kl")
    assert graph.subject.method == f"ONNX, MatMulNBits, 4 bits, blocks of {GROUP}"
    (note,) = graph.notes
    assert note.startswith("the graph computes in float32, the reference in bfloat16: about ")


def test_the_figures_are_those_of_whole_models(sound: Sound) -> None:
    report = sound.run.reports["onnx"]
    ids = windows(sound, report.protocol.windows)
    model = AutoModelForCausalLM.from_pretrained(sound.folder / "base", dtype=torch.bfloat16)
    head = model.lm_head.to(torch.float32)
    head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    with torch.no_grad():
        own = model(ids).logits[:, :-1].double().log_softmax(-1)
    other = plain_logits(sound.gptq, ids)[:, :-1].double().log_softmax(-1)
    kl = (own.exp() * (own - other)).sum(-1)
    nll = [-each.gather(2, ids[:, 1:, None]).mean() for each in (own, other)]
    assert value(report) == pytest.approx(float(kl.mean()), rel=1e-4)
    assert value(report, "max_kl") == pytest.approx(float(kl.max()), rel=1e-3)
    assert value(report, "perplexity_ratio") == pytest.approx(float((nll[1] - nll[0]).exp()), rel=1e-5)
    assert value(report, "top1_agreement") == pytest.approx(float((own.argmax(-1) == other.argmax(-1)).double().mean()))


def test_logits_come_in_the_pieces_of_the_other_models(sound: Sound) -> None:
    ids = windows(sound, 11)
    with GraphRunner(OnnxWeights(sound.gptq, dtype=torch.float32), CPU).predictor(ids) as predictor:
        assert predictor.windows == 11
        pieces = list(predictor.logits(range(2, 11)))
    assert [len(piece) for piece in pieces] == [TOKENS_AT_ONCE, TOKENS_AT_ONCE, 9 * 31 - 2 * TOKENS_AT_ONCE]
    torch.testing.assert_close(torch.cat(pieces), plain_logits(sound.gptq, ids[2:])[:, :-1].flatten(0, 1))


def test_never_are_the_logits_of_two_windows_in_memory() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    class Model:
        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
            assert input_ids.shape == (1, 300)
            assert all(each() is None for each in made)
            logits = torch.zeros(1, 300, 7)
            made.append(weakref.ref(logits))
            return SimpleNamespace(logits=logits)

    model: Any = Model()
    predictor = WindowByWindow(model, torch.zeros(5, 300, dtype=torch.int64), where="here")
    assert sum(len(piece) for piece in predictor.logits(range(5))) == 5 * 299
    assert len(made) == 5


def test_unquantized_weights_in_float32_are_at_the_noise_floor_and_keep_the_16_bit_gates(sound: Sound) -> None:
    report = sound.verify(sound.dense, profile="16bit", gates={}, windows=64, max_windows=256)
    assert report.verdict == "pass", [gate.reason for gate in report.gates if not gate.passed]
    measured = figure(report, "mean_kl")
    assert measured.noise_floor is not None
    assert 0.5 < measured.value / measured.noise_floor < 2
    limits = {gate.figure: gate.limit for gate in report.gates if gate.limit is not None}
    assert limits["mean_kl"] >= 3 * measured.noise_floor
    assert report.subject.method == "ONNX, unquantized"
    assert "better_than_rtn" not in verdicts(report)


def test_the_artifact_continues_prompts_in_onnx_runtime(sound: Sound) -> None:
    found = sound.run.reports["onnx"].generations
    assert found is not None
    assert [each.id for each in found.comparisons] == [str(number) for number in range(len(PROMPTS))]
    tokenizer, model = trained_models.tokenizer(), qexport.load(sound.gptq, device="cpu")
    for each, prompt in zip(found.comparisons, PROMPTS, strict=True):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(str(text), add_special_tokens=False)])
        new = generated(model, ids)[0, ids.shape[1] :]
        assert each.artifact_tokens == len(new)
        assert each.artifact == tokenizer.decode(new, skip_special_tokens=True)


def generated(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    generate: Any = model.generate
    found = generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=0, pad_token_id=0)
    assert isinstance(found, torch.Tensor)
    return found


def test_speed_is_that_of_the_graph(sound: Sound) -> None:
    speed = {"prompt_tokens": 4, "new_tokens": 3, "repeats": 6}
    timings = sound.verify(sound.dense, windows=2, max_windows=2, gates={}, speed=speed).timings
    assert timings.speed is not None
    assert timings.speed.artifact_bytes == sum(p.nbytes for p in trained_models.trained().parameters())


def test_one_damaged_scale_fails_the_divergence(sound: Sound, copy: Path) -> None:
    def damage(scales: np.ndarray[Any, Any]) -> None:
        scales[0, 0] *= 200

    edit_weight(copy, "model.layers.1.mlp.down_proj.scales", damage)
    report = sound.verify(copy)
    assert report.verdict == "fail"
    assert {"mean_kl", "better_than_rtn"} <= failed(report)
    assert verdicts(report)["graph"] == "pass"


def test_a_rounded_head_is_held_against_the_references_as_a_quantized_layer(sound: Sound, tmp_path: Path) -> None:
    """Damage that the divergence does not show, in one row in five hundred."""
    recipe = {
        "load": {"base": str(sound.folder / "base")},
        "quantize": {"method": "none"},
        "export": [{"layout": "onnx", "token_embedding_type": "q8_0", "output_tensor_type": "q8_0"}],
        "verify": sound.settings().model_dump(mode="json", exclude_unset=True),
        "output": str(tmp_path / "rounded"),
    }
    (tmp_path / "rounded.yaml").write_text(json.dumps(recipe))
    with traced_once():
        result = run(load_recipe(tmp_path / "rounded.yaml"), device="cpu")
    folder = result.artifact_path
    report = result.reports["onnx"]
    assert report.weights is not None
    assert {layer.name for layer in report.weights.layers} == {"model.embed_tokens", "lm_head"}
    assert "rounded to Q8_0" in (folder / "README.md").read_text()
    assert any(
        "rounded to Q8_0" in note
        for note in Manifest.model_validate_json((folder / "qexport-manifest.json").read_text()).notes
    )
    inspect_artifact(folder)

    def damage(scales: np.ndarray[Any, Any]) -> None:
        scales[3] *= 1.5

    copied = factories.without_digests(shutil.copytree(folder, tmp_path / "copy"))
    edit_weight(copied, "lm_head.scales", damage)
    assert "weights" in failed(sound.verify(copied))


def test_a_scale_that_is_no_number_is_an_error_that_names_the_graph(sound: Sound, copy: Path) -> None:
    edit_weight(copy, "model.layers.1.mlp.down_proj.scales", lambda scales: scales.fill(np.nan))
    with pytest.raises(NumericalError, match="the graph's logits hold NaN or Inf") as caught:
        sound.verify(copy)
    assert "held-out window 0" in str(caught.value)


def test_a_graph_that_does_not_heed_its_mask_fails_the_gate_graph_alone(sound: Sound, copy: Path) -> None:
    def forget(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.input[:] = ["all_ones" if name == "attention_mask" else name for name in node.input]
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "a_one"))
        graph.node.insert(0, helper.make_node("Max", ["attention_mask", "a_one"], ["all_ones"]))

    edit_graph(copy, forget)
    report = sound.verify(copy)
    assert failed(report) == {"graph"}
    (reason,) = [gate.reason for gate in report.gates if gate.name == "graph"]
    assert "padding (left padding changes the predictions by" in reason
    assert {check.name: check.passed for check in report.checks if check.gate == "graph"} == {
        "padding": False, "cached decoding": True,
    }  # fmt: skip
    assert value(report) == value(sound.run.reports["onnx"])  # no window is padded


@pytest.mark.parametrize("name", ["key", "value"])
def test_a_graph_that_forgets_its_cache_fails_the_gate_graph(sound: Sound, copy: Path, name: str) -> None:
    def forget(graph: onnx.GraphProto) -> None:
        past = f"past_key_values.1.{name}"
        for node in graph.node:
            node.input[:] = ["forgotten" if each == past else each for each in node.input]
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "a_zero"))
        graph.node.insert(0, helper.make_node("Mul", [past, "a_zero"], ["forgotten"]))

    edit_graph(copy, forget)
    report = sound.verify(copy)
    assert failed(report) == {"graph"}
    assert [check.name for check in report.checks if check.passed is False] == ["cached decoding"]


def test_padding_that_makes_nan_never_passes(sound: Sound, copy: Path) -> None:
    """As an unmasked softmax over nothing does, but only where a row is padded."""

    def spoil(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.output[:] = ["sound_logits" if name == "logits" else name for name in node.output]
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "nought"))
        graph.node.extend([
            helper.make_node("ReduceMin", ["attention_mask"], ["seen"], keepdims=0),
            helper.make_node("Cast", ["seen"], ["seen_float"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["nought", "seen_float"], ["nan_or_zero"]),
            helper.make_node("Add", ["sound_logits", "nan_or_zero"], ["logits"]),
        ])  # fmt: skip

    edit_graph(copy, spoil)
    report = sound.verify(copy)
    assert [check.name for check in report.checks if check.passed is False] == ["padding"]
    assert failed(report) == {"graph"}


def refuse_headers(reference: Checkpoint, artifact: Path) -> None:
    with open_stored(artifact, dtype=torch.bfloat16) as stored:
        check_headers(reference, stored)


def test_headers_are_held_against_the_reference(sound: Sound, copy: Path) -> None:
    refuse_headers(sound.checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(InputError, match="not the reference's"):
        refuse_headers(sound.checkpoint, copy)
    assert failed(sound.verify(copy, windows=2, max_windows=2, gates={})) == {"config"}
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(InputError):
        refuse_headers(sound.checkpoint, copy)


def test_a_graph_with_another_models_parameters_is_refused(sound: Sound, copy: Path) -> None:
    other = replace(sound.checkpoint, architecture=Architecture({**sound.checkpoint.config, "num_hidden_layers": 4}))
    shutil.copyfile(copy / "config.json", copy / "kept")
    config = json.loads((copy / "kept").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"model\.layers\.3\..* missing"):
        refuse_headers(other, copy)


def test_an_artifact_without_a_tokenizer_fails_the_tokenizer(sound: Sound, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert failed(sound.verify(copy, windows=2, max_windows=2, gates={})) >= {"tokenizer"}


def test_the_report_names_the_reader_and_the_files_and_has_no_drift(sound: Sound) -> None:
    found = Report.read(sound.gptq)
    assert found.digest() == sound.run.reports["onnx"].digest()
    page = report_html(found)
    assert "Drift after each block" not in page
    assert READER in page
    digests = {name: hashlib.sha256((sound.gptq / name).read_bytes()).hexdigest()
               for name in ("model.onnx", "model.onnx.data")}  # fmt: skip
    assert found.subject.weights_sha256 == digests
    manifest = Manifest.read(sound.gptq)
    assert manifest.verification is not None
    assert manifest.verification.readers == [READER]
    assert found.subject.sizes == manifest.sizes


def test_verifying_later_tells_the_same_as_the_run(sound: Sound) -> None:
    first = sound.run.reports["onnx"]
    again = sound.verify(sound.gptq)
    assert again.subject.weights_sha256 == first.subject.weights_sha256
    assert (again.layers, again.subject.method) == (first.layers, first.subject.method)
    teacher_forced = [each for each in first.figures if each.unit == "document"]
    assert again.figures == teacher_forced
    assert verdicts(again) == verdicts(first)


def test_the_gate_stays_where_others_are_decided_again(sound: Sound) -> None:
    others = sound.settings(gates={})
    gates, _ = decide_again(sound.run.reports["onnx"], others, profile_of_layer)
    assert [gate.name for gate in gates] == ["config", "files", "tokenizer", "weights", "graph", "better_than_rtn"]
    gates, _ = decide_again(sound.run.reports["safetensors"], others, profile_of_layer)
    assert "graph" not in {gate.name for gate in gates}


def opened(sound: Sound, **options: Any) -> ArtifactFolder:
    with open_folder(sound.gptq, sound.checkpoint.architecture, torch.bfloat16, name="artifact", **options) as found:
        return found


@pytest.mark.parametrize("change", [{"group_size": 128}, {"group_size": 48}, {"method": "int8"}, {"bits": 2}])
def test_records_that_are_not_those_of_the_graph_are_refused(sound: Sound, change: dict[str, Any]) -> None:
    found = opened(sound)
    assert {grid.group_size for grid in found.artifact.grids.values()} == {GROUP}
    assert {(layer.method, layer.bits, layer.group_size) for layer in found.layers} == {("gptq", 4, GROUP)}
    first, *others = found.layers
    with pytest.raises(InputError, match="not those of the artifact") as caught:
        opened(sound, layers=[first.model_copy(update=change), *others])
    assert str(caught.value.where).startswith(first.name)


def test_the_folder_loads_and_is_inspected(sound: Sound, copy: Path) -> None:
    assert isinstance(qexport.load(copy, device="cpu"), OnnxCausalLM)
    with pytest.raises(RecipeError, match=r"the graph computes in torch\.float32"):
        qexport.load(copy, device="cpu", dtype=torch.bfloat16)
    found = inspect_artifact(sound.gptq)
    assert (found.layout, found.quantized_layers, found.report) == ("onnx", 21, "as in the manifest")
    assert found.method == f"ONNX, MatMulNBits, 4 bits, blocks of {GROUP}"
    assert {loader.name: loader.verdict for loader in found.loaders} == {
        "onnxruntime": "yes", "OpenVINO": "untried", "qexport.load": "yes", "vLLM": "no", "TGI": "no",
    }  # fmt: skip
    assert inspect_artifact(copy).layout is None


def test_without_the_extra_the_error_names_it(sound: Sound, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("qexport.reading.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for attempt in (
        lambda: sound.verify(sound.dense),
        lambda: qexport.load(sound.dense),
        lambda: inspect_artifact(sound.dense),
    ):
        with pytest.raises(RecipeError, match="onnx") as caught:
            attempt()
        assert "pip install 'qexport[onnx]'" in str(caught.value)


def test_a_graph_is_opened_anew_for_each_use(sound: Sound) -> None:
    """So that its weights are not in memory while another whole model is."""
    runner = GraphRunner(OnnxWeights(sound.dense, dtype=torch.float32), CPU)
    with runner.whole() as model:
        alive = weakref.ref(model)
    del model
    assert alive() is None
