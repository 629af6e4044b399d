//! What an operator sees of the hand-overs, and can do about them.

use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::error::Error;
use crate::health::{FailedHandOver, HANDLER_GONE_AFTER, HandledChannel};
use crate::id::RequestId;
use crate::sealer::Sealer;
use crate::store::dead_letters::at;
use crate::store::{Store, StoreError, millis};

/// How many outcomes one statement looks at.
const BATCH: i64 = 1000;
/// How many waiting outcomes of a channel are counted.
const MAX_COUNT: i64 = 10_000;

impl Store {
    /// Notes that this process has a handler of the channel. Writes only if no process of the fleet
    /// has done so for this long.
    pub(crate) async fn note_handler(
        &self,
        channel: &str,
        interval: Duration,
    ) -> Result<(), StoreError> {
        self.run("hand_over.heartbeat", async |connection| {
            note_handler(connection, channel, interval).await
        })
        .await
    }

    /// The channels of which outcomes wait although no process has had a handler lately.
    pub(crate) async fn channels_without_handler(&self) -> Result<Vec<String>, StoreError> {
        self.run("hand_over.without_handler", async |connection| {
            without_handler(connection).await
        })
        .await
    }

    pub(crate) async fn handled_channels(&self) -> Result<Vec<HandledChannel>, Error> {
        self.run_verified("hand_over.channels", async |connection| {
            handled_channels(connection).await
        })
        .await
    }

    /// The outcomes that could not be handed over, in the order of their ids.
    pub(crate) async fn failed_hand_overs(
        &self,
        after: Option<RequestId>,
        limit: i64,
    ) -> Result<Vec<FailedHandOver>, Error> {
        self.run_verified("hand_over.failed", async |connection| {
            failed(connection, after, limit, self.sealer()).await
        })
        .await
    }

    /// Makes an outcome due that could not be handed over. Returns whether there is such a one.
    pub(crate) async fn retry_hand_over(&self, id: RequestId) -> Result<bool, Error> {
        self.run_verified("hand_over.retry", async |connection| {
            retry(connection, id).await
        })
        .await
    }

    /// The same for up to a thousand outcomes of a channel. Returns how many, and the last of them,
    /// or `None` at the end.
    pub(crate) async fn retry_hand_overs(
        &self,
        channel: &str,
        after: Option<RequestId>,
    ) -> Result<(u64, Option<RequestId>), Error> {
        self.run_verified("hand_over.retry_all", async |connection| {
            retry_all(connection, channel, after).await
        })
        .await
    }

    /// Removes an outcome that could not be handed over from those that wait. Returns whether there
    /// is such a one.
    pub(crate) async fn forget_hand_over(&self, id: RequestId) -> Result<bool, Error> {
        self.run_verified("hand_over.forget", async |connection| {
            forget(connection, id).await
        })
        .await
    }
}

async fn note_handler(
    connection: &mut PgConnection,
    channel: &str,
    interval: Duration,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE handler_heartbeats SET seen_at = now()
         WHERE channel_name = $1 AND seen_at < now() - $2 * interval '1 millisecond'",
    )
    .bind(channel)
    .bind(millis(interval))
    .execute(connection)
    .await?;
    Ok(())
}

async fn without_handler(connection: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT h.channel_name
         FROM handled_channels h LEFT JOIN handler_heartbeats b USING (channel_name)
         WHERE coalesce(b.seen_at < now() - $1 * interval '1 millisecond', true)
            AND EXISTS (
                SELECT FROM unhandled u
                WHERE u.channel_name = h.channel_name AND u.due_at < 'infinity' OFFSET 0
            )",
    )
    .bind(millis(HANDLER_GONE_AFTER))
    .fetch_all(connection)
    .await
}

async fn handled_channels(
    connection: &mut PgConnection,
) -> Result<Vec<HandledChannel>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT
            h.channel_name,
            (epoch_us(clock_timestamp()) - epoch_us(b.seen_at)) / 1000 AS seen,
            (SELECT count(*) FROM (
                SELECT FROM unhandled u
                WHERE u.channel_name = h.channel_name AND u.due_at < 'infinity' LIMIT $1
            ) w) AS waiting,
            (SELECT count(*) FROM (
                SELECT FROM unhandled u
                WHERE u.channel_name = h.channel_name AND u.due_at = 'infinity' LIMIT $1
            ) w) AS parked
         FROM handled_channels h LEFT JOIN handler_heartbeats b USING (channel_name)
         ORDER BY h.channel_name",
    )
    .bind(MAX_COUNT)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let seen: Option<i64> = row.try_get("seen")?;
            let last_seen = seen.map(|ms| Duration::from_millis(ms.max(0).unsigned_abs()));
            Ok(HandledChannel {
                channel: row.try_get("channel_name")?,
                has_handler: last_seen.is_some_and(|ago| ago < HANDLER_GONE_AFTER),
                last_seen,
                waiting: row.try_get::<i64, _>("waiting")?.unsigned_abs(),
                parked: row.try_get::<i64, _>("parked")?.unsigned_abs(),
            })
        })
        .collect()
}

/// Reads the index of outcomes that could not be handed over, which is small.
async fn failed(
    connection: &mut PgConnection,
    after: Option<RequestId>,
    limit: i64,
    sealer: &Sealer,
) -> Result<Vec<FailedHandOver>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT
            u.id, u.channel_name, u.failures, u.error, u.due_at = 'infinity' AS parked,
            u.parked_since IS NOT NULL AS unreadable,
            epoch_us(coalesce(u.failing_since, u.parked_since, clock_timestamp())) AS since
         FROM unhandled u
         WHERE (u.failures > 0 OR u.parked_since IS NOT NULL) AND ($1::uuid IS NULL OR u.id > $1)
         ORDER BY u.id LIMIT $2",
    )
    .bind(after.map(Uuid::from))
    .bind(limit)
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| failed_row(row, sealer)).collect()
}

fn failed_row(row: &PgRow, sealer: &Sealer) -> Result<FailedHandOver, sqlx::Error> {
    let id = RequestId::from(row.try_get::<Uuid, _>("id")?);
    let error: Option<String> = row.try_get("error")?;
    Ok(FailedHandOver {
        id,
        channel: row.try_get("channel_name")?,
        failures: row.try_get::<i32, _>("failures")?.max(0).unsigned_abs(),
        error: error.map(|text| sealer.shown_handler_error(id, text)),
        since: at(row.try_get("since")?),
        parked: row.try_get("parked")?,
        unreadable: row.try_get("unreadable")?,
    })
}

/// A row that a handler has at this moment is being retried already, and is not waited for.
async fn retry(connection: &mut PgConnection, id: RequestId) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "WITH failed AS MATERIALIZED (
            SELECT u.id FROM unhandled u
            WHERE u.id = $1 AND (u.failures > 0 OR u.parked_since IS NOT NULL)
         ), idle AS MATERIALIZED (
            SELECT u.id FROM unhandled u
            WHERE u.id = ANY (ARRAY(SELECT f.id FROM failed f)) FOR UPDATE SKIP LOCKED
         ), retried AS (
            UPDATE unhandled u
            SET due_at = clock_timestamp(), failures = 0, failing_since = NULL, error = NULL,
                parked_since = NULL
            WHERE u.id = ANY (ARRAY(SELECT i.id FROM idle i))
         )
         SELECT EXISTS (SELECT FROM failed)",
    )
    .bind(Uuid::from(id))
    .fetch_one(connection)
    .await
}

async fn retry_all(
    connection: &mut PgConnection,
    channel: &str,
    after: Option<RequestId>,
) -> Result<(u64, Option<RequestId>), sqlx::Error> {
    let (looked, retried, last): (i64, i64, Option<Uuid>) = sqlx::query_as(
        "WITH failed AS MATERIALIZED (
            SELECT u.id, u.channel_name FROM unhandled u
            WHERE (u.failures > 0 OR u.parked_since IS NOT NULL)
                AND ($2::uuid IS NULL OR u.id > $2)
            ORDER BY u.id LIMIT $3
         ), idle AS MATERIALIZED (
            SELECT u.id FROM unhandled u
            WHERE u.id = ANY (ARRAY(SELECT f.id FROM failed f WHERE f.channel_name = $1))
            FOR UPDATE SKIP LOCKED
         ), retried AS (
            UPDATE unhandled u
            SET due_at = clock_timestamp(), failures = 0, failing_since = NULL, error = NULL,
                parked_since = NULL
            WHERE u.id = ANY (ARRAY(SELECT i.id FROM idle i))
            RETURNING u.id
         )
         SELECT
            (SELECT count(*) FROM failed), (SELECT count(*) FROM retried),
            (SELECT f.id FROM failed f ORDER BY f.id DESC LIMIT 1)",
    )
    .bind(channel)
    .bind(after.map(Uuid::from))
    .bind(BATCH)
    .fetch_one(connection)
    .await?;
    let last = last.filter(|_| looked >= BATCH).map(RequestId::from);
    Ok((retried.unsigned_abs(), last))
}

async fn forget(connection: &mut PgConnection, id: RequestId) -> Result<bool, sqlx::Error> {
    let forgotten = sqlx::query(
        "DELETE FROM unhandled d WHERE d.id = ANY (ARRAY(
            SELECT u.id FROM unhandled u
            WHERE u.id = $1 AND (u.failures > 0 OR u.parked_since IS NOT NULL)
            FOR UPDATE SKIP LOCKED
         ))",
    )
    .bind(Uuid::from(id))
    .execute(connection)
    .await?;
    Ok(forgotten.rows_affected() > 0)
}
