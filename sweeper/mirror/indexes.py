"""What the copy of one run consists of: an index names every file with its digest, and is written last.

Objects are never overwritten by a later owner: their names hold who wrote them, so that a request
which an earlier owner had under way harms nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sweeper.manifests import Lineage, digest
from sweeper.mirror.bucket import Bucket

SCHEMA_VERSION = 1
MAX_INDEX_BYTES = 16 << 20
_INDEX = re.compile(r"runs/([^/]+)/([0-9]{8})\.([0-9]{8})\.([0-9]{8})(\.final)?\.json\Z")
_WRITER = re.compile(r"[0-9]{8}\.[0-9]{8}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_STEP_FILE = re.compile(r"checkpoints/step_([0-9]{8,12})/")


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes: the generation of a data directory, and the lease epoch of a run in it."""

    generation: int
    lease_epoch: int

    def __str__(self) -> str:
        return f"{self.generation:08d}.{self.lease_epoch:08d}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, and which object has its bytes."""

    size_bytes: int
    digest: str
    writer: str

    def object_name(self, run_id: str) -> str:
        """`objects/<run_id>/<generation>.<lease_epoch>/<digest>`."""
        return f"objects/{run_id}/{self.writer}/{self.digest}"


@dataclass(frozen=True, slots=True)
class Index:
    """One copy of one run.

    Attributes:
        sequence: Counts the copies of one writer.
        attempt: Number of the run's attempt at the time.
        files: Name in the run directory → entry.
        epochs: Step of each checkpoint → lease epoch of its owner.
        is_final: The run has its result.
    """

    run_id: str
    writer: Writer
    sequence: int
    attempt: int
    files: Mapping[str, Entry]
    epochs: Mapping[int, int]
    is_final: bool = False

    @property
    def name(self) -> str:
        """The index's own object."""
        final = ".final" if self.is_final else ""
        return f"runs/{self.run_id}/{self.writer}.{self.sequence:08d}{final}.json"

    @property
    def step(self) -> int | None:
        """The newest checkpoint."""
        return max(self.epochs, default=None)

    def objects(self) -> set[str]:
        """The objects it needs."""
        return {entry.object_name(self.run_id) for entry in self.files.values()}

    def to_bytes(self) -> bytes:
        """JSON with a digest of itself, for a store may hold a part of it only."""
        body = self._body()
        return _canonical({**body, "index_digest": digest(_canonical(body))})

    def _body(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "generation": self.writer.generation,
            "lease_epoch": self.writer.lease_epoch,
            "sequence": self.sequence,
            "attempt": self.attempt,
            "is_final": self.is_final,
            "checkpoint_step": self.step,
            "epochs": {str(step): epoch for step, epoch in self.epochs.items()},
            "files": {
                name: {"size_bytes": entry.size_bytes, "digest": entry.digest, "writer": entry.writer}
                for name, entry in self.files.items()
            },
        }


def _canonical(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def parse(data: bytes) -> Index | None:
    """Read an index; None unless it is byte for byte what we would write. Names in it may be hostile."""
    try:
        raw = json.loads(data)
        index = Index(
            run_id=raw["run_id"],
            writer=Writer(raw["generation"], raw["lease_epoch"]),
            sequence=raw["sequence"],
            attempt=raw["attempt"],
            files={
                name: Entry(e["size_bytes"], e["digest"], e["writer"]) for name, e in raw["files"].items()
            },
            epochs={int(step): epoch for step, epoch in raw["epochs"].items()},
            is_final=raw["is_final"],
        )
        numbers = [index.writer.generation, index.writer.lease_epoch, index.sequence, index.attempt]
        numbers += [*index.epochs, *index.epochs.values(), *(e.size_bytes for e in index.files.values())]
        is_sound = all(type(number) is int and 0 <= number < 2**53 for number in numbers) and all(
            _DIGEST.match(entry.digest) and _WRITER.match(entry.writer) for entry in index.files.values()
        )
        return index if is_sound and index.to_bytes() == data else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


# --- which one counts --------------------------------------------------------------------------


def order(name: str) -> tuple[int, int, int] | None:
    """(generation, lease epoch, sequence) of an index's name: the largest counts. None: it is no index."""
    match = _INDEX.match(name)
    return (int(match[2]), int(match[3]), int(match[4])) if match else None


def run_of(name: str) -> str:
    """The run in an index's name, whatever it is."""
    return name.split("/")[1]


def newest_first(names: Iterable[str]) -> list[str]:
    """Names of indexes, the one that counts first."""
    known = [(place, name) for name in names if (place := order(name)) is not None]
    return [name for _, name in sorted(known, reverse=True)]


def read_newest(bucket: Bucket, run_id: str) -> tuple[Index | None, list[str]]:
    """The newest index of a run that is whole, and the names of all there are. Raises OSError."""
    names = newest_first(bucket.names(f"runs/{run_id}/"))
    for name in names:
        try:
            index = parse(bucket.read(name, limit_bytes=MAX_INDEX_BYTES))
        except FileNotFoundError:
            continue  # a newer one has taken its place
        if index is not None and index.run_id == run_id and index.name == name:
            return index, names
    return None, names


def final_runs(bucket: Bucket) -> set[str]:
    """The runs whose newest index says that they are finished. Raises OSError."""
    newest: dict[str, str] = {}
    for name in reversed(newest_first(bucket.names("runs/"))):
        newest[run_of(name)] = name
    return {run_id for run_id, name in newest.items() if name.endswith(".final.json")}


# --- what stays --------------------------------------------------------------------------------


def kept_steps(
    epochs: Mapping[int, int], *, newest: int | None, lineage: Lineage, keep_last: int
) -> dict[int, int]:
    """Of the checkpoints that are copied already, those that stay beside the newest: a pure decision.

    Args:
        epochs: Step → lease epoch of what is copied.
        newest: Step of the checkpoint that is copied now; None when there is none.
        lineage: Its (lease epoch, start step) pairs. What an owner wrote that had lost the run goes.
        keep_last: How many there are in all.
    """
    if newest is None:
        return {}
    sound = {
        step: epoch
        for step, epoch in epochs.items()
        if step < newest and not any(later > epoch and start < step for later, start in lineage)
    }
    older = sorted(sound, reverse=True)[: max(0, keep_last - 1)]
    return {step: sound[step] for step in older}


def step_of(name: str) -> int | None:
    """The checkpoint that a file belongs to, by its name."""
    match = _STEP_FILE.match(name)
    return int(match[1]) if match else None
