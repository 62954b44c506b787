"""The server itself: HTTP, keys, faults, and going away and coming back on the same port."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import re
import shutil
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from . import graphql
from .backend import Backend, ServerArtifact, ServerRun
from .schema import Schema

API_KEY = "c0ffee" * 6 + "abcd"  # the client wants 40 characters
KINDS = ("graphql", "file_stream", "upload", "download")

_STREAM = re.compile(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream\Z")
_BY_DIGEST = re.compile(r"/artifactsV2/.+/([0-9a-f]{32})/[^/]+\Z")
_STORAGE = re.compile(r"/storage/([0-9a-f]{32})\Z")


@dataclass(slots=True)
class Fault:
    """What goes wrong with requests of one kind, until it has happened `times` or is lifted.

    Attributes:
        kind: graphql, file_stream, upload, download or all; the name of a GraphQL operation; or
            artifact: uploads of an artifact's files, not of a run's.
        delay_s: The answer begins so much later; applied at once.
        drop: "before": the connection ends without an answer and nothing was done; "after": all was.
        status: This HTTP status instead of doing anything, e.g. 500 or 401.
        hits: How often it happened.
    """

    kind: str
    delay_s: float = 0.0
    drop: str | None = None
    status: int | None = None
    times: int | None = None
    hits: int = 0

    def strikes(self, kind: str, operation: str) -> bool:
        """Whether it happens to this request; counts it."""
        if self.kind not in ("all", kind, operation) or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True


class WandbServer:
    """Serves on a free loopback port; a context manager.

    Attributes:
        runs: By name.
        operations: Names of the GraphQL operations that came, in order.
        requests: How many requests of each kind were answered.
        unknown: GraphQL errors for what is not served here: a test of the client wants it empty.
        api_keys: Those that are valid.
        changed: Notified after each request; its lock guards everything here.
    """

    def __init__(self, *, port: int = 0) -> None:
        self.backend = Backend()
        self.operations: list[str] = []
        self.requests: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.api_keys = {API_KEY}
        self.refusal = 401
        self.faults: list[Fault] = []
        self.changed = threading.Condition()
        self._schema = Schema(self.backend, lambda: self.url)
        self._handler = type("Handler", (_Handler,), {"owner": self})
        self._open: set[socket.socket] = set()
        self._http: _Quiet | None = _Quiet(("127.0.0.1", port), self._handler)
        self._port = self._http.server_address[1]

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL is set to."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def runs(self) -> dict[str, ServerRun]:
        return self.backend.runs

    @property
    def artifacts(self) -> list[ServerArtifact]:
        """All versions of all artifacts, pending and deleted ones included, oldest first."""
        return self.backend.artifacts

    @property
    def violations(self) -> dict[str, list[str]]:
        """Run → what its clients did that would harm its history."""
        return {run.name: run.violations for run in self.runs.values() if run.violations}

    def versions(self, collection: str) -> list[ServerArtifact]:
        """The committed versions of a collection, oldest first."""
        with self.changed:
            found = [a for a in self.artifacts if (a.collection, a.state) == (collection, "COMMITTED")]
            return sorted(found, key=lambda artifact: artifact.index or 0)

    def __enter__(self) -> Self:
        self._serve()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_away()
        self.backend.close()

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 20.0) -> bool:
        """Wait until `condition()` holds; asked after each request."""
        with self.changed:
            return bool(self.changed.wait_for(condition, timeout_s))

    # --- faults ----------------------------------------------------------------------------

    def fault(
        self,
        kind: str,
        *,
        delay_s: float = 0.0,
        drop: str | None = None,
        status: int | None = None,
        times: int | None = None,
    ) -> Fault:
        """Have something go wrong from now on (see `Fault`); `lift` ends it."""
        fault = Fault(kind, delay_s, drop, status, times)
        with self.changed:
            self.faults.append(fault)
        return fault

    def strike(self, kind: str, operation: str) -> list[Fault]:
        """The faults that happen to a request: delays, and of the others the first that is due."""
        struck: list[Fault] = []
        for fault in self.faults:
            is_first = not any(other.drop or other.status for other in struck)
            if (is_first or not (fault.drop or fault.status)) and fault.strikes(kind, operation):
                struck.append(fault)
        return struck

    def lift(self, *faults: Fault) -> None:
        """End these faults, or all. A request that waits goes on at once."""
        with self.changed:
            self.faults = [fault for fault in self.faults if faults and fault not in faults]
            self.changed.notify_all()

    @contextlib.contextmanager
    def failing(self, kind: str, **how: Any) -> Iterator[Fault]:
        """A fault that lasts as long as the block."""
        fault = self.fault(kind, **how)
        try:
            yield fault
        finally:
            self.lift(fault)

    def revoke(self, *, status: int = 401) -> None:
        """No key is valid any more; every request that needs one is answered with `status`."""
        with self.changed:
            self.api_keys, self.refusal = set(), status

    def accept(self, key: str = API_KEY) -> None:
        """This key is valid (again)."""
        with self.changed:
            self.api_keys.add(key)

    def go_away(self) -> None:
        """Close the port and all connections: whoever connects now is refused."""
        http, self._http = self._http, None
        if http is None:
            return
        http.shutdown()
        http.server_close()
        with self.changed:
            left = list(self._open)
            self.changed.notify_all()
        for connection in left:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        """Serve on the same port again, with all that was known."""
        if self._http is None:
            self._http = _Quiet(("127.0.0.1", self._port), self._handler)
            self._serve()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Away as long as the block lasts."""
        self.go_away()
        try:
            yield
        finally:
            self.come_back()

    def _serve(self) -> None:
        assert self._http is not None
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    # --- requests, under the lock ----------------------------------------------------------

    def graphql(self, document: graphql.Document, variables: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(HTTP status, answer) of one GraphQL request."""
        try:
            return 200, {"data": graphql.execute(document, variables, self._schema.root(document.kind))}
        except graphql.GraphqlError as error:
            is_ours = str(error).startswith(("Cannot query", "Syntax Error", "Unknown", "unknown"))
            if is_ours:
                self.unknown.append(f"{document.name}: {error}")
            answer = {"data": None, "errors": [{"message": str(error), "path": []}]}
            return (400 if is_ours else 200), answer

    def state(self) -> dict[str, Any]:
        """All that a test may want to know, as plain JSON values."""
        with self.changed:
            return {
                "runs": {
                    run.name: {
                        **{key: getattr(run, key) for key in _SHOWN},
                        "files": {f.name: f.size_bytes for f in run.files.values() if f.is_there},
                    }
                    for run in self.runs.values()
                },
                "artifacts": [
                    {
                        **{key: getattr(artifact, key) for key in _SHOWN_OF_ARTIFACTS},
                        "files": {
                            name: {"size_bytes": file.size_bytes, "num_uploads": file.num_uploads}
                            for name, file in artifact.files.items()
                        },
                    }
                    for artifact in self.artifacts
                ],
                "operations": list(self.operations),
                "requests": dict(self.requests),
                "violations": self.violations,
                "unknown": list(self.unknown),
                "faults": [asdict(fault) for fault in self.faults],
            }

    def command(self, name: str, given: dict[str, Any]) -> None:
        """One of the acts of a test in another process: fault, lift, revoke, accept, away."""
        if name == "fault":
            self.fault(**given)
        elif name == "lift":
            self.lift()
        elif name == "revoke":
            self.revoke(**given)
        elif name == "accept":
            self.accept(**given)
        elif name == "away":
            threading.Thread(target=self._stay_away, args=(float(given["seconds"]),), daemon=True).start()
        else:
            raise ValueError(name)

    def _stay_away(self, seconds: float) -> None:
        self.go_away()
        time.sleep(seconds)
        self.come_back()


_SHOWN = [
    "project",
    "display_name",
    "group",
    "tags",
    "config",
    "history",
    "summary",
    "steps",
    "exit_codes",
    "is_preempting",
    "state",
    "num_inits",
    "violations",
]
_SHOWN_OF_ARTIFACTS = [
    "collection",
    "type",
    "project",
    "state",
    "index",
    "aliases",
    "metadata",
    "digest",
    "run",
]


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed in these tests; their connections break."""


class _Dropped(Exception):
    """The connection shall end without an answer."""


class _Handler(BaseHTTPRequestHandler):
    owner: WandbServer
    protocol_version = "HTTP/1.1"
    # An answer in two packets waits for the client's delayed acknowledgement otherwise.
    wbufsize = -1
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.owner.changed:
            self.owner._open.add(self.connection)

    def finish(self) -> None:
        with self.owner.changed:
            self.owner._open.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def do_POST(self) -> None:
        if self.path.startswith("/debug/"):
            self.owner.command(self.path.removeprefix("/debug/"), json.loads(self._body() or b"{}"))
            self._answer(200, {})
        elif stream := _STREAM.match(self.path):
            body = json.loads(self._body() or b"{}")
            self._guarded("file_stream", "", lambda: self._stream(stream[3], body))
        else:
            body = json.loads(self._body() or b"{}")
            try:
                document = graphql.parse(body.get("query", ""))
            except graphql.GraphqlError as error:
                self.owner.unknown.append(str(error))
                self._answer(400, {"errors": [{"message": str(error)}]})
                return
            variables = body.get("variables") or {}
            self._guarded("graphql", document.name, lambda: self.owner.graphql(document, variables))

    def do_GET(self) -> None:
        if self.path == "/debug/state":
            self._answer(200, self.owner.state())
        elif found := _STORAGE.match(self.path):
            self._guarded("download", "", lambda: self._send_file(found[1]), needs_key=False)
        elif found := _BY_DIGEST.match(self.path):
            self._guarded("download", "", lambda: self._send_digest(found[1]))
        else:
            self._answer(404, {"message": "not found"})

    def do_PUT(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        found = _STORAGE.match(self.path)
        received, md5 = self.owner.backend.receive(self.rfile.read, size)
        try:
            token = found[1] if found else ""
            # Of an artifact's files the client says beforehand what they hold.
            file = self.owner.backend.blobs.get(token)
            whose = "artifact" if file and file.expected_md5 else ""
            self._guarded("upload", whose, lambda: self._take_file(token, received, md5), needs_key=False)
        finally:
            received.unlink(missing_ok=True)

    # --- what is done, under the lock --------------------------------------------------------

    def _stream(self, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        if name not in self.owner.runs:
            return 404, {"error": "run not found"}
        self.owner.backend.stream(name, body)
        return 200, {"exitcode": None, "limits": {}}

    def _take_file(self, token: str, received: Any, md5: bytes) -> tuple[int, Any]:
        file = self.owner.backend.blobs.get(token)
        if file is None:
            return 404, {"message": "no such address"}
        is_taken = self.owner.backend.store(file, received, md5)
        return (200, {}) if is_taken else (400, {"message": "BadDigest"})

    def _send_digest(self, hexadecimal: str) -> tuple[int, Any]:
        md5 = base64.b64encode(bytes.fromhex(hexadecimal)).decode()
        for token, file in self.owner.backend.blobs.items():
            if file.is_there and file.md5 == md5:
                return self._send_file(token)
        return 404, {"message": "not found"}

    def _send_file(self, token: str) -> tuple[int, Any]:
        file = self.owner.backend.blobs.get(token)
        if file is None or not file.is_there:
            return 404, {"message": "no such address"}
        return 200, open(file.path, "rb")

    # --- faults and answers ------------------------------------------------------------------

    def _guarded(
        self, kind: str, operation: str, act: Callable[[], tuple[int, Any]], *, needs_key: bool = True
    ) -> None:
        """Do what was asked, with the faults that strike, and answer."""
        owner = self.owner
        with owner.changed:
            struck = owner.strike(kind, operation)
        try:
            with owner.changed:
                status, answer = self._instead(struck, needs_key=needs_key) or self._attempt(act)
                owner.requests[kind] += 1
                if kind == "graphql":
                    owner.operations.append(operation)
                owner.changed.notify_all()
                for fault in struck:
                    # A fault that is lifted, or a server that goes away, ends the waiting.
                    owner.changed.wait_for(
                        lambda fault=fault: fault not in owner.faults or owner._http is None, fault.delay_s
                    )
            if any(fault.drop == "after" for fault in struck):
                raise _Dropped
        except _Dropped:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._answer(status, answer)

    def _attempt(self, act: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
        try:
            return act()
        except Exception:  # noqa: BLE001 - a bug of this server must not look like a fault of the test's
            self.owner.unknown.append(traceback.format_exc())
            return 500, {"errors": [{"message": "a bug in the test's server"}]}

    def _instead(self, struck: list[Fault], *, needs_key: bool) -> tuple[int, Any] | None:
        if any(fault.drop == "before" for fault in struck):
            raise _Dropped
        for fault in struck:
            if fault.status is not None:
                return fault.status, {"errors": [{"message": "a fault of the test's"}]}
        if needs_key and self._key() not in self.owner.api_keys:
            return self.owner.refusal, {"errors": [{"message": "user is not logged in"}]}
        return None

    def _key(self) -> str:
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        if scheme != "Basic":
            return ""
        user, _, key = base64.b64decode(value).decode().partition(":")
        return key if user == "api" else ""

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, status: int, value: Any) -> None:
        is_file = hasattr(value, "read")
        data = b"" if is_file else json.dumps(value).encode()
        size = os.fstat(value.fileno()).st_size if is_file else len(data)
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_file else "application/json")
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if is_file:
            with value:
                shutil.copyfileobj(value, self.wfile, 1 << 20)
        else:
            self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        return None
