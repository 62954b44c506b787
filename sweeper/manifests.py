"""MANIFEST.json: what a checkpoint consists of, and a digest of its own remaining bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from sweeper import rundir
from sweeper.errors import CheckpointRefused

SCHEMA_VERSION = 1
ALGORITHM = "blake3"
MANIFEST = "MANIFEST.json"
MAX_MANIFEST_BYTES = 4 << 20

Lineage = tuple[tuple[int, int], ...]
"""(lease_epoch, step it started from) of each attempt that led here, oldest first."""


def digest(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3 of `data`, hexadecimal."""
    return blake3(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Manifest:
    """MANIFEST.json.

    Attributes:
        files: Name → (size in bytes, digest).
        parent_step: Step of the checkpoint this attempt resumed from; None if it started at 0.
        value: The value by which the best are kept, at this step; None when there was none.
        is_pinned: Never pruned.
        digest: Digest of the manifest's own remaining bytes in canonical form.
    """

    run_id: str
    step: int
    lease_epoch: int
    lineage: Lineage
    parent_step: int | None
    config_digest: str
    world_size: int
    files: Mapping[str, tuple[int, str]]
    digest: str = ""
    value: float | None = None
    is_pinned: bool = False

    def body(self) -> dict[str, Any]:
        """Everything but the manifest's own digest, as plain JSON values."""
        keep: dict[str, Any] = {} if self.value is None else {"value": self.value}
        if self.is_pinned:
            keep["is_pinned"] = True
        return {
            **keep,
            "schema_version": SCHEMA_VERSION,
            "algorithm": ALGORITHM,
            "run_id": self.run_id,
            "step": self.step,
            "lease_epoch": self.lease_epoch,
            "lineage": [list(pair) for pair in self.lineage],
            "parent_step": self.parent_step,
            "config_digest": self.config_digest,
            "world_size": self.world_size,
            "files": {
                name: {"size_bytes": size, "digest": value} for name, (size, value) in self.files.items()
            },
        }

    def to_bytes(self) -> bytes:
        """Canonical bytes, with the digest of the rest as the last word on them."""
        body = self.body()
        return _canonical({**body, "manifest_digest": digest(_canonical(body))})


def _canonical(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest. Raises CheckpointRefused unless it is byte for byte what we would write."""
    try:
        raw = json.loads(data)
        manifest = Manifest(
            run_id=raw["run_id"],
            step=raw["step"],
            lease_epoch=raw["lease_epoch"],
            lineage=tuple((int(epoch), int(start)) for epoch, start in raw["lineage"]),
            parent_step=raw["parent_step"],
            config_digest=raw["config_digest"],
            world_size=raw["world_size"],
            files={name: (entry["size_bytes"], entry["digest"]) for name, entry in raw["files"].items()},
            digest=raw["manifest_digest"],
            value=raw.get("value"),
            is_pinned=raw.get("is_pinned", False),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointRefused(f"{MANIFEST} is damaged", why=f"{type(error).__name__}: {error}") from error
    if not _has_sound_values(manifest):
        raise CheckpointRefused(f"{MANIFEST} is damaged", why="its values are not of their kinds")
    if manifest.to_bytes() != data:
        raise CheckpointRefused(f"{MANIFEST} is damaged", why="it does not agree with its own digest")
    return manifest


def _has_sound_values(manifest: Manifest) -> bool:
    numbers = [
        manifest.step,
        manifest.lease_epoch,
        manifest.world_size,
        *(size for size, _ in manifest.files.values()),
    ]
    if manifest.parent_step is not None:
        numbers.append(manifest.parent_step)
    keeps = manifest.value is None or type(manifest.value) is float
    return keeps and all(type(number) is int and number >= 0 for number in numbers)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory, checked against itself only. Raises CheckpointRefused."""
    try:
        data = rundir.read_bytes(directory / MANIFEST, limit_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise CheckpointRefused(f"{MANIFEST} is missing", why="the checkpoint was never finished") from None
    except (rundir.Damaged, OSError) as error:
        raise CheckpointRefused(f"{MANIFEST} cannot be read", why=str(error)) from error
    return parse_manifest(data)
