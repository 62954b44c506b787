"""Copies one run after another into the generation that a data directory holds, and gives them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sweeper import rundir
from sweeper.arrivals import Gone, Listed, Listing
from sweeper.errors import Fenced, SweeperError
from sweeper.mirror import generations, indexes
from sweeper.mirror.bucket import Bucket
from sweeper.mirror.indexes import Entry, Index, Writer
from sweeper.mirror.snapshots import Snapshot, taken
from sweeper.rundir import Damaged


class Overtaken(SweeperError):
    """Another owner of this data directory has the run; its copies count, and mine do not."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A run that is copied.

    Attributes:
        lease_epoch: Of the attempt that goes on; nothing is copied once a newer one is in the directory.
        is_over: The attempt has ended.
    """

    run_dir: Path
    lease_epoch: int
    attempt: int
    keep_last: int
    is_over: bool = False

    @property
    def run_id(self) -> str:
        """Its run."""
        return self.run_dir.name


@dataclass(slots=True)
class Copier:
    """Writes copies, and nothing once the generation or the run has a newer owner.

    Args:
        bucket: The copy of one sweep.
        generation: Which this data directory holds.
        warn: Takes texts for people.
    """

    bucket: Bucket
    generation: int
    warn: Callable[[str], None]
    _newest: dict[str, Index] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)

    def copy(self, subject: Subject) -> Index:
        """Copy a run as it is now. Objects first, then the index, then what it no longer needs goes.

        Raises:
            Fenced: Another machine has taken over.
            Overtaken: Another worker has the run.
            Torn: It changed meanwhile.
            OSError, SweeperError: The store, or the disk.
        """
        self.check(subject)
        known = self._newest.pop(subject.run_id, None)  # trusted again when all went well
        before, names = (known, [known.name]) if known else indexes.read_newest(self.bucket, subject.run_id)
        with taken(subject.run_dir, attempt=subject.attempt, is_over=subject.is_over) as snapshot:
            writer = Writer(self.generation, max(subject.lease_epoch, snapshot.result_epoch or 0))
            self._refuse_newer(before, writer)
            self._say_refused(subject, snapshot)
            files = self._upload(subject, snapshot, writer, before)
            index = _index(subject, snapshot, writer, files, before, names)
        self.check(subject)
        self.bucket.write(index.name, index.to_bytes())
        self._remove(subject, index, before if known else None, names)
        self._newest[subject.run_id] = index
        return index

    def check(self, subject: Subject | None = None) -> None:
        """Ask anew whether this may write. Raises Fenced, Overtaken or OSError."""
        generations.check(self.bucket, self.generation)
        if subject is not None and rundir.largest_epoch(subject.run_dir) > subject.lease_epoch:
            raise Overtaken(f"run {subject.run_id} has a newer owner")

    def _refuse_newer(self, before: Index | None, writer: Writer) -> None:
        if before is None:
            return
        if before.writer.generation > writer.generation:
            raise Fenced(f"generation {before.writer.generation} has written here")
        if str(before.writer) > str(writer):
            raise Overtaken(f"run {before.run_id} was copied by a newer owner")

    def _say_refused(self, subject: Subject, snapshot: Snapshot) -> None:
        for text in snapshot.refused:
            if (said := f"{subject.run_id}: {text}") not in self._refused:
                self._refused.add(said)
                self.warn(said)

    def _upload(
        self, subject: Subject, snapshot: Snapshot, writer: Writer, before: Index | None
    ) -> dict[str, Entry]:
        there = {entry.digest: entry for entry in before.files.values()} if before else {}
        files: dict[str, Entry] = {}
        for name, held in snapshot.files.items():
            if held.digest not in there:
                entry = Entry(held.size_bytes, held.digest, str(writer))
                self.check(subject)
                self.bucket.upload(entry.object_name(subject.run_id), held.fd)
                there[held.digest] = entry
            files[name] = there[held.digest]
        return files

    def _remove(self, subject: Subject, index: Index, before: Index | None, names: Sequence[str]) -> None:
        """Remove what the new index does not need; at the first copy also what crashes had left behind."""
        there = before.objects() if before else set(self.bucket.names(f"objects/{index.run_id}/"))
        for name in [*sorted(there - index.objects()), *names]:
            self.check(subject)
            self.bucket.delete(name)


def _index(
    subject: Subject,
    snapshot: Snapshot,
    writer: Writer,
    files: dict[str, Entry],
    before: Index | None,
    names: Sequence[str],
) -> Index:
    manifest = snapshot.manifest
    kept = indexes.kept_steps(
        before.epochs if before else {},
        newest=manifest.step if manifest else None,
        lineage=manifest.lineage if manifest else (),
        keep_last=subject.keep_last,
    )
    old = (
        {name: entry for name, entry in before.files.items() if indexes.step_of(name) in kept}
        if before
        else {}
    )
    epochs = {**kept, manifest.step: manifest.lease_epoch} if manifest else {}
    mine = [
        place[2]
        for place in map(indexes.order, names)
        if place and place[:2] == (writer.generation, writer.lease_epoch)
    ]
    return Index(
        run_id=subject.run_id, writer=writer, sequence=max(mine, default=-1) + 1, attempt=subject.attempt,
        files={**old, **files}, epochs=epochs, is_final=snapshot.result_epoch is not None,
    )  # fmt: skip


class Copy:
    """The copy of one sweep as a source of run directories."""

    def __init__(self, bucket: Bucket, url: str) -> None:
        self._bucket, self._url = bucket, url
        self._indexes: dict[str, Index] = {}

    @property
    def name(self) -> str:
        """For people."""
        return f"the copy {self._url}"

    def run_ids(self, sweep: str) -> list[str]:
        """The runs of which there is an index."""
        names = self._bucket.names("runs/")
        return sorted({indexes.run_of(name) for name in names if indexes.order(name) is not None})

    def listing(self, run_id: str) -> Listing:
        """The files that the newest index names. Raises Damaged when no index is whole."""
        index, _ = indexes.read_newest(self._bucket, run_id)
        if index is None:
            raise Damaged(f"run {run_id}: {self.name} has no index that is whole")
        self._indexes[run_id] = index
        files = {name: Listed(entry.size_bytes, entry.digest) for name, entry in index.files.items()}
        return Listing(files, lease_epoch=index.writer.lease_epoch, attempt=index.attempt)

    def fetch(self, run_id: str, name: str, target: Path, *, limit_bytes: int) -> None:
        """Download one file. Raises Gone when a newer index has taken its object away."""
        entry = self._indexes[run_id].files[name]
        try:
            self._bucket.download(entry.object_name(run_id), target, limit_bytes=limit_bytes)
        except FileNotFoundError as error:
            raise Gone(
                f"run {run_id}: {self.name} lacks {name}", why="it was copied anew meanwhile"
            ) from error
