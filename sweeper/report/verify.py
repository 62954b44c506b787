"""`sweeper verify`: check every byte of checkpoints on disk; needs no database."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper import checkpoints, rundir
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, NotFound, NotWell
from sweeper.report import places, rows, tables


@dataclass(frozen=True, slots=True)
class Target:
    """One `checkpoints/` directory to verify.

    Attributes:
        run_id: The run its checkpoints must belong to.
        config_digest: Digest of that run's config.yaml; None when run.json cannot be read.
        only: Name of the one step directory asked for; None for all.
        problem: Why the run itself is not well.
    """

    root: Path
    run_id: str
    config_digest: str | None = None
    only: str | None = None
    problem: str | None = None


def main(names: list[str], *, data_dir: Path, as_json: bool) -> int:
    """Print each checkpoint and whether it is valid.

    Args:
        names: Runs, sweeps, or directories (data, sweep, run, checkpoints, one step); none = all
            runs of the data directory.

    Returns:
        1 when any checkpoint is invalid.

    Raises:
        NotFound: Something named does not exist.
    """
    targets = [target for name in names for target in targets_of(name, data_dir=data_dir)]
    if not names:
        targets = [run_target(path) for path in rundir.run_dirs(data_dir)]
    found = list(verdicts(targets))
    if as_json:
        print(rows.to_json(found))
    elif found:
        print(tables.table(_HEADERS, [_cells(verdict) for verdict in found]))
    bad = sum(not verdict["valid"] for verdict in found)
    print(_summary(num_runs=len(targets), num_checkpoints=len(found), num_bad=bad), file=sys.stderr)
    return EXIT_NOT_WELL if bad else EXIT_OK


def latest(directory: str) -> int:
    """Print the path of the newest valid checkpoint, and nothing else: for shell scripts.

    Args:
        directory: A run directory, or its `checkpoints` directory.

    Raises:
        NotWell: There is none.
        NotFound: That is no place for checkpoints.
    """
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise NotFound(
            f"{directory} is a file", do="Name the run directory, or the checkpoints directory in it."
        )
    if _is_checkpoint(path.absolute()):
        raise NotFound(
            f"{directory} is a checkpoint itself",
            do=f"`sweeper verify {directory}` says whether it is valid; --latest takes the directory around it.",
        )
    found = checkpoints.find_latest(directory)
    if found is None:
        raise NotWell(f"{directory} has no valid checkpoint", do=f"`sweeper verify {directory}` says why.")
    print(found)
    return EXIT_OK


def _summary(*, num_runs: int, num_checkpoints: int, num_bad: int) -> str:
    if num_checkpoints == 0:
        return f"sweeper: no checkpoint to verify in {num_runs} runs"
    well = f"{num_bad} invalid" if num_bad else "all valid"
    return f"sweeper: {num_checkpoints} checkpoints of {num_runs} runs, {well}"


# --- what is meant -------------------------------------------------------------------------


def targets_of(name: str, *, data_dir: Path) -> list[Target]:
    """What a word on the command line asks to verify. Raises NotFound."""
    if rundir.RUN_ID.match(name) and not Path(name).is_dir():
        return [run_target(places.find_run_dir(name, data_dir=data_dir))]
    if rundir.SWEEP_NAME.match(name) and (data_dir / "sweep" / name).is_dir():
        return [run_target(path) for path in rundir.run_dirs(data_dir, name)]
    path = Path(name)
    if not path.is_dir():
        raise NotFound(
            f"{name!r} is neither a run or sweep below {data_dir} nor a directory",
            do="`sweeper list` shows every run.",
        )
    return _directory_targets(path)


def _directory_targets(path: Path) -> list[Target]:
    path = path.absolute()
    if (path / rundir.RUN_FILE).is_file():
        return [run_target(path)]
    if _is_checkpoint(path):
        return [_checkpoints_target(path.parent, only=path.name)]
    if path.name == rundir.CHECKPOINTS_DIR or checkpoints.steps_on_disk(path):
        return [_checkpoints_target(path)]
    if (path / rundir.CHECKPOINTS_DIR).is_dir():  # open_run's
        return [_checkpoints_target(path / rundir.CHECKPOINTS_DIR)]
    return [run_target(run_dir) for run_dir in places.place_of(path).run_dirs()]


def _is_checkpoint(path: Path) -> bool:
    return path in [directory for _, directory in checkpoints.steps_on_disk(path.parent)]


def run_target(run_dir: Path) -> Target:
    """The checkpoints of a run, with what its run.json says that they must agree with."""
    root = run_dir / rundir.CHECKPOINTS_DIR
    try:
        identity = rundir.read_identity(run_dir)
    except FileNotFoundError:
        return Target(root, run_dir.name)
    except rundir.Damaged as error:
        return Target(root, run_dir.name, problem=str(error))
    return Target(root, identity.run_id, config_digest=identity.config_digest)


def _checkpoints_target(root: Path, *, only: str | None = None) -> Target:
    run = run_target(root.parent)
    if rundir.RUN_ID.match(run.run_id):
        return Target(root, run.run_id, run.config_digest, only, run.problem)
    return Target(root, checkpoints.run_id_inside(root), only=only)  # they must all agree on it


# --- verdicts ------------------------------------------------------------------------------

_HEADERS = ("RUN", "STEP", "VALID", "SIZE", "REASON")


def verdicts(targets: Iterable[Target]) -> Iterator[dict[str, Any]]:
    """One JSON-able verdict per checkpoint, newest first within a run."""
    for target in targets:
        if target.problem:
            yield _verdict(target, path=target.root.parent, reason=target.problem)
        for found in checkpoints.inspect(
            target.root, run_id=target.run_id, config_digest=target.config_digest
        ):
            if target.only is not None and found.directory.name != target.only:
                continue
            if found.reason is not None and not found.directory.exists():
                continue  # its owner pruned it while it was read
            yield _verdict(
                target,
                path=found.directory,
                step=found.step,
                lease_epoch=found.lease_epoch,
                size_bytes=found.size_bytes,
                reason=found.reason,
            )


def _verdict(
    target: Target,
    *,
    path: Path,
    reason: str | None,
    step: int | None = None,
    lease_epoch: int | None = None,
    size_bytes: int | None = None,
) -> dict[str, Any]:
    return {
        "run_id": target.run_id,
        "step": step,
        "path": str(places.relative(path)),
        "valid": reason is None,
        "reason": reason,
        "lease_epoch": lease_epoch,
        "size_bytes": size_bytes,
    }


def _cells(verdict: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(verdict["run_id"]),
        tables.number(verdict["step"]),
        "yes" if verdict["valid"] else "NO",
        tables.number(verdict["size_bytes"]),
        "" if verdict["valid"] else f"{verdict['path']}: {verdict['reason']}",
    )
