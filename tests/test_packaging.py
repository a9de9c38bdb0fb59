"""What is published as a package, and what keeps the project's settings in step with each other."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import qexport

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ["dev", "docs", "genai", "readers", "tasks"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "qexport/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"qexport", f"qexport-{PROJECT['version']}.dist-info"}
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qexport").rglob("*.jinja")}
    assert templates <= names


def test_the_version_is_that_of_the_project() -> None:
    assert qexport.__version__ == PROJECT["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(\d[^]]*)\]", changelog, flags=re.MULTILINE)[0] == PROJECT["version"]


def test_the_version_costs_no_import_of_torch() -> None:
    code = "import sys, qexport; qexport.__version__; print({'torch', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def locked(name: str) -> dict[str, list[str]]:
    """The blocks of a lock by package: the pin and its hashes."""
    text = re.sub(r"^#.*\n", "", (ROOT / f"requirements/{name}.txt").read_text(), flags=re.MULTILINE)
    blocks = [re.split(r" \\\n\s+", block.strip()) for block in re.split(r"\n(?=\S)", text) if block.strip()]
    return {block[0]: block[1:] for block in blocks}


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_a_version_and_hashes_and_no_address(name: str) -> None:
    packages = locked(name)
    assert packages
    for pin, hashes in packages.items():
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+!]+( ; .*)?", pin)
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), pin
    assert not re.search(r"://|^--|^torch==", (ROOT / f"requirements/{name}.txt").read_text(), flags=re.MULTILINE)


def test_every_direct_dependency_is_locked() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = {
        "dev": PROJECT["dependencies"] + extras["dev"] + extras["onnx"] + extras["release"],
        "tasks": PROJECT["dependencies"] + extras["dev"] + extras["tasks"],
        "docs": extras["docs"],
    }
    for name, requirements in wanted.items():
        names = {re.split(r"[<>=\[]", each)[0].lower().replace("_", "-").replace(".", "-") for each in requirements}
        assert names - {pin.partition("==")[0] for pin in locked(name)} == ({"torch"} if name != "docs" else set()), (
            name
        )


def test_torch_is_pinned_apart_from_the_locks() -> None:
    lines = (ROOT / "requirements/torch.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["torch==2.13.0"]


def workflow() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load((ROOT / ".github/workflows/ci.yml").read_text())
    return found


def test_the_workflow_runs_what_a_change_must_pass_on_every_python_that_is_claimed() -> None:
    [job] = workflow()["jobs"].values()
    claimed = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if ":: Python :: 3." in each]
    assert job["strategy"]["matrix"]["python"] == claimed == ["3.11", "3.12", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    for step in job["steps"]:
        assert "run" in step or re.fullmatch(r"[\w./-]+@v\d+", step["uses"])
    assert workflow()["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_have_what_github_demands(path: Path) -> None:
    form = YAML(typ="safe").load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": False}
        return
    assert form.keys() >= {"name", "description", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_pre_commit_runs_the_programs_of_the_environment() -> None:
    config = YAML(typ="safe").load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-format", "ruff-check", "mypy"]
    assert all(hook["entry"].startswith(".venv/bin/") and hook["language"] == "system" for hook in hooks)
