"""Committing checkpoints: in the trainer itself, or in a saver process beside it. No torch here."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sweeper import checkpoints, fsops, images
from sweeper.channel import Link
from sweeper.checkpoints import Draft
from sweeper.manifests import Manifest
from sweeper.retention import Keep, Kept


@dataclass(frozen=True, slots=True)
class Plan:
    """A checkpoint to be committed: everything but its bytes. Plain JSON values.

    Attributes:
        starts: (lease_epoch, start step) of all attempts known, for the lineage of older ones.
        keep: The rules by which older ones are removed: the fields of `retention.Keep`.
        exports: File of the checkpoint → path where a copy of it is put, for other tools.
    """

    root: str
    run_id: str
    step: int
    lease_epoch: int
    lineage: list[list[int]]
    parent_step: int | None
    config_digest: str
    starts: list[list[int]]
    keep: dict[str, Any]
    world_size: int = 1
    value: float | None = None
    is_pinned: bool = False
    exports: dict[str, str] = field(default_factory=dict)

    def draft(self) -> Draft:
        """Begin it; nothing of it counts until it is committed."""
        return Draft(
            root=Path(self.root), run_id=self.run_id, step=self.step, lease_epoch=self.lease_epoch,
            lineage=tuple((epoch, start) for epoch, start in self.lineage), parent_step=self.parent_step,
            config_digest=self.config_digest, world_size=self.world_size, value=self.value, is_pinned=self.is_pinned,
        )  # fmt: skip


class Committer:
    """Commits checkpoints of one attempt, and removes those no rule keeps.

    Args:
        link: To the worker, which is asked for the lease and records what was committed.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._began_s: float | None = None
        self._waited_s = 0.0
        self.known_good: dict[int, Kept] = {}

    def save(self, plan: Plan, files: Mapping[str, memoryview], *, metrics_fd: int | None = None) -> None:
        """Write and commit a checkpoint whose files lie in memory.

        Args:
            files: File name → its bytes, each beginning on a page.
            metrics_fd: The metrics log, made durable before the commit.

        Raises:
            Fenced: The run belongs to somebody else; the draft stays, a fenced process deletes nothing.
            OSError: The disk refused; older checkpoints are untouched.
        """
        self._began_s, self._waited_s = time.monotonic(), 0.0
        draft = plan.draft()
        try:
            for name, image in files.items():
                draft.add_image(name, image)
            if metrics_fd is not None:
                fsops.fsync_file(metrics_fd, Path(plan.root).parent / "metrics.jsonl")
            # Before the commit: after the last one nobody would make up for a copy that is missing.
            for name, path in plan.exports.items():
                self._export(files[name], Path(path))
            self.commit(draft, plan)
        except OSError:
            draft.discard()
            raise

    def commit(self, draft: Draft, plan: Plan) -> None:
        """Make a draft the newest checkpoint and prune older ones. Raises as `save`."""
        manifest = checkpoints.commit(
            draft,
            check_lease=self.check_lease,
            record=self._record,
            committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.known_good[draft.step] = checkpoints.kept(manifest)
        starts = {(epoch, start) for epoch, start in plan.starts} | checkpoints.known_starts(draft.root)
        try:
            checkpoints.prune(
                draft.root, run_id=plan.run_id, rules=Keep(**plan.keep), known_good=self.known_good, starts=starts
            )  # fmt: skip
        except OSError as error:
            self.complain(f"older checkpoints could not be removed: {error}")

    def _record(self, manifest: Manifest) -> None:
        seconds = 0.0 if self._began_s is None else time.monotonic() - self._began_s - self._waited_s
        self._link.ask("committed", step=manifest.step, seconds=seconds)

    def check_lease(self) -> None:
        """Raise Fenced unless the lease holds at this moment."""
        before = time.monotonic()
        self._link.ask("lease")
        self._waited_s += time.monotonic() - before  # the database's time is not the save's

    def complain(self, text: str) -> None:
        """Say something in the worker's log that a person should see."""
        self._link.tell("complaint", text=text)

    def _export(self, image: memoryview, path: Path) -> None:
        """Put a copy for other tools in place; the checkpoint is what counts. Raises Fenced."""
        temporary = fsops.temporary_name(path)
        try:
            os.makedirs(path.parent, exist_ok=True)
            images.write(temporary, image)
            self.check_lease()
            fsops.rename(temporary, path)
            fsops.fsync_dir(path.parent)
        except OSError as error:
            self.complain(f"weights could not be exported to {path}: {error}")
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
