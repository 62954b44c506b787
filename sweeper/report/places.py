"""Where things are on disk: what a directory named on the command line is, and what it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import checkpoints, rundir
from sweeper.errors import NotFound
from sweeper.report.rows import owner_is_gone
from sweeper.states import State

if TYPE_CHECKING:
    from sweeper.reading_rows import RunRow


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of ours: a data directory, one sweep's, or one run's.

    Attributes:
        sweep: None for a data directory.
        run_id: None unless it is a run directory.
    """

    data_dir: Path
    sweep: str | None = None
    run_id: str | None = None

    def run_dirs(self) -> Iterator[Path]:
        """The run directories in it, by name."""
        if self.run_id is not None and self.sweep is not None:
            return iter([self.data_dir / "sweep" / self.sweep / "runs" / self.run_id])
        return rundir.run_dirs(self.data_dir, self.sweep)


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be a path: no sweep and no run is called so."""
    return not rundir.SWEEP_NAME.match(name) and not rundir.RUN_ID.match(name)


def place_of(directory: Path) -> Place:
    """What `directory` is, by its position: `DATA`, `DATA/sweep`, `DATA/sweep/S`, `…/runs`, `…/runs/S.r.00012`.

    Raises:
        NotFound: It does not exist, or is none of these.
    """
    if not directory.is_dir():
        raise NotFound(f"{directory} is not a directory")
    path = Path(os.path.abspath(directory))
    match = rundir.RUN_ID.match(path.name)
    if match and path.parts[-4:-1] == ("sweep", match[1], "runs"):
        return Place(path.parents[3], match[1], path.name)
    if path.name == "runs" and path.parts[-3:-2] == ("sweep",):
        path = path.parent
    if path.parent.name == "sweep" and rundir.SWEEP_NAME.match(path.name) and (path / "runs").is_dir():
        return Place(path.parents[1], path.name)
    if path.name == "sweep" and not (path / "sweep").is_dir():
        path = path.parent
    if (path / "sweep").is_dir() or (path / "sweeper.db").is_file():
        return Place(path)
    raise NotFound(
        f"{directory} is not a directory of sweeper's",
        why="it holds no sweep/ and is no sweep's or run's directory",
        do="Name a data directory, DATA/sweep/NAME, or DATA/sweep/NAME/runs/RUN.",
    )


def relative(path: Path) -> Path:
    """`path` relative to the current directory where it lies below it, else absolute."""
    absolute = Path(os.path.abspath(path))
    here = Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) and absolute != here else absolute


def find_run_dir(run_id: str, *, data_dir: Path) -> Path:
    """The directory of a run, without asking a database. Raises NotFound."""
    match = rundir.RUN_ID.match(run_id)
    path = data_dir / rundir.relative_path(match[1], int(match[2])) if match else None
    if path is not None and path.is_dir():
        return path
    known = [entry.name for entry in rundir.run_dirs(data_dir)]
    near = get_close_matches(run_id, known, n=3)
    raise NotFound(
        f"run {run_id!r} has no directory below {data_dir}",
        why=f"there are {len(known)} runs" if known else "there is no run",
        do=f"Did you mean {' or '.join(near)}?"
        if near
        else "`sweeper list` shows every run; name the right --data-dir.",
    )


# --- a run without a database --------------------------------------------------------------


def disk_run(run_dir: Path) -> RunRow:
    """A run as its directory alone tells of it, in the shape `sweeper.reading` has.

    The marker says that it is unfinished; whether somebody trains it is judged by the process
    that the marker names.

    Raises:
        Damaged: run.json, the marker or the result is not what was written.
        FileNotFoundError: There is no run.json.
    """
    identity = rundir.read_identity(run_dir)
    marker = _marker(run_dir)
    result = rundir.read_result(run_dir) if marker is None else None
    owner = _owner(marker) if marker else None
    steps = checkpoints.steps_on_disk(run_dir / rundir.CHECKPOINTS_DIR)
    step = steps[0][0] if steps else None
    is_held = owner is not None and not owner_is_gone(owner)
    return {
        "run_id": identity.run_id,
        "sweep": identity.sweep,
        "number": identity.number,
        "trial": identity.trial,
        "params": identity.params,
        "seed": identity.seed,
        "path": rundir.relative_path(identity.sweep, identity.number),
        "wandb_run_id": identity.wandb_run_id,
        "state": _final_state(result) or (State.RUNNING if is_held else State.INTERRUPTED).value,
        "outcome": None,
        "reason": result.get("reason") if result else None,
        "value": result.get("value") if result else None,
        "owner": owner,
        "worker": None,
        "lease_epoch": rundir.largest_epoch(run_dir),
        "lease_until": float("inf") if is_held else None,
        "attempts": len(log_files(run_dir)),
        "global_step": step or 0,
        "total_steps": None,
        "checkpoint_step": step,
        "replaces": identity.replaces,
        "retry_of": identity.retry_of,
        "is_retried": False,
    }


def _marker(run_dir: Path) -> dict[str, Any] | None:
    try:
        return rundir.read_json(rundir.marker_path(run_dir))
    except FileNotFoundError:
        return None


def _owner(marker: dict[str, Any]) -> dict[str, Any]:
    names = ("host", "machine_id", "boot_id", "pid_namespace", "uid", "pid", "slurm_job_id")
    return {**{name: marker.get(name) for name in names}, "start_ticks": marker.get("pid_start")}


def _final_state(result: dict[str, Any] | None) -> str | None:
    state = result.get("state") if result else None
    return state if state in {known.value for known in State if known.is_final} else None


# --- logs ----------------------------------------------------------------------------------


def log_files(run_dir: Path) -> list[tuple[int, Path]]:
    """(attempt, log) of each attempt that has one, in order."""
    found = []
    try:
        names = os.listdir(run_dir / rundir.LOGS_DIR)
    except OSError:
        return []
    for name in names:
        number = name.removeprefix("attempt_").removesuffix(".log")
        if number.isdigit() and rundir.attempt_log(run_dir, int(number)).name == name:
            found.append((int(number), run_dir / rundir.LOGS_DIR / name))
    return sorted(found)


def open_log(path: Path) -> int:
    """Open a log for reading: a regular file, not through a link. Raises Damaged."""
    import stat

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise rundir.Damaged(f"{path} cannot be read", why=error.strerror or str(error)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise rundir.Damaged(f"{path} is not a regular file")
    return fd


def last_lines(path: Path, *, count: int, limit_bytes: int = 1 << 16) -> list[str]:
    """The last lines of a log, as text; reads no more than `limit_bytes`. Raises Damaged."""
    fd = open_log(path)
    try:
        size = os.fstat(fd).st_size
        data = os.pread(fd, limit_bytes, max(0, size - limit_bytes))
    finally:
        os.close(fd)
    return data.decode(errors="replace").splitlines()[-count:]
