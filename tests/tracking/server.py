"""A fake tracking server: the part of MLflow's REST API that a run needs, failing on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit


@dataclass
class FakeServer:
    """A server that keeps what a real one does: a point is identified by key, step, value and time.

    `mode`: up; 500: refuses before it does anything; lost: does it and answers 500; slow: holds each answer until
    `released` is set.
    """

    folder: Path
    mode: Literal["up", "500", "lost", "slow"] = "up"
    port: int = 0
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    points: dict[str, list[tuple[str, int, float, int]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def history(self, key: str) -> list[tuple[int, float]]:
        """Return the points of all runs, in the order of arrival."""
        return [(step, value) for points in self.points.values() for k, step, value, _ in points if k == key]

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        action = path.partition("/mlflow/")[2]
        run = self.runs.get(asked.get("run_id", ""))
        if action == "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1", "name": "e", "lifecycle_stage": "active"}}
        if action == "runs/create":
            return {"run": self._create(asked)}
        if action == "runs/search":
            wanted = asked["filter"].rpartition("= ")[2].strip("'")
            return {"runs": [r for r in self.runs.values() if wanted in [tag["value"] for tag in r["data"]["tags"]]]}
        assert run is not None, (action, asked)
        if action == "runs/log-batch":
            points = self.points[asked["run_id"]]
            for m in asked.get("metrics", []):
                point = (m["key"], int(m.get("step", 0)), float(m["value"]), int(m["timestamp"]))
                if point not in points:
                    points.append(point)
            run["data"]["tags"] += asked.get("tags", [])
            run["data"]["params"] += asked.get("params", [])
            run["data"]["metrics"] = [{"key": k, "value": v, "step": s, "timestamp": t} for k, s, v, t in points]
            return {}
        if action == "runs/update":
            run["info"].update({k: v for k, v in asked.items() if k in ("status", "end_time")})
            return {"run_info": run["info"]}
        if action == "metrics/get-history":
            found = [p for p in self.points[asked["run_id"]] if p[0] == asked["metric_key"]]
            return {"metrics": [{"key": k, "value": v, "step": s, "timestamp": t} for k, s, v, t in found]}
        assert action == "runs/get", action
        return {"run": run}

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        run_id = f"{len(self.runs):032x}"
        info = {
            "run_id": run_id,
            "run_uuid": run_id,
            "experiment_id": "1",
            "status": "RUNNING",
            "lifecycle_stage": "active",
        }
        info["artifact_uri"] = (self.folder / run_id).as_uri()
        self.points[run_id] = []
        self.runs[run_id] = {"info": info, "data": {"tags": asked.get("tags", []), "params": [], "metrics": []}}
        return self.runs[run_id]


@contextmanager
def listening(server: FakeServer) -> Iterator[FakeServer]:
    """Listen within the block, on the same port each time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

        def reply(self, asked: dict[str, Any]) -> None:
            path = urlsplit(self.path).path
            server.asked.append(path)
            mode = server.mode
            if mode == "slow":
                server.held.set()
                server.released.wait(60)
            with lock:
                answer = {} if mode == "500" or path == "/health" else server.answer(path, asked)
            body = json.dumps(answer).encode()
            self.send_response(500 if mode in ("500", "lost") else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Listening(ThreadingHTTPServer):
        daemon_threads = True

    lock = threading.Lock()
    with Listening(("127.0.0.1", server.port), Handler) as http:
        server.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            http.shutdown()
            thread.join()
