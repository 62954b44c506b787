"""Run directories out of W&B: what a machine that has nothing else goes on from.

Each W&B run holds the run's identity and configuration as files below `<run id>/`, and the result
once it is final; checkpoints come from its artifact (`wandb_checkpoints`). `sweeper.arrivals`
checks every byte of what is fetched here.

`python -P -m sweeper.tracking.wandb_source NAME PATH DATA_DIR OVERWRITE` fetches in a process of its
own: the client starts threads, and a launcher that forks must have none.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import arrivals, errands, fsops, rundir
from sweeper.arrivals import Gone, Listed, Listing
from sweeper.errors import ConfigError, NotFound, SweeperError
from sweeper.tracking.messages import WandbSettings
from sweeper.tracking.wandb_sink import project_of

if TYPE_CHECKING:
    import wandb

    from sweeper.tracking.wandb_checkpoints import Version

TIMEOUT_S = 60
NUM_VERSIONS = 3
"""So many of the newest checkpoints are looked at, and the newest that is good is fetched."""
_PLACE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9 ._-]{0,127}\Z")
_WANDB_ID = re.compile(
    r"(?P<run_id>[a-z0-9][a-z0-9_-]{0,63}\.r\.[0-9]{5,9})[.-][0-9a-z]{8}(?:-(?P<attempt>[0-9]{1,6}))?\Z"
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `resume_from_wandb` names: one run, or a sweep with all its runs.

    Attributes:
        wandb_run_id: W&B's id of the run; None when our own id or a sweep was named.
        run_id: Our id of the run; None for a sweep.
    """

    sweep: str
    run_id: str | None = None
    wandb_run_id: str | None = None
    project: str | None = None
    entity: str | None = None

    @classmethod
    def parse(cls, name: str) -> Wanted:
        """Read `[[ENTITY/]PROJECT/]NAME`, NAME being W&B's id, a run id of ours, or a sweep. Raises ConfigError."""
        *place, last = name.split("/")
        match = _WANDB_ID.match(last)
        run_id = match["run_id"] if match else last if rundir.RUN_ID.match(last) else None
        sweep = run_id.rpartition(".r.")[0] if run_id else last
        is_place = len(place) <= 2 and all(_PLACE.match(part) for part in place)
        if not is_place or not rundir.SWEEP_NAME.match(sweep):
            raise ConfigError(
                f"resume_from_wandb={name!r} names no run",
                do="Use W&B's id (simple.r.00003.1a2b3c4d), the run's (simple.r.00003) or a sweep's name, "
                "with PROJECT/ or ENTITY/PROJECT/ before it where it is another's.",
            )
        entity = place[0] if len(place) == 2 else None
        project = place[-1] if place else None
        return cls(sweep, run_id, last if match else None, project, entity)


@dataclass
class WandbSource:
    """A source of run directories, as `sweeper.arrivals` asks for.

    Attributes:
        wanted: Only what it names is seen.
        path: ENTITY/PROJECT, or PROJECT of the default entity.
    """

    wanted: Wanted
    path: str
    _runs: dict[str, Any] = field(default_factory=dict)
    _holders: dict[str, dict[str, wandb.Artifact]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import wandb

        self._api = wandb.Api(timeout=TIMEOUT_S)

    @property
    def name(self) -> str:
        return f"W&B project {self.path}"

    def run_ids(self, sweep: str) -> Sequence[str]:
        """The runs that are wanted and of which W&B has the identity; the newest W&B run of each."""
        found: dict[str, Any] = {}
        for run in self._candidates():
            match = _WANDB_ID.match(run.id)  # name and group can be changed there by people
            if match is None or match["run_id"].rpartition(".r.")[0] != sweep:
                continue
            if self.wanted.run_id not in (None, match["run_id"]):
                continue
            known = found.get(match["run_id"])
            if known is None or run.created_at > known.created_at:
                found[match["run_id"]] = run
        self._runs = found
        return sorted(found)

    def _candidates(self) -> Iterator[Any]:
        wanted = self.wanted
        if wanted.wandb_run_id is not None:
            yield self._api.run(f"{self.path}/{wanted.wandb_run_id}")
            return
        yield from self._api.runs(self.path)

    def listing(self, run_id: str) -> Listing:
        """Its files: those of the run itself, and of its newest checkpoint."""
        run = self._runs[run_id]
        prefix = f"{run_id}/"
        files = {
            file.name.removeprefix(prefix): Listed(size_bytes=int(file.size))
            for file in run.files()
            if file.name.startswith(prefix)
        }
        lease_epoch, holders = 0, {}
        for version, artifact in self._versions(run):
            lease_epoch = max(lease_epoch, version.lease_epoch)
            for name, entry in artifact.manifest.entries.items():
                files[name], holders[name] = Listed(size_bytes=int(entry.size or 0)), artifact
        self._holders[run_id] = holders
        return Listing(files, lease_epoch=lease_epoch, attempt=_attempt_of(run))

    def newest_step(self, run_id: str) -> int | None:
        """The step of the newest checkpoint that W&B has of one of `run_ids`."""
        versions = self._versions(self._runs[run_id])
        return versions[-1][0].step if versions else None

    def _versions(self, run: Any) -> list[tuple[Version, wandb.Artifact]]:
        """The newest versions of the run's checkpoints, newest last: a damaged one has others to walk back to."""
        from sweeper.tracking.wandb_checkpoints import TYPE, Version

        found = []
        for artifact in run.logged_artifacts():
            version = Version.read(artifact.metadata) if artifact.type == TYPE else None
            if version is not None and artifact.state == "COMMITTED":
                found.append((version, artifact))
        return sorted(found, key=lambda pair: (pair[0].lease_epoch, pair[0].step))[-NUM_VERSIONS:]

    def fetch(self, run_id: str, name: str, target: Path, *, limit_bytes: int) -> None:
        """Write one listed file to the new file `target`. Raises Gone."""
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wandb-") as private:
            artifact = self._holders[run_id].get(name)
            if artifact is not None:
                entry = artifact.get_entry(name)
                self._check_size(name, int(entry.size or 0), limit_bytes)
                got = Path(entry.download(root=private, skip_cache=True))
            else:
                file = self._runs[run_id].file(f"{run_id}/{name}")
                self._check_size(name, int(file.size), limit_bytes)
                with file.download(root=private, replace=True) as opened:
                    got = Path(opened.name)
            if not got.resolve().is_relative_to(Path(private).resolve()):
                raise SweeperError(f"W&B's client put {name} outside of its directory")
            fsops.rename(got, target)

    def _check_size(self, name: str, size_bytes: int, limit_bytes: int) -> None:
        if size_bytes > limit_bytes:
            raise Gone(f"{name} has {size_bytes} bytes, more than was listed")


def _attempt_of(run: Any) -> int:
    """The number of the run's last attempt that W&B knows of; 0 if it does not say."""
    told = run.summary.get("sweeper/attempts")
    numbered = _WANDB_ID.match(run.id)
    suffix = int(numbered["attempt"] or 0) if numbered else 0
    return max(suffix, told if type(told) is int and 0 < told < 1_000_000 else 0)


def fetch(
    wanted: Wanted,
    path: str,
    *,
    data_dir: Path,
    overwrite: bool,
    say: Callable[[str], None],
) -> list[str]:
    """Fetch what is wanted into the data directory; returns the runs that are here now.

    Raises:
        NotFound: W&B does not have it, or cannot be asked.
        SweeperError, OSError: As `arrivals.fetch_sweep`.
    """
    what = wanted.wandb_run_id or wanted.run_id or f"sweep {wanted.sweep}"
    check = f"Check the id, the key, and its access to project {path}; what has arrived whole is kept."
    try:
        source = WandbSource(wanted, path)
        arrived = arrivals.fetch_sweep(source, wanted.sweep, data_dir=data_dir, overwrite=overwrite, say=say)
    except SweeperError:
        raise
    except Exception as error:  # the client's errors have no common root
        why = " ".join(str(error).split())[:300]
        raise NotFound(f"W&B does not give {what}", why=why, do=check) from error
    if not arrived:
        raise NotFound(f"W&B has no {what} in project {path}", do=check)
    return [arrival.run_id for arrival in arrived]


# --- in a process of its own -------------------------------------------------------------------


def fetch_in_child(wanted: Wanted, settings: WandbSettings, *, data_dir: Path, overwrite: bool) -> list[str]:
    """`fetch` in a child.

    Returns:
        The runs that are here now.

    Raises:
        SystemExit: It failed and has said why; with its exit code.
    """
    entity, project = wanted.entity or settings.entity, wanted.project or project_of(settings)
    path = f"{entity}/{project}" if entity else project
    name = wanted.wandb_run_id or wanted.run_id or wanted.sweep
    arguments = [name, path, os.path.abspath(data_dir), str(int(overwrite))]
    with tempfile.TemporaryDirectory(prefix="sweeper-fetch-") as scratch:  # the client leaves some behind
        module, variables = "sweeper.tracking.wandb_source", {"TMPDIR": scratch, "WANDB_SILENT": "true"}
        arrived: list[str] = errands.send(module, *arguments, variables=variables)
    return arrived


def _answer(arguments: list[str]) -> list[str]:
    """Do what `fetch_in_child` was asked for."""
    name, path, data_dir, overwrite = arguments
    return fetch(
        Wanted.parse(name), path, data_dir=Path(data_dir), overwrite=bool(int(overwrite)), say=_say
    )  # fmt: skip


def _say(text: str) -> None:
    print(f"[W&B] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    errands.answer(lambda: _answer(sys.argv[1:]))
