"""`sweeper show` and `sweeper best`: one run in full."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import checkpoints, clock, rundir
from sweeper.errors import NotWell
from sweeper.reading import Reading
from sweeper.report import places, rows, tables

if TYPE_CHECKING:
    from sweeper.reading_rows import AttemptRow, RunRow, SweepRow

LOG_LINES = 5
WEIGHTS_FILE = "model.pth"


def main(run_id: str, *, storage: str, data_dir: Path, as_json: bool) -> int:
    """Print trial, overrides, attempts with outcome and last lines, checkpoints with validity.

    Raises:
        NotFound: There is no such run.
    """
    with Reading(storage) as reading:
        run, attempts = reading.run(run_id), reading.attempts(run_id)
    report = run_report(run, attempts, data_dir=data_dir)
    print(rows.to_json(report) if as_json else _text(report))
    return 0


def run_report(run: RunRow, attempts: list[AttemptRow], *, data_dir: Path) -> dict[str, Any]:
    """The run's row of the contract, and `overrides`, `history`, `log`, `checkpoints`.

    What cannot be read on disk is said in `problems` and does not hide the rest.
    """
    (row,) = rows.run_rows([run], data_dir=str(data_dir), now_s=clock.wall_s())
    run_dir = data_dir / run["path"]
    problems: list[str] = []
    return {
        **row,
        "overrides": _overrides(run_dir, problems),
        "history": [_attempt(attempt, run_dir=run_dir) for attempt in attempts],
        "log": _log(run_dir, problems),
        "checkpoints": [
            _checkpoint(found) for found in inspect(run, attempts, data_dir=data_dir, problems=problems)
        ],
        "problems": problems,
    }


def inspect(
    run: RunRow, attempts: list[AttemptRow], *, data_dir: Path, problems: list[str]
) -> list[checkpoints.Inspected]:
    """The run's checkpoints on disk, newest first, judged as a resume would judge them."""
    run_dir = data_dir / run["path"]
    digest = None
    try:
        digest = rundir.read_identity(run_dir).config_digest
    except FileNotFoundError:
        problems.append(f"{run_dir / rundir.RUN_FILE} is missing")
    except rundir.Damaged as error:
        problems.append(str(error))
    starts = [(a["lease_epoch"], a["start_step"]) for a in attempts if a["start_step"] is not None]
    root = run_dir / rundir.CHECKPOINTS_DIR
    return checkpoints.inspect(root, run_id=run["run_id"], config_digest=digest, starts=starts)


def _overrides(run_dir: Path, problems: list[str]) -> list[str] | None:
    try:
        return rundir.read_overrides(run_dir)
    except FileNotFoundError:
        problems.append(f"{run_dir / rundir.OVERRIDES_FILE} is missing")
    except rundir.Damaged as error:
        problems.append(str(error))
    return None


def _attempt(attempt: AttemptRow, *, run_dir: Path) -> dict[str, Any]:
    return {
        "attempt": attempt["attempt"],
        "lease_epoch": attempt["lease_epoch"],
        "owner": rows.owner_name(attempt["owner"]),
        "started_at": utc(attempt["started_at"]),
        "ended_at": utc(attempt["ended_at"]),
        "start_step": attempt["start_step"],
        "end_step": attempt["end_step"],
        "checkpoint_step": attempt["checkpoint_step"],
        "outcome": attempt["outcome"],
        "reason": attempt["reason"],
        "detail": attempt["detail"],
        "log": str(rundir.attempt_log(run_dir, attempt["attempt"])),
    }


def utc(seconds: float | None) -> str | None:
    """Unix seconds as `2025-01-31T12:00:00Z`."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _log(run_dir: Path, problems: list[str]) -> list[str]:
    files = places.log_files(run_dir)
    if not files:
        return []
    try:
        return places.last_lines(files[-1][1], count=LOG_LINES)
    except rundir.Damaged as error:
        problems.append(str(error))
        return []


def _checkpoint(found: checkpoints.Inspected) -> dict[str, Any]:
    return {
        "step": found.step,
        "path": str(places.relative(found.directory)),
        "valid": found.reason is None,
        "reason": found.reason,
        "lease_epoch": found.lease_epoch,
        "size_bytes": found.size_bytes,
    }


# --- as text -------------------------------------------------------------------------------


def _text(report: dict[str, Any]) -> str:
    sections = [_head(report), _overrides_text(report), _attempts_text(report), _log_text(report)]
    sections += [_checkpoints_text(report), _problems_text(report)]
    return "\n\n".join(section for section in sections if section)


def _head(report: dict[str, Any]) -> str:
    facts = [
        ("run", report["run_id"]),
        ("trial", report["trial"]),
        ("state", report["state"] + (f" ({report['outcome']})" if report["outcome"] else "")),
        ("reason", report["reason"]),
        ("lease", None if report["lease"] == "none" else f"{report['lease']}, {report['owner']}"),
        ("value", report["value"]),
        ("step", tables.steps(report)),
        ("checkpoint", report["checkpoint_step"]),
        ("params", tables.short_params(report["params"])),
        ("seed", report["seed"]),
        ("replaces", report["replaces"]),
        ("retry of", report["retry_of"]),
        ("W&B run", report["wandb_run_id"]),
        ("path", report["path"]),
    ]
    return "\n".join(
        f"{name:<11} {tables.escape(str(value))}" for name, value in facts if value not in (None, "")
    )


def _overrides_text(report: dict[str, Any]) -> str:
    return "\n".join(["overrides", *_indented(report["overrides"] or [])]) if report["overrides"] else ""


def _attempts_text(report: dict[str, Any]) -> str:
    headers = ("ATTEMPT", "STARTED", "ENDED", "FROM", "TO", "CHECKPOINT", "OUTCOME", "REASON")
    cells = [
        (
            str(a["attempt"]),
            a["started_at"],
            a["ended_at"] or "-",
            tables.number(a["start_step"]),
            tables.number(a["end_step"]),
            tables.number(a["checkpoint_step"]),
            a["outcome"] or "running",
            a["reason"] or "",
        )
        for a in report["history"]
    ]
    lines = [tables.table(headers, cells, width=tables.terminal_width())] if cells else []
    for a in report["history"]:
        if a["detail"]:
            lines += ["", f"attempt {a['attempt']}: {a['outcome']}", *_indented(a["detail"].splitlines())]
    return "\n".join(lines)


def _log_text(report: dict[str, Any]) -> str:
    return "\n".join(["last lines of the log", *_indented(report["log"])]) if report["log"] else ""


def _checkpoints_text(report: dict[str, Any]) -> str:
    if not report["checkpoints"]:
        return "no checkpoint on disk"
    cells = [
        (
            str(c["step"]),
            "yes" if c["valid"] else "NO",
            tables.number(c["size_bytes"]),
            c["path"],
            c["reason"] or "",
        )
        for c in report["checkpoints"]
    ]
    return tables.table(("CHECKPOINT", "VALID", "SIZE", "PATH", "REASON"), cells)


def _problems_text(report: dict[str, Any]) -> str:
    return "\n".join(f"problem: {tables.escape(text)}" for text in report["problems"])


def _indented(lines: list[str]) -> list[str]:
    return [f"    {tables.escape(line.expandtabs())}" for line in lines]


# --- best ----------------------------------------------------------------------------------


def best(sweep: str, *, storage: str, data_dir: Path, as_json: bool) -> int:
    """Print parameters, value, weights, and the command that trains the best trial again.

    Raises:
        NotFound: There is no such sweep.
        NotWell: It has no completed trial yet.
    """
    with Reading(storage) as reading:
        row = reading.sweep(sweep)
        run = reading.best(sweep)
        attempts = reading.attempts(run["run_id"]) if run else []
        command = reading.config(sweep).get("command") or [f"+sweep={sweep}"]
    if run is None:
        raise NotWell(
            f"sweep {sweep} has no completed trial yet", do=f"`sweeper status {sweep}` shows how far it is."
        )
    report = best_report(row, run, attempts, data_dir=data_dir, command=command)
    print(rows.to_json(report) if as_json else _best_text(report))
    for problem in report["problems"]:
        print(f"sweeper: {tables.escape(problem)}", file=sys.stderr)
    return 0


def best_report(
    sweep: SweepRow, run: RunRow, attempts: list[AttemptRow], *, data_dir: Path, command: list[str]
) -> dict[str, Any]:
    """The best run's row of the contract, and `metric`, `direction`, `weights`, `command`, `problems`."""
    (row,) = rows.run_rows([run], data_dir=str(data_dir), now_s=clock.wall_s())
    problems: list[str] = []
    found = inspect(run, attempts, data_dir=data_dir, problems=problems)
    problems += [f"{places.relative(c.directory)} is not valid: {c.reason}" for c in found if c.reason]
    valid = [_weights(c.directory) for c in found if c.reason is None]
    if not valid:
        problems.append(f"run {run['run_id']} has no valid checkpoint on disk")
    return {
        **row,
        "metric": sweep["metric"],
        "direction": sweep["direction"],
        "weights": str(places.relative(valid[0])) if valid else None,
        "command": again(run, command),
        "problems": problems,
    }


def _weights(directory: Path) -> Path:
    """The file with the weights; the checkpoint itself, where a program calls them something else."""
    path = directory / WEIGHTS_FILE
    return path if path.exists() else directory


def again(run: RunRow, command: list[str]) -> str:
    """The shell command that trains this run's parameters once more, in a sweep of its own.

    Args:
        run: Whose parameters.
        command: The arguments its sweep was launched with, without name and number of trials.
    """
    name = f"{run['sweep'][:58]}-again"
    overrides = [*command, f"sweep.name={name}", "sweep.n_trials=1", "sweep.params=null"]
    overrides.append(f"sweep.run_seed={run['seed']}")
    overrides += [rundir.override(key, value) for key, value in run["params"].items()]
    return shlex.join(["python", "-m", "sweeper", "launch", *overrides])


def _best_text(report: dict[str, Any]) -> str:
    facts = [
        ("run", report["run_id"]),
        ("trial", report["trial"]),
        (report["metric"], f"{report['value']} ({report['direction']}d)"),
        ("weights", report["weights"] or "-"),
        *((f"  {key}", value) for key, value in report["params"].items()),
        ("again", report["command"]),
    ]
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{tables.escape(name):<{width}}  {tables.escape(str(value))}" for name, value in facts)
