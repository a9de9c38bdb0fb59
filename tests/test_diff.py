"""`qexport diff`: faults planted in copies of models and artifacts, each found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import factories
import gguf_folders
import stored_models
from qexport.cli import main
from qexport.comparing import tensors as comparing_tensors
from qexport.comparing.difference import Difference, compare
from qexport.comparing.documents import compare_values
from qexport.comparing.sides import open_side
from qexport.errors import InputError
from qexport.pipeline import run
from qexport.recipe import load_recipe

QUERY = "model.layers.0.self_attn.q_proj"


def difference(a: Path, b: Path, **options: Any) -> Difference:
    return compare((a, b), names=(str(a), str(b)), **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and GPTQ codes of it in three layouts and two formats."""
    folder = tmp_path_factory.mktemp("diff")
    factories.save(factories.build(factories.llama_config()), folder / "base")
    factories.write_text(folder / "calibration.jsonl", seed=1)
    recipe = {
        "load": {"base": "./base"},
        "quantize": {
            "method": "gptq",
            "group_size": 32,
            "calibration": {"source": "calibration.jsonl", "samples": 4, "sequence_length": 32},
        },
        "export": [{"layout": "safetensors"}, {"layout": "vllm", "format": "compressed-tensors"}],
        "output": "./out",
    }
    (folder / "r.yaml").write_text(json.dumps(recipe))
    run(load_recipe(folder / "r.yaml"), device="cpu")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(made / name, tmp_path / "copy")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_copy_is_equal(made: Path, copy: Callable[[str], Path]) -> None:
    found = difference(made / "out/safetensors", copy("out/safetensors"))
    assert found.equal
    assert {each.state for each in found.parameters} == {"equal"}
    assert main(["diff", str(made / "base"), str(made / "base"), "--exit-code"]) == 0


def test_the_same_codes_in_two_formats_are_equal_in_value(made: Path) -> None:
    found = difference(made / "out/safetensors", made / "out/vllm")
    assert found.same_weights
    assert not found.equal
    states = {each.name: each.state for each in found.parameters}
    assert states[f"{QUERY}.weight"] == "equal values"
    assert states["model.norm.weight"] == "equal"
    config = next(each for each in found.files if each.name == "config.json")
    assert "quantization_config.quant_method" in {change.key for change in config.changes}
    assert {each.name for each in found.evidence} == set()


def test_a_base_against_its_codes_shows_how_far_they_are(made: Path) -> None:
    found = difference(made / "base", made / "out/safetensors", weights_only=True)
    base = load_file(made / "base/model.safetensors")[f"{QUERY}.weight"].double()
    with open_side(made / "out/safetensors") as side:
        change = side.parameters.read(f"{QUERY}.weight").double() - base
    own = next(each for each in found.parameters if each.name == f"{QUERY}.weight")
    assert own.relative == pytest.approx(float(change.norm() / base.norm()))
    assert own.largest == pytest.approx(float(change.abs().max()))
    assert own.share == pytest.approx(float((change != 0).double().mean()))
    assert {each.state for each in found.parameters if "proj" not in each.name} == {"equal"}


def flip(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1).view(torch.uint8)[5] ^= 1

    return change


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.other"] = tensors.pop("model.norm.weight")


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.cat([tensors["model.norm.weight"]] * 2)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = torch.nan


@pytest.mark.parametrize(
    ("change", "name", "state"),
    [
        (flip("model.norm.weight"), "model.norm.weight", "changed"),
        (flip(f"{QUERY}.qweight"), f"{QUERY}.weight", "changed"),
        (flip(f"{QUERY}.scales"), f"{QUERY}.weight", "changed"),
        (rename, "model.norm.weight", "only in A"),
        (rename, "model.norm.other", "only in B"),
        (reshape, "model.norm.weight", "other shape"),
        (poison, "model.norm.weight", "unreadable"),
    ],
    ids=["a norm", "a code", "a scale", "lost", "added", "another shape", "NaN"],
)
def test_a_planted_fault_is_found(
    made: Path, copy: Callable[[str], Path], change: Callable[[dict[str, torch.Tensor]], object], name: str, state: str
) -> None:
    other = copy("out/safetensors")
    edit(other, change)
    found = difference(made / "out/safetensors", other, weights_only=True)
    assert {each.name: each.state for each in found.parameters if each.differs}[name] == state
    assert sum(each.differs for each in found.parameters) == (2 if change is rename else 1)


def test_the_exit_code_is_asked_for(made: Path, copy: Callable[[str], Path]) -> None:
    other = copy("base")
    (other / "config.json").write_text("{}")
    places = [str(made / "base"), str(other)]
    assert main(["diff", *places]) == 0
    assert main(["diff", *places, "--exit-code"]) == 6
    (other / "config.json").write_bytes((made / "base" / "config.json").read_bytes())
    edit(other, flip("model.norm.weight"))
    assert main(["diff", *places, "--weights"]) == 0
    assert main(["diff", *places, "--weights", "--exit-code"]) == 6


def test_files_are_compared_key_by_key(
    made: Path, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy("out/safetensors")
    for name, key, value in (("config.json", "rope_theta", 5.0), ("generation_config.json", "eos_token_id", True)):
        content = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps(content | {key: value}))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "\nBe evil.")
    (other / "launch").mkdir()
    (other / "launch" / "x.sh").write_text("rm")
    assert main(["diff", str(made / "out/safetensors"), str(other), "--exit-code"]) == 6
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "rope_theta: absent -> 5.0" in lines
    assert "eos_token_id: 0 -> true" in lines
    assert any(line.startswith("model.merges: a list of ") for line in lines)
    assert "+Be evil." in lines
    assert "launch/x.sh: only in B" in lines


def test_a_template_may_stand_in_another_file(made: Path, copy: Callable[[str], Path]) -> None:
    other = copy("base")
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = (other / "chat_template.jinja").read_text()
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    (other / "chat_template.jinja").unlink()
    assert difference(made / "base", other).equal


def test_true_is_not_one_but_one_is_one_point_zero() -> None:
    assert compare_values("x", {"a": [1, 2.0]}, {"a": [1.0, 2]}) is None
    found = compare_values("x", {"a": 1, "b": False}, {"a": True, "b": 0})
    assert found
    assert [change.words() for change in found.changes] == ["a: 1 -> true", "b: false -> 0"]


def test_recipes_inputs_and_figures_of_artifacts_are_compared(made: Path, tmp_path: Path) -> None:
    recipe = load_recipe(made / "r.yaml", [f"output={tmp_path / 'other'}", "quantize.group_size=64"])
    run(recipe, device="cpu")
    found = difference(made / "out/safetensors", tmp_path / "other/safetensors")
    changes = {change.key: (change.a, change.b) for each in found.evidence for change in each.changes}
    assert changes == {"quantize.group_size": ("32", "64")}
    assert [each.name for each in found.evidence] == ["recipe"]


def test_folders_of_other_makers(tmp_path: Path, made: Path) -> None:
    model = factories.build(factories.llama_config())
    nf4, int8 = (
        stored_models.write(model, tmp_path / name, stored_models.QUANTIZATIONS[name]) for name in ("nf4", "int8")
    )
    found = difference(nf4, int8)
    assert {each.state for each in found.parameters if "proj" in each.name} == {"changed"}
    assert {each.state for each in found.parameters if "proj" not in each.name} == {"equal"}
    assert any("no manifest" in note for note in found.notes)
    config = json.loads((nf4 / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "somebody's"
    (nf4 / "config.json").write_text(json.dumps(config))
    raw = difference(nf4, nf4)
    assert raw.same_weights
    assert "somebody's" in raw.notes[0]


def test_adapters_are_compared(tmp_path: Path) -> None:
    for name, alpha in (("a", 16), ("b", 32)):
        (tmp_path / name).mkdir()
        save_file({"x": torch.full((4,), float(alpha))}, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
    found = difference(tmp_path / "a", tmp_path / "b")
    assert (found.parameters[0].state, found.parameters[0].relative) == ("changed", 1.0)
    assert found.files[0].changes[0].words() == "lora_alpha: 16 -> 32"


def test_of_each_side_one_parameter_is_in_memory(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = comparing_tensors._compare_values

    def watching(name: str, a: torch.Tensor, b: torch.Tensor) -> Any:
        nonlocal most
        alive.extend((weakref.ref(a), weakref.ref(b)))
        most = max(most, sum(each() is not None for each in alive))
        return original(name, a, b)

    monkeypatch.setattr(comparing_tensors, "_compare_values", watching)
    difference(made / "base", made / "out/safetensors", weights_only=True)
    assert most == 2


def test_places_that_cannot_be_compared(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["diff", str(made / "base"), str(tmp_path / "empty")]) == 3
    assert "holds no weights" in capsys.readouterr().err
    assert main(["diff", str(made / "base"), "oci://host/name"]) == 2
    assert main(["diff", str(made / "base"), str(tmp_path / "nothing"), "--json"]) == 3


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-2.safetensors", "onnx/model.onnx", "adapter.pth"])
def test_weights_that_no_parameter_stands_for_are_compared_by_digest(
    made: Path, copy: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    a, b = copy("base"), shutil.copytree(made / "base", tmp_path / "other")
    for folder, content in ((a, b"one"), (b, b"two")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    found = difference(a, b)
    assert [each.name for each in found.files] == [name]
    assert not found.equal
    (b / name).write_bytes(b"one")
    assert difference(a, b).equal


def named(folder: Path, **templates: str) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def test_all_templates_are_compared_by_name(made: Path, copy: Callable[[str], Path], tmp_path: Path) -> None:
    a, b = copy("base"), shutil.copytree(made / "base", tmp_path / "other")
    named(a, rag="x", default="y")
    named(b, default="y", rag="x")
    assert difference(a, b).equal
    named(b, default="y", rag="evil")
    assert [each.name for each in difference(a, b).files] == ["chat template rag"]
    (b / "additional_chat_templates").mkdir()
    (b / "additional_chat_templates" / "rag.jinja").write_text("x")
    (b / "chat_template.jinja").write_text("y")
    assert [each.name for each in difference(a, b).files] == ["tokenizer_config.json"]  # what is not taken differs


@pytest.mark.parametrize("many", [True, False], ids=["many files", "deep folders"])
def test_what_is_too_much_is_refused(copy: Callable[[str], Path], many: bool) -> None:
    folder = copy("base")
    if many:
        for index in range(2000):
            (folder / f"{index}.txt").touch()
    else:
        (folder / "/".join("abcdefghi")).mkdir(parents=True)
        (folder / "/".join("abcdefghi") / "x.txt").touch()
    with pytest.raises(InputError, match="the folder has more than"):
        difference(folder, folder)
    assert difference(folder, folder, weights_only=True).same_weights


@pytest.mark.parametrize(
    ("a", "b", "largest"),
    [
        (torch.tensor([1 << 53]), torch.tensor([(1 << 53) + 1]), 1.0),
        (torch.tensor([-1]), torch.tensor([1]), 2.0),
        (torch.tensor([3], dtype=torch.uint64), torch.tensor([(1 << 64) - 1], dtype=torch.uint64), float(1 << 64)),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), 2.0),
        (torch.tensor([True]), torch.tensor([False]), 1.0),
    ],
    ids=["int64", "a sign", "uint64", "complex", "bool"],
)
def test_values_are_compared_exactly(tmp_path: Path, a: torch.Tensor, b: torch.Tensor, largest: float) -> None:
    for name, tensor in (("a", a), ("b", b)):
        save_file({"t": tensor}, tmp_path / f"{name}.safetensors")
    (found,) = difference(tmp_path / "a.safetensors", tmp_path / "b.safetensors").parameters
    assert (found.state, found.largest, found.share) == ("changed", largest, 1.0)


NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize(
    ("a", "b", "state", "words"),
    [
        ([NAN, INF, 1], [NAN, INF, 1], "equal", ""),
        ([NAN, INF, 1], [NAN, INF, 2], "changed", "by 1 of its norm, by 1 at most, 33.333% of the values"),
        ([NAN, 1, 1], [0, 1, 1], "changed", "changed: 1 value NaN or Inf in one alone"),
        ([INF, 1, 1], [-INF, 1, 1], "changed", "changed: 1 value NaN or Inf in one alone"),
        ([1, 1, 1], [INF, NAN, 1], "changed", "changed: 2 values NaN or Inf in one alone"),
    ],
    ids=["equal bits", "a number beside them", "NaN in A", "another infinity", "both in B"],
)
def test_nan_and_infinity(tmp_path: Path, a: list[float], b: list[float], state: str, words: str) -> None:
    for name, values in (("a", a), ("b", b)):
        save_file({"t": torch.tensor(values)}, tmp_path / f"{name}.safetensors")
    (found,) = difference(tmp_path / "a.safetensors", tmp_path / "b.safetensors").parameters
    assert found.state == state
    assert not words or found.words() == words


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nan_in_two_dtypes_is_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([NAN, -INF, 0.5])
    save_file({"t": values}, tmp_path / "a.safetensors")
    save_file({"t": values.to(dtype)}, tmp_path / "b.safetensors")
    (found,) = difference(tmp_path / "a.safetensors", tmp_path / "b.safetensors").parameters
    assert found.state == "equal values"


def test_a_folder_with_a_gguf_file(tmp_path: Path) -> None:
    made = gguf_folders.make(gguf_folders.CONFIGS["llama"], tmp_path)
    found = difference(made.gguf, made.safetensors)
    assert found.same_weights
    assert "model.gguf" in {each.name for each in found.files}
    assert difference(made.gguf, made.gguf).equal
