//! Parking requests that this process can't read, and listing the parked ones.

use std::time::Duration;

use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::Fence;
use crate::codec::Unreadable;
use crate::error::Error;
use crate::id::RequestId;
use crate::status::ParkedRequest;
use crate::store::dead_letters::at;
use crate::store::{Store, StoreError};

/// The delay after the first look at a request, as `park_request` has it. Later ones are longer.
const FIRST_DELAY: Duration = Duration::from_secs(5);

/// A claimed request that can't be read.
#[derive(Debug)]
pub(crate) struct Park {
    pub(crate) fence: Fence,
    pub(crate) reason: Unreadable,
}

/// What became of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parked {
    /// The time until a poll may claim it again.
    pub(crate) delay: Duration,
}

impl Parked {
    /// Whether the request was not parked before.
    pub(crate) fn is_first(self) -> bool {
        self.delay <= FIRST_DELAY
    }
}

impl Store {
    /// Parks requests, sorted by id. `None` for a claim that is no longer the latest.
    pub(crate) async fn park(&self, parks: &[Park]) -> Result<Vec<Option<Parked>>, StoreError> {
        self.run("settle.park", async |connection| {
            park(connection, parks).await
        })
        .await
    }

    /// The first parked requests with a greater id, in the order of their ids.
    pub(crate) async fn parked(
        &self,
        after: Option<RequestId>,
        limit: i64,
    ) -> Result<Vec<ParkedRequest>, Error> {
        self.run_verified("parked.list", async |connection| {
            parked(connection, after, limit).await
        })
        .await
    }
}

/// Rows are locked in the order of the arrays, sorted by id.
async fn park(
    connection: &mut PgConnection,
    parks: &[Park],
) -> Result<Vec<Option<Parked>>, sqlx::Error> {
    let (ids, claim_nos): (Vec<Uuid>, Vec<i32>) = parks
        .iter()
        .map(|park| (Uuid::from(park.fence.id), park.fence.claim_no))
        .unzip();
    let reasons: Vec<_> = parks.iter().map(|park| park.reason.as_str()).collect();
    let delays: Vec<Option<i64>> = sqlx::query_scalar(
        "SELECT (extract(epoch FROM park_request(i.id, i.claim_no, i.reason)) * 1000)::bigint
         FROM unnest($1::uuid[], $2::int[], $3::text[]) AS i(id, claim_no, reason)",
    )
    .bind(ids)
    .bind(claim_nos)
    .bind(reasons)
    .fetch_all(connection)
    .await?;
    let parked = |ms: i64| Parked {
        delay: Duration::from_millis(ms.unsigned_abs()),
    };
    Ok(delays.into_iter().map(|ms| ms.map(parked)).collect())
}

/// Reads the index of payloads that were parked once, which is small.
async fn parked(
    connection: &mut PgConnection,
    after: Option<RequestId>,
    limit: i64,
) -> Result<Vec<ParkedRequest>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT p.id, m.channel_name, p.parked_reason,
            epoch_us(p.parked_since) AS since
         FROM mq_payloads p JOIN mq_msgs m ON m.id = ANY (ARRAY[p.id])
         WHERE p.parked_since IS NOT NULL AND m.state = 'parked' AND ($1::uuid IS NULL OR p.id > $1)
         ORDER BY p.id LIMIT $2",
    )
    .bind(after.map(Uuid::from))
    .bind(limit)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let reason: Option<String> = row.try_get("parked_reason")?;
            Ok(ParkedRequest {
                id: row.try_get::<Uuid, _>("id")?.into(),
                channel: row.try_get("channel_name")?,
                since: at(row.try_get("since")?),
                reason: reason.unwrap_or_default(),
            })
        })
        .collect()
}
