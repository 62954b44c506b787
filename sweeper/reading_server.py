"""Reading a PostgreSQL database through SQLAlchemy, behind `sweeper.reading`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from sweeper.errors import StorageError
from sweeper.postgres import url_for_driver
from sweeper.reading import hide_password

_ERRORS = (SQLAlchemyError, ImportError)
"""ImportError: the driver that the URL names is not installed."""


class Server:
    """A PostgreSQL database through SQLAlchemy; every statement sees committed rows only."""

    def __init__(self, storage: str, *, url: str, timeout_s: float) -> None:
        self._url = url
        self._snapshot = False
        try:
            engine = sqlalchemy.create_engine(
                url_for_driver(storage),
                poolclass=sqlalchemy.NullPool,
                isolation_level="REPEATABLE READ",
                connect_args={"connect_timeout": max(2, round(timeout_s))},
            )
            self._connection = engine.connect().execution_options(postgresql_readonly=True)
        except _ERRORS as error:
            raise self._storage_error(error) from error

    def rows(self, sql: str, parameters: Mapping[str, object]) -> list[dict[str, Any]]:
        try:
            return [
                dict(row) for row in self._connection.execute(sqlalchemy.text(sql), parameters).mappings()
            ]
        except _ERRORS as error:
            raise self._storage_error(error) from error
        finally:
            self._forget()

    def tables(self) -> set[str]:
        try:
            return set(sqlalchemy.inspect(self._connection).get_table_names())
        except _ERRORS as error:
            raise self._storage_error(error) from error
        finally:
            self._forget()

    def begin(self) -> None:
        self._snapshot = True

    def end(self) -> None:
        self._snapshot = False
        self._forget()

    def close(self) -> None:
        self._connection.close()

    def _forget(self) -> None:
        if not self._snapshot:
            self._connection.rollback()

    def _storage_error(self, error: Exception) -> StorageError:
        why = " ".join(str(getattr(error, "orig", None) or error).split())
        return StorageError(
            f"the database {self._url} cannot be read",
            why=hide_password(why),
            do="Check the URL, that the server runs, and that this machine may connect.",
        )
