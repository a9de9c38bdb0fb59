"""Sweeps as files: which variants they name, and what is wrong with them, each at its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qexport.errors import RecipeError
from qexport.recipe.sweep import MOST_VARIANTS, LoadedSweep, Sweep, load_sweep, sweep_schema

ROOT = Path(__file__).parents[1]
RECIPE = """\
load: {base: ./model}
quantize:
  method: gptq
  calibration: {source: calibration.jsonl}
export: [{layout: safetensors}]
verify: {text: heldout.jsonl}
output: out
"""


FOUR = "matrix: {quantize.bits: [4]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "bare.yaml").write_text(RECIPE.replace("verify: {text: heldout.jsonl}\n", ""))
    return tmp_path


def loaded(folder: Path, text: str, *overrides: str, head: str = "recipe: recipe.yaml\noutput: made\n") -> LoadedSweep:
    path = folder / "sweep.yaml"
    path.write_text(head + text)
    return load_sweep(path, overrides)


def refused(folder: Path, text: str, *overrides: str, head: str = "recipe: recipe.yaml\noutput: made\n") -> str:
    with pytest.raises(RecipeError) as error:
        loaded(folder, text, *overrides, head=head)
    assert error.value.where == str(folder / "sweep.yaml")
    return error.value.what


def test_each_combination_is_a_variant_with_a_name_of_its_own(folder: Path) -> None:
    found = loaded(
        folder,
        """\
overrides: {verify.max_windows: 32}
matrix:
  quantize.bits: [3, 4]
  quantize: [{method: nf4, double_quant: true}, {method: int8}]
  export: [[{layout: safetensors}], [{layout: tgi}, {layout: safetensors}]]
exclude:
  - {quantize.bits: 3}
variants:
  - name: eight
    overrides: {quantize.bits: 8, quantize.calibration.source: other.jsonl}
""",
        "verify.windows=16",
    )
    names = ["bits-4_nf4-double_quant-true_safetensors", "bits-4_nf4-double_quant-true_tgi+safetensors"]
    names += ["bits-4_int8_safetensors", "bits-4_int8_tgi+safetensors", "eight"]
    assert [variant.name for variant in found.variants] == names
    assert (found.keep, found.output, found.recipe) == ("all", folder / "made", folder / "recipe.yaml")
    eight = found.variants[-1]
    assert eight.overrides[:3] == ["verify.windows=16", "verify.max_windows=32", "quantize.bits=8"]
    assert eight.recipe.output == str(folder / "made" / "eight")
    assert eight.recipe.quantize.calibration_settings is not None
    assert eight.recipe.quantize.calibration_settings.source == str(folder / "other.jsonl")
    assert {(each.recipe.verify.windows, each.recipe.verify.max_windows) for each in found.variants if each.recipe.verify} == {(16, 32)}  # fmt: skip  # noqa: E501


def test_the_texts_of_a_variant_make_the_same_recipe_in_a_run(folder: Path) -> None:
    from qexport.recipe import load_recipe

    text = "matrix: {quantize: [{method: nf4, skip_modules: ['*.0.*', 'true']}, {method: w8a8}]}"
    for variant in loaded(folder, text).variants:
        again = load_recipe(folder / "recipe.yaml", variant.overrides)
        assert again.model_copy(update={"output": variant.recipe.output}) == variant.recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it names no variants"),
        ("matrx: {quantize.bits: [4]}", "sweep.yaml:3: matrx: unknown key; did you mean matrix?"),
        ("matrix:\n  quantize.bits: 4", "sweep.yaml:4: matrix.quantize.bits: must be a list"),
        ("matrix:\n  quantize.bits: []", "sweep.yaml:4: matrix.quantize.bits"),
        ("matrix:\n  quantize.bits: [4, 5]", "sweep.yaml:4: quantize.bits: must be 2, 3, 4 or 8, not 5"),
        ("matrix:\n  quantize.bitz: [4, 8]", "sweep.yaml:4: quantize.bitz: unknown key; did you mean bits?"),
        ("matrix:\n  quantize..bits: [4, 8]", "sweep.yaml:4: quantize..bits: write a dotted path"),
        ("matrix:\n  verify.windows: [4, 8]", "sweep.yaml:4: matrix.verify.windows: variants differ in quantize and"),
        ("variants:\n - {name: a, overrides: {load.base: x}}", "variants.0.overrides.load.base: variants differ in"),
        ("variants:\n - {name: a/b, overrides: {quantize.bits: 8}}", "sweep.yaml:4: variants.0.name"),
        ("variants:\n - {name: a.partial, overrides: {quantize.bits: 8}}", "must not be called a.partial"),
        ("matrix:\n  quantize.bits: [4, 4.0]", "4.0"),
        ("matrix:\n  quantize.bits: [4, 4]", "sweep.yaml:3: name: several variants are called bits-4"),
        (f"{FOUR}\nvariants:\n- {{name: Bits-4, overrides: {{quantize.bits: 8}}}}", "sweep.yaml:5: name"),
        (f"{FOUR}\nvariants:\n- {{name: a, overrides: {{quantize.bits: 4}}}}", "makes the same as bits-4"),
        (f"{FOUR}\nexclude:\n- {{quantize.bits: 8}}", "sweep.yaml:5: exclude.0.quantize.bits: the matrix"),
        ("matrix: {quantize.bits: [4]}\nexclude:\n- {quantize.bits: 4}", "it names no variants"),
        ("matrix: {quantize.bits: [4]}\noverrides: {output: x}", "sweep.yaml:4: overrides.output"),
        ("matrix: {quantize.bits: [4]}\nkeep: most", "sweep.yaml:4: keep: must be 'all' or 'best', not 'most'"),
        (f"matrix: {{quantize.samples: [{', '.join(map(str, range(MOST_VARIANTS + 1)))}]}}", "at most 200 are made"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_at_its_line(folder: Path, text: str, said: str) -> None:
    assert said in refused(folder, text)


def test_a_problem_of_one_variant_names_it(folder: Path) -> None:
    said = refused(folder, "matrix:\n  quantize.bits: [3, 4]\n  quantize: [{method: nf4}, {method: w8a8, x: 1}]")
    assert "sweep.yaml:5: quantize.x: unknown key" in said
    assert said.count("quantize.x") == 1
    assert "variants bits-3_w8a8-x-1" in said


def test_a_recipe_without_verification_cannot_be_compared(folder: Path) -> None:
    said = refused(folder, "matrix: {quantize.bits: [4]}", head="recipe: bare.yaml\noutput: made\n")
    assert "the recipe has no verify" in said


def test_a_sweep_without_a_folder_is_refused(folder: Path) -> None:
    assert "output: missing" in refused(folder, "matrix: {quantize.bits: [4]}", head="recipe: recipe.yaml\n")


def test_a_wrong_override_of_the_command_line_is_told_as_such(folder: Path) -> None:
    said = refused(folder, "matrix: {quantize.bits: [4]}", "verify.windowz=3")
    assert "command line: verify.windowz: unknown key" in said


def test_the_ready_sweep_has_eight_variants_and_names_its_schema() -> None:
    path = ROOT / "recipes" / "sweep.yaml"
    assert len(load_sweep(path).variants) == 8
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=sweep.schema.json\n")
    assert (ROOT / "recipes" / "sweep.schema.json").read_text(encoding="utf-8") == sweep_schema()


def test_every_field_is_described() -> None:
    page = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page.partition("| field |")[2].partition("\n\n")[0], flags=re.MULTILINE)
    assert rows == list(Sweep.model_fields)


def test_the_sweep_in_the_documents_is_valid(folder: Path) -> None:
    page = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (folder / "gptq-4bit.yaml").write_text(RECIPE)
    found = loaded(folder, block, head="")
    assert [variant.name for variant in found.variants][-3:] == ["bits-8_group_size-64", "nf4", "for-llama.cpp"]
    assert len(found.variants) == 7
