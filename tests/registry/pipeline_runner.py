"""Runs the scripts of docs/ci.md's pipelines on this machine, job by job, as GitHub and GitLab would: each in a clean
checkout. What is theirs (docker, gh, pip) is stood in for by scripts that keep what they were told.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines import pipelines
from running_registry import NAME, PASSWORD, RunningRegistry, log_in

DOCKER = """
import base64, json, os, pathlib, sys
login, host, user, name, stdin = sys.argv[1:]
assert (login, user, stdin) == ("login", "--username", "--password-stdin")
folder = pathlib.Path(os.environ["DOCKER_CONFIG"])
folder.mkdir(exist_ok=True)
auth = base64.b64encode(f"{name}:{sys.stdin.read()}".encode()).decode()
(folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
"""
PYTHON = """
import pathlib, sys
assert sys.argv[1:] == ["-m", "pip", "install", "--requirement", "requirements.txt"], sys.argv
assert pathlib.Path("requirements.txt").is_file()
"""
GH = """
import pathlib, sys
kind, comment, number, option, file, *rest = sys.argv[1:]
assert (kind, comment, number, option) == ("pr", "comment", "7", "--body-file")
pathlib.Path("comment.md").write_bytes(pathlib.Path(file).read_bytes())
"""


@dataclass
class Runner:
    """A service that runs jobs.

    Attributes:
        checkout: what the repository holds; copied for each job.
        folder: for the jobs.
        registry: that releases go to.
        key: the file with the private key.
    """

    checkout: Path
    folder: Path
    registry: RunningRegistry
    key: Path

    def github(self, event: str, version: str, *jobs: str) -> dict[str, int]:
        """Runs jobs one after another; the exit code of each step that ran, by name."""
        pipeline = pipelines()["github"]
        own = {"REGISTRY": self.registry.host, "REPOSITORY": self.repository, "VERSION": version}
        assert own.keys() == pipeline["env"].keys()
        codes: dict[str, int] = {}
        for job in jobs:
            place, failed = self._checked_out(job), False
            files = {name: str(place / name) for name in ("GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
            environment = self._environment(place) | own | files | {"GITHUB_ACTOR": NAME, "RUNNER_TEMP": str(place)}
            for step in pipeline["jobs"][job]["steps"]:
                if "run" not in step or not wanted(step.get("if", ""), event, place, failed=failed):
                    continue
                secrets = {name: self._secret(value) for name, value in step.get("env", {}).items()}
                code = run(["bash", "-e"], step["run"], place, environment | secrets)
                codes[step["name"]] = code
                failed = failed or code != 0
                environment |= written(place / "GITHUB_ENV")
            if failed:
                break
        return codes

    def gitlab(self, tag: str, *jobs: str) -> dict[str, int]:
        """Runs jobs of a tag; the exit code of each."""
        pipeline = pipelines()["gitlab"]
        codes: dict[str, int] = {}
        for job in jobs:
            place = self._checked_out(job)
            given = {
                "CI_REGISTRY": self.registry.host, "CI_REGISTRY_IMAGE": f"{self.registry.host}/team",
                "CI_REGISTRY_USER": NAME, "CI_REGISTRY_PASSWORD": PASSWORD, "CI_PROJECT_DIR": str(place),
                "CI_COMMIT_TAG": tag, "RELEASE_KEY": str(self.key),
            }  # fmt: skip
            variables = [f'export {name}="{value}"' for name, value in pipeline["variables"].items()]
            lines = [*variables, *pipeline["default"]["before_script"], *pipeline[job]["script"]]
            environment = self._environment(place) | given
            codes[job] = run(["bash", "-eo", "pipefail"], "\n".join(lines), place, environment)
            after = "\n".join(pipeline[job].get("after_script", []))
            assert run(["bash", "-eo", "pipefail"], after, place, environment) == 0
        return codes

    @property
    def repository(self) -> str:
        return f"oci://{self.registry.host}/team/notes"

    def by_hand(self, script: str) -> None:
        """Runs what a person types, in the checkout, logged in."""
        log_in(self.checkout / "docker", self.registry.host, PASSWORD)
        assert run(["bash", "-e"], script, self.checkout, self._environment(self.checkout)) == 0

    def job(self, name: str) -> Path:
        """The folder of a job that ran."""
        return self.folder / name

    def _checked_out(self, job: str) -> Path:
        place = self.job(job)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.checkout, place)
        return place

    def _environment(self, place: Path) -> dict[str, str]:
        stand_ins = self.folder / "programs"
        stand_ins.mkdir(exist_ok=True)
        for name, text in {"docker": DOCKER, "python": PYTHON, "gh": GH}.items():
            (stand_ins / name).write_text(f"#!{sys.executable}{text}")
            (stand_ins / name).chmod(0o755)
        programs = [str(stand_ins), str(Path(sys.executable).parent), os.environ["PATH"]]
        own = {"DOCKER_CONFIG": str(place / "docker"), "SSL_CERT_FILE": str(self.registry.certificate)}
        return os.environ | own | {"PATH": os.pathsep.join(programs), "XDG_CACHE_HOME": str(place / "cache")}

    def _secret(self, expression: str) -> str:
        values = {
            "${{ github.token }}": PASSWORD, "${{ secrets.RELEASE_KEY }}": self.key.read_text().rstrip(),
            "${{ github.event.number }}": "7",
        }  # fmt: skip
        return values[expression]


def wanted(condition: str, event: str, place: Path, *, failed: bool) -> bool:
    """Whether a step runs: its condition is a conjunction, and without `always()` nothing before it may have failed."""
    parts = [part.strip() for part in condition.split("&&")] if condition else []
    values = {
        "always()": True,
        "hashFiles('report/report.md') != ''": (place / "report/report.md").is_file(),
        f"github.event_name == '{event}'": True,
    }
    unmet = [part for part in parts if not values.get(part, False)]
    assert all(part in values or part.startswith("github.event_name == ") for part in unmet), condition
    return not unmet and ("always()" in parts or not failed)


def run(shell: list[str], script: str, place: Path, environment: Mapping[str, str]) -> int:
    done = subprocess.run(
        [*shell, "-c", script], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    print(f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.returncode


def written(file: Path) -> dict[str, str]:
    """The variables in a file of GitHub's."""
    return dict(line.split("=", 1) for line in file.read_text().splitlines()) if file.exists() else {}
