"""PostgreSQL as its clients see it: how to connect, and which of its errors pass by themselves."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from sweeper.errors import ConfigError
from sweeper.reading import hide_password

_SESSION = {
    # A node that died in a transaction must not hold its row locks for hours: the server ends it.
    "idle_in_transaction_session_timeout": "30s",
    "lock_timeout": "20s",
    "statement_timeout": "60s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": 5,
    "application_name": "sweeper",
    "options": " ".join(f"-c {key}={value}" for key, value in _SESSION.items()),
    "prepare_threshold": None,  # prepared statements do not survive PgBouncer
    # A server that died is noticed in seconds, not in hours.
    "tcp_user_timeout": 20_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
_TRANSIENT = (
    "08",  # connection exceptions
    "40",  # deadlock, serialization failure: the transaction did not happen
    "57P",  # shutting down, starting up, crashed
    "25P03",  # we were idle in a transaction, e.g. stopped and continued
    "53300",  # too many connections: somebody's will be free in a moment
    "55P03",  # lock_timeout
)
"""Beginnings of SQLSTATEs. Source: PostgreSQL, Appendix A, Error Codes."""
_MISCONFIGURED = (
    "no password supplied",
    "Name or service not known",
    "No address associated with hostname",
    "connection is bad: invalid",  # port, sslmode, any option's value
    "does not support SSL",
    "invalid response to SSL negotiation",  # another program's port
    "definition of service",
    "root certificate file",
    "certificate verify failed",
)
"""What libpq and the resolver say when no connection can ever be made so, and none was made before."""
_FULL_OR_STARTING = ("starting up", "shutting down", "recovery", "too many clients", "connection slots")


def parse(url: str) -> URL:
    """The parts of a database's URL. Raises ConfigError unless sweeper can use such a database."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"storage {hide_password(url)!r} is not a database that sweeper can use",
            do="Use sqlite:///PATH or postgresql://USER@HOST[:PORT]/DATABASE.",
        )
    return parsed


def url_for_driver(url: str) -> URL:
    """The URL with the driver that is installed: psycopg 3, whatever SQLAlchemy's version prefers."""
    parsed = parse(url)
    return (
        parsed.set(drivername="postgresql+psycopg") if parsed.get_backend_name() == "postgresql" else parsed
    )


def engine_options() -> dict[str, Any]:
    """Arguments of `create_engine` for a process that uses one connection at a time."""
    return {"pool_size": 1, "max_overflow": 0, "connect_args": CONNECT_ARGS}


def is_misconfigured(error: BaseException) -> bool:
    """Whether no connection will ever be made with this URL and from this machine, unless somebody changes them.

    Once it has worked, the same words pass by themselves: name servers and shared disks come back.
    """
    if not isinstance(error, DBAPIError) or not is_transient(error) or error.statement is not None:
        return False
    said = str(error.orig)
    return type(error.orig).__name__ == "ProgrammingError" or any(words in said for words in _MISCONFIGURED)


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed when it is tried once more."""
    if not isinstance(error, DBAPIError) or not type(error.orig).__module__.startswith("psycopg"):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_TRANSIENT)
    if error.statement is None:  # no connection was made; libpq passes on the server's words, not its code
        said = str(error.orig)
        return "FATAL" not in said or any(words in said for words in _FULL_OR_STARTING)
    return error.connection_invalidated
