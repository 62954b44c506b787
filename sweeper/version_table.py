"""Which version of our tables this code reads and writes.

Apart from `sweeper.schema`, so that reading a database needs no SQLAlchemy.
"""

VERSION_TABLE = "sweeper_version"
"""Alembic's table for our revisions; Optuna keeps its own in `alembic_version`."""

HEAD = "0002"
"""The Alembic revision this code reads and writes. Revisions are numbered, so they compare as text."""
