"""A stand-in for MLflow's tracking server: it keeps what it is told, and fails where it is asked to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

API = "/api/2.0/mlflow"
FILES = "/api/2.0/mlflow-artifacts/artifacts/"
EXPERIMENT = {"experiment_id": "1", "name": "qexport", "artifact_location": "mlflow-artifacts:/1"}


@dataclass
class TrackingServer:
    """What the server was told.

    Attributes:
        uri: its address.
        run_id: of the entry that is made; MLflow's client keeps where the files of a known one go.
        failing: the status that answers to requests whose path contains the text.
        senseless: a part of the path of requests that get an answer of another form.
        stage: of the experiment.
        told: the bodies of requests, with the last part of their path.
        files: what was uploaded.
    """

    uri: str = ""
    run_id: str = ""
    failing: dict[str, int] = field(default_factory=dict)
    senseless: str | None = None
    stage: str = "active"
    told: list[tuple[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """The status and the document of an answer."""
        status = next((status for text, status in self.failing.items() if text in path), 200)
        if status != 200:
            return status, {"error_code": "INTERNAL_ERROR", "message": "the disk is full"}
        if self.senseless is not None and self.senseless in path:
            return 200, {"run": 5, "experiment": 5}
        name = path.partition("?")[0].removeprefix(API)
        if path.startswith(FILES):
            self.files[path.partition(f"/{self.run_id}/artifacts/")[2]] = body
            return 200, {}
        self.told.append((name, json.loads(body or b"{}")))
        run = {
            "run_id": self.run_id, "run_uuid": self.run_id, "experiment_id": "1", "status": "RUNNING",
            "artifact_uri": f"mlflow-artifacts:/1/{self.run_id}/artifacts",
        }  # fmt: skip
        documents = {
            "/experiments/get-by-name": {"experiment": EXPERIMENT | {"lifecycle_stage": self.stage}},
            "/runs/create": {"run": {"info": run, "data": {}}},
            "/runs/get": {"run": {"info": run, "data": {}}},
            "/runs/update": {"run_info": run},
        }
        return 200, documents.get(name, {})


@contextmanager
def serving() -> Iterator[TrackingServer]:
    """A server on loopback, until the block ends."""
    server = TrackingServer(run_id=uuid4().hex)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        do_POST = do_PUT = do_GET

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, document = server.answer(self.path, body)
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.uri = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
