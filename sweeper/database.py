"""The database as a place: URLs, engines, what may hold one, creating it, checking it.

SQLite: every transaction begins IMMEDIATE (it ignores row locks, and a deferred one fails when
it wants to write), WAL, synchronous=FULL. PostgreSQL: READ COMMITTED, so that a statement after a
lock sees what the lock waited for. What is in the tables is the business of others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import Connection, Engine, make_url

from sweeper import alive, postgres, processes, schema
from sweeper.errors import ConfigError, StorageBusy, StorageError, StorageLost
from sweeper.reading import hide_password

BUSY_TIMEOUT_S = 20.0
_ALLOWS_NETWORK = "allow_network_file_system"
_CREATING = 0x7377656570  # PostgreSQL's number of the lock under which tables are created
NETWORK_FILE_SYSTEMS = frozenset(
    [
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "virtiofs"),
        *(
            "ceph",
            "ceph-fuse",
            "glusterfs",
            "lustre",
            "gpfs",
            "beegfs",
            "wekafs",
            "panfs",
            "pvfs2",
            "ocfs2",
            "gfs2",
        ),
        *(
            "juicefs",
            "mfs",
            "moosefs",
            "dfuse",
            "quobyte",
            "curvefs",
            "cvmfs2",
            "vmhgfs-fuse",
            "sshfs",
            "davfs2",
        ),
        *("s3fs", "gcsfuse", "goofys", "rclone", "blobfuse", "blobfuse2", "mountpoint-s3"),
    ]
)
"""Types of /proc/self/mounts; those of FUSE without their `fuse.`."""


# --- engines and statements ----------------------------------------------------------------


def database_path(url: str) -> Path | None:
    """The file of an SQLite URL; None for a server."""
    parsed = postgres.parse(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError(
            f"storage.url={url} has no file",
            do="A sweep that survives needs one, e.g. sqlite:///outputs/sweeper.db",
        )
    return Path(parsed.database)


def shown(url: str) -> str:
    """The URL as people may see it."""
    return hide_password(make_url(url).render_as_string())  # it hides the one before the host only


def connect_sqlite(path: Path) -> sqlite3.Connection:
    """Open an SQLite file the way all of ours are opened, Optuna's engine included."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()
    return connection


def make_engine(url: str) -> Engine:
    """An engine for `transaction`. On SQLite nothing else begins one: each statement is on its own."""
    path = database_path(url)
    if path is None:
        return sa.create_engine(postgres.url_for_driver(url), **postgres.engine_options())
    return sa.create_engine(url, creator=lambda: connect_sqlite(path))


class CommitUnknown(Exception):
    """The connection was lost while COMMIT was in flight: it may have happened, or not."""


@contextlib.contextmanager
def transaction(engine: Engine, *, only_reads: bool = False) -> Iterator[Connection]:
    """One transaction, which takes the write lock at once on SQLite unless it only reads.

    Raises:
        CommitUnknown: The reply to COMMIT was lost.
    """
    with engine.connect() as connection:
        # Not in a listener: an engine that has one looks for more of them at each statement.
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")
        yield connection
        try:
            connection.commit()
        except exc.DBAPIError as error:
            if only_reads or not postgres.is_transient(error):
                raise
            raise CommitUnknown from error


_text = lru_cache(maxsize=500)(sa.text)  # bounded: numbers of trials are written into a text


def execute(connection: Connection, sql: str, **params: Any) -> Any:
    """Execute one statement with named parameters (`:name`)."""
    if connection.dialect.name == "sqlite":  # it takes :name as it is; compiling costs more than executing
        return connection.exec_driver_sql(sql, params)
    return connection.execute(_text(sql), params)


def execute_many(connection: Connection, sql: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Execute one statement for each row of named parameters; no row, no statement."""
    if rows and connection.dialect.name == "sqlite":
        connection.exec_driver_sql(sql, rows)
    elif rows:
        connection.execute(_text(sql), rows)


def insert(connection: Connection, table: str, /, **columns: Any) -> None:
    """Insert one row; columns that are not named get their defaults."""
    values = ", ".join(f":{name}" for name in columns)
    execute(connection, f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})", **columns)


@contextlib.contextmanager
def explained(url: str, *, was_open: bool = True) -> Iterator[None]:
    """Turn what the database raises into a StorageError that says why and what to do.

    Args:
        was_open: It has answered before, so that whatever keeps it from answering now will pass.
    """
    try:
        yield
    except (exc.DBAPIError, sqlite3.Error) as error:
        raise _explain(url, error, was_open=was_open) from error


def _explain(url: str, error: Exception, *, was_open: bool) -> StorageError:
    why = " ".join(str(getattr(error, "orig", None) or error).split())
    is_wrong = not was_open and postgres.is_misconfigured(error)
    is_lost = postgres.is_transient(error) and not is_wrong
    kind = StorageLost if is_lost else StorageBusy if "locked" in why else StorageError
    if "no password supplied" in why:
        do = f"Does this machine see {_password_file(url)}, with mode 0600 and a line for this server? ?passfile= in storage.url names another."
    elif is_wrong:
        do = "Check host, port and options of storage.url."
    elif kind is StorageLost:
        do = "Nothing is lost; run the same command again once the server answers."
    elif "locked" in why:
        do = "Another process holds its write lock; find it (e.g. with `fuser`), or wait, and run the same command again."
    elif "not a database" in why or "malformed" in why:
        do = "Name another file with storage.url=, or move this one away and run `sweeper rebuild DATA_DIR`."
    elif "readonly" in why or "read-only" in why or "unable to open" in why:
        do = "Make the file and its directory writable, or name another with storage.url=."
    elif "full" in why:
        do = "Free some space; nothing is lost, run the same command again."
    elif "authentication" in why or "pg_hba" in why or "does not exist" in why:
        do = "Check user, database and password (~/.pgpass, or ?passfile= in storage.url)."
    else:
        do = "Nothing is lost on disk; run the same command again once the database answers."
    return kind(f"the database {shown(url)} cannot be used", why=why, do=do)


def _password_file(url: str) -> str:
    """Where a password is looked for that the URL does not hold."""
    return str(make_url(url).query.get("passfile") or os.environ.get("PGPASSFILE") or "~/.pgpass")


# --- file systems --------------------------------------------------------------------------


def file_system_of(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, from the text of /proc/self/mounts."""
    best, kind = "", ""
    real = os.path.realpath(path)
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        where = fields[1].encode().decode("unicode_escape")
        inside = real == where or real.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best):
            best, kind = where, fields[2]
    return kind


def refuse_network_file_system(path: Path, *, mounts: str | None = None) -> None:
    """Raise StorageError when `path` would put an SQLite file on a network file system."""
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    kind = file_system_of(path.parent, text)
    if kind.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS:
        raise StorageError(
            f"the database file {path} would lie on a network file system ({kind})",
            why="SQLite's locks are not reliable there, and a lost lock loses runs",
            do="Put it on a local disk with storage.url=sqlite:////local/dir/sweeper.db (run directories may stay "
            "where they are), use PostgreSQL (`sweeper db up --host ADDRESS` starts one that other machines reach), or set storage.allow_network_file_system=true if you know better.",
        )


# --- creating and upgrading ----------------------------------------------------------------


def create_database(url: str, *, allow_network_file_system: bool = False) -> None:
    """Create file and schema, once, under a file lock; does nothing where it exists.

    Raises:
        StorageError: It cannot be created, or what is there is not ours to use.
    """
    path = database_path(url)
    if path is None:
        engine = make_engine(url)
        with explained(url, was_open=False), engine.connect() as lock:  # held until this connection ends
            execute(lock, "SELECT pg_advisory_lock(:key)", key=_CREATING)
            lock.commit()
            _create_schema(url, None)
        engine.dispose()
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not allow_network_file_system:
            refuse_network_file_system(path)
        with open(path.with_name(path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with explained(url):
                _create_schema(url, path)
                if allow_network_file_system:
                    _record_permission(url)
    except OSError as error:
        raise StorageError(
            f"the database {path} cannot be created",
            why=error.strerror or str(error),
            do="Name another place with data_dir= or storage.url=.",
        ) from error


def _create_schema(url: str, path: Path | None) -> None:
    engine = make_engine(url)
    try:
        with transaction(engine) as connection:
            names = set(sa.inspect(connection).get_table_names())
            optuna_made = _revision(connection, "alembic_version", names)
        if not optuna_made:  # written last, and not in one transaction with the tables
            _create_optuna_tables(url, path)
        if schema.VERSION_TABLE not in names:
            with transaction(engine) as connection:
                schema.metadata.create_all(connection)
                for statement in schema.OPTUNA_INDEXES:
                    connection.exec_driver_sql(statement)
                _stamp(connection)
    finally:
        engine.dispose()


def _create_optuna_tables(url: str, path: Path | None) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = {"creator": lambda: connect_sqlite(path)} if path else {"connect_args": postgres.CONNECT_ARGS}
    where = url if path else postgres.url_for_driver(url).render_as_string(hide_password=False)
    storage = optuna.storages.RDBStorage(where, engine_kwargs=options)
    storage.remove_session()
    storage.engine.dispose()


def _stamp(connection: Connection) -> None:
    connection.exec_driver_sql(
        f"CREATE TABLE {schema.VERSION_TABLE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"
    )
    connection.exec_driver_sql(f"INSERT INTO {schema.VERSION_TABLE} VALUES ('{schema.HEAD}')")
    for key, value in _machine().items():
        execute(connection, "INSERT INTO sweeper_meta VALUES (:k, :v)", k=key, v=value)


def _machine() -> dict[str, str]:
    return {"machine_id": processes.machine_id(), "boot_id": processes.boot_id(), "host": alive.host()}


def _record_permission(url: str) -> None:
    """Remember that the user wants the file where it is, for every worker that opens it."""
    engine = make_engine(url)
    with transaction(engine) as connection:
        execute(
            connection,
            "INSERT INTO sweeper_meta VALUES (:k, '1') ON CONFLICT (key) DO NOTHING",
            k=_ALLOWS_NETWORK,
        )
    engine.dispose()


def upgrade_schema(url: str) -> tuple[str, str]:
    """Run the migrations that are missing; returns the revision before and after.

    Raises:
        StorageError: There is no such database, or it is newer than this code.
    """
    from alembic import command
    from alembic.config import Config

    path = database_path(url)
    if path is not None and not path.exists():
        raise StorageError(f"there is no database at {path}", do="`sweeper launch` creates one.")
    engine = make_engine(url)
    with explained(url, was_open=False), transaction(engine) as connection:
        names = set(sa.inspect(connection).get_table_names())
        if schema.VERSION_TABLE not in names:
            raise StorageError(
                f"the database {shown(url)} is not one of sweeper's",
                do="`sweeper launch` creates one.",
            )
        before = _revision(connection, schema.VERSION_TABLE, names)
    if before > schema.HEAD:
        raise StorageError(
            f"the database has schema {before}, newer than this sweeper ({schema.HEAD})",
            do="Install the newer sweeper.",
        )
    config = Config()
    config.set_main_option("script_location", "sweeper:migrations")
    with explained(url), transaction(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()
    return before, schema.HEAD


def _revision(connection: Connection, table: str, names: Set[str]) -> str:
    """What a version table says; empty when it is not there or says nothing yet."""
    if table not in names:
        return ""
    return str(connection.exec_driver_sql(f"SELECT version_num FROM {table}").scalar_one_or_none() or "")


# --- checking ------------------------------------------------------------------------------


def check_database(engine: Engine, url: str, *, allow_network_file_system: bool = False) -> None:
    """Raise StorageError unless this sweeper may use this database on this machine."""
    path = database_path(url)
    with transaction(engine) as connection:
        names = set(sa.inspect(connection).get_table_names())
        ours = _revision(connection, schema.VERSION_TABLE, names)
        optuna = _revision(connection, "alembic_version", names)
        if not ours or not optuna:
            raise StorageError(
                f"the database {shown(url)} is not one of sweeper's, or only half created",
                do="Run `python -m sweeper launch …` or `sweeper rebuild DATA_DIR` to create it.",
            )
        recorded = dict(map(tuple, connection.exec_driver_sql("SELECT key, value FROM sweeper_meta")))
    if ours != schema.HEAD:
        newer = ours > schema.HEAD
        raise StorageError(
            f"the database {shown(url)} has schema {ours}, this sweeper has {schema.HEAD}",
            do="Install the newer sweeper." if newer else "Run `sweeper db upgrade`.",
        )
    if optuna != schema.OPTUNA_REVISION:
        raise StorageError(
            f"the database {shown(url)} has Optuna's tables in revision {optuna}, not {schema.OPTUNA_REVISION}",
            do="Use the Optuna version range that sweeper requires (optuna>=5,<6).",
        )
    if path is not None:
        if not (allow_network_file_system or _ALLOWS_NETWORK in recorded):
            refuse_network_file_system(path)
        _check_machine(engine, path, recorded)


def _check_machine(engine: Engine, path: Path, recorded: Mapping[str, str]) -> None:
    here = _machine()
    if recorded.get("boot_id") == here["boot_id"]:
        return
    # Machines of one image share their machine_id; databases of earlier versions do not name the host.
    if (recorded.get("machine_id"), recorded.get("host", here["host"])) != (here["machine_id"], here["host"]):
        raise StorageError(
            f"the SQLite database {path} belongs to another machine ({recorded.get('host', 'of another id')})",
            why="SQLite is for the workers of one machine",
            do="Use PostgreSQL for several machines (`sweeper db up --host ADDRESS` starts one that others reach, storage.url= names one); if you moved the file here for good, "
            "run `sweeper rebuild DATA_DIR` into a new one.",
        )
    with transaction(engine) as connection:
        for key in ("boot_id", "host"):
            execute(
                connection,
                "INSERT INTO sweeper_meta VALUES (:k, :v) ON CONFLICT (key) DO UPDATE SET value=excluded.value",
                k=key, v=here[key],
            )  # fmt: skip
