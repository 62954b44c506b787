"""What the machine itself needs for each row, measured in the same run: nobody can be faster."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench import processes, trials
from bench.contenders import Contender
from bench.processes import Failed
from bench.table import Cell, Missing, Series

SCRIPTS = Path(__file__).parent / "scripts"


def python(script: str, *arguments: object) -> list[str]:
    """A command line that runs one of our scripts in sweeper's environment."""
    return [sys.executable, str(SCRIPTS / script), *map(str, arguments)]


def answer_of(argv: list[str], *, timeout_s: float) -> dict[str, Any]:
    """Run a script that ends with one line of JSON. Raises Failed."""
    out = processes.run(argv, timeout_s=timeout_s)
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    if "error" in answer:
        raise Failed(answer["error"])
    return answer


def series(argv: list[str], key: str, *, scale: float = 1.0, timeout_s: float = 120.0) -> Cell:
    """One list (or number) of a script's answer, as a cell."""
    try:
        value = answer_of(argv, timeout_s=timeout_s)[key]
    except Failed as error:
        return Missing(str(error))
    values = value if isinstance(value, list) else [value]
    return Series(tuple(scale * item for item in values))


def training_s() -> float:
    """Seconds that the tiny training takes in a warm process."""
    with processes.scratch() as directory:
        path = directory / "trace"
        processes.run(python("floor_training.py", 30), timeout_s=60, env={"BENCH_TRACE": str(path)})
        return trials.training_s(path)


def trial_ms(*, count: int, training_s: float) -> Cell:
    """Row 1: fork, two commits, fsyncs."""
    floor = Contender("floor", lambda directory: python("floor_trial.py", directory, count, trials.WORKERS))
    return trials.cost_ms(floor, trials=count, training_s=training_s, timeout_s=120)


def import_torch_s(*, repeats: int) -> Series:
    """Rows 2 and 6: a python that imports torch, from start to end of the import."""
    code = "import time, torch; print(time.monotonic())"
    seconds = []
    for _ in range(repeats):
        started_s = time.monotonic()
        seconds.append(float(processes.run([sys.executable, "-c", code], timeout_s=60)) - started_s)
    return Series(tuple(seconds))


def transactions(*, workers: int, acts: int, limit_s: float) -> dict[str, Any]:
    """Row 3: two bare transactions per trial."""
    with processes.scratch() as directory:
        argv = python("floor_transactions.py", directory, workers, acts, limit_s)
        return answer_of(argv, timeout_s=60 + 10 * limit_s)


def commits(*, workers: int, acts: int, limit_s: float) -> dict[str, Any]:
    """Row 11: two commits of PostgreSQL per claim."""
    with processes.scratch() as directory:
        directory.chmod(0o711)
        return answer_of(
            python("floor_commits.py", directory, workers, acts, limit_s), timeout_s=120 + 2 * limit_s
        )


def query_s(database: Path, *, repeats: int) -> Series:
    """Row 4: bare python that asks SQLite for the unfinished runs and prints them."""
    code = (
        "import sqlite3, sys, json\n"
        "db = sqlite3.connect('file:' + sys.argv[1] + '?mode=ro', uri=True)\n"
        'sql = "SELECT run_id, state, global_step FROM sweeper_run"\n'
        "sql += \" WHERE state IN ('running', 'interrupted')\"\n"
        "print(json.dumps(db.execute(sql).fetchall()))"
    )
    return timed([sys.executable, "-I", "-c", code, str(database)], repeats=repeats)


def timed(argv: list[str], *, repeats: int, timeout_s: float = 120.0) -> Series:
    """Seconds of a whole command, from start to exit."""
    seconds = []
    for _ in range(repeats):
        started_s = time.monotonic()
        processes.run(argv, timeout_s=timeout_s)
        seconds.append(time.monotonic() - started_s)
    return Series(tuple(seconds))


def restart(*, repeats: int) -> dict[str, list[float]]:
    """Row 5: `restart_s`, fork + build + load + one step; and `save_s`, a durable save of the small state."""
    with processes.scratch() as directory:
        return answer_of(python("floor_restart.py", directory, repeats), timeout_s=120)


def step_s() -> float:
    """Row 7: what a paced step takes when nothing disturbs it."""
    return float(answer_of(python("floor_pace.py", 500), timeout_s=60)["step_s"])


def disk(*, size_mb: int, repeats: int) -> dict[str, Any]:
    """Rows 9 and 10: `write_s`, write and fsync of the bytes of a save; `read_s`, a plain cold read of them."""
    with processes.scratch() as directory:
        return answer_of(python("floor_disk.py", directory, size_mb, repeats), timeout_s=180)


def copy_ms(*, size_mb: int, repeats: int) -> Cell:
    """Row 8: a memory copy into a warm buffer."""
    return series(python("floor_copy.py", size_mb, repeats + 1), "stall_s", scale=1e3)
