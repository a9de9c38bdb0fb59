"""Where the bytes of an ONNX artifact lie: shared with another, in several files, the same each time."""

from __future__ import annotations

import getpass
import hashlib
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from pydantic import ValidationError

import factories
from fresh import Fresh
from onnx_exports import METHODS as QUANTIZERS
from onnx_exports import (
    Export,
    assert_same_model,
    assert_same_weights,
    export,
    exported,
    passed_once,
    prompts,
    run_pass,
)
from qexport.export.onnx.files import shared_names
from qexport.reading.onnx.external_data import ExternalData
from qexport.recipe import Recipe
from qexport.tensors.safetensors_file import SafetensorsFile

METHODS = ["none bf16", "none fp16", "nf4", "nf4 double", "fp4", "gptq act-order", "int8"]


def shared(method: str, folder: Path, family: str = "llama", **settings: Any) -> Export:
    return export(passed_once(family, method), folder, share_weights=True, **settings)


def places(made: Export) -> dict[str, ExternalData]:
    """Every initializer that lies in a file."""
    found = {name: initializer.place for name, initializer in made.graph().initializers.items()}
    return {name: place for name, place in found.items() if isinstance(place, ExternalData)}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.onnx*"))}


@pytest.mark.parametrize("method", METHODS)
def test_shared_weights_are_links_to_the_files_of_the_safetensors_artifact(method: str, tmp_path: Path) -> None:
    made = shared(method, tmp_path)
    link, source = made.onnx / "shared.safetensors", made.safetensors / "model.safetensors"
    assert link.samefile(source)
    names = shared_names(made.passed.outputs)
    found = places(made)
    assert {name for name, place in found.items() if place.path.suffix == ".safetensors"} == names
    with SafetensorsFile(source) as file:
        for name in names:
            assert found[name].path.name == link.name
            assert found[name].offset == file.offsets()[name]
    assert_same_weights(made)
    assert_same_model(made)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_written_twice(method: str, tmp_path: Path) -> None:
    made, alone = shared(method, tmp_path), exported("llama", method)
    own = set(places(made)) - shared_names(made.passed.outputs)
    sizes = {name: place.length for name, place in places(alone).items()}
    assert made.layout.weights.total_bytes == sum(sizes[name] for name in own)
    assert made.layout.weights.shared_bytes == sum(sizes.values()) - made.layout.weights.total_bytes
    data = made.onnx / "model.onnx.data"
    assert data.exists() == bool(own)
    assert not own or data.stat().st_size < made.layout.weights.total_bytes + 4096 * len(own)
    assert (made.onnx / "model.onnx").stat().st_size < 200_000, "weights are in the graph"


def test_files_without_shared_tensors_stay_out(tmp_path: Path) -> None:
    made = shared("gptq", tmp_path, max_shard_size="1KB")
    linked = sorted(made.onnx.glob("*.safetensors"))
    assert 0 < len(linked) < len(list(made.safetensors.glob("*.safetensors")))
    for path in linked:
        with SafetensorsFile(path) as file:
            assert file.offsets().keys() & shared_names(made.passed.outputs)
    assert_same_weights(made)


@pytest.mark.parametrize("method", ["none bf16", "gptq", "nf4"])
def test_the_graph_computes_the_same_wherever_its_weights_lie(method: str, tmp_path: Path) -> None:
    ids, mask = prompts()
    found = [
        made.model()(input_ids=ids, attention_mask=mask).logits
        for made in (exported("llama", method), shared(method, tmp_path / "a"),
                     shared(method, tmp_path / "b", max_shard_size="60KB"))
    ]  # fmt: skip
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("method", ["none bf16", "gptq asymmetric"])
def test_several_files(method: str, share: bool, tmp_path: Path) -> None:
    made = export(passed_once("llama", method), tmp_path, max_shard_size="60KB", share_weights=share)
    limit = 60_000
    own = {name: place for name, place in places(made).items() if place.path.suffix == ".data"}
    files = sorted(path.name for path in made.onnx.glob("*.onnx.data"))
    assert files == sorted({place.path.name for place in own.values()})
    if not share:
        assert len(files) > 2
        assert files == [f"model-{number + 1:05d}-of-{len(files):05d}.onnx.data" for number in range(len(files))]
    for name in files:
        held = [place.length for place in own.values() if place.path.name == name]
        assert sum(held) <= limit or len(held) == 1
    sources = sorted(path.name for path in made.safetensors.glob("*.safetensors"))
    assert len(sources) > 2
    links = sorted(path.name for path in made.onnx.glob("*.safetensors"))
    assert links == ([name.replace("model", "shared") for name in sources] if share else [])
    assert_same_weights(made)
    assert_same_model(made)


@pytest.mark.parametrize(("family", "method"), [("llama", "gptq"), ("falcon h1", "none bf16")])
def test_onnx_finds_nothing_wrong_with_graph_and_data(family: str, method: str) -> None:
    onnx.checker.check_model(str(exported(family, method).onnx / "model.onnx"))


def test_every_tensor_begins_on_a_page_and_none_overlaps_another() -> None:
    ends: dict[Path, int] = {}
    for place in sorted(places(exported("llama", "gptq asymmetric")).values(), key=lambda place: place.offset):
        assert place.offset % 4096 == 0
        assert place.offset >= ends.get(place.path, 0)
        ends[place.path] = place.offset + place.length


def test_there_is_nothing_to_share_without_the_safetensors_layout() -> None:
    recipe: dict[str, Any] = {
        "load": {"base": "org/model"},
        "quantize": {"method": "nf4"},
        "export": [{"layout": "onnx", "share_weights": True}],
    }
    with pytest.raises(ValidationError, match="nothing to share"):
        Recipe.model_validate(recipe)
    Recipe.model_validate(recipe | {"export": [*recipe["export"], {"layout": "safetensors"}]})


def one_block_in_float16(folder: Path) -> None:
    """Of Falcon-H1, which has every kind of node. Float16 adds casts; test_onnx_layout.py traces the same model."""
    done = run_pass(factories.falcon_h1_config(num_hidden_layers=1), QUANTIZERS["gptq asymmetric"])
    export(done, folder, activations="float16")


def test_two_processes_write_the_same_bytes(fresh: Fresh, tmp_path: Path) -> None:
    """This one and another with another number of threads, another seed of Python's hashes and a trace of its own, in
    folders of other names.
    """
    code = (
        "import sys, torch; torch.set_num_threads(2)\n"
        "print(hash('seed')); from pathlib import Path; import disk_cache\n"
        "disk_cache.FOLDER = Path(sys.argv[1])\n"
        "import test_onnx_sharing\n"
        "test_onnx_sharing.one_block_in_float16(Path(sys.argv[2]))"
    )
    done = fresh.run(code, str(tmp_path / "cache"), str(tmp_path / "another one"))
    assert done.code == 0, done.err
    assert int(done.out.split()[0]) != hash("seed")
    assert (tmp_path / "cache").exists(), "it has taken a trace of ours"
    assert torch.get_num_threads() == 1
    one_block_in_float16(tmp_path / "one")
    first, second = (digests(tmp_path / name / "onnx") for name in ("one", "another one"))
    assert first.keys() == {"model.onnx", "model.onnx.data"}
    assert first == second


@pytest.mark.parametrize("family", ["llama", "falcon 7b", "falcon h1", "gpt-2"])
def test_nothing_of_this_machine_is_in_the_graph(family: str) -> None:
    made = exported(family, "gptq")
    content = (made.onnx / "model.onnx").read_bytes()
    user = getpass.getuser()
    for trace_of_it in (str(made.onnx), str(Path(__file__).parents[1]), str(Path.home()), f"/{user}/", "site-packages",
                        sys.prefix, ".py", "Traceback", "torch.nn", "pkg."):  # fmt: skip
        assert trace_of_it.encode() not in content, trace_of_it
