"""The container images in launch files are the recipe's, and stay the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import factories
import gguf_folders
from qexport.export import OnnxSettings, TgiSettings, VllmSettings, checked_image
from qexport.export.tgi.layout import TgiLayout
from qexport.export.vllm.layout import VllmLayout
from qexport.release.launching import render

DIGEST = f"@sha256:{64 * 'a'}"
MIRROR = f"mirror.example.com:5000/serving/image{DIGEST}"
NAMED = re.compile(r"[\w.:/@-]*(?:vllm-openai|text-generation-inference|tritonserver|serving/image)[:@][\w.:@-]+")


@pytest.mark.parametrize("layout", ["tgi", "vllm"])
def test_every_launch_file_names_the_image_of_the_recipe(layout: str, tmp_path: Path) -> None:
    base = gguf_folders.checkpoint(factories.llama_config(), tmp_path)
    options: dict[str, Any] = {"image": MIRROR} if layout == "tgi" else {"image": MIRROR, "triton_image": MIRROR}
    own = gguf_folders.layout(layout, base)
    mirrored = gguf_folders.layout(layout, base, **options)
    assert isinstance(own, TgiLayout | VllmLayout)
    assert isinstance(mirrored, TgiLayout | VllmLayout)
    usual = {name for content in render(own.launch).values() for name in NAMED.findall(content.decode())}
    assert usual >= {TgiSettings().image if layout == "tgi" else VllmSettings().image}
    files = [content.decode() for content in render(mirrored.launch).values()]
    assert {name for content in files for name in NAMED.findall(content)} == {MIRROR}
    assert not any(name in content for content in files for name in usual)


@pytest.mark.parametrize(
    "name", ["a:1", "a/b:1", f"a{DIGEST}", f"h.example:80/a/b-c:v1_2{DIGEST}", "localhost:5000/a:1"]
)
def test_an_image_with_a_tag_or_a_digest_is_taken(name: str) -> None:
    assert checked_image(name) == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vllm/vllm-openai", "neither a tag nor a digest"),
        ("localhost:5000/a", "neither a tag nor a digest"),
        ("a:1\nimage: b", "expected a container image"),
        ("a:$(id)", "expected a container image"),
        ("a@sha256:12", "expected a container image"),
        ("https://h.example/a:1", "expected a container image"),
        ("-v:1", "expected a container image"),
        ("", "expected a container image"),
    ],
)
def test_what_is_no_image_or_moves_is_refused(name: str, words: str) -> None:
    for settings in (TgiSettings, VllmSettings):
        with pytest.raises(ValidationError, match=words):
            settings.model_validate({"image": name})
    with pytest.raises(ValidationError, match=words):
        OnnxSettings.model_validate({"triton_image": name})


@given(st.text(max_size=60) | st.from_regex(r"[a-z0-9./:@ -]{0,60}", fullmatch=True))
def test_what_is_taken_is_one_word_for_a_shell_and_for_yaml(name: str) -> None:
    try:
        taken = checked_image(name)
    except ValueError:
        return
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", taken)
