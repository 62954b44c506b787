"""A database made new and one brought up by the migrations are the same; Optuna's part is Optuna's."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import sweeps
from alembic.script import ScriptDirectory

import sweeper
from sweeper import database, schema, version_table
from sweeper.database import create_database, make_engine, upgrade_schema
from sweeper.store import Store


def description(url: str) -> dict[str, Any]:
    """Tables with columns, keys and indexes, in whatever order they were created."""
    engine = make_engine(url)
    with engine.connect() as connection:
        inspector = sa.inspect(connection)
        found = {table: _table(inspector, table) for table in inspector.get_table_names()}
    engine.dispose()
    return found


def _table(inspector: sa.Inspector, table: str) -> dict[str, Any]:
    indexes = inspector.get_indexes(table)
    return {
        "columns": [
            (c["name"], str(c["type"]), c["nullable"], _plain(c["default"]), c.get("primary_key"))
            for c in inspector.get_columns(table)
        ],
        "primary key": inspector.get_pk_constraint(table)["constrained_columns"],
        "foreign keys": sorted(str(key) for key in inspector.get_foreign_keys(table)),
        "unique": sorted(map(str, inspector.get_unique_constraints(table))),
        "indexes": sorted((i["name"] or "", str(i["column_names"]), i["unique"], _where(i)) for i in indexes),
    }


def _plain(default: str | None) -> str | None:
    return default.strip("'\"()").lower() if default else None


def _where(index: Any) -> str:
    return re.sub(r"\s+", " ", str(index.get("dialect_options", {}).get("sqlite_where", "")))


def empty_version(url: str) -> None:
    """A database of Optuna's alone, with our version table and nothing in it: before the first migration."""
    optuna.storages.RDBStorage(url)
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE {schema.VERSION_TABLE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"
        )
    engine.dispose()


def test_creating_and_upgrading_from_nothing_give_the_same_tables(tmp_path: Path) -> None:
    created, upgraded = (f"sqlite:///{tmp_path / name}.db" for name in ("created", "upgraded"))
    create_database(created)
    empty_version(upgraded)
    assert upgrade_schema(upgraded) == ("", schema.HEAD)
    ours, theirs = description(created), description(upgraded)
    assert set(ours) == set(theirs)
    for table in ours:
        assert ours[table] == theirs[table], table


def test_upgrading_what_is_up_to_date_changes_nothing(store: Store) -> None:
    sweeps.must_draw(store, sweeps.make(store))
    before, tables = sweeps.everything(store), description(store.url)
    assert upgrade_schema(store.url) == (schema.HEAD, schema.HEAD)
    assert sweeps.everything(store) == before
    assert description(store.url) == tables


def test_our_version_is_beside_optunas_which_is_untouched(store: Store) -> None:
    upgrade_schema(store.url)
    assert sweeps.rows(store, schema.VERSION_TABLE) == [{"version_num": schema.HEAD}]
    assert sweeps.rows(store, "alembic_version") == [{"version_num": schema.OPTUNA_REVISION}]
    optuna_head = optuna.storages.RDBStorage(store.url).get_head_version()
    assert optuna_head == schema.OPTUNA_REVISION, "what optuna_rows.py writes was written for this revision"


def test_the_newest_migration_is_the_head_that_the_code_knows() -> None:
    scripts = ScriptDirectory(str(Path(sweeper.__file__).parent / "migrations"))
    assert scripts.get_current_head() == schema.HEAD == version_table.HEAD
    assert schema.VERSION_TABLE == version_table.VERSION_TABLE
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert revisions == sorted(revisions, reverse=True), "revisions are compared as text"


def test_all_our_tables_carry_our_prefix_and_none_of_optunas_does() -> None:
    assert all(name.startswith(schema.PREFIX) for name in schema.metadata.tables)
    assert schema.VERSION_TABLE.startswith(schema.PREFIX)


@pytest.mark.sqlite
def test_a_connection_is_durable_and_shares_the_file(store: Store) -> None:
    path = database.database_path(store.url)
    assert path is not None
    connection = database.connect_sqlite(path)
    pragmas = {
        name: connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
    }
    connection.close()
    timeout_ms = int(database.BUSY_TIMEOUT_S * 1000)
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": timeout_ms}


@pytest.mark.sqlite
def test_a_write_takes_its_lock_at_once(store: Store) -> None:
    """A deferred transaction that reads before it writes fails when somebody wrote in between."""
    statements: list[str] = []
    sa.event.listen(
        store._engine, "before_cursor_execute", lambda c, cursor, sql, *rest: statements.append(sql)
    )
    sweep = sweeps.make(store)
    sweeps.must_draw(store, sweep)
    begins = {following.split()[0] for sql, following in pairwise(statements) if sql == "BEGIN"}
    assert begins <= {"SELECT"}, "a transaction that only reads"
    assert "BEGIN IMMEDIATE" in statements


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "question",
    [
        "SELECT max(number) FROM trials WHERE study_id=1",
        "SELECT min(t.number) FROM trials t WHERE t.study_id=1 AND t.state='WAITING'",
        "SELECT run_id FROM sweeper_run WHERE state IN ('running', 'interrupted')",
        "SELECT count(*) FROM sweeper_run WHERE sweep_id=1 AND state IN ('running') AND is_retried=0",
    ],
)
def test_the_questions_of_a_worker_are_answered_by_an_index(store: Store, question: str) -> None:
    with store._engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {question}").all()
    assert all("USING" in row[-1] and "INDEX" in row[-1] for row in plan), plan
