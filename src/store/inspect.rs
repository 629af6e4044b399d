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

/// Gives up what is past its deadline, in case no runner polls; empties the outcome slots that have outlived the retention; and
/// forgets failed attempts and keys of requests that are no longer there. Returns how many attempts or keys went, at most.
pub(crate) async fn prune(
    connection: &mut PgConnection,
    retention: Duration,
) -> Result<u64, sqlx::Error> {
    sqlx::query("SELECT expire_requests(1000)")
        .execute(&mut *connection)
        .await?;
    sqlx::query("SELECT prune_outcomes($1 * interval '1 millisecond')")
        .bind(millis(retention))
        .execute(&mut *connection)
        .await?;
    // In small batches: a delete of everything at once would hold back vacuum and the log.
    let pruned = sqlx::query(
        "DELETE FROM attempts a USING (
            SELECT old.id, old.number FROM attempts old
            WHERE old.ended_at < clock_timestamp() - $1 * interval '1 millisecond'
                AND NOT EXISTS (SELECT FROM mq_payloads p WHERE p.id = old.id OFFSET 0)
            ORDER BY old.ended_at LIMIT 1000
        ) gone
        WHERE a.id = gone.id AND a.number = gone.number",
    )
    .bind(millis(retention))
    .execute(&mut *connection)
    .await?;
    // A key whose request has just been inserted is too young to be taken for forgotten.
    let keys = sqlx::query(
        "DELETE FROM request_keys k USING (
            SELECT old.channel_name, old.key FROM request_keys old
            WHERE old.created_at < clock_timestamp() - $1 * interval '1 millisecond'
                AND NOT EXISTS (SELECT FROM mq_msgs m WHERE m.id = old.id OFFSET 0)
                AND NOT EXISTS (SELECT FROM outcomes o WHERE o.id = old.id OFFSET 0)
            ORDER BY old.created_at LIMIT 1000
        ) gone
        WHERE k.channel_name = gone.channel_name AND k.key = gone.key AND k.created_at < clock_timestamp() - $1 * interval '1 millisecond'",
    )
    .bind(millis(retention))
    .execute(connection)
    .await?;
    Ok(pruned.rows_affected().max(keys.rows_affected()))
}

/// Ends up to `limit` unfinished requests of the given channels, of all of them for `None`, as cancelled.
pub(crate) async fn clear(
    connection: &mut PgConnection,
    channels: Option<&[String]>,
    retention: Duration,
    limit: i32,
) -> Result<Vec<RequestId>, sqlx::Error> {
    let cancelled: Vec<Uuid> =
        sqlx::query_scalar("SELECT cancel_channels($1, $2 * interval '1 millisecond', $3)")
            .bind(channels)
            .bind(millis(retention))
            .bind(limit)
            .fetch_one(connection)
            .await?;
    Ok(cancelled.into_iter().map(RequestId::from).collect())
}

/// What became of a wish to cancel a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cancelled {
    Now,
    /// It had ended already.
    Ended,
    Unknown,
}

/// Ends an unfinished request as cancelled.
pub(crate) async fn cancel(
    connection: &mut PgConnection,
    id: RequestId,
    retention: Duration,
) -> Result<Cancelled, sqlx::Error> {
    let verdict: Option<String> =
        sqlx::query_scalar("SELECT cancel_request($1, $2 * interval '1 millisecond')")
            .bind(Uuid::from(id))
            .bind(millis(retention))
            .fetch_one(connection)
            .await?;
    Ok(match verdict.as_deref() {
        Some("cancelled") => Cancelled::Now,
        Some(_) => Cancelled::Ended,
        None => Cancelled::Unknown,
    })
}
