"""Our tables, beside Optuna's in the same database. Times are Unix seconds, UTC.

Optuna's tables (`studies`, `trials`, …) are created by Optuna; `sweeper.optuna_rows` writes rows of
its trials itself, so that a trial and its run are one transaction.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from sweeper.version_table import HEAD, VERSION_TABLE

__all__ = [
    "HEAD",
    "OPTUNA_INDEXES",
    "OPTUNA_REVISION",
    "PREFIX",
    "VERSION_TABLE",
    "attempt",
    "meta",
    "metadata",
    "run",
    "sweep",
    "verdict",
]

PREFIX = "sweeper_"
OPTUNA_REVISION = "v3.2.0.a"
"""The revision of Optuna's tables (schema 12) that `sweeper.optuna_rows` was written for."""

OPTUNA_INDEXES = (
    "CREATE INDEX sweeper_trials_number ON trials (study_id, number)",
    "CREATE INDEX sweeper_trials_waiting ON trials (study_id, number) WHERE state = 'WAITING'",
)
"""Indexes of ours on Optuna's table: the next number and the queue, flat in the number of trials."""

metadata = MetaData()

meta = Table(
    "sweeper_meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

sweep = Table(
    "sweeper_sweep",
    metadata,
    Column("sweep_id", Integer, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("study_id", Integer, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("n_trials", Integer, nullable=False),
    Column("metric", String(256), nullable=False),
    Column("direction", String(8), nullable=False),
    Column("config", Text, nullable=False),  # JSON: the composed configuration of the last launch
    Column("next_run", Integer, nullable=False, server_default="0"),
    Column("is_cancelled", Boolean, nullable=False, server_default=text("false")),
    Column("created_at", Float, nullable=False),
)

run = Table(
    "sweeper_run",
    metadata,
    Column("run_id", String(80), primary_key=True),
    Column("sweep_id", Integer, ForeignKey("sweeper_sweep.sweep_id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("trial_id", Integer, nullable=False),  # Optuna's primary key
    Column("trial", Integer, nullable=False),  # Optuna's number within the study
    Column("params", Text, nullable=False),  # JSON
    Column("seed", BigInteger, nullable=False),
    Column("threads", Integer, nullable=False),
    Column("path", Text, nullable=False),  # relative to the data directory
    Column("wandb_run_id", String(96), nullable=False),
    Column("state", String(16), nullable=False),
    Column("outcome", String(16)),  # of the last attempt that ended
    Column("reason", Text),
    Column("value", Float),
    Column("lease_epoch", Integer, nullable=False),
    Column("owner_token", String(32)),
    Column("owner", Text),  # JSON: ProcessId of the worker
    Column("processes", Text),  # JSON: list of ProcessId, trainers of the attempt
    Column("worker", String(128)),  # name of the worker that owns or last owned it
    Column("heartbeat", BigInteger, nullable=False, server_default="0"),
    Column("lease_until", Float),
    Column("not_before", Float, nullable=False, server_default="0"),  # back-off
    Column("attempts", Integer, nullable=False),
    Column("global_step", BigInteger, nullable=False, server_default="0"),
    Column("total_steps", BigInteger),
    Column("checkpoint_step", BigInteger),
    Column("lost_count", Integer, nullable=False, server_default="0"),
    Column("crashed_count", Integer, nullable=False, server_default="0"),
    Column("oom_count", Integer, nullable=False, server_default="0"),
    Column("is_retried", Boolean, nullable=False, server_default=text("false")),
    Column("replaces", String(80)),
    Column("retry_of", String(80)),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    UniqueConstraint("sweep_id", "number"),
    Index("sweeper_run_state", "sweep_id", "state", "is_retried"),
    Index("sweeper_run_trial", "trial_id"),
    Index(
        "sweeper_run_incomplete",
        "run_id",
        sqlite_where=text("state IN ('running', 'interrupted')"),
        postgresql_where=text("state IN ('running', 'interrupted')"),
    ),
)

attempt = Table(
    "sweeper_attempt",
    metadata,
    Column("run_id", String(80), ForeignKey("sweeper_run.run_id"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("lease_epoch", Integer, nullable=False),
    Column("owner", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("start_step", BigInteger),  # NULL until the trainer said where it starts
    Column("end_step", BigInteger),
    Column("checkpoint_step", BigInteger),  # newest committed in this attempt
    Column("outcome", String(16)),  # NULL while it runs
    Column("reason", Text),
    Column("detail", Text),  # traceback or last lines of the log
    Column("went_on_at", Float),  # when the trainer said where it starts
    Column("num_gpus", Integer),
    Column("longest_save_s", Float),
)

verdict = Table(
    "sweeper_verdict",
    metadata,
    Column("trial_id", Integer, primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("value", Float),
    Column("prune", Boolean, nullable=False),
)
