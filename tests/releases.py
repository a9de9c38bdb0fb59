"""Tiny artifacts whose gates pass, keys, and releases of them, for the tests of releasing."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from peft import LoraConfig

import adapters
import disk_cache
import factories
from qexport.pipeline import run
from qexport.recipe import load_recipe

VERSION = "1.4.0"
RECIPE: dict[str, Any] = {
    "load": {"base": "./tiny", "adapter": "./notes"},
    "quantize": {"method": "w8a8"},
    "export": [{"layout": "safetensors"}, {"layout": "vllm"}],
    "verify": {
        "text": "heldout.jsonl", "windows": 24, "max_windows": 48, "sequence_length": 32,
        "profile": "off", "gates": {"mean_kl": {"at_most": 5.0}},
    },
    "output": "out",
}  # fmt: skip
CARD = "---\nlicense: apache-2.0\nlanguage: [en, fr]\n---\n# tiny\n"


def proven(folder: Path) -> Path:
    """The recipe's artifact, whose gates passed; made once."""
    with tarfile.open(fileobj=io.BytesIO(disk_cache.kept("released artifact", _packed))) as tar:
        tar.extractall(folder, filter="data")
    return folder / "out"


def _packed() -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        artifact(Path(scratch))
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            tar.add(scratch, ".")
        return stream.getvalue()


def artifact(folder: Path) -> Path:
    """What a run makes of the inputs."""
    inputs(folder)
    return run(load_recipe(folder / "recipe.yaml"), device="cpu").artifact_path


def inputs(folder: Path, **changes: Any) -> None:
    """A base with license and notice, an adapter without, and a recipe."""
    model = factories.build(factories.llama_config())
    factories.save(model, folder / "tiny")
    (folder / "tiny" / "README.md").write_text(CARD)
    (folder / "tiny" / "LICENSE").write_text("Do as you like.\n")
    (folder / "tiny" / "NOTICE").write_text("Made by somebody.\n")
    adapters.save_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), folder / "notes")
    factories.write_text(folder / "heldout.jsonl", seed=2)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE | changes))


def key(folder: Path, name: str = "release") -> tuple[Path, Path]:
    """A private key by openssl, and its public one."""
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private)
    openssl("ec", "-in", private, "-pubout", "-out", public)
    return private, public


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
