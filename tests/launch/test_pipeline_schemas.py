"""`make test-launch`: the pipelines of docs/ci.md fit the schemas of GitHub and GitLab; planted faults do not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipelines import pipeline_texts

PYTHON = os.environ.get("QEXPORT_LAUNCH_PYTHON", "")
SCHEMAS = {
    "github": ["vendor.github-workflows"],
    "github with timeouts": ["custom.github-workflows-require-timeout"],
    "gitlab": ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
}

pytestmark = pytest.mark.skipif(not PYTHON, reason="QEXPORT_LAUNCH_PYTHON names no interpreter")


def problems(text: str, schema: str, folder: Path) -> str:
    file = folder / "pipeline.yml"
    file.write_text(text)
    command = [PYTHON, "-m", "check_jsonschema", "--builtin-schema", *SCHEMAS[schema], str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_pipeline_is_valid(schema: str, tmp_path: Path) -> None:
    assert problems(pipeline_texts()[schema.split(maxsplit=1)[0]], schema, tmp_path) == ""


@pytest.mark.parametrize(
    ("schema", "old", "new"),
    [
        ("github", "runs-on:", "run-on:"),
        ("github", "workflow_dispatch:", "workflow_dispatched:"),
        ("github", "        uses: actions/cache/save@v5\n", ""),
        ("github", "      packages: write", "      package: write"),
        ("github", "    needs: build", "    needs: {build: true}"),
        ("github with timeouts", "    timeout-minutes: 360\n", ""),
        ("gitlab", "  timeout: 6h", "  timeouts: 6h"),
        ("gitlab", "    exit_codes: 130", "    exit_code: 130"),
        ("gitlab", "      junit: report/junit.xml", "      junits: report/junit.xml"),
        ("gitlab", "      when: manual", "      when: by hand"),
    ],
)
def test_planted_faults_are_found(schema: str, old: str, new: str, tmp_path: Path) -> None:
    text = pipeline_texts()[schema.split(maxsplit=1)[0]]
    assert old in text
    assert problems(text.replace(old, new), schema, tmp_path)
