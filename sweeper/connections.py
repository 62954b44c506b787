"""An open database that may be away for a while: transactions that run again.

A method whose transaction did not happen runs again. Where the reply to COMMIT was lost, a proof
tells what became of it; a method without one may run twice.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.engine import Connection

from sweeper import clock
from sweeper.database import (
    CommitUnknown,
    check_database,
    database_path,
    execute,
    explained,
    make_engine,
    shown,
    transaction,
)
from sweeper.errors import StorageError, StorageLost

IDLE_S = 2.0
"""After so long without a use a connection is given back: servers have few, workers are many."""

Proof = tuple[str, dict[str, Any]]
"""A SELECT that finds a row if and only if the transaction it belongs to was committed."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_D = TypeVar("_D", bound="Database")


def patient(method: Callable[Concatenate[_D, _P], _T]) -> Callable[Concatenate[_D, _P], _T]:
    """Run a method again while the server is away and nothing of it happened."""

    @functools.wraps(method)
    def again(self: _D, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        until, pause_s = clock.awake_s() + self.ttl_s * 2 / 3, 0.05
        while True:
            try:
                return method(self, *args, **kwargs)
            except StorageLost:
                if clock.awake_s() + pause_s > until:
                    raise
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(1.0, 2 * pause_s)

    return again


class Database:
    """An open database.

    Args:
        url: SQLite's file must exist.
        ttl_s: How long a lease holds. A server that is away is waited for as long as an owner
            that cannot renew would wait: two thirds of it.
    """

    def __init__(self, url: str, *, ttl_s: float = 60.0, allow_network_file_system: bool = False) -> None:
        self.url = url
        self.ttl_s = ttl_s
        self._path = database_path(url)
        if self._path is not None and not self._path.exists():
            raise StorageError(
                f"there is no database at {self._path}",
                do="Start a sweep with `python -m sweeper launch +sweep=simple`, name the right one with --storage "
                "or --data-dir, or make it anew from run directories with `sweeper rebuild DATA_DIR`.",
            )
        self._engine = make_engine(url)
        self._used_s = clock.awake_s()
        self._file = self._file_id()
        self._check(allow_network_file_system=allow_network_file_system)

    @patient
    def _check(self, *, allow_network_file_system: bool) -> None:
        with explained(self.url, was_open=False):
            check_database(self._engine, self.url, allow_network_file_system=allow_network_file_system)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    @property
    def idle_poll_s(self) -> float:
        """How long a worker that found nothing waits at most before it asks again; a server has many to answer."""
        return 0.2 if self._path is not None else 2.0

    def rest(self, *, after_s: float | None = None) -> None:
        """Give the server its connection back when it was not used for a while; the next use makes one."""
        unused_s = clock.awake_s() - self._used_s
        if self._path is None and unused_s > (IDLE_S if after_s is None else after_s):
            self._engine.dispose()

    @contextlib.contextmanager
    def _transaction(self, proof: Proof | None = None) -> Iterator[Connection]:
        self._used_s = clock.awake_s()
        try:
            with explained(self.url), transaction(self._engine) as connection:
                yield connection
        except CommitUnknown as error:
            if proof is None or not self._is_proven(*proof):
                raise StorageLost(
                    f"the database {shown(self.url)} did not answer", why="the connection was lost"
                ) from error

    @patient
    def _is_proven(self, select: str, params: dict[str, Any]) -> bool:
        with self._reading() as connection:
            return execute(connection, select, **params).first() is not None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A transaction that takes no write lock."""
        self._used_s = clock.awake_s()
        with explained(self.url), transaction(self._engine, only_reads=True) as connection:
            yield connection

    def _now(self, connection: Connection) -> float:
        """The clock by which leases are counted, Unix seconds: the server's, or this machine's on SQLite."""
        if self._path is not None:
            return clock.wall_s()
        return float(execute(connection, "SELECT extract(epoch FROM clock_timestamp())").scalar_one())

    def _file_id(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def check_file(self) -> None:
        """Raise StorageError when the database file is no longer the one at its path."""
        if self._file_id() != self._file:
            raise StorageError(
                f"the database file {self._path} was removed or replaced while in use",
                do="The run directories hold everything: `sweeper rebuild DATA_DIR`, then launch again.",
            )
