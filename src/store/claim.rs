//! What belongs to a claim while its attempt is made. The claiming itself is `mq_poll`, which sqlxmq's runner calls.

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use sqlx::PgConnection;
use uuid::Uuid;

use super::millis;
use crate::error::Error;

/// What `mq_poll` says of a claimed request.
#[derive(Debug, Deserialize)]
pub(crate) struct ClaimHead<'a> {
    pub(crate) claim_no: i32,
    pub(crate) attempts: u32,
    #[serde(rename = "age_ms")]
    age_ms: i64,
    /// The body is too large to come with the claim.
    pub(crate) fetch_body: bool,
    /// The request's head, or nothing if its payload is gone.
    #[serde(borrow)]
    head: Option<&'a RawValue>,
}

impl<'a> ClaimHead<'a> {
    pub(crate) fn parse(json: &'a str) -> Result<Self, Error> {
        serde_json::from_str(json)
            .map_err(|error| Error::corrupt(format!("the claim's head: {error}")))
    }

    pub(crate) fn age(&self) -> Duration {
        Duration::from_millis(self.age_ms.max(0) as u64)
    }

    pub(crate) fn head(&self) -> Option<&'a str> {
        self.head.map(RawValue::get)
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
            JOIN unnest($1::uuid[], $2::int[]) AS i(id, claim_no) ON m.id = i.id AND m.claim_no = i.claim_no
            ORDER BY m.id FOR UPDATE OF m SKIP LOCKED
        )
        UPDATE mq_msgs m SET attempt_at = clock_timestamp() + $3 * interval '1 millisecond', state = 1
        FROM locked WHERE m.id = locked.id",
    )
    .bind(ids)
    .bind(claim_nos)
    .bind(millis(lease))
    .execute(connection)
    .await?;
    Ok(())
}
