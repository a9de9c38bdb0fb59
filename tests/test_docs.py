"""The documentation against the code: nothing it names is missing, nothing that it must name is left out."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer

from pipelines import commands, pipeline_texts, pipelines, scripts
from qexport.artifact.figures import CATALOGUE
from qexport.artifact.manifest import Manifest
from qexport.artifact.report import REPORT_NAME, Report
from qexport.cli.app import app
from qexport.errors import QexportError
from qexport.reporting.writing import COMMENT_NAME, PAGE_NAME, TEST_RESULTS_NAME

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("calibration/*.md")]
)
COMMANDS = {
    "inspect", "plan", "run", "sweep", "check", "validate", "verify", "release", "promote", "gate", "report", "diff",
    "rebuild", "schema",
}  # fmt: skip
COMMAND_LINE = typer.main.get_command(app)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:qexport|recipes|calibration|benchmarks|tests|docs)/[\w./-]*)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    used = set(re.findall(r"(?:^|`|    )make ([a-z](?:[a-z/.-]*[a-z])?)", page.read_text(), flags=re.MULTILINE))
    assert {name for name in used if "/" not in name} <= targets
    assert all(name in makefile for name in used if "/" in name), "files that are made"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_are_ones_that_the_command_line_knows(page: Path) -> None:
    used = set(re.findall(r"^(?: {4}|\$ )qexport (\w+)", page.read_text(), flags=re.MULTILINE))
    assert used <= COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_environment_recipes_in_commands_exist(page: Path) -> None:
    recipes = re.findall(r"qexport (?:run|plan) (recipes/\S+\.yaml)", page.read_text())
    assert [recipe for recipe in recipes if not (ROOT / recipe).exists()] == []


def test_every_dependency_and_extra_has_its_reason() -> None:
    text = (ROOT / "docs/dependencies.md").read_text().partition("## Locks")[0]
    reasons = set(re.findall(r"^\| `?([\w.-]+)`? \|", text, flags=re.MULTILINE)) - {"package", "extra", "---"}
    declared = {re.split(r"[<>=\[]", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert reasons == declared | set(PROJECT["optional-dependencies"])


def test_the_site_shows_every_page_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\ntheme:")[0]
    shown = re.findall(r"[\w./-]+\.md$", navigation, flags=re.MULTILINE)
    adapters = [page_id(path) for path in ROOT.glob("recipes/adapters/*/*.md")]
    assert sorted(shown) == sorted([page_id(page) for page in PAGES] + adapters)


def test_the_architecture_page_names_every_room() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("## The rooms")[2].partition("##")[0]
    named = {
        room for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for room in re.findall(r"`(\w+)`", row)
    }
    entries = [path for path in (ROOT / "qexport").iterdir() if not path.name.startswith("__")]
    rooms = {path.stem for path in entries if path.is_dir() or path.suffix == ".py"}
    assert named == rooms


def test_the_readme_shows_what_the_recipe_file_holds() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    recipe = (ROOT / "recipes/gptq-4bit.yaml").read_text()
    assert blocks
    shown = [line for line in blocks[0].splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stands = [line for line in recipe.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert shown == stands


def test_the_readme_shows_a_root_digest_for_each_layout_of_the_recipe() -> None:
    shown = re.findall(r"^Root digest  [0-9a-f]{64}  (\w+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    recipe = (ROOT / "recipes/gptq-4bit.yaml").read_text()
    assert shown == re.findall(r"layout: (\w+)", recipe)


def test_the_changelog_has_an_unreleased_section() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def refusal(words: list[str]) -> str:
    """What the command line says to a command's name and arguments, before it does anything."""
    command = COMMAND_LINE.commands[words[0]]  # type: ignore[attr-defined]
    try:
        command.make_context(words[0], words[1:])
    except typer.TyperException as error:
        return f"{shlex.join(words)}: {error.format_message()}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_command_line_takes_every_command_that_is_shown(page: Path) -> None:
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    shown = [words for line in lines for words in commands(line)]
    assert [said for said in map(refusal, shown) if said] == []


@pytest.mark.parametrize("service", ["github", "gitlab"])
def test_pipelines_go_the_whole_way_with_commands_that_exist(service: str) -> None:
    found = scripts(pipelines()[service])
    used = [words for script in found for words in commands(script)]
    assert [said for said in map(refusal, used) if said] == []
    assert list(dict.fromkeys(words[0] for words in used)) == ["check", "plan", "run", "release", "verify", "promote"]
    for script in found:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), script
    files = {REPORT_NAME, PAGE_NAME, COMMENT_NAME, TEST_RESULTS_NAME}
    assert set(re.findall(r"report/(\w+\.\w+)", pipeline_texts()[service])) == files


def test_pipelines_put_no_expression_into_a_script() -> None:
    """GitHub would put a stranger's text into the script; and a script without them can be run here."""
    assert [script for script in scripts(pipelines()["github"]) if "${{" in script] == []


def test_the_pipelines_page_tells_every_exit_code_but_that_of_defects() -> None:
    table = (ROOT / "docs/ci.md").read_text(encoding="utf-8").partition("## What a step says")[2]
    codes = {error.exit_code for error in QexportError.__subclasses__()} | {130}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)} == codes


def rows(page: str, heading: str) -> list[str]:
    """The names in the first cells of the tables of a section."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_every_figure_is_explained_and_no_other() -> None:
    assert sorted(rows("docs/verification.md", "The figures")) == sorted(CATALOGUE)


def test_every_figure_is_told_in_two_sentences_with_a_source() -> None:
    section = (ROOT / "docs/verification.md").read_text(encoding="utf-8").partition("## The figures")[2]
    lines = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", section.partition("## Uncertainty")[0], flags=re.MULTILINE)
    assert len(lines) == len(CATALOGUE)
    for name, meaning, source in lines:
        assert len(re.findall(r"[.](?= [A-Z`0-9]|$)", meaning)) == 2, name
        assert source, name


def test_every_field_of_report_and_manifest_is_described() -> None:
    assert sorted(rows("docs/verification.md", "What `report.json` holds")) == sorted(Report.model_fields)
    manifest = rows("docs/artifact.md", "The manifest")
    assert sorted(manifest) == sorted(Manifest.model_fields)
