"""When an attempt's training went on, on how many GPUs, and how long saves took: what resuming costs and saves."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("sweeper_attempt", sa.Column("went_on_at", sa.Float()))
    op.add_column("sweeper_attempt", sa.Column("num_gpus", sa.Integer()))
    op.add_column("sweeper_attempt", sa.Column("longest_save_s", sa.Float()))
