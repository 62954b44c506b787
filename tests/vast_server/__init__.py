"""VastAI on the loopback: the endpoints that the real `vastai` client uses, with instances that run.

An instance is a directory, and its container the processes that its on-start script started there:
with a HOME, a workspace and an environment of their own. Faults come on demand. What it does not
prove: prices, images, GPUs, and what VastAI itself does that its documentation does not say.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ACCOUNT_KEY = "ac" * 32
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b, "neq": lambda a, b: a != b, "lte": lambda a, b: a <= b, "lt": lambda a, b: a < b,
    "gte": lambda a, b: a >= b, "gt": lambda a, b: a > b, "in": lambda a, b: a in b, "notin": lambda a, b: a not in b,
}  # fmt: skip


@dataclass
class Fault:
    """What happens to a request in place of its answer.

    Attributes:
        what: Matched against `METHOD /path`.
        times: How often; each request takes one.
        status: The answer's status; 0: the connection is closed without one.
        is_done: What was asked is done all the same.
    """

    what: str
    times: int = 1
    status: int = 500
    body: str = "{}"
    kind: str = "application/json"
    delay_s: float = 0.0
    is_done: bool = False


@dataclass
class Box:
    """One instance.

    Attributes:
        body: What it was created with.
        key: Good for this instance only.
        actual: State of the container.
        state: State of the contract.
        is_listed: Listings show it.
        is_heard: Somebody has read the last word of its script.
    """

    number: int
    offer: dict[str, Any]
    body: dict[str, Any]
    folder: Path
    key: str = field(default_factory=lambda: secrets.token_hex(32))
    label: str = ""
    actual: str | None = None
    intended: str = "running"
    state: str = "running"
    is_listed: bool = True
    is_heard: bool = False
    num_starts: int = 0
    began_s: float = field(default_factory=time.time)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def work(self) -> Path:
        return self.folder / "workspace"

    def row(self) -> dict[str, Any]:
        """As the API shows it."""
        environment = [[name, value] for name, value in self.body["env"].items()]
        return {
            "id": self.number, "label": self.label, "actual_status": self.actual, "intended_status": self.intended,
            "cur_state": self.state, "dph_total": self.body["price"] or self.offer["dph_total"],
            "machine_id": self.offer["machine_id"], "num_gpus": self.offer["num_gpus"], "gpu_name": self.offer["gpu_name"],
            "start_date": self.began_s, "extra_env": environment, "image_uuid": self.body["image"],
        }  # fmt: skip

    def pids(self) -> list[int]:
        """Processes of its container that live: each has the container's own variable."""
        mark = f"SWEEPER_WORKSPACE={self.work}".encode()
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and mark in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
        return found

    def kill(self) -> None:
        """End its container at once, as an interruption does."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.process is not None:
                self.process.poll()
            time.sleep(0.01)

    def start(self, url: str, more: dict[str, str]) -> None:
        """Run its container, the first time or again."""
        for folder in (self.folder / "home", self.work):
            folder.mkdir(parents=True, exist_ok=True)
        script = self.folder / "onstart.sh"
        script.write_text(self.body["onstart"])
        environment = {
            "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(self.folder / "home"), "VAST_URL": url,
            "CONTAINER_ID": str(self.number), "CONTAINER_API_KEY": self.key, "SWEEPER_WORKSPACE": str(self.work),
            **{name: value for name, value in self.body["env"].items() if not name.startswith("-")}, **more,
        }  # fmt: skip
        self.actual, self.state, self.num_starts = "running", "running", self.num_starts + 1
        self.is_heard = False
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["bash", str(script)], cwd=self.folder, env=environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self.process.wait, daemon=True).start()


def offer(number: int, **changes: Any) -> dict[str, Any]:
    """An offer as the API shows it."""
    return {
        "id": number, "machine_id": 9000 + number, "gpu_name": "RTX 4090", "num_gpus": 1, "dph_total": 0.4,
        "min_bid": 0.2, "storage_total_cost": 0.01, "reliability": 0.99, "disk_space": 500.0, "geolocation": "Iceland, IS",
        "verified": True, "external": False, "rentable": True, **changes,
    }  # fmt: skip


class VastServer:
    """The service; a context manager. All that runs ends with it.

    Attributes:
        creations: Bodies of the requests that rented.
        calls: `METHOD /path` of every request, in order.
        environment: What the containers get beyond the variables they were created with.
        on_create: Called while the client waits for the answer of its `create`.
        keep_loading: No container comes up.
        is_heard_out: An instance that asks for its own end gets it when its last word was read (20 s at most), so
            that no launch of a test misses it on a busy machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.offers = [offer(101), offer(102, dph_total=0.5), offer(103, dph_total=2.0)]
        self.boxes: dict[int, Box] = {}
        self.creations: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.faults: list[Fault] = []
        self.environment: dict[str, str] = {}
        self.on_create: Callable[[], None] = lambda: None
        self.keep_loading = False
        self.is_heard_out = False
        self.most_at_once = 0
        self._lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> VastServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        for box in self.boxes.values():
            box.kill()

    # --- for tests -------------------------------------------------------------------------

    def fault(self, what: str, **how: Any) -> Fault:
        """Let requests fail from now on."""
        fault = Fault(what, **how)
        with self._lock:
            self.faults.append(fault)
        return fault

    def there(self) -> list[Box]:
        """What is rented."""
        with self._lock:
            return [box for box in self.boxes.values() if box.is_listed]

    def running(self) -> list[int]:
        """Instances that cost, or of which processes are left."""
        return [
            box.number
            for box in self.boxes.values()
            if (box.is_listed and box.actual != "stopped") or box.pids()
        ]

    def interrupt(self, box: Box) -> None:
        """Somebody bids more: the container ends at once, the instance stays as a stopped one."""
        with self._lock:
            box.actual, box.state = "stopped", "stopped"
        box.kill()

    def restart(self, box: Box) -> None:
        """The container starts once more, as after an interruption that is over."""
        box.kill()
        box.start(self.url, self.environment)

    def until(self, condition: Callable[[], Any], *, seconds: float = 60.0) -> Any:
        """What `condition` returns as soon as that is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.02)
        raise AssertionError("it did not happen; the logs:\n" + self.logs())

    def logs(self) -> str:
        """What all containers printed."""
        texts = [
            f"--- {box.number}\n{box.log.read_text()}" for box in self.boxes.values() if box.log.exists()
        ]
        return "\n".join(texts)

    # --- for requests ----------------------------------------------------------------------

    def answer(self, method: str, target: str, body: dict[str, Any], key: str) -> tuple[int, Any]:
        """Status and body."""
        url = urlsplit(target)
        path = url.path
        with self._lock:
            self.calls.append(f"{method} {path}")
        if path.startswith("/logs/"):
            return 200, self._log(int(path.removeprefix("/logs/")))
        if path == "/api/v0/gpu_names/unique/":
            return 200, {"gpu_names": ["RTX 4090"]}
        owner = next((box for box in self.boxes.values() if box.key == key), None)
        if key != ACCOUNT_KEY and owner is None:
            return 401, {"success": False, "error": "auth_error", "msg": "Invalid user key"}
        if path.startswith("/api/v0/users/current"):
            return 200, {"id": 1, "host_agreement_accepted": False}
        if path == "/api/v0/bundles/" and method == "POST":
            return 200, {"offers": self._search(body)}
        if path == "/api/v1/instances/" and method == "GET":
            return 200, self._list({name: values[0] for name, values in parse_qs(url.query).items()})
        if found := re.fullmatch(r"/api/v0/asks/(\d+)/", path):
            return self._create(int(found[1]), body)
        if found := re.fullmatch(r"/api/v0/instances/(?:(request_logs|bid_price)/)?(\d+)/", path):
            box = self.boxes.get(int(found[2]))
            if box is None or not box.is_listed:
                return 404, {"success": False, "error": "no_such_instance", "msg": f"no instance {found[2]}"}
            if owner is not None and owner is not box:
                return 403, {"success": False, "error": "forbidden", "msg": "not yours"}
            if owner is not None and self.is_heard_out:
                self._hear_out(box)
            return self._act(method, found[1], box, body)
        return 404, {"success": False, "error": "not_found", "msg": path}

    def _search(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        """The client sends what was typed: numbers come as texts."""
        taken = {box.offer["id"] for box in self.there()}
        wanted = [
            (name, operator, value)
            for name, test in query.items() if isinstance(test, dict) and name != "order"
            for operator, value in test.items()
        ]  # fmt: skip
        return [
            row for row in self.offers
            if row["id"] not in taken and all(OPERATORS[operator](row[name], _like(row[name], value)) for name, operator, value in wanted)
        ][: query.get("limit") or 64]  # fmt: skip

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        rows = [box.row() for box in self.there() if box.number > int(query.get("after_token") or 0)]
        limit = int(query.get("limit") or 25)
        more = rows[limit - 1]["id"] if len(rows) > limit else None
        return {"instances": rows[:limit], "next_token": more and str(more), "total_instances": len(rows)}

    def _create(self, number: int, body: dict[str, Any]) -> tuple[int, Any]:
        self.on_create()
        with self._lock:
            found = next((row for row in self._search({"id": {"eq": number}})), None)
            if found is None:
                return 404, {
                    "success": False,
                    "error": "no_such_ask",
                    "msg": f"offer {number} is not available",
                }
            self.creations.append(body)
            box = Box(
                70_000 + len(self.boxes), found, body, self.folder / str(len(self.boxes)), label=body["label"]
            )
            self.boxes[box.number] = box
            self.most_at_once = max(self.most_at_once, len(self.there()))
        if self.keep_loading:
            box.actual = "loading"
        else:
            box.start(self.url, self.environment)
        return 200, {"success": True, "new_contract": box.number}

    def _act(self, method: str, what: str | None, box: Box, body: dict[str, Any]) -> tuple[int, Any]:
        if what == "request_logs":
            return 200, {"success": True, "result_url": f"{self.url}/logs/{box.number}"}
        if what == "bid_price":
            box.body["price"] = body["price"]
            return 200, {"success": True}
        if method == "GET":
            return 200, {"instances": box.row()}
        if method == "DELETE":
            with self._lock:
                box.is_listed, box.intended = False, "stopped"
            # Its own script asks, too: it gets its answer before it is ended.
            threading.Timer(0.05, box.kill).start()
            return 200, {"success": True}
        if body.get("state") == "stopped":
            box.intended, box.actual, box.state = "stopped", "stopped", "stopped"
            threading.Timer(0.05, box.kill).start()
            return 200, {"success": True}
        if body.get("state") == "running":
            box.intended = "running"
            self.restart(box)
            return 200, {"success": True}
        return 400, {"success": False, "error": "invalid_args", "msg": "what?"}

    def _hear_out(self, box: Box) -> None:
        end = time.monotonic() + 20
        while self.is_heard_out and not box.is_heard and time.monotonic() < end:
            time.sleep(0.02)

    def _log(self, number: int) -> str:
        box = self.boxes[number]
        text = box.log.read_text(errors="replace") if box.log.exists() else ""
        box.is_heard = "finished: " in text.rpartition("began: ")[2]
        return text

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.what, f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None


def _like(own: Any, given: Any) -> Any:
    if isinstance(given, list):
        return [_like(own, item) for item in given]
    is_text = isinstance(given, str) and isinstance(own, int | float) and not isinstance(own, bool)
    return float(given) if is_text else given


def _handler_of(server: VastServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            given = self.rfile.read(size)
            body = json.loads(given) if given else {}
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            fault = server.take_fault(self.command, self.path)
            if fault is None or fault.is_done:
                status, answer = server.answer(self.command, self.path, body, key)
            if fault is not None:
                time.sleep(fault.delay_s)
                if fault.status == 0:
                    self.close_connection = True
                    return
                self._send(fault.status, fault.body, fault.kind)
                return
            if isinstance(answer, str):
                self._send(status, answer, "text/plain")
            else:
                self._send(status, json.dumps(answer), "application/json")

        do_GET = do_PUT = do_POST = do_DELETE = _any

        def _send(self, status: int, text: str, kind: str) -> None:
            data = text.encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            return None

    return Handler


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[VastServer]:
    """A service for one test."""
    with VastServer(folder) as server:
        yield server
