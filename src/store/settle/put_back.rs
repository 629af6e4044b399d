//! Putting requests back: due again after a delay, or held by this process for its next attempt.

use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use super::{Failure, Fence, SettledRow, body_of, settled_row, status_of};
use crate::sealer::Sealer;
use crate::store::{Store, StoreError, millis};

/// A request that is due again after `delay`.
#[derive(Debug)]
pub(crate) struct PutBack {
    pub(crate) fence: Fence,
    pub(crate) delay: Duration,
    /// This process holds the request and makes the next attempt. Other processes may claim it if
    /// this one hasn't by one lease after the due time.
    pub(crate) hold: bool,
    pub(crate) waits_for: WaitsFor,
    /// The claim made no attempt, so none is counted.
    pub(crate) uncounted: bool,
    pub(crate) failure: Option<Failure>,
}

/// What the next attempt of a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitsFor {
    /// The end of the delay.
    Delay,
    /// A retry budget: the delay doesn't count in the request's age, unless a caller waits.
    Budget,
    /// Its destination, until that takes more.
    Destination,
}

impl Store {
    /// Puts requests back into the queue, or holds them for this process's next attempt. `bytes` is
    /// the size of their responses.
    pub(crate) async fn put_back(
        &self,
        put_backs: &[PutBack],
        bytes: usize,
    ) -> Result<Vec<SettledRow>, StoreError> {
        let lease = self.config().lease;
        self.run_large("settle.put_back", bytes, async |connection| {
            put_back(connection, put_backs, lease, self.sealer()).await
        })
        .await
    }

    /// As [`put_back`](Self::put_back) for one request, without changing anything.
    pub(crate) async fn try_put_back(&self, one: &PutBack, bytes: usize) -> Result<(), StoreError> {
        let lease = self.config().lease;
        self.run_large("settle.try", bytes, async |connection| {
            let mut transaction = connection.begin().await?;
            put_back(
                &mut transaction,
                std::slice::from_ref(one),
                lease,
                self.sealer(),
            )
            .await?;
            transaction.rollback().await
        })
        .await
    }
}

/// A request keeps its first 3 and its last 20 failed attempts, so one that fails for days stays
/// small. Earlier ones are found by the primary key, for one request after the other. The range has
/// more than one row only after an attempt that was never recorded, because its process died.
const PUT_BACK: &str = "
    WITH input AS MATERIALIZED (
        SELECT i.* FROM unnest(
            $1::uuid[], $2::int[], $3::bigint[], $4::bool[], $5::bool[],
            $6::text[], $7::text[], $8::int[], $9::smallint[], $10::text[], $13::bool[],
            $14::bool[]
        ) WITH ORDINALITY
            AS i(
                id, claim_no, delay_ms, hold, uncounted, error_class, error, duration_ms,
                http_status, head, defer, ageless, number
            )
    ), locked AS MATERIALIZED (
        SELECT i.*, greatest(m.attempts, 1) AS attempts
        FROM mq_msgs m JOIN input i ON m.id = ANY (ARRAY[i.id]) AND m.claim_no = i.claim_no
        ORDER BY i.id FOR UPDATE OF m
    ), payloads AS (
        UPDATE mq_payloads p
        SET response_status = l.http_status, response_head = l.head,
            response_body = ($11::bytea[])[l.number]
        FROM locked l WHERE p.id = ANY (ARRAY[l.id]) AND l.http_status IS NOT NULL
    ), failed AS (
        INSERT INTO attempts (id, number, duration_ms, http_status, error_class, error)
        SELECT l.id, l.attempts, l.duration_ms, l.http_status, l.error_class, l.error
        FROM locked l WHERE l.error_class IS NOT NULL
        ON CONFLICT DO NOTHING
    ), forgotten AS (
        DELETE FROM attempts a WHERE a.ctid = ANY (ARRAY(
            SELECT early.ctid FROM locked l, LATERAL (
                SELECT o.ctid FROM attempts o
                WHERE o.id = l.id AND o.number > 3 AND o.number <= l.attempts - 20 OFFSET 0
            ) early
            WHERE l.attempts > 23 AND l.error_class IS NOT NULL
        ))
    )
    UPDATE mq_msgs m
    SET attempt_at = clock_timestamp()
            + (l.delay_ms + CASE WHEN l.hold THEN $12 ELSE 0 END) * interval '1 millisecond',
        claim_no = next_claim_no(m.claim_no),
        began_at = CASE
            -- Not of a damaged row, whose time can be too large to be added to.
            WHEN l.ageless AND m.waiter IS NULL
                AND coalesce(m.began_at, m.created_at) <= clock_timestamp()
            THEN coalesce(m.began_at, m.created_at) + l.delay_ms * interval '1 millisecond'
            ELSE m.began_at
        END,
        attempts = greatest(m.attempts, 1) - l.uncounted::int,
        lost = CASE WHEN l.uncounted THEN m.lost ELSE 0 END,
        state = CASE
            WHEN l.hold THEN 'held'
            WHEN l.defer THEN 'deferred'
            ELSE 'waiting'
        END::mq_state,
        destination = CASE
            WHEN l.defer THEN coalesce(m.destination, substr(m.channel_args, 8))
            ELSE m.destination
        END
    FROM locked l WHERE m.id = ANY (ARRAY[l.id])
    RETURNING m.id, m.claim_no, m.attempts, m.waiter, m.channel_name, m.seq IS NOT NULL AS ordered";

pub(super) async fn put_back(
    connection: &mut PgConnection,
    put_backs: &[PutBack],
    lease: Duration,
    sealer: &Sealer,
) -> Result<Vec<SettledRow>, sqlx::Error> {
    let column = put_backs.iter();
    let failures = column.clone().map(|put_back| put_back.failure.as_ref());
    let responses = failures
        .clone()
        .map(|failure| failure.and_then(|f| f.response.as_ref()));
    let stored = responses.clone().map(|r| r.map(|r| sealer.response(r)));
    let stored: Vec<_> = stored.collect();
    let heads = stored
        .iter()
        .map(|s| s.as_ref().map(|stored| &*stored.head));
    let bodies = responses.clone().zip(&stored);
    let bodies = bodies.map(|(response, stored)| body_of(response, stored.as_ref()));
    let texts = put_backs.iter().map(|put_back| {
        let failure = put_back.failure.as_ref();
        failure.map(|f| sealer.error_text(put_back.fence.id, &f.text))
    });
    let rows = sqlx::query(PUT_BACK)
        .bind(
            column
                .clone()
                .map(|put_back| put_back.fence.id.into())
                .collect::<Vec<Uuid>>(),
        )
        .bind(
            column
                .clone()
                .map(|put_back| put_back.fence.claim_no)
                .collect::<Vec<_>>(),
        )
        .bind(
            column
                .clone()
                .map(|put_back| millis(put_back.delay))
                .collect::<Vec<_>>(),
        )
        .bind(
            column
                .clone()
                .map(|put_back| put_back.hold)
                .collect::<Vec<_>>(),
        )
        .bind(
            column
                .map(|put_back| put_back.uncounted)
                .collect::<Vec<_>>(),
        )
        .bind(
            failures
                .clone()
                .map(|f| f.map(|f| f.class.as_str()))
                .collect::<Vec<_>>(),
        )
        .bind(texts.collect::<Vec<_>>())
        .bind(
            failures
                .map(|f| f.map(|f| i32::try_from(f.duration.as_millis()).unwrap_or(i32::MAX)))
                .collect::<Vec<_>>(),
        )
        .bind(responses.map(status_of).collect::<Vec<_>>())
        .bind(heads.collect::<Vec<_>>())
        .bind(bodies.collect::<Vec<_>>())
        .bind(millis(lease))
        .bind(
            put_backs
                .iter()
                .map(|put_back| put_back.waits_for == WaitsFor::Destination)
                .collect::<Vec<_>>(),
        )
        .bind(
            put_backs
                .iter()
                .map(|put_back| put_back.waits_for == WaitsFor::Budget)
                .collect::<Vec<_>>(),
        )
        .fetch_all(connection)
        .await?;
    rows.iter().map(settled_row).collect()
}
