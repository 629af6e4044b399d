//! Settling: recording the results of attempts. A request finishes, or is put back.
//!
//! Each statement locks rows in the order of their ids, so two settles can't deadlock. A claim that
//! is no longer the latest matches no row, and changes nothing.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{FromRow, PgConnection, Postgres, Row};
use uuid::Uuid;

use super::enqueue::notify_runners;
use super::outcome::notify_waiters;
use super::{Store, StoreError, millis};
use crate::classify::FailureClass;
use crate::codec;
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::response::Response;
use crate::status::Status;

/// The claim that a settle stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Fence {
    pub(crate) id: RequestId,
    pub(crate) claim_no: i32,
}

impl Fence {
    /// The fence before a settle raised its number to this one.
    pub(crate) fn before(self) -> Self {
        Self {
            claim_no: self.claim_no - 1,
            ..self
        }
    }
}

/// A failed attempt.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) class: FailureClass,
    pub(crate) text: String,
    pub(crate) duration: Duration,
    /// The response whose status asked for another attempt.
    pub(crate) response: Option<Response>,
}

/// A request that is due again after `delay`.
#[derive(Debug)]
pub(crate) struct PutBack {
    pub(crate) fence: Fence,
    pub(crate) delay: Duration,
    /// This process holds the request and makes the next attempt. Other processes may claim it if
    /// this one hasn't by one lease after the due time.
    pub(crate) hold: bool,
    /// The claim made no attempt, so none is counted.
    pub(crate) uncounted: bool,
    pub(crate) failure: Option<Failure>,
}

/// A row after its settle.
#[derive(Debug)]
pub(crate) struct SettledRow {
    /// The claim with its new number.
    pub(crate) fence: Fence,
    pub(crate) attempts: u32,
    /// The instance that waits for the outcome. Nil if several do.
    pub(crate) waiter: Option<Uuid>,
    pub(crate) channel: String,
    /// The next request of the ordering key may be claimed now.
    pub(crate) ordered: bool,
}

/// The statement by which requests leave the queue, in three forms. `$finished` selects the rows of
/// `$input` whose claim is the latest.
///
/// Bodies are picked by number, as in the insert. The partition is computed once, in a subselect,
/// and not for each row.
macro_rules! finish {
    ($input:expr, $body:literal, $finished:literal) => {
        concat!(
            "WITH input AS MATERIALIZED (",
            $input,
            "), ",
            $finished,
            ", payloads AS (
                DELETE FROM mq_payloads p USING finished f
                WHERE p.id = ANY (ARRAY[f.id]) AND f.status IN ('completed', 'cancelled')
            ), stored AS (
                INSERT INTO outcomes (
                    slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
                    expires_at, http_status, head, body, error_class, error
                )
                SELECT
                    CASE WHEN f.status IN ('completed', 'cancelled')
                        THEN (
                            SELECT outcome_slot(clock_timestamp(), $10 * interval '1 millisecond')
                        )
                        ELSE -1 END,
                    f.id, f.channel_name, f.channel_args, f.status, f.attempts, f.created_at,
                    clock_timestamp(),
                    CASE WHEN f.status IN ('completed', 'cancelled')
                        THEN clock_timestamp() + $10 * interval '1 millisecond' END,
                    CASE WHEN f.earlier THEN f.earlier_status ELSE f.http_status END,
                    CASE WHEN f.earlier THEN f.earlier_head ELSE f.head END,
                    CASE WHEN f.earlier THEN f.earlier_body ELSE ",
            $body,
            " END,
                    f.error_class, f.error
                FROM finished f
            ), to_handle AS (
                INSERT INTO unhandled (id, channel_name)
                SELECT f.id, f.channel_name
                FROM finished f JOIN handled_channels h ON h.channel_name = f.channel_name
            )
            SELECT
                f.id, f.claim_no, f.attempts, f.waiter, f.channel_name,
                f.ordered AND NOT f.halts AS ordered,
                CASE WHEN f.earlier THEN f.earlier_status END AS earlier_status,
                CASE WHEN f.earlier THEN f.earlier_head END AS earlier_head,
                CASE WHEN f.earlier THEN f.earlier_body END AS earlier_body
            FROM finished f"
        )
    };
    ($input:expr, $body:literal) => {
        finish!(
            $input,
            $body,
            "finished AS (
                DELETE FROM mq_msgs m USING input i
                WHERE m.id = ANY (ARRAY[i.id]) AND m.claim_no = i.claim_no
                RETURNING
                    i.*, m.channel_name, m.channel_args, m.waiter, m.created_at,
                    m.attempts - i.unmade::int AS attempts,
                    m.seq IS NOT NULL AS ordered, false AS halts, false AS earlier,
                    NULL::smallint AS earlier_status, NULL::text AS earlier_head,
                    NULL::bytea AS earlier_body
            )"
        )
    };
}

macro_rules! many {
    () => {
        "SELECT i.* FROM unnest(
            $1::uuid[], $2::int[], $3::text[], $4::smallint[], $5::text[], $7::text[], $8::text[],
            $9::bool[]
        ) WITH ORDINALITY
            AS i(id, claim_no, status, http_status, head, error_class, error, unmade, number)"
    };
}

/// For requests that were answered. Rows are deleted in the order of the arrays, sorted by id.
const FINISH: &str = finish!(many!(), "($6::bytea[])[f.number]");

/// For one request that was answered. Unnesting arrays would cost more than the rest.
const FINISH_ALONE: &str = finish!(
    "SELECT
        $1::uuid AS id, $2::int AS claim_no, $3::text AS status, $4::smallint AS http_status,
        $5::text AS head,
        $7::text AS error_class, $8::text AS error, $9::bool AS unmade",
    "$6::bytea"
);

/// For batches with a dead letter. Rows are locked first, to tell which dead letters halt their
/// ordering key. A discarded request without a response ends with the last one it ever got.
const FINISH_DEAD_LETTERS: &str = finish!(
    many!(),
    "($6::bytea[])[f.number]",
    "leaving AS MATERIALIZED (
        SELECT
            i.*, m.channel_name, m.channel_args, m.waiter, m.created_at,
            m.attempts - i.unmade::int AS attempts, m.seq IS NOT NULL AS ordered,
            m.halts AND m.seq IS NOT NULL AND i.status IN ('discarded', 'ambiguous') AS halts
        FROM mq_msgs m JOIN input i ON m.id = ANY (ARRAY[i.id]) AND m.claim_no = i.claim_no
        ORDER BY i.id FOR UPDATE OF m
    ), removed AS (
        DELETE FROM mq_msgs m USING leaving l
        WHERE m.id = ANY (ARRAY[l.id]) AND NOT l.halts
    ), halted AS (
        UPDATE mq_msgs m
        SET state = 3, claim_no = m.claim_no + 1, attempt_at = '9999-12-31 UTC', deadline = NULL,
            supersede_key = NULL
        FROM leaving l WHERE m.id = ANY (ARRAY[l.id]) AND l.halts
    ), finished AS MATERIALIZED (
        SELECT
            l.*,
            l.http_status IS NULL AND p.response_head IS NOT NULL AND l.status = 'discarded'
                AS earlier,
            p.response_status AS earlier_status, p.response_head AS earlier_head,
            p.response_body AS earlier_body
        FROM leaving l LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[l.id])
    )"
);

/// A result that finishes its request.
pub(crate) type Finish = (Fence, Arc<Outcome>);

/// A request that finished.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) row: SettledRow,
    /// The response to an earlier attempt of a discarded request, if the last one brought none.
    pub(crate) earlier: Option<Box<Response>>,
}

impl Store {
    /// Finishes requests, sorted by id: stores their outcomes and removes their rows from the
    /// queue, in one statement. `bytes` is the size of their responses.
    pub(crate) async fn finish(
        &self,
        finishes: &[Finish],
        bytes: usize,
    ) -> Result<Vec<Finished>, StoreError> {
        let retention = self.config().retention;
        self.run_large("settle.finish", bytes, async |connection| {
            finish(connection, finishes, retention).await
        })
        .await
    }

    /// Puts requests back into the queue, or holds them for this process's next attempt. `bytes` is
    /// the size of their responses.
    pub(crate) async fn put_back(
        &self,
        put_backs: &[PutBack],
        bytes: usize,
    ) -> Result<Vec<SettledRow>, StoreError> {
        let lease = self.config().lease;
        self.run_large("settle.put_back", bytes, async |connection| {
            put_back(connection, put_backs, lease).await
        })
        .await
    }

    /// Notifies instances that wait for finished requests, and runners that may claim the next
    /// ones.
    pub(crate) async fn notify_settled(
        &self,
        waiters: &[(Uuid, RequestId)],
        runners: &[Arc<str>],
    ) -> Result<(), StoreError> {
        self.run("settle.notify", async |connection| {
            if !waiters.is_empty() {
                notify_waiters(&mut *connection, waiters).await?;
            }
            if !runners.is_empty() {
                notify_runners(connection, runners).await?;
            }
            Ok(())
        })
        .await
    }
}

async fn finish(
    connection: &mut PgConnection,
    finishes: &[Finish],
    retention: Duration,
) -> Result<Vec<Finished>, sqlx::Error> {
    let query = match finishes {
        [(fence, outcome)] if !is_dead_letter(outcome) => bind_alone(*fence, outcome),
        _ => bind_many(finishes),
    };
    let rows = query.bind(millis(retention)).fetch_all(connection).await?;
    rows.iter()
        .map(|row| {
            let settled = settled_row(row)?;
            Ok(Finished {
                earlier: earlier(row, settled.fence.id)?,
                row: settled,
            })
        })
        .collect()
}

fn is_dead_letter(outcome: &Outcome) -> bool {
    matches!(outcome.status, Status::Discarded | Status::Ambiguous)
}

fn bind_alone(fence: Fence, outcome: &Outcome) -> Query<'_, Postgres, PgArguments> {
    let response = outcome.response.as_ref();
    let fault = outcome.fault.as_ref();
    sqlx::query(FINISH_ALONE)
        .bind(Uuid::from(fence.id))
        .bind(fence.claim_no)
        .bind(outcome.status.as_str())
        .bind(status_of(response))
        .bind(response.map(codec::encode_response))
        .bind(response.map(|response| &*response.body))
        .bind(fault.map(|fault| &*fault.class))
        .bind(fault.map(|fault| &*fault.text))
        .bind(outcome.unmade)
}

fn bind_many(finishes: &[Finish]) -> Query<'_, Postgres, PgArguments> {
    let outcomes = finishes.iter().map(|(_, outcome)| &**outcome);
    let dead_letters = outcomes.clone().any(is_dead_letter);
    let responses = outcomes.clone().map(|outcome| outcome.response.as_ref());
    let faults = outcomes.clone().map(|outcome| outcome.fault.as_ref());
    let fences = finishes.iter().map(|(fence, _)| fence);
    sqlx::query(if dead_letters {
        FINISH_DEAD_LETTERS
    } else {
        FINISH
    })
    .bind(fences.clone().map(|f| f.id.into()).collect::<Vec<Uuid>>())
    .bind(fences.map(|f| f.claim_no).collect::<Vec<_>>())
    .bind(
        outcomes
            .clone()
            .map(|outcome| outcome.status.as_str())
            .collect::<Vec<_>>(),
    )
    .bind(responses.clone().map(status_of).collect::<Vec<_>>())
    .bind(
        responses
            .clone()
            .map(|response| response.map(codec::encode_response))
            .collect::<Vec<_>>(),
    )
    .bind(
        responses
            .map(|response| response.map(|response| &*response.body))
            .collect::<Vec<_>>(),
    )
    .bind(
        faults
            .clone()
            .map(|fault| fault.map(|fault| &*fault.class))
            .collect::<Vec<_>>(),
    )
    .bind(
        faults
            .map(|fault| fault.map(|fault| &*fault.text))
            .collect::<Vec<_>>(),
    )
    .bind(outcomes.map(|outcome| outcome.unmade).collect::<Vec<_>>())
}

fn earlier(row: &PgRow, id: RequestId) -> Result<Option<Box<Response>>, sqlx::Error> {
    let Some(status) = row.try_get::<Option<i16>, _>(6)? else {
        return Ok(None);
    };
    let head: String = row.try_get(7)?;
    let body: Option<Vec<u8>> = row.try_get(8)?;
    let body = Bytes::from(body.unwrap_or_default());
    // If the stored head can't be read back, the outcome's error is enough.
    let response = codec::decode_response(id, status as u16, &head, body);
    Ok(response.ok().map(Box::new))
}

const PUT_BACK: &str = "
    WITH input AS MATERIALIZED (
        SELECT i.* FROM unnest(
            $1::uuid[], $2::int[], $3::bigint[], $4::bool[], $5::bool[],
            $6::text[], $7::text[], $8::int[], $9::smallint[], $10::text[]
        ) WITH ORDINALITY
            AS i(
                id, claim_no, delay_ms, hold, uncounted, error_class, error, duration_ms,
                http_status, head, number
            )
    ), locked AS MATERIALIZED (
        SELECT i.*, m.attempts
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
    )
    UPDATE mq_msgs m
    SET attempt_at = clock_timestamp()
            + (l.delay_ms + CASE WHEN l.hold THEN $12 ELSE 0 END) * interval '1 millisecond',
        claim_no = m.claim_no + 1,
        attempts = m.attempts - l.uncounted::int,
        state = CASE WHEN l.hold THEN 2 ELSE 0 END
    FROM locked l WHERE m.id = ANY (ARRAY[l.id])
    RETURNING m.id, m.claim_no, m.attempts, m.waiter, m.channel_name, m.seq IS NOT NULL AS ordered";

async fn put_back(
    connection: &mut PgConnection,
    put_backs: &[PutBack],
    lease: Duration,
) -> Result<Vec<SettledRow>, sqlx::Error> {
    let column = put_backs.iter();
    let failures = column.clone().map(|put_back| put_back.failure.as_ref());
    let responses = failures
        .clone()
        .map(|failure| failure.and_then(|f| f.response.as_ref()));
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
        .bind(
            failures
                .clone()
                .map(|f| f.map(|f| &*f.text))
                .collect::<Vec<_>>(),
        )
        .bind(
            failures
                .map(|f| f.map(|f| i32::try_from(f.duration.as_millis()).unwrap_or(i32::MAX)))
                .collect::<Vec<_>>(),
        )
        .bind(responses.clone().map(status_of).collect::<Vec<_>>())
        .bind(
            responses
                .clone()
                .map(|r| r.map(codec::encode_response))
                .collect::<Vec<_>>(),
        )
        .bind(
            responses
                .map(|r| r.map(|response| &*response.body))
                .collect::<Vec<_>>(),
        )
        .bind(millis(lease))
        .fetch_all(connection)
        .await?;
    rows.iter().map(settled_row).collect()
}

fn status_of(response: Option<&Response>) -> Option<i16> {
    response.map(|response| response.status.as_u16() as i16)
}

/// Reads by position, which saves looking up nine names for each row.
fn settled_row(row: &PgRow) -> Result<SettledRow, sqlx::Error> {
    let (id, claim_no, attempts, waiter, channel, ordered): (Uuid, _, i32, _, _, _) =
        FromRow::from_row(row)?;
    Ok(SettledRow {
        fence: Fence {
            id: id.into(),
            claim_no,
        },
        attempts: attempts as u32,
        waiter,
        channel,
        ordered,
    })
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;
    use crate::testkit::Postgres;

    #[tokio::test]
    async fn an_earlier_claim_in_the_same_batch_changes_nothing() {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        crate::migrate(database.pool()).await.unwrap();
        let mut connection = database.pool().acquire().await.unwrap();
        sqlx::query("SET search_path TO requeuest")
            .execute(&mut *connection)
            .await
            .unwrap();
        for put_back_first in [true, false] {
            let id = RequestId::generate();
            sqlx::query(
                "INSERT INTO mq_msgs (
                    id, channel_name, channel_args, attempt_at, claim_no, attempts
                 )
                 VALUES ($1, 'c', 'g', now(), 2, 2)",
            )
            .bind(Uuid::from(id))
            .execute(&mut *connection)
            .await
            .unwrap();
            let fence = |claim_no| Fence { id, claim_no };
            let put_back = |claim_no, seconds| PutBack {
                fence: fence(claim_no),
                delay: Duration::from_secs(seconds),
                hold: false,
                uncounted: false,
                failure: None,
            };
            let latest = if put_back_first {
                let put_backs = [put_back(1, 0), put_back(2, 3600)];
                let settled = super::put_back(&mut connection, &put_backs, Duration::ZERO).await;
                let settled = settled.unwrap();
                assert_eq!(settled.len(), 1);
                let delayed: bool =
                    sqlx::query_scalar("SELECT attempt_at > now() FROM mq_msgs WHERE id = $1")
                        .bind(Uuid::from(id))
                        .fetch_one(&mut *connection)
                        .await
                        .unwrap();
                assert!(delayed);
                settled[0].fence.claim_no
            } else {
                2
            };
            let outcome = |text: &str| Arc::new(Outcome::discarded(id, "other", text.to_owned()));
            let finishes = [
                (fence(latest - 1), outcome("stale")),
                (fence(latest), outcome("latest")),
            ];
            let settled = finish(&mut connection, &finishes, Duration::from_secs(60)).await;
            let settled = settled.unwrap();
            assert_eq!(settled.len(), 1);
            assert_eq!(settled[0].row.fence, fence(latest));
            let stored: Vec<String> =
                sqlx::query_scalar("SELECT error FROM outcomes WHERE id = $1")
                    .bind(Uuid::from(id))
                    .fetch_all(&mut *connection)
                    .await
                    .unwrap();
            assert_eq!(stored, ["latest"]);
        }
    }
}
