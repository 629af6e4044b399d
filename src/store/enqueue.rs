//! Persisting requests.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::{PgConnection, PgExecutor};
use uuid::Uuid;

use super::{millis, quoted};
use crate::id::RequestId;

/// The longest that a runner goes without a look, as `mq_poll` tells it.
pub(crate) const RUNNER_WAIT: Duration = Duration::from_secs(1);
/// Names the rows for anybody who looks into the queue with sqlxmq's eyes.
const MESSAGE_NAME: &str = "requeuest";

/// A request on its way into the queue.
#[derive(Debug)]
pub(crate) struct NewRequest {
    pub(crate) id: RequestId,
    pub(crate) channel: Arc<str>,
    pub(crate) group: String,
    pub(crate) ordered: bool,
    pub(crate) delay: Duration,
    pub(crate) head: String,
    pub(crate) body: Option<Bytes>,
    /// The instance that waits for the outcome.
    pub(crate) waiter: Option<Uuid>,
    /// Inserted with a lease, for the process that inserts it to make the first attempt.
    pub(crate) claimed: bool,
}

impl NewRequest {
    /// Whether a runner has to be told of it, because it may look too late by itself.
    pub(crate) fn needs_runner(&self) -> bool {
        !self.claimed && self.delay < RUNNER_WAIT
    }

    pub(crate) fn size(&self) -> usize {
        self.head.len() + self.body.as_ref().map_or(0, Bytes::len)
    }
}

const INSERT: &str = "
    WITH input AS MATERIALIZED (
        SELECT i.* FROM unnest(
            $1::uuid[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::bytea[], $7::uuid[], $8::bool[]
        ) AS i(id, channel_name, channel_args, delay_ms, head, body, waiter, claimed)
    ), payloads AS (
        INSERT INTO mq_payloads (id, name, head, body)
        SELECT i.id, $9, i.head, i.body FROM input i
    )
    INSERT INTO mq_msgs (id, channel_name, channel_args, attempt_at, waiter, claim_no, attempts, state)
    SELECT
        i.id, i.channel_name, i.channel_args,
        clock_timestamp() + (i.delay_ms + CASE WHEN i.claimed THEN $10 ELSE 0 END) * interval '1 millisecond',
        i.waiter, i.claimed::int, i.claimed::int, i.claimed::int::smallint
    FROM input i";

/// After a commit whose outcome is unknown: a row that is there, or has already ended, is left alone.
const INSERT_AGAIN: &str = "
    WITH input AS MATERIALIZED (
        SELECT i.* FROM unnest(
            $1::uuid[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::bytea[], $7::uuid[], $8::bool[]
        ) AS i(id, channel_name, channel_args, delay_ms, head, body, waiter, claimed)
        WHERE NOT EXISTS (SELECT FROM mq_payloads p WHERE p.id = i.id)
            AND NOT EXISTS (SELECT FROM outcomes o WHERE o.id = i.id)
    ), payloads AS (
        INSERT INTO mq_payloads (id, name, head, body)
        SELECT i.id, $9, i.head, i.body FROM input i
    )
    INSERT INTO mq_msgs (id, channel_name, channel_args, attempt_at, waiter, claim_no, attempts, state)
    SELECT
        i.id, i.channel_name, i.channel_args,
        clock_timestamp() + (i.delay_ms + CASE WHEN i.claimed THEN $10 ELSE 0 END) * interval '1 millisecond',
        i.waiter, i.claimed::int, i.claimed::int, i.claimed::int::smallint
    FROM input i";

/// Inserts requests without an ordering key, in one statement.
pub(crate) async fn insert(
    connection: &mut PgConnection,
    requests: &[NewRequest],
    lease: Duration,
    again: bool,
) -> Result<(), sqlx::Error> {
    let column = requests.iter();
    sqlx::query(if again { INSERT_AGAIN } else { INSERT })
        .bind(column.clone().map(|r| r.id.into()).collect::<Vec<Uuid>>())
        .bind(column.clone().map(|r| &*r.channel).collect::<Vec<_>>())
        .bind(column.clone().map(|r| &*r.group).collect::<Vec<_>>())
        .bind(column.clone().map(|r| millis(r.delay)).collect::<Vec<_>>())
        .bind(column.clone().map(|r| &*r.head).collect::<Vec<_>>())
        .bind(
            column
                .clone()
                .map(|r| r.body.as_deref())
                .collect::<Vec<_>>(),
        )
        .bind(column.clone().map(|r| r.waiter).collect::<Vec<_>>())
        .bind(column.map(|r| r.claimed).collect::<Vec<_>>())
        .bind(MESSAGE_NAME)
        .bind(millis(lease))
        .execute(connection)
        .await?;
    Ok(())
}

/// How [`insert_one`] goes about it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InsertOne {
    /// Whether runners are told at the commit.
    pub(crate) notify: bool,
    /// Whether to wait for another transaction that is about to add to the same ordering key.
    pub(crate) wait: bool,
}

/// Inserts one request, ordered or not, through the schema's own function: on any connection, in any transaction.
/// Returns whether it did; it always does with `wait`.
pub(crate) async fn insert_one<'c>(
    executor: impl PgExecutor<'c>,
    schema: &str,
    request: &NewRequest,
    how: InsertOne,
) -> Result<bool, sqlx::Error> {
    // On the caller's connection nothing may depend on its search_path, not even the operator.
    let call = format!(
        "SELECT {}.enqueue(
            $1, $2, $3, $4, $5 OPERATOR(pg_catalog.*) interval '1 millisecond', $6, $7, $8, $9, $10, $11
        )",
        quoted(schema)
    );
    sqlx::query_scalar(&call)
        .bind(Uuid::from(request.id))
        .bind(&*request.channel)
        .bind(&*request.group)
        .bind(request.ordered)
        .bind(millis(request.delay))
        .bind(MESSAGE_NAME)
        .bind(&*request.head)
        .bind(request.body.as_deref())
        .bind(request.waiter)
        .bind(how.notify)
        .bind(how.wait)
        .fetch_one(executor)
        .await
}

/// Tells the runners of these channels that something is due.
pub(crate) async fn notify_runners(
    connection: &mut PgConnection,
    channels: &[Arc<str>],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "SELECT pg_notify(c.name, '')
         FROM (SELECT 'mq_' || i.name FROM unnest($1::text[]) AS i(name) UNION SELECT 'mq') AS c(name)",
    )
    .bind(channels.iter().map(|channel| &**channel).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}
