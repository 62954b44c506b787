"""Alembic migrations of our tables, with a version table of our own (Optuna has `alembic_version`).

A new database is created from `sweeper.schema` and stamped with its HEAD; a test holds the two
ways to the same result.
"""
