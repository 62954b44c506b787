"""What the server remembers: runs, artifacts, and the bytes of files. No network here.

Source: the GraphQL documents and file_stream requests of wandb-core 0.31 and `wandb.Api`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENTITY = "me"
HISTORY, EVENTS, SUMMARY, OUTPUT = (
    "wandb-history.jsonl",
    "wandb-events.jsonl",
    "wandb-summary.json",
    "output.log",
)


def node_id(kind: str, *parts: object) -> str:
    """An id as W&B's: base64 of a path."""
    return base64.b64encode(":".join([kind, *map(str, parts)]).encode()).decode()


def now() -> str:
    """UTC, as W&B writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(slots=True)
class ServerFile:
    """The stored bytes of one file; `path` is missing until they have come."""

    name: str
    path: Path
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    expected_md5: str | None = None
    md5: str = ""
    size_bytes: int = 0
    num_uploads: int = 0

    @property
    def is_there(self) -> bool:
        return self.num_uploads > 0

    def read(self) -> bytes:
        return self.path.read_bytes()


@dataclass(slots=True)
class ServerRun:
    """One run as the server knows it.

    Attributes:
        exit_codes: Of every end that was told.
        is_preempting: Whether this attempt has said that it is about to be preempted.
        violations: What a client did that would harm the history on wandb.ai.
    """

    name: str
    project: str
    entity: str = ENTITY
    display_name: str = ""
    group: str = ""
    job_type: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    is_preempting: bool = False
    is_over: bool = False
    num_inits: int = 0
    num_lines: dict[str, int] = field(default_factory=dict)
    files: dict[str, ServerFile] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    created_at: str = field(default_factory=now)
    seen_s: float = field(default_factory=time.monotonic)
    crash_after_s: float = 300.0

    @property
    def id(self) -> str:
        """The storage id."""
        return node_id("Run", "v1", self.name, self.project, self.entity)

    @property
    def steps(self) -> list[int]:
        """The steps of all rows, in the order they lie in."""
        return [row["_step"] for row in self.history]

    @property
    def state(self) -> str:
        """running, preempting, finished, failed, crashed or preempted."""
        if not self.is_over:
            if time.monotonic() - self.seen_s > self.crash_after_s:
                return "preempted" if self.is_preempting else "crashed"
            return "preempting" if self.is_preempting else "running"
        if self.exit_codes[-1] == 0:
            return "finished"
        return "preempted" if self.is_preempting else "failed"

    def live(self) -> None:
        """A client is there: what was over goes on."""
        self.seen_s = time.monotonic()
        if self.is_over:
            self.is_over = self.is_preempting = False

    def add_rows(self, offset: int, rows: list[dict[str, Any]]) -> None:
        """Store history lines at their offset and note what breaks the rules."""
        if offset > len(self.history):
            self.violations.append(
                f"a hole in the lines: {len(self.history)} are there, {offset} was written"
            )
        for index, row in enumerate(rows, offset):
            if index < len(self.history):
                # The same line again is a request whose answer was lost.
                if self.history[index] != row:
                    self.violations.append(
                        f"line {index} (step {self.history[index]['_step']}) was overwritten"
                    )
                continue
            before = self.history[index - 1]["_step"] if 0 < index <= len(self.history) else -1
            step = row.get("_step", -1)
            if step <= before:
                what = (
                    "is there already"
                    if step in {r["_step"] for r in self.history}
                    else f"comes after {before}"
                )
                self.violations.append(f"step {step} {what}")
            self.history.append(row)
        self.history[offset : offset + len(rows)] = rows


@dataclass(slots=True)
class ServerArtifact:
    """One version of an artifact. `index` is drawn when it is committed."""

    number: int
    collection: str
    type: str
    project: str
    digest: str
    client_id: str
    run: str | None
    entity: str = ENTITY
    description: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    state: str = "PENDING"
    index: int | None = None
    wanted_aliases: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    history_step: int | None = None
    manifest: ServerFile | None = None
    files: dict[str, ServerFile] = field(default_factory=dict)
    used_by: list[str] = field(default_factory=list)
    created_at: str = field(default_factory=now)

    @property
    def id(self) -> str:
        return node_id("Artifact", self.number)

    @property
    def version(self) -> str:
        return f"v{self.index}"

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """Path → entry of the manifest that was uploaded."""
        if self.manifest is None or not self.manifest.is_there:
            return {}
        return dict(json.loads(self.manifest.read())["contents"])

    @property
    def size_bytes(self) -> int:
        return sum(entry.get("size", 0) for entry in self.entries.values())


class Backend:
    """All that one server knows. Not safe for threads: the server asks under its lock."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="wandb-server-")
        self.runs: dict[str, ServerRun] = {}
        self.artifacts: list[ServerArtifact] = []
        self.blobs: dict[str, ServerFile] = {}
        self.num_collected = 0

    def close(self) -> None:
        """Forget all bytes."""
        self._directory.cleanup()

    # --- runs ------------------------------------------------------------------------------

    def find_run(self, name: str, project: str | None = None) -> ServerRun | None:
        """The run, unless it is of another project."""
        run = self.runs.get(name)
        return run if run and project in (None, "", run.project) else None

    def upsert(self, given: dict[str, Any]) -> tuple[ServerRun, bool]:
        """`upsertBucket`: (the run, whether it is new)."""
        name = given.get("name") or self._name_of(given.get("id"))
        is_new = name not in self.runs
        run = self.runs.setdefault(
            name, ServerRun(name=name, project=given.get("modelName") or "uncategorized")
        )
        if given.get("name"):  # `wandb.Api` changes a run without being its client
            run.num_inits += 1
            run.live()
        run.display_name = run.display_name or name
        for attribute, key in _GIVEN.items():
            if given.get(key):
                setattr(run, attribute, given[key])
        if given.get("config"):
            run.config = json.loads(given["config"])
        if given.get("summaryMetrics"):
            run.summary = json.loads(given["summaryMetrics"])
        return run, is_new

    def _name_of(self, run_id: str | None) -> str:
        return next(run.name for run in self.runs.values() if run.id == run_id)

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """Store one file_stream request: lines at their offset, the summary, the end."""
        run = self.runs[name]
        run.live()
        files = body.get("files") or {}
        for file, chunk in files.items():
            lines = chunk["content"]
            if file == HISTORY:
                run.add_rows(chunk["offset"], [json.loads(line) for line in lines])
            elif file == SUMMARY:
                run.summary = json.loads(lines[-1])
            end = chunk["offset"] + len(lines)
            run.num_lines[file] = max(run.num_lines.get(file, 0), end)
        run.is_preempting = run.is_preempting or bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_codes.append(body.get("exitcode", 0))
            run.is_over = True

    # --- bytes -----------------------------------------------------------------------------

    def new_file(self, name: str, *, expected_md5: str | None = None) -> ServerFile:
        """A place for the bytes of a file, with an address nobody guesses."""
        file = ServerFile(name, Path(self._directory.name) / secrets.token_hex(8), expected_md5=expected_md5)
        self.blobs[file.token] = file
        return file

    def store(self, file: ServerFile, received: Path, md5: bytes) -> bool:
        """Take what was uploaded; False when it is not what was announced (a bucket's BadDigest)."""
        encoded = base64.b64encode(md5).decode()
        if file.expected_md5 not in (None, encoded):
            return False
        received.replace(file.path)
        file.md5, file.size_bytes = encoded, file.path.stat().st_size
        file.num_uploads += 1
        return True

    def receive(self, read: Callable[[int], bytes], size_bytes: int) -> tuple[Path, bytes]:
        """Write an upload to a file of its own as it comes; (path, md5). Raises EOFError when cut off."""
        path = Path(self._directory.name) / f"in-{secrets.token_hex(8)}"
        hasher, left = hashlib.md5(usedforsecurity=False), size_bytes
        with open(path, "wb") as out:
            while left:
                chunk = read(min(left, 1 << 20))
                if not chunk:
                    path.unlink()
                    raise EOFError
                hasher.update(chunk)
                out.write(chunk)
                left -= len(chunk)
        return path, hasher.digest()

    # --- artifacts -------------------------------------------------------------------------

    def artifact(self, artifact_id: str) -> ServerArtifact | None:
        """A version that was not deleted, by its id."""
        return next((a for a in self.artifacts if a.id == artifact_id and a.state != "DELETED"), None)

    def versions(self, collection: str, project: str) -> list[ServerArtifact]:
        """Committed versions of a collection, newest first."""
        return sorted(
            (
                a
                for a in self.artifacts
                if (a.collection, a.project, a.state) == (collection, project, "COMMITTED")
            ),
            key=lambda a: -(a.index or 0),
        )

    def member(self, collection: str, project: str, alias: str) -> ServerArtifact | None:
        """The version with this alias or number."""
        for artifact in self.versions(collection, project):
            if alias in (artifact.version, *artifact.aliases):
                return artifact
        return None

    def create_artifact(self, given: dict[str, Any]) -> ServerArtifact:
        """A new pending version, or the committed one that has the same digest."""
        name, project = given["artifactCollectionName"], given["projectName"]
        aliases = [alias["alias"] for alias in given.get("aliases") or []]
        for artifact in self.versions(name, project):
            if given.get("enableDigestDeduplication") and artifact.digest == given["digest"]:
                self.set_aliases(artifact, aliases)
                return artifact
        artifact = ServerArtifact(
            number=len(self.artifacts),
            collection=name,
            type=given["artifactTypeName"],
            project=project,
            digest=given["digest"],
            client_id=given.get("clientID") or "",
            run=given.get("runName"),
            description=given.get("description"),
            metadata=json.loads(given.get("metadata") or "{}"),
            wanted_aliases=aliases,
            tags=[tag["tagName"] for tag in given.get("tags") or []],
            history_step=given.get("historyStep"),
        )
        self.artifacts.append(artifact)
        return artifact

    def add_file(self, artifact: ServerArtifact, name: str, md5: str) -> tuple[ServerFile, str]:
        """(the file, the id of the version it was first of): an earlier one's when that has the same bytes."""
        for earlier in self.versions(artifact.collection, artifact.project):
            for file in earlier.files.values():
                if file.is_there and file.md5 == md5:
                    artifact.files[name] = file
                    return file, earlier.id
        artifact.files[name] = self.new_file(name, expected_md5=md5)
        return artifact.files[name], artifact.id

    def commit(self, artifact: ServerArtifact) -> str:
        """Make a version visible; returns why it cannot be, or nothing."""
        if artifact.manifest is None or not artifact.manifest.is_there:
            return "its manifest was not uploaded"
        for name, entry in artifact.entries.items():
            file = artifact.files.get(name)
            if file is None or not file.is_there or file.md5 != entry["digest"]:
                return f"{name} was not uploaded"
        numbers = [a.index for a in self.artifacts if a.index is not None and _same(a, artifact)]
        artifact.index = max(numbers, default=-1) + 1
        artifact.state = "COMMITTED"
        self.set_aliases(artifact, ["latest", *artifact.wanted_aliases])
        return ""

    def set_aliases(self, artifact: ServerArtifact, aliases: list[str]) -> None:
        """Give aliases to a version; each belongs to one version of its collection."""
        for other in self.artifacts:
            if _same(other, artifact):
                other.aliases = [alias for alias in other.aliases if alias not in aliases]
        artifact.aliases += list(dict.fromkeys(aliases))

    def delete_artifact(self, artifact: ServerArtifact, *, with_aliases: bool) -> str:
        """Remove a version and the bytes nobody else has; returns why not, or nothing."""
        if artifact.aliases and not with_aliases:
            return f"artifact {artifact.collection}:{artifact.version} has aliases {artifact.aliases}"
        artifact.state, artifact.aliases = "DELETED", []
        used = {file.token for a in self.artifacts if a.state != "DELETED" for file in _all_files(a)}
        for file in _all_files(artifact):
            if file.token not in used and self.blobs.pop(file.token, None):
                file.path.unlink(missing_ok=True)
                self.num_collected += 1
        return ""


_GIVEN = {
    "display_name": "displayName",
    "group": "groupName",
    "job_type": "jobType",
    "notes": "notes",
    "tags": "tags",
}


def _same(one: ServerArtifact, other: ServerArtifact) -> bool:
    return (one.collection, one.project) == (other.collection, other.project)


def _all_files(artifact: ServerArtifact) -> list[ServerFile]:
    manifest = [artifact.manifest] if artifact.manifest else []
    return [*artifact.files.values(), *manifest]
