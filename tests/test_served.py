"""What both servers share: plan and folder show a server the same, rules are asked of both, templates leave no gap."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import UndefinedError
from ruamel.yaml import YAML
from safetensors.torch import save_file

import vllm_folders
from qexport.artifact.disk import disk_failure
from qexport.errors import CompatibilityError, InputError, QexportError
from qexport.export import launch
from qexport.export.launch import render_launch_files
from qexport.export.served import OTHER_LAYOUT, FolderFiles, Rule, Rules, ServedModel, ServedWeights, Server
from qexport.export.tgi.rules import TGI
from qexport.export.tgi.served import ServedByTgi
from qexport.export.vllm.launch import VllmLaunch, launch_files
from qexport.export.vllm.rules import VLLM
from qexport.export.vllm.served import ServedByVllm
from qexport.quantizing.int8 import Int8
from qexport.quantizing.nf4 import Nf4
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.w8a8 import W8a8
from qexport.tensors import TensorSpec
from qexport.tensors.safetensors_folder import SafetensorsFolder
from quantized_models import gptq_method
from tgi_folders import TgiModel, falcon, falcon_40b, llama

SPECS = {"a.weight": TensorSpec((2, 3), torch.float16)}


@pytest.mark.parametrize(
    "made",
    [
        TgiModel(llama()),
        TgiModel(llama(), gptq_method(desc_act=True)),
        TgiModel(falcon()),
        TgiModel(falcon_40b(), W8a8(method="w8a8")),
        TgiModel(llama(), Nf4(method="nf4")),
        TgiModel(llama(), Int8(method="int8")),
        TgiModel(llama(), NoQuantization(method="none")),
    ],
    ids=lambda made: f"{made.config.model_type} {type(made.method).__name__}",
)
def test_tgi_finds_on_the_disk_what_was_planned(made: TgiModel, tmp_path: Path) -> None:
    planned = ServedByTgi.planned(made.layout._files(made.checkpoint), made.layout.weights.specs)
    found = ServedByTgi.on_disk(made.write(tmp_path / "out"))
    assert found.tensors == planned.tensors
    assert {name: found.files[name] for name in planned.files} == planned.files
    assert (found.codes, found.linears, found.layers) == (planned.codes, planned.linears, planned.layers)
    judged = [rule for rule in TGI.rules if not rule.disk]
    assert [rule.check(found) for rule in judged] == [rule.check(planned) for rule in judged]


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_vllm_finds_on_the_disk_what_was_planned(form: vllm_folders.Form, tmp_path: Path) -> None:
    model = vllm_folders.llama()
    layout = vllm_folders.layout(model, form)
    planned = ServedByVllm.planned(layout._files(model.checkpoint), layout.weights.specs)
    found = ServedByVllm.on_disk(vllm_folders.write(tmp_path / "out", "gptq" if form == "gptq" else "w4a16"))
    assert found.tensors == planned.tensors
    assert {name: found.files[name] for name in planned.files} == planned.files
    assert found.schemes == planned.schemes
    judged = [rule for rule in VLLM.rules if not rule.disk]
    assert [rule.check(found) for rule in judged] == [rule.check(planned) for rule in judged]


def test_only_what_a_plan_cannot_show_is_left_out_of_it() -> None:
    assert {rule.name for rule in TGI.rules if rule.disk} == {
        "no file of weights has a reserved word in its name",
        "the files of weights can be opened",
        "each tensor is in one file",
        "there is one set of weights",
        "GPTQ: joined layers have the same g_idx",
    }
    assert {rule.name for rule in VLLM.rules if rule.disk} == {
        "all weights that the index names can be read",
        "joined NVFP4 layers have one global scale",
    }


class Stored(ServedModel):
    @staticmethod
    def read_weights(folder: Path) -> ServedWeights:
        return ServedWeights(SPECS)


def test_a_broken_plan_is_refused_with_every_rule_and_every_way_to_mend_it(tmp_path: Path) -> None:
    rules = Rules[Stored]()

    @rules.rule("on the disk", "a.py", "never said", disk=True)
    def on_disk(model: Stored) -> Iterator[str]:
        yield "broken"

    Server("S", Stored, rules).refuse_plan(Stored.planned({}, SPECS))
    with pytest.raises(QexportError, match="1 of 1 demands of S") as finished:
        Server("S", Stored, rules).refuse_folder(tmp_path)
    assert finished.value.exit_code == 1

    @rules.rule("first", "b.py", "do this")
    def first(model: Stored) -> Iterator[str]:
        yield from ("one", "two")

    @rules.rule("second", "c.py")
    def second(model: Stored) -> Iterator[str]:
        yield "three"

    with pytest.raises(CompatibilityError, match="S would not serve this") as caught:
        Server("S", Stored, rules).refuse_plan(Stored.planned({}, SPECS))
    assert str(caught.value.where).split() == ["first:", "one", "two", "(b.py)", "second:", "three", "(c.py)"]
    assert caught.value.mend == "do this"
    del rules[1]
    with pytest.raises(CompatibilityError) as caught:
        Server("S", Stored, rules).refuse_plan(Stored.planned({}, SPECS))
    assert caught.value.mend == OTHER_LAYOUT


def test_a_file_that_is_no_json_object_is_empty_with_the_reason() -> None:
    for content, reason in ((b"{", "not valid JSON"), (b"[]", "JSON object, not list"), (b'{"a":1,"a":2}', "twice")):
        model = Stored.planned({"config.json": content}, SPECS)
        assert model.config == {}
        assert reason in str(model.json_fault("config.json"))
    assert Stored.planned({}, SPECS).json_fault("config.json") == "there is no config.json"


def test_files_of_a_folder_are_named_and_read_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "launch" / "empty").mkdir(parents=True)
    (tmp_path / "launch" / "a.env").write_bytes(b"A=1")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    with (tmp_path / "config.json").open("wb") as large:
        large.truncate((1 << 26) + 1)
    files = FolderFiles(tmp_path)
    assert set(files) == {"config.json", "launch/", "launch/empty/", "launch/a.env"}
    assert files["launch/a.env"] == b"A=1"
    model = Stored.on_disk(tmp_path)
    assert "too many" in str(model.json_fault("config.json"))

    def reads(model: Stored) -> Iterator[str]:
        yield model.files["config.json"].decode()

    assert "cannot be judged: InputError" in Rule("a", "a.py", reads).check(model).detail


@dataclass(frozen=True)
class Values:
    value: Any = "null"


@pytest.mark.parametrize("value", ["null", "a: b", "- x", "'", '"', "#", "1", "yes", "{}", "*a", "x" * 500, "a\nb", ""])
def test_values_in_yaml_are_the_values_that_were_meant(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "figures:\n- {{ figures.value | yaml }}\n- last\n", monkeypatch)
    [text] = render_launch_files("planted_layout", {"a.yaml": "a.jinja"}, Values(value)).values()
    assert YAML(typ="safe").load(text.decode()) == {"figures": [value, "last"]}


def test_a_figure_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "{{ figures.valeu }}", monkeypatch)
    with pytest.raises(UndefinedError, match="valeu"):
        render_launch_files("planted_layout", {"a.yaml": "a.jinja"}, Values())


def package(root: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout's package with one template."""
    folder = root / "planted_layout"
    (folder / "templates").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "templates" / "a.jinja").write_text(template)
    monkeypatch.syspath_prepend(root)
    monkeypatch.delitem(sys.modules, "planted_layout", raising=False)
    launch._environment.cache_clear()


def test_the_engine_arguments_are_json_for_any_length() -> None:
    for length in (None, 1, 131072):
        figures = VllmLaunch(
            name="a",
            image="a:1",
            triton_image="b:1",
            max_model_len=length,
            dtype="float16",
            degrees=[1],
            rounded_by_amx=False,
        )
        made = json.loads(launch_files(figures)["launch/triton/a/1/model.json"])
        assert made.get("max_model_len") == length


def test_an_error_of_the_disk_breaks_no_rule() -> None:
    def unreadable(_: Any) -> Iterator[str]:
        raise InputError("cannot be read") from OSError(errno.EIO, "Input/output error")

    def malformed(_: Any) -> Iterator[str]:
        raise InputError("no JSON")

    nothing: Any = None
    assert not Rule[Any]("a rule", "a source", malformed).check(nothing).passed
    with pytest.raises(InputError, match="cannot be read"):
        Rule[Any]("a rule", "a source", unreadable).check(nothing)


@pytest.mark.parametrize("read", [ServedByTgi.read_weights, ServedByVllm.read_weights, SafetensorsFolder])
def test_weights_that_the_disk_cannot_read_are_not_called_malformed(
    read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    read(tmp_path)

    def unreadable(path: Path, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "open", unreadable)
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert disk_failure(caught.value, where=None)
