//! Looking after the schema: its version, its age, its ends.

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::millis;
use crate::id::RequestId;

/// What a session of ours finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Schema {
    Missing,
    /// The session looks into another schema than the one that it was told to: a pooler swallowed its settings.
    Elsewhere,
    Version(i64),
}

/// The newest migration that the session's schema has.
pub(crate) async fn schema_version(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Schema, sqlx::Error> {
    let current: Option<String> = sqlx::query_scalar("SELECT current_schema()::text")
        .fetch_one(&mut *connection)
        .await?;
    match current {
        None => return Ok(Schema::Missing),
        Some(current) if current != schema => return Ok(Schema::Elsewhere),
        Some(_) => {}
    }
    // Asked for first, so that a missing ledger is no error in the server's log.
    let ledger: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
        .fetch_one(&mut *connection)
        .await?;
    if !ledger {
        return Ok(Schema::Missing);
    }
    let version: Option<i64> =
        sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
            .fetch_one(connection)
            .await?;
    Ok(version.map_or(Schema::Missing, Schema::Version))
}

/// Whether the database answers.
pub(crate) async fn probe(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT 1").execute(connection).await?;
    Ok(())
}

/// Empties the outcome slots that have outlived the retention, and forgets failed attempts of requests that are
/// no longer there. Returns how many attempts went.
pub(crate) async fn prune(
    connection: &mut PgConnection,
    retention: Duration,
) -> Result<u64, sqlx::Error> {
    sqlx::query("SELECT prune_outcomes($1 * interval '1 millisecond')")
        .bind(millis(retention))
        .execute(&mut *connection)
        .await?;
    // In small batches: a delete of everything at once would hold back vacuum and the log.
    let pruned = sqlx::query(
        "DELETE FROM attempts a USING (
            SELECT old.id, old.number FROM attempts old
            WHERE old.ended_at < clock_timestamp() - $1 * interval '1 millisecond'
                AND NOT EXISTS (SELECT FROM mq_payloads p WHERE p.id = old.id)
            ORDER BY old.ended_at LIMIT 1000
        ) gone
        WHERE a.id = gone.id AND a.number = gone.number",
    )
    .bind(millis(retention))
    .execute(connection)
    .await?;
    Ok(pruned.rows_affected())
}

/// Ends up to `limit` unfinished requests of the given channels, of all of them for `None`, as cancelled.
/// Returns them, with the instances that wait for their outcomes.
pub(crate) async fn clear(
    connection: &mut PgConnection,
    channels: Option<&[String]>,
    retention: Duration,
    limit: i32,
) -> Result<Vec<(RequestId, Option<Uuid>)>, sqlx::Error> {
    let cancelled: Vec<(Uuid, Option<Uuid>)> = sqlx::query_as(
        "SELECT id, waiter FROM cancel_channels($1, $2 * interval '1 millisecond', $3)",
    )
    .bind(channels)
    .bind(millis(retention))
    .bind(limit)
    .fetch_all(connection)
    .await?;
    Ok(cancelled
        .into_iter()
        .map(|(id, waiter)| (id.into(), waiter))
        .collect())
}
