//! Finishing requests: their outcomes are stored, and their rows leave the queue.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{Connection as _, PgConnection, Postgres, Row};
use uuid::Uuid;

use super::{Fence, SettledRow, body_of, settled_row, status_of};
use crate::id::RequestId;
use crate::metadata::Metadata;
use crate::outcome::Outcome;
use crate::response::Response;
use crate::sealer::{Sealer, StoredResponse};
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
            finish(connection, finishes, retention, self.sealer()).await
        })
        .await
    }

    /// As [`finish`](Self::finish) for one request, without changing anything.
    pub(crate) async fn try_finish(&self, one: &Finish, bytes: usize) -> Result<(), StoreError> {
        let retention = self.config().retention;
        self.run_large("settle.try", bytes, async |connection| {
            let mut transaction = connection.begin().await?;
            let one = std::slice::from_ref(one);
            finish(&mut transaction, one, retention, self.sealer()).await?;
            transaction.rollback().await
        })
        .await
    }
}

/// The statement by which answered requests leave the queue: a short form of the schema's function
/// `finish_requests`, for batches without a dead letter. It locks no row before it deletes it, and
/// reads no payload.
///
/// Bodies are picked by number, as in the insert. The partition is computed once, and not for each
/// row. `$to_handle` and `$noted` are two ways of noting outcomes for handlers, of which a form has
/// one.
macro_rules! finish {
    ($input:expr, $body:literal, $to_handle:literal, $noted:literal) => {
        concat!(
            "WITH input AS MATERIALIZED (",
            $input,
            "), ring AS MATERIALIZED (
                SELECT outcome_slot(clock_timestamp(), $10 * interval '1 millisecond') AS slot
            ), finished AS (
                DELETE FROM mq_msgs m USING input i
                WHERE m.id = ANY (ARRAY[i.id]) AND m.claim_no = i.claim_no
                RETURNING
                    i.*, m.channel_name, m.channel_args, m.waiter, m.created_at,
                    greatest(m.attempts, i.unmade::int) - i.unmade::int AS attempts,
                    m.seq IS NOT NULL AS frees_next
            ), payloads AS (
                DELETE FROM mq_payloads p USING finished f WHERE p.id = ANY (ARRAY[f.id])
            ), stored AS (
                INSERT INTO outcomes (
                    slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
                    expires_at, http_status, head, body, error_class, error, metadata
                )
                SELECT
                    (SELECT r.slot FROM ring r),
                    f.id, f.channel_name, f.channel_args, f.status, f.attempts, f.created_at,
                    clock_timestamp(), clock_timestamp() + $10 * interval '1 millisecond',
                    f.http_status, f.head, ",
            $body,
            ", f.error_class, f.error, f.metadata::json
                FROM finished f
            )",
            $to_handle,
            " SELECT
                f.id, f.claim_no, f.attempts, f.waiter, f.channel_name, f.frees_next,
                NULL::smallint, NULL::text, NULL::bytea",
            $noted,
            " FROM finished f"
        )
    };
}

/// Rows are deleted in the order of the arrays, sorted by id.
const FINISH: &str = finish!(
    "SELECT i.* FROM unnest(
        $1::uuid[], $2::int[], $3::text[], $4::smallint[], $5::text[], $7::text[], $8::text[],
        $9::bool[], $11::text[]
    ) WITH ORDINALITY
        AS i(
            id, claim_no, status, http_status, head, error_class, error, unmade, metadata, number
        )",
    "($6::bytea[])[f.number]",
    // While no channel has a handler, no row is looked up.
    ", to_handle AS (
        INSERT INTO unhandled (id, channel_name, slot)
        SELECT f.id, f.channel_name, (SELECT r.slot FROM ring r)
        FROM finished f JOIN handled_channels h ON h.channel_name = f.channel_name
        WHERE EXISTS (SELECT FROM handled_channels)
    )",
    ""
);

/// For one request. Unnesting arrays would cost more than the rest, and a second insert in the
/// statement a tenth of it, even for no row.
const FINISH_ALONE: &str = finish!(
    "SELECT
        $1::uuid AS id, $2::int AS claim_no, $3::text AS status, $4::smallint AS http_status,
        $5::text AS head,
        $7::text AS error_class, $8::text AS error, $9::bool AS unmade, $11::text AS metadata",
    "$6::bytea",
    "",
    ", CASE WHEN EXISTS (SELECT FROM handled_channels) THEN
        note_unhandled(f.id, f.channel_name, (SELECT r.slot FROM ring r))
    END"
);

/// For batches with a dead letter.
const FINISH_DEAD_LETTERS: &str = "
    SELECT
        f.id, f.claim_no, f.attempts, f.waiter, f.channel_name, f.frees_next, f.earlier_status,
        f.earlier_head, f.earlier_body
    FROM finish_requests(
        $1, $2, $3, $4, $5, $6, $7, $8, $9, $10 * interval '1 millisecond'
    ) f";

/// A result that finishes its request.
pub(crate) type Finish = (Fence, Arc<Outcome>);

pub(super) async fn finish(
    connection: &mut PgConnection,
    finishes: &[Finish],
    retention: Duration,
    sealer: &Sealer,
) -> Result<Vec<Finished>, sqlx::Error> {
    let stored = |outcome: &Outcome| outcome.response.as_ref().map(|r| sealer.response(r));
    let rows = match finishes {
        [(fence, outcome)] if !is_dead_letter(outcome) => {
            let stored = stored(outcome);
            let query = bind_alone(*fence, outcome, stored.as_ref(), retention, sealer);
            query.fetch_all(connection).await?
        }
        _ => {
            let stored: Vec<_> = finishes
                .iter()
                .map(|(_, outcome)| stored(outcome))
                .collect();
            let query = bind_many(finishes, &stored, retention, sealer);
            query.fetch_all(connection).await?
        }
    };
    rows.iter()
        .map(|row| {
            let settled = settled_row(row)?;
            Ok(Finished {
                earlier: earlier(row, settled.fence.id, sealer)?,
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

fn bind_alone<'a>(
    fence: Fence,
    outcome: &'a Outcome,
    stored: Option<&'a StoredResponse>,
    retention: Duration,
    sealer: &Sealer,
) -> Query<'a, Postgres, PgArguments> {
    let response = outcome.response.as_ref();
    let fault = outcome.fault.as_ref();
    sqlx::query(FINISH_ALONE)
        .bind(Uuid::from(fence.id))
        .bind(fence.claim_no)
        .bind(outcome.status.as_str())
        .bind(status_of(response))
        .bind(stored.map(|stored| &*stored.head))
        .bind(body_of(response, stored))
        .bind(fault.map(|fault| &*fault.class))
        .bind(fault.map(|fault| sealer.error_text(outcome.id, &fault.text)))
        .bind(outcome.without_attempt)
        .bind(millis(retention))
        .bind(metadata_of(outcome))
}

fn bind_many<'a>(
    finishes: &'a [Finish],
    stored: &'a [Option<StoredResponse>],
    retention: Duration,
    sealer: &Sealer,
) -> Query<'a, Postgres, PgArguments> {
    let outcomes = finishes.iter().map(|(_, outcome)| &**outcome);
    let dead_letters = outcomes.clone().any(is_dead_letter);
    let responses = outcomes.clone().map(|outcome| outcome.response.as_ref());
    let faults = outcomes.clone().map(|outcome| outcome.fault.as_ref());
    let heads = stored
        .iter()
        .map(|s| s.as_ref().map(|stored| &*stored.head));
    let bodies = responses.clone().zip(stored);
    let bodies = bodies.map(|(response, stored)| body_of(response, stored.as_ref()));
    let fences = finishes.iter().map(|(fence, _)| fence);
    let query = sqlx::query(if dead_letters {
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
    .bind(heads.collect::<Vec<_>>())
    .bind(bodies.collect::<Vec<_>>())
    .bind(
        faults
            .map(|fault| fault.map(|fault| &*fault.class))
            .collect::<Vec<_>>(),
    )
    .bind(
        outcomes
            .clone()
            .map(|outcome| {
                let fault = outcome.fault.as_ref();
                fault.map(|fault| sealer.error_text(outcome.id, &fault.text))
            })
            .collect::<Vec<_>>(),
    )
    .bind(
        outcomes
            .clone()
            .map(|outcome| outcome.without_attempt)
            .collect::<Vec<_>>(),
    )
    .bind(millis(retention));
    if dead_letters {
        return query;
    }
    query.bind(outcomes.map(metadata_of).collect::<Vec<_>>())
}

fn earlier(
    row: &PgRow,
    id: RequestId,
    sealer: &Sealer,
) -> Result<Option<Box<Response>>, sqlx::Error> {
    let Some(status) = row.try_get::<Option<i16>, _>(6)? else {
        return Ok(None);
    };
    let head: String = row.try_get(7)?;
    let body: Option<Vec<u8>> = row.try_get(8)?;
    // If the stored head can't be read back, the outcome's error is enough.
    let response = sealer.read_response(id, status as u16, &head, body);
    Ok(response.ok().map(Box::new))
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use http::{Extensions, HeaderMap, StatusCode, Version};
    use sqlx::Executor;

    use super::*;
    use crate::outcome::Fault;
    use crate::testkit::Postgres;

    /// What is left of requests after their end, apart from times.
    const LEFT: &str = "
        SELECT concat_ws(
            ' ', to_jsonb(o) - '{id,slot,created_at,finished_at,expires_at}'::text[], o.slot >= 0,
            o.finished_at > o.created_at, o.expires_at - o.finished_at < interval '61 s',
            u.slot = o.slot, p.head, m.state
        )
        FROM outcomes o LEFT JOIN unhandled u USING (id) LEFT JOIN mq_payloads p USING (id)
        LEFT JOIN mq_msgs m USING (id)
        WHERE o.id = $1";

    async fn insert(connection: &mut PgConnection, channel: &str, ordered: bool) -> Fence {
        let id = RequestId::generate();
        sqlx::query(
            "WITH payload AS (
                INSERT INTO mq_payloads (id, name, head, metadata)
                VALUES ($1, 'n', '{}', '{\"a\":1}')
             )
             INSERT INTO mq_msgs (
                id, channel_name, channel_args, attempt_at, claim_no, attempts, seq, state, waiter,
                halts
             )
             VALUES (
                $1, $2, 'g', now(), 3, 2, CASE WHEN $3 THEN nextval('mq_seq') END, 'claimed',
                '00000000-0000-0000-0000-000000000007', true
             )",
        )
        .bind(Uuid::from(id))
        .bind(channel)
        .bind(ordered)
        .execute(connection)
        .await
        .unwrap();
        Fence { id, claim_no: 3 }
    }

    fn answered(id: RequestId, counted: bool) -> Outcome {
        let response = Response {
            id,
            status: StatusCode::CREATED,
            version: Version::HTTP_11,
            headers: HeaderMap::new(),
            body: "answer".into(),
            trailers: None,
            url: None,
            extensions: Extensions::new(),
        };
        let outcome = Outcome {
            metadata: Some(Metadata::stored("{\"a\":1}")),
            ..Outcome::answered(Status::Completed, response)
        };
        if counted {
            outcome
        } else {
            outcome.without_attempt()
        }
    }

    #[tokio::test]
    async fn an_answered_request_ends_alike_alone_in_a_batch_and_beside_a_dead_letter() {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        crate::migrate(database.pool()).await.unwrap();
        let mut connection = database.pool().acquire().await.unwrap();
        connection
            .execute(
                "SET search_path TO requeuest;
                 INSERT INTO handled_channels (channel_name) VALUES ('handled')",
            )
            .await
            .unwrap();
        for (channel, ordered, counted) in [
            ("handled", false, true),
            ("other", true, true),
            ("handled", true, false),
        ] {
            let mut ends = Vec::new();
            for beside in [None, Some(Status::Completed), Some(Status::Discarded)] {
                let fence = insert(&mut connection, channel, ordered).await;
                let mut finishes = vec![(fence, Arc::new(answered(fence.id, counted)))];
                if let Some(status) = beside {
                    let other = insert(&mut connection, channel, false).await;
                    let outcome = match status {
                        Status::Completed => answered(other.id, true),
                        _ => Outcome::discarded(other.id, Fault::new("other", "x".to_owned())),
                    };
                    finishes.push((other, Arc::new(outcome)));
                }
                finishes.sort_by_key(|(fence, _)| fence.id);
                let retention = Duration::from_secs(60);
                let none = Sealer::default();
                let settled = finish(&mut connection, &finishes, retention, &none).await;
                let settled = settled.unwrap();
                assert_eq!(settled.len(), finishes.len());
                let settled = settled.into_iter().find(|one| one.row.fence == fence);
                let settled = settled.unwrap();
                let row = &settled.row;
                let row = format!(
                    "{} {:?} {} {}",
                    row.attempts, row.waiter, row.channel, row.ordered
                );
                let left: Vec<String> = sqlx::query_scalar(LEFT)
                    .bind(Uuid::from(fence.id))
                    .fetch_all(&mut *connection)
                    .await
                    .unwrap();
                assert_eq!(left.len(), 1, "{left:?}");
                assert!(settled.earlier.is_none());
                ends.push((row, left));
            }
            assert_eq!(ends[0], ends[1]);
            assert_eq!(ends[0], ends[2]);
        }
    }
}
