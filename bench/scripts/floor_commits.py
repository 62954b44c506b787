"""Floor of claims: two transactions of one UPDATE each on PostgreSQL, every worker on a row of its own.

Usage: floor_commits.py DIRECTORY WORKERS ACTS LIMIT_S
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psycopg

from bench.crowd import Act, answer, crowd
from sweeper.embedded import Server


def client(url: str) -> Act:
    """Two commits."""
    connection = psycopg.connect(url, autocommit=True)
    connection.execute("INSERT INTO row VALUES (%s, 0)", [os.getpid()])
    connection.autocommit = False

    def act() -> None:
        for _ in range(2):
            connection.execute("UPDATE row SET value=value+1 WHERE id=%s", [os.getpid()])
            connection.commit()

    return act


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]) / "postgres")
    database = server.up()
    try:
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute("CREATE TABLE row (id INTEGER PRIMARY KEY, value INTEGER)")
        answer(
            crowd(
                workers=int(sys.argv[2]),
                acts=int(sys.argv[3]),
                limit_s=float(sys.argv[4]),
                connect=lambda: client(database),
            )
        )
    finally:
        server.down()
