"""The first tables, and two indexes of ours on Optuna's."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "sweeper_meta",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "sweeper_sweep",
        sa.Column("sweep_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("n_trials", sa.Integer(), nullable=False),
        sa.Column("metric", sa.String(length=256), nullable=False),
        sa.Column("direction", sa.String(length=8), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("next_run", sa.Integer(), server_default="0", nullable=False),
        sa.Column("is_cancelled", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("sweep_id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "sweeper_verdict",
        sa.Column("trial_id", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("prune", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("trial_id", "step"),
    )
    op.create_table(
        "sweeper_run",
        sa.Column("run_id", sa.String(length=80), nullable=False),
        sa.Column("sweep_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("trial_id", sa.Integer(), nullable=False),
        sa.Column("trial", sa.Integer(), nullable=False),
        sa.Column("params", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("threads", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("wandb_run_id", sa.String(length=96), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("lease_epoch", sa.Integer(), nullable=False),
        sa.Column("owner_token", sa.String(length=32), nullable=True),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("processes", sa.Text(), nullable=True),
        sa.Column("worker", sa.String(length=128), nullable=True),
        sa.Column("heartbeat", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("lease_until", sa.Float(), nullable=True),
        sa.Column("not_before", sa.Float(), server_default="0", nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("global_step", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("total_steps", sa.BigInteger(), nullable=True),
        sa.Column("checkpoint_step", sa.BigInteger(), nullable=True),
        sa.Column("lost_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("crashed_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("oom_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("is_retried", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("replaces", sa.String(length=80), nullable=True),
        sa.Column("retry_of", sa.String(length=80), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["sweep_id"],
            ["sweeper_sweep.sweep_id"],
        ),
        sa.PrimaryKeyConstraint("run_id"),
        sa.UniqueConstraint("sweep_id", "number"),
    )
    op.create_index(
        "sweeper_run_incomplete",
        "sweeper_run",
        ["run_id"],
        unique=False,
        sqlite_where=sa.text("state IN ('running', 'interrupted')"),
        postgresql_where=sa.text("state IN ('running', 'interrupted')"),
    )
    op.create_index("sweeper_run_state", "sweeper_run", ["sweep_id", "state", "is_retried"], unique=False)
    op.create_index("sweeper_run_trial", "sweeper_run", ["trial_id"], unique=False)
    op.create_table(
        "sweeper_attempt",
        sa.Column("run_id", sa.String(length=80), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lease_epoch", sa.Integer(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.Column("start_step", sa.BigInteger(), nullable=True),
        sa.Column("end_step", sa.BigInteger(), nullable=True),
        sa.Column("checkpoint_step", sa.BigInteger(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["sweeper_run.run_id"],
        ),
        sa.PrimaryKeyConstraint("run_id", "attempt"),
    )
    op.execute("CREATE INDEX sweeper_trials_number ON trials (study_id, number)")
    op.execute("CREATE INDEX sweeper_trials_waiting ON trials (study_id, number) WHERE state = 'WAITING'")
