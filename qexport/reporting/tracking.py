"""Entries in an MLflow tracking server. `connect` asks it before any work; what fails later is returned, not raised: a
server that fails must not end a run whose artifact is complete.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from qexport.errors import InputError, RecipeError
from qexport.reporting.tracked import Tracked

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SETTINGS: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""MLflow's own, where the user sets none: it reports its use to its makers, and asks a dead server for minutes."""

_AT_ONCE: Final = 100
"""Settings, figures or tags in one request, which every server takes."""

_LONGEST_REASON: Final = 300


@dataclass(frozen=True)
class Logged:
    """What became of an entry.

    Attributes:
        name: of the entry.
        run_id: MLflow's; None if the entry could not be begun.
        missing: what was not logged, with the reason; empty if all was.
    """

    name: str
    run_id: str | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tracker:
    """An experiment in a tracking server.

    Attributes:
        client: MLflow's.
        experiment: its name.
        experiment_id: its id.
        began: when the command began, in milliseconds since 1970.
    """

    client: MlflowClient
    experiment: str
    experiment_id: str
    began: int

    def log(self, entry: Tracked) -> Logged:
        """Makes an entry. Each part is tried, also after another has failed; MLflow's state `FAILED` stands for gates
        that did not pass.
        """
        try:
            # the client names no user and no program of this machine; MLflow's `start_run` would
            run = self.client.create_run(self.experiment_id, start_time=self.began, run_name=entry.name)
        except Exception as error:  # of an answer that makes no sense, the errors of whatever parses it
            return Logged(entry.name, None, (f"everything: {_reason(error)}",))
        run_id = str(run.info.run_id)
        parts: dict[str, Callable[[], None]] = {
            "settings, figures and verdicts": lambda: self._log_values(run_id, entry),
            ", ".join(entry.files): lambda: self._log_files(run_id, entry.files),
            "the end of the entry": lambda: self.client.set_terminated(run_id, _STATES[entry.passed]),
        }
        missing = []
        for part, log in parts.items():
            try:
                log()
            except Exception as error:  # of storages, whose packages have exceptions of their own
                missing.append(f"{part or 'no file'}: {_reason(error)}")
        return Logged(entry.name, run_id, tuple(missing))

    def _log_values(self, run_id: str, entry: Tracked) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        kinds: dict[str, list[Any]] = {
            "tags": [RunTag(key, value) for key, value in entry.tags.items()],
            "params": [Param(key, value) for key, value in entry.params.items()],
            "metrics": [Metric(key, value, now, 0) for key, value in entry.metrics.items()],
        }
        for kind, values in kinds.items():
            for first in range(0, len(values), _AT_ONCE):
                self.client.log_batch(run_id, **{kind: values[first : first + _AT_ONCE]})

    def _log_files(self, run_id: str, files: Mapping[str, str]) -> None:
        with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
            for name, text in files.items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="")
            if files:
                self.client.log_artifacts(run_id, folder)


_STATES: Final = {True: "FINISHED", False: "FAILED"}


def connect(uri: str, experiment: str) -> Tracker:
    """Finds an experiment, or makes it.

    Args:
        uri: of the server (http, https), or what else the installed MLflow takes.
        experiment: its name.

    Raises:
        RecipeError: MLflow is not installed, does not take the URI, or the experiment was deleted; or the URI is
            malformed or has credentials.
        InputError: the server does not answer, refuses, or answers with something else.
    """
    if _has_credentials(uri):
        raise RecipeError(
            "credentials in the address of a tracking server show in logs and process lists",
            where="--mlflow",
            mend="give it in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )
    began = int(time.time() * 1000)
    client = _client(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    except Exception as error:  # see `Tracker.log`
        what = f"the tracking server cannot be used: {_reason(error)}"
        raise InputError(what, where=uri, mend="start it, correct --mlflow, or leave it out") from error
    if found is not None and found.lifecycle_stage == "deleted":
        mend = f"mlflow experiments restore --experiment-id {experiment_id}, or name another with --mlflow-experiment"
        raise RecipeError("the experiment was deleted", where=experiment, mend=mend)
    if not experiment_id or (found is not None and found.lifecycle_stage != "active"):
        stage = "" if found is None else f" in the state {found.lifecycle_stage!r}"
        what = f"the tracking server answers with the experiment {str(experiment_id)!r}{stage}, which is none"
        raise InputError(what, where=uri, mend="check that --mlflow is the address of MLflow itself")
    return Tracker(client, experiment, str(experiment_id), began)


def _has_credentials(uri: str) -> bool:
    """Whether a URI has a password, or that of a server a user, which may be a token."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise RecipeError(
            f"this is no address: {error}", where="--mlflow", mend="write it as https://HOST or https://HOST:PORT"
        ) from error
    return parts.password is not None or (parts.scheme in ("http", "https") and parts.username is not None)


def _client(uri: str) -> MlflowClient:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError as error:
        what = f"logging to MLflow needs the package {error.name}"
        raise RecipeError(what, where="--mlflow", mend="pip install 'qexport[mlflow]'") from error
    try:
        return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        mend = (
            "give the address of a server; for a folder set MLFLOW_ALLOW_FILE_STORE=true; databases need the whole "
            "package: pip install mlflow"
        )
        raise RecipeError(f"MLflow refuses its store: {_reason(error)}", where=uri, mend=mend) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
