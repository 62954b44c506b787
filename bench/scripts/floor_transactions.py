"""Floor of ask + tell: two bare SQLite transactions (IMMEDIATE, WAL, synchronous=FULL) for each trial.

Usage: floor_transactions.py DIRECTORY WORKERS TRIALS LIMIT_S
"""

from __future__ import annotations

import os
import sqlite3
import sys
from pathlib import Path

from bench.crowd import Act, answer, crowd

TABLES = """
CREATE TABLE trial (id INTEGER PRIMARY KEY, owner INTEGER, state TEXT);
CREATE TABLE param (trial INTEGER, name TEXT, value REAL);
CREATE TABLE value (trial INTEGER, value REAL);
"""


def connect(path: Path) -> sqlite3.Connection:
    """A durable SQLite connection."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=60)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def client(path: Path) -> Act:
    """Ask: a trial with three parameters. Tell: its state and value."""
    connection = connect(path)

    def act() -> None:
        connection.execute("BEGIN IMMEDIATE")
        row = connection.execute("INSERT INTO trial (owner, state) VALUES (?, 'RUNNING')", (os.getpid(),))
        params = [(row.lastrowid, name, 0.5) for name in ("lr", "width", "dropout")]
        connection.executemany("INSERT INTO param VALUES (?, ?, ?)", params)
        connection.execute("COMMIT")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE trial SET state='COMPLETE' WHERE id=?", (row.lastrowid,))
        connection.execute("INSERT INTO value VALUES (?, 0.5)", (row.lastrowid,))
        connection.execute("COMMIT")

    return act


if __name__ == "__main__":
    database = Path(sys.argv[1]) / "floor.db"
    connect(database).executescript(TABLES)
    answer(
        crowd(
            workers=int(sys.argv[2]),
            acts=int(sys.argv[3]),
            limit_s=float(sys.argv[4]),
            connect=lambda: client(database),
        )
    )
