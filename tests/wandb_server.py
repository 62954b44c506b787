"""A loopback W&B server for tests: what the real client needs to start, resume, log and finish runs.

It keeps runs in memory and answers GraphQL (`Viewer`, `RunResumeStatus`, `UpsertBucket`, anything
else with an empty object) and `file_stream`. It does not prove what wandb.ai does with the rows.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

API_KEY = "c0ffee" * 6 + "abcd"  # the client wants 40 characters
_STREAM = re.compile(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream\Z")


@dataclass(slots=True)
class ServerRun:
    """One run as the server knows it."""

    name: str
    project: str
    display_name: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    is_preempting: bool = False
    num_inits: int = 0

    @property
    def steps(self) -> list[int]:
        """The steps of all rows, in the order they lie in."""
        return [row["_step"] for row in self.history]


class WandbServer:
    """Serves on a free loopback port; a context manager."""

    def __init__(self) -> None:
        self.runs: dict[str, ServerRun] = {}
        self.operations: list[str] = []
        self.changed = threading.Condition()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _Quiet(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL is set to."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def wait_for(self, condition: Any, timeout_s: float = 20.0) -> bool:
        """Wait until `condition()` holds; asked after each request."""
        with self.changed:
            return self.changed.wait_for(condition, timeout_s)

    # --- the protocol ----------------------------------------------------------------------

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The `data` of one GraphQL answer."""
        self.operations.append(operation)
        if operation == "Viewer":
            teams = {"edges": [{"node": {"name": "me"}}]}
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": teams}}
        if operation == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            bucket = _resume_bucket(run) if run else None
            model = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            return {"model": {**model, "bucket": bucket}}
        if operation == "UpsertBucket":
            return {"upsertBucket": self._upsert(variables)}
        if operation == "CreateRunFiles":  # HAZARD: an empty answer crashes wandb-core
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}
        return {}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        is_new = name not in self.runs
        run = self.runs.setdefault(name, ServerRun(name=name, project=variables.get("project") or "p"))
        run.num_inits += 1
        run.display_name = variables.get("displayName") or run.display_name
        run.group = variables.get("groupName") or run.group
        run.tags = variables.get("tags") or run.tags
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        entity = {"id": "e", "name": "me"}
        project = {"id": "p", "name": run.project, "entity": entity}
        bucket = {"id": f"id-{name}", "name": name, "displayName": run.display_name, "project": project}
        return {"bucket": {**bucket, "description": "", "sweepName": None}, "inserted": is_new}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """Store one file_stream request: history lines at their offset, the summary, the end."""
        run = self.runs[name]
        files = body.get("files") or {}
        history = files.get("wandb-history.jsonl")
        if history:
            rows = [json.loads(line) for line in history["content"]]
            run.history[history["offset"] : history["offset"] + len(rows)] = rows
        summary = files.get("wandb-summary.json")
        if summary:
            run.summary = json.loads(summary["content"][-1])
        run.is_preempting = run.is_preempting or bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_codes.append(body.get("exitcode", 0))


def _resume_bucket(run: ServerRun) -> dict[str, Any]:
    return {
        "id": f"id-{run.name}",
        "name": run.name,
        "displayName": run.display_name,
        "summaryMetrics": json.dumps(run.summary),
        "logLineCount": 0,
        "historyLineCount": len(run.history),
        "eventsLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsTail": "[]",
        "config": json.dumps(run.config),
        "tags": run.tags,
        # A run "exists" for a resume only if this has the key "t".
        "wandbConfig": json.dumps({"t": 1}),
    }


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed in these tests; their connections break."""


class _Handler(BaseHTTPRequestHandler):
    owner: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        stream = _STREAM.match(self.path)
        with self.owner.changed:
            if stream:
                self.owner.stream(stream[3], body)
                answer: dict[str, Any] = {"exitcode": None, "limits": {}}
            else:
                operation = body.get("operationName") or _operation(body.get("query", ""))
                answer = {"data": self.owner.graphql(operation, body.get("variables") or {})}
            self.owner.changed.notify_all()
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer({})

    def _answer(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        return None


def _operation(query: str) -> str:
    match = re.search(r"(?:query|mutation)\s+(\w+)", query)
    return match[1] if match else ""
