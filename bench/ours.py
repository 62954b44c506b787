"""Our side, driven as a user drives it: the command line, and a training function in bench/trainers.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench import processes, trace
from bench.contenders import Contender
from bench.floors import answer_of, python, timed
from bench.processes import Failed
from bench.table import Cell, Missing, Series

CONF = Path(__file__).parent / "conf"


def launch(sweep: str, directory: Path, *overrides: str) -> list[str]:
    """The command that starts a sweep of bench/conf, or goes on with it."""
    argv = [sys.executable, "-m", "sweeper", "launch", f"+sweep={sweep}", f"data_dir={directory}/data"]
    return [*argv, *overrides, "--config-dir", str(CONF)]


def trials(count: int, *, sweep: str = "bench_tiny") -> Contender:
    """Rows 1 and 2: many tiny trials on two workers."""
    return Contender(
        "sweeper",
        lambda directory: launch(sweep, directory, f"sweep.n_trials={count}", "launcher.n_workers=2"),
    )


LONG_RUN = Contender("sweeper", lambda directory: launch("bench_long", directory, "launcher.n_workers=1"))
"""Rows 5 to 7."""


def asks(*, workers: int, acts: int, limit_s: float) -> dict[str, Any]:
    """Row 3: draw and settle through sweeper.store and sweeper.search, as a worker does."""
    with processes.scratch() as directory:
        return answer_of(
            python("ours_asks.py", directory, workers, acts, limit_s), timeout_s=60 + 10 * limit_s
        )


def claims(*, workers: int, acts: int, limit_s: float) -> dict[str, Any]:
    """Row 11: claim and release interrupted runs on PostgreSQL."""
    with processes.scratch() as directory:
        directory.chmod(0o711)  # started by root, the server is somebody else
        argv = python("ours_claims.py", directory, workers, acts, limit_s)
        return answer_of(argv, timeout_s=120 + 2 * limit_s)


def fill(directory: Path, *, runs: int, unfinished: int) -> Path:
    """Row 4: a database with many runs."""
    processes.run(python("ours_fill.py", directory, runs, unfinished), timeout_s=120)
    return directory / "sweeper.db"


def listing_s(database: Path, *, repeats: int) -> Cell:
    """Row 4: `sweeper list --incomplete --json`, the whole command."""
    argv = [
        sys.executable,
        "-m",
        "sweeper",
        "list",
        "--incomplete",
        "--json",
        "--storage",
        f"sqlite:///{database}",
    ]
    try:
        return timed(argv, repeats=repeats)
    except Failed as error:
        return Missing(str(error))


def stall_ms(*, size_mb: int, repeats: int, every: int = 5) -> Cell:
    """Row 8: how long the loop stands still at the steps that save, beyond what other steps take."""
    overrides = (
        f"trainer.size_mb={size_mb}",
        f"trainer.steps={every * (repeats + 2) + 1}",
        "launcher.n_workers=1",
    )
    try:
        with processes.scratch() as directory:
            path = directory / "trace"
            processes.run(
                launch("bench_large", directory, *overrides, f"checkpoint.every_n_steps={every}"),
                timeout_s=180,
                env={"BENCH_TRACE": str(path)},
            )
            gaps = boundaries_s(trace.read(path))
    except Failed as error:
        return Missing(str(error))
    # The first save comes a step late, for its memory is made beside the training, and shifts the
    # others: each window of so many steps holds one, and its longest gap is taken.
    late = [gap for step, gap in sorted(gaps.items()) if step > 2 * every]
    windows = [late[start : start + every] for start in range(0, every * repeats, every)]
    idle_s = Series(tuple(late)).median
    return Series(tuple(1e3 * (max(window) - idle_s) for window in windows if len(window) == every))


def logged_s(*, steps: int, repeats: int) -> tuple[list[float], list[float]]:
    """Row 12: seconds of a training with W&B away, and with none; by turns. Raises Failed."""
    away = {"WANDB_MODE": "", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    modes = {"online": away, "disabled": {}}
    found: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(repeats):
        for mode, env in modes.items():
            with processes.scratch() as directory:
                path = directory / "trace"
                overrides = (
                    f"trainer.steps={steps}", f"tracking.wandb.mode={mode}", "launcher.n_workers=1",
                    "tracking.wandb.finish_timeout=1",
                )  # fmt: skip
                argv = launch("bench_logged", directory, *overrides)
                processes.run(argv, timeout_s=300, env={**env, "BENCH_TRACE": str(path)})
                found[mode].append(training_s(trace.read(path)))
    return found["online"], found["disabled"]


def training_s(events: list[trace.Event]) -> float:
    """Seconds from the start to the end of the only training."""
    at = {event.name: event.at_s for event in events}
    return at["end"] - at["start"]


def saves(*, size_mb: int, repeats: int) -> tuple[dict[str, Any], list[float]]:
    """Rows 9 to 11: what saves of a large state were like, and seconds to load the last, cold. Raises Failed."""
    with processes.scratch() as directory:
        answer = answer_of(python("ours_save.py", directory / "run", size_mb, repeats), timeout_s=300)
        loads = [
            float(
                answer_of(python("ours_save.py", directory / "run", size_mb, "load"), timeout_s=120)["load_s"]
            )
            for _ in range(repeats)
        ]
    return answer, loads


def boundaries_s(events: list[trace.Event]) -> dict[int, float]:
    """Step → seconds between the end of its body and the begin of the next one's."""
    begins = {event.step: event.at_s for event in events if event.name == "begin"}
    ends = {event.step: event.at_s for event in events if event.name == "end"}
    return {step: begins[step + 1] - at_s for step, at_s in ends.items() if step + 1 in begins}
