"""Commits an order, rolls one back, and is refused. Prints what it saw as JSON."""

import json
import sys

import psycopg
from psycopg.types.json import Jsonb


def place(cursor, url, note):
    cursor.execute("INSERT INTO orders VALUES (%s)", [note])
    options = Jsonb({"key": note, "ordered": "orders"})
    cursor.execute(
        "SELECT requeuest.fire('POST', %s, body => %s, options => %s)",
        [url, note.encode(), options],
    )
    return cursor.fetchone()[0]


database, url = sys.argv[1:]
with psycopg.connect(database) as connection:
    with connection.transaction(force_rollback=True), connection.cursor() as cursor:
        rolled_back = place(cursor, url, "rolled back")
    with connection.transaction(), connection.cursor() as cursor:
        committed = place(cursor, url, "committed")
    try:
        connection.execute("SELECT requeuest.fire('POST', 'ftp://a/')")
    except psycopg.errors.InvalidParameterValue as error:
        refused = [error.sqlstate, error.diag.column_name, error.diag.message_hint]
    connection.rollback()
print(json.dumps([str(committed), str(rolled_back), refused]))
