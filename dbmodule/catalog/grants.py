"""What a role lacks to keep the catalog, as the SQL that gives it."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

_NEEDED = """
    WITH needed (relation, privileges) AS (
        VALUES
            ('backup', 'SELECT,INSERT,DELETE'),
            ('backup_dependency', 'SELECT,INSERT'),
            ('backup_relation', 'SELECT,INSERT'),
            ('corrupt_page', 'SELECT,INSERT'),
            ('job', 'SELECT,UPDATE'),
            ('lineage', 'SELECT,INSERT')
    )
    SELECT bool_and(
        has_schema_privilege(n.oid, 'USAGE')
        AND (SELECT bool_and(has_table_privilege(c.oid, privilege))
             FROM pg_catalog.string_to_table(needed.privileges, ',') AS privilege)
    )
    FROM needed
    JOIN pg_catalog.pg_namespace AS n ON n.nspname = 'dbmodule'
    JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND c.relname = needed.relation
"""


def missing_grants(connection: psycopg.Connection[Any]) -> list[str]:
    """SQL for an administrator to run, so that the session's role can keep the catalog.

    Without the extension that is its creation, whose roles do not exist yet. Raises
    `psycopg.Error`.
    """
    row = connection.execute(_NEEDED).fetchone()
    held = None if row is None else row[0]
    if held:
        return []
    me = connection.execute("SELECT current_user::text").fetchone()
    grant = sql.SQL("GRANT dbmodule_agent TO {};").format(sql.Identifier(me[0] if me else ""))
    installed = connection.execute("SELECT to_regnamespace('dbmodule')").fetchone()
    if installed is None or installed[0] is None:
        return ["CREATE EXTENSION dbmodule;", grant.as_string(connection)]
    return [grant.as_string(connection)]
