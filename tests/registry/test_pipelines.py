"""The pipelines of docs/ci.md, run as they stand, with a tiny model and a real registry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import releases
from pipeline_runner import Runner
from pipelines import PAGE
from running_registry import NAME, PASSWORD, make_certificate, running_registry

VERIFY = releases.RECIPE["verify"] | {"baseline": "production"}
RECIPE = {
    "load": {"base": "./tiny", "adapter": "./adapter"}, "verify": VERIFY, "export": [{"layout": "vllm"}],
    "output": "out/notes",
}  # fmt: skip


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A repository as the page wants it, whose first release was made as the page says."""
    folder = tmp_path_factory.mktemp("service")
    checkout = folder / "checkout"
    releases.inputs(checkout, **RECIPE)
    (checkout / "notes").rename(checkout / "adapter")
    (checkout / "requirements.txt").touch()
    (checkout / "release-gates.yaml").write_text("profile: 'off'\ngates: {mean_kl: {at_most: 4.0}}\n")
    with running_registry(folder, make_certificate(folder)) as registry:
        made = Runner(checkout, folder / "jobs", registry, folder / "release.key")
        made.folder.mkdir()
        block = PAGE.read_text(encoding="utf-8").partition("```console\n")[2].partition("```")[0]
        script = "".join(line.removeprefix("$ ") for line in block.splitlines(keepends=True))
        made.by_hand(script.replace("oci://registry.example.com/models/notes", made.repository))
        (checkout / "release.key").rename(made.key)
        shutil.rmtree(checkout / "out")
        yield made


def digests(runner: Runner, *tags: str) -> list[str]:
    found = []
    for tag in tags:
        answer = requests.head(
            f"https://{runner.registry.host}/v2/team/notes/manifests/{tag}", auth=(NAME, PASSWORD), timeout=30,
            headers={"Accept": "application/vnd.oci.image.index.v1+json"}, verify=str(runner.registry.certificate),
        )  # fmt: skip
        found.append(answer.headers.get("Docker-Content-Digest", ""))
    return found


def verdicts(report: Path) -> dict[str, str]:
    return {gate["name"]: gate["verdict"] for gate in json.loads(report.read_text())["gates"]}


def test_github_takes_a_tag_to_production_and_back(runner: Runner) -> None:
    codes = runner.github("push", "v1.1.0", "build", "verify", "promote")
    assert set(codes.values()) == {0}
    assert {"Run", "Release", "Verify", "Promote"} <= codes.keys()
    assert "Comment on the pull request" not in codes
    first, second, stable = digests(runner, "1.0.0", "1.1.0", "stable")
    assert first != second == stable
    for report in (runner.job("build") / "report/report.json", runner.job("verify") / "report/report.json"):
        assert verdicts(report)["baseline_mean_kl"] == "pass"
    assert list(runner.job("build").glob("**/release.key")) == []
    assert runner.github("workflow_dispatch", "1.0.0", "promote")["Promote"] == 0
    assert digests(runner, "stable") == [first]


def test_github_stops_at_a_failed_gate_and_comments(runner: Runner) -> None:
    recipe = runner.checkout / "recipe.yaml"
    before = recipe.read_text()
    recipe.write_text(before.replace('"at_most": 5.0', '"at_most": 1e-4'))
    codes = runner.github("pull_request", "7/merge", "build")
    recipe.write_text(before)
    assert codes["Run"] == 6
    assert (codes["Show the report"], codes["Comment on the pull request"]) == (0, 0)
    assert (runner.job("build") / "comment.md").read_text().startswith("### ❌ Failed: ")
    assert verdicts(runner.job("build") / "report/report.json")["mean_kl"] == "fail"


def test_gitlab_takes_a_tag_to_production(runner: Runner) -> None:
    assert runner.gitlab("v1.2.0", "build", "verify", "promote") == {"build": 0, "verify": 0, "promote": 0}
    third, stable = digests(runner, "1.2.0", "stable")
    assert third == stable != ""
    assert (runner.job("build") / "report/junit.xml").is_file()
    assert verdicts(runner.job("verify") / "report/report.json")["baseline_mean_kl"] == "pass"
