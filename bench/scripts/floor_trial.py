"""Floor of a trial: fork with torch loaded, two SQLite commits, the fsyncs of a run directory.

Usage: floor_trial.py DIRECTORY TRIALS WORKERS
"""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  (the first optimizer would import it in each child)

from bench import workload


def main(directory: Path, trials: int, workers: int) -> None:
    """Run `trials` trials on `workers` processes."""
    connection = connect(directory)
    connection.execute("CREATE TABLE run (id INTEGER PRIMARY KEY, state TEXT, value REAL, text TEXT)")
    connection.close()
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    team = [context.Process(target=worker, args=(directory, trials, counter)) for _ in range(workers)]
    for process in team:
        process.start()
    for process in team:
        process.join()


def connect(directory: Path) -> sqlite3.Connection:
    """A durable SQLite connection."""
    connection = sqlite3.connect(directory / "floor.db", isolation_level=None, timeout=60)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def worker(directory: Path, trials: int, counter: Any) -> None:
    """Draw trials until none is left."""
    connection = connect(directory)
    while (number := draw(counter)) < trials:
        run_dir = directory / f"r{number:05d}"
        commit(connection, "INSERT INTO run VALUES (?, 'running', NULL, ?)", (number, "x" * 500))
        begin(run_dir)
        value = train()
        finish(run_dir)
        commit(connection, "UPDATE run SET state='completed', value=? WHERE id=?", (value, number))
        os.unlink(run_dir / "marker")


def draw(counter: Any) -> int:
    """The next number."""
    with counter.get_lock():
        counter.value += 1
        return int(counter.value) - 1


def commit(connection: sqlite3.Connection, sql: str, values: tuple[object, ...]) -> None:
    """One durable transaction."""
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(sql, values)
    connection.execute("COMMIT")


def begin(run_dir: Path) -> None:
    """Four small durable files in a new durable directory: config, overrides, identity, marker."""
    os.mkdir(run_dir)
    for name in ("config.yaml", "overrides.yaml", "run.json", "marker"):
        write(run_dir / name)
    sync_dir(run_dir)
    sync_dir(run_dir.parent)


def finish(run_dir: Path) -> None:
    """The result, durably."""
    write(run_dir / "result.json")
    sync_dir(run_dir)


def write(path: Path) -> None:
    """A small durable file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(fd, b"x" * 500)
    os.fsync(fd)
    os.close(fd)


def sync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def train() -> float:
    """Train in a child of our own."""
    pid = os.fork()
    if pid == 0:
        workload.tiny()
        os._exit(0)
    os.waitpid(pid, 0)
    return 1.0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
