"""The stable JSON contract: one run as programs see it.

On the path of `sweeper list`, so it imports nothing heavy.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

from sweeper import alive
from sweeper.states import INCOMPLETE, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from sweeper.reading_rows import RunRow

FIELDS = (
    "run_id",
    "sweep",
    "number",
    "trial",
    "state",
    "incomplete",
    "lease",
    "global_step",
    "total_steps",
    "checkpoint_step",
    "attempts",
    "value",
    "outcome",
    "reason",
    "params",
    "seed",
    "path",
    "owner",
    "wandb_run_id",
    "replaces",
    "retry_of",
)
"""The keys of every run in every `--json`. Keys may be added; none is removed or changes its meaning."""

_IDENTITY = {"host", "machine_id", "boot_id", "pid_namespace", "uid", "pid", "start_ticks"}


def run_rows(
    runs: Iterable[RunRow],
    *,
    data_dir: str,
    now_s: float,
    is_gone: Callable[[dict[str, Any]], bool] | None = None,
) -> list[dict[str, Any]]:
    """Runs as the contract has them.

    Args:
        runs: As `sweeper.reading` returns them.
        data_dir: What `path` is given below; absolute, or relative to the current directory.
        now_s: Unix seconds to judge leases by.
        is_gone: Whether an owner is gone for certain; the default looks at this machine's processes.
    """
    is_gone = is_gone or owner_is_gone
    return [_run_row(run, data_dir=data_dir, now_s=now_s, is_gone=is_gone) for run in runs]


def _run_row(
    run: RunRow, *, data_dir: str, now_s: float, is_gone: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    held = run["state"] == State.RUNNING
    row: dict[str, Any] = {field: run.get(field) for field in FIELDS}
    row["incomplete"] = run["state"] in INCOMPLETE
    row["lease"] = lease(run, now_s=now_s, is_gone=is_gone)
    row["path"] = os.path.join(data_dir, run["path"])
    row["owner"] = owner_name(run["owner"]) if held else None
    return row


def lease(run: RunRow, *, now_s: float, is_gone: Callable[[dict[str, Any]], bool]) -> str:
    """`live`, `expired`, or `none` when nobody holds the run.

    For people and programs that look on. A worker that wants to take over asks for more.
    """
    if run["state"] != State.RUNNING:
        return "none"
    if run["lease_until"] is None or run["lease_until"] < now_s:
        return "expired"
    return "expired" if run["owner"] and is_gone(run["owner"]) else "live"


def owner_is_gone(owner: dict[str, Any]) -> bool:
    """Whether this machine can prove that the process is gone."""
    pid = owner.get("pid")
    if not (owner.keys() >= _IDENTITY and isinstance(pid, int) and 0 < pid < 2**31):
        return False  # written by another version, or damaged: no proof
    process: Any = SimpleNamespace(**owner)
    return alive.proof_of_death(process) is not None


def owner_name(owner: dict[str, Any] | None) -> str | None:
    """`host:pid`, with the SLURM job where there is one."""
    if not owner:
        return None
    job = owner.get("slurm_job_id")
    return f"{owner.get('host')}:{owner.get('pid')}" + (f" (job {job})" if job else "")


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Strict JSON, ASCII only; numbers that JSON has no word for become `"nan"`, `"inf"`, `"-inf"`."""
    import json

    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
