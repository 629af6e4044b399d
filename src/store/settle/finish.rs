//! Finishing requests: their outcomes are stored, and their rows leave the queue.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{PgConnection, Postgres, Row};
use uuid::Uuid;

use super::{Fence, SettledRow, settled_row, status_of};
use crate::codec;
use crate::id::RequestId;
use crate::metadata::Metadata;
use crate::outcome::Outcome;
use crate::response::Response;
use crate::status::Status;
use crate::store::{Store, StoreError, millis};

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
}

/// The statement by which requests leave the queue, in three forms. `$finished` selects the rows of
/// `$input` whose claim is the latest.
///
/// Bodies are picked by number, as in the insert. The partition is computed once, and not for each
/// row.
macro_rules! finish {
    ($input:expr, $body:literal, $finished:literal) => {
        concat!(
            "WITH input AS MATERIALIZED (",
            $input,
            "), ring AS MATERIALIZED (
                SELECT outcome_slot(clock_timestamp(), $11 * interval '1 millisecond') AS slot
            ), ",
            $finished,
            ", payloads AS (
                DELETE FROM mq_payloads p USING finished f
                WHERE p.id = ANY (ARRAY[f.id]) AND f.status IN ('completed', 'cancelled')
            ), stored AS (
                INSERT INTO outcomes (
                    slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
                    expires_at, http_status, head, body, error_class, error, metadata
                )
                SELECT
                    CASE WHEN f.status IN ('completed', 'cancelled')
                        THEN (SELECT r.slot FROM ring r) ELSE -1 END,
                    f.id, f.channel_name, f.channel_args, f.status, f.attempts, f.created_at,
                    clock_timestamp(),
                    CASE WHEN f.status IN ('completed', 'cancelled')
                        THEN clock_timestamp() + $11 * interval '1 millisecond' END,
                    CASE WHEN f.earlier THEN f.earlier_status ELSE f.http_status END,
                    CASE WHEN f.earlier THEN f.earlier_head ELSE f.head END,
                    CASE WHEN f.earlier THEN f.earlier_body ELSE ",
            $body,
            " END,
                    f.error_class, f.error, f.metadata::json
                FROM finished f
            ), to_handle AS (
                INSERT INTO unhandled (id, channel_name, slot)
                SELECT
                    f.id, f.channel_name,
                    CASE WHEN f.status IN ('completed', 'cancelled')
                        THEN (SELECT r.slot FROM ring r) ELSE -1 END
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
            $9::bool[], $10::text[]
        ) WITH ORDINALITY
            AS i(
                id, claim_no, status, http_status, head, error_class, error, unmade, metadata,
                number
            )"
    };
}

/// For requests that were answered. Rows are deleted in the order of the arrays, sorted by id.
const FINISH: &str = finish!(many!(), "($6::bytea[])[f.number]");

/// For one request that was answered. Unnesting arrays would cost more than the rest.
const FINISH_ALONE: &str = finish!(
    "SELECT
        $1::uuid AS id, $2::int AS claim_no, $3::text AS status, $4::smallint AS http_status,
        $5::text AS head,
        $7::text AS error_class, $8::text AS error, $9::bool AS unmade, $10::text AS metadata",
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

pub(super) async fn finish(
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

fn metadata_of(outcome: &Outcome) -> Option<&str> {
    outcome.metadata.as_ref().map(Metadata::json)
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
        .bind(outcome.without_attempt)
        .bind(metadata_of(outcome))
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
    .bind(
        outcomes
            .clone()
            .map(|outcome| outcome.without_attempt)
            .collect::<Vec<_>>(),
    )
    .bind(outcomes.map(metadata_of).collect::<Vec<_>>())
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
