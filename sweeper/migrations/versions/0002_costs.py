"""When an attempt's training went on, and on how many GPUs: what resuming costs and saves."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("sweeper_attempt", sa.Column("went_on_at", sa.Float()))
    op.add_column("sweeper_attempt", sa.Column("num_gpus", sa.Integer()))
