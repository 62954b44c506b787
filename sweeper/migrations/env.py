"""Run by Alembic; the connection is handed over by `sweeper.database.upgrade_schema`."""

from alembic import context

from sweeper import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    version_table=schema.VERSION_TABLE,
    include_name=lambda name, kind, parents: kind != "table" or bool(name and name.startswith(schema.PREFIX)),
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
