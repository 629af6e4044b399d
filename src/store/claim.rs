//! What belongs to a claim while its attempt is made. The claiming itself is `mq_poll`, which sqlxmq's runner calls.

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use sqlx::PgConnection;
use uuid::Uuid;

use super::enqueue::SENDING_ONCE;
use super::millis;
use super::settle::Fence;
use crate::error::Error;

/// What `mq_poll` says of a claimed request.
#[derive(Debug, Deserialize)]
pub(crate) struct ClaimHead {
    pub(crate) claim_no: i32,
    pub(crate) attempts: u32,
    #[serde(rename = "age_ms")]
    age_ms: i64,
    /// How far off the deadline is, if there is one.
    deadline_ms: Option<i64>,
    /// The last claim ended with its process, and the request may have been sent and must not be sent again.
    pub(crate) lost: bool,
    /// As many were claimed as were asked for: there may be more.
    pub(crate) more: bool,
    /// The body is too large to come with the claim.
    pub(crate) fetch_body: bool,
    /// The request's head, or nothing if its payload is gone.
    head: Option<Box<RawValue>>,
}

impl ClaimHead {
    pub(crate) fn parse(json: &str) -> Result<Self, Error> {
        serde_json::from_str(json)
            .map_err(|error| Error::corrupt(format!("the claim's head: {error}")))
    }

    pub(crate) fn age(&self) -> Duration {
        Duration::from_millis(self.age_ms.max(0) as u64)
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.deadline_ms
            .map(|ms| Duration::from_millis(ms.max(0) as u64))
    }

    pub(crate) fn head(&self) -> Option<&str> {
        self.head.as_deref().map(RawValue::get)
    }
}

/// Fetches a body that was too large to come with the claim.
pub(crate) async fn body(
    connection: &mut PgConnection,
    id: Uuid,
) -> Result<Option<Vec<u8>>, sqlx::Error> {
    let body = sqlx::query_scalar("SELECT body FROM mq_payloads WHERE id = $1")
        .bind(id)
        .fetch_optional(connection)
        .await?;
    Ok(body.flatten())
}

/// What a transmission needs to be sure of, where its claim may have been lost without notice: after a backoff, and before
/// what must not be sent twice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Confirm {
    /// The transmission has not been counted yet.
    pub(crate) count: bool,
    /// What has been sent must not be sent again.
    pub(crate) once: bool,
}

/// Takes a fresh lease if the claim is still the latest. Returns whether it is.
pub(crate) async fn confirm(
    connection: &mut PgConnection,
    fence: Fence,
    lease: Duration,
    how: Confirm,
) -> Result<bool, sqlx::Error> {
    let confirmed = sqlx::query(
        "UPDATE mq_msgs m
         SET attempt_at = clock_timestamp() + $3 * interval '1 millisecond', attempts = m.attempts + $4::int, state = $5
         WHERE m.id = $1 AND m.claim_no = $2",
    )
    .bind(Uuid::from(fence.id))
    .bind(fence.claim_no)
    .bind(millis(lease))
    .bind(i32::from(how.count))
    .bind(if how.once { SENDING_ONCE } else { 1 })
    .execute(connection)
    .await?;
    Ok(confirmed.rows_affected() > 0)
}

/// Prolongs the leases of claims that are still the latest. Rows that a settle holds are skipped: they need no lease any
/// more, and waiting for them in another order than the settle's would deadlock.
pub(crate) async fn renew(
    connection: &mut PgConnection,
    ids: &[Uuid],
    claim_nos: &[i32],
    lease: Duration,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH locked AS MATERIALIZED (
            SELECT m.id FROM mq_msgs m
            JOIN unnest($1::uuid[], $2::int[]) AS i(id, claim_no) ON m.id = ANY (ARRAY[i.id]) AND m.claim_no = i.claim_no
            ORDER BY i.id FOR UPDATE OF m SKIP LOCKED
        )
        UPDATE mq_msgs m SET attempt_at = clock_timestamp() + $3 * interval '1 millisecond'
        FROM locked WHERE m.id = ANY (ARRAY[locked.id])",
    )
    .bind(ids)
    .bind(claim_nos)
    .bind(millis(lease))
    .execute(connection)
    .await?;
    Ok(())
}
