//! What a list shows of its requests.

use sqlx::postgres::PgRow;
use sqlx::{ColumnIndex, Decode, PgConnection, Postgres, Row, Type};
use uuid::Uuid;

use super::{answered, at};
use crate::id::RequestId;
use crate::inspection::{RequestState, RequestSummary};
use crate::sealer::Sealer;
use crate::status::Status;
use crate::store::columns::{METHOD, QUEUED_STATUS, named_by_group, ordering_key};

/// Looks the requests of a page up, in its order.
pub(super) async fn summaries(
    connection: &mut PgConnection,
    ids: &[Uuid],
    sealer: &Sealer,
) -> Result<Vec<RequestSummary>, sqlx::Error> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let (ordering_key, named) = (ordering_key("g.name"), named_by_group("g.name"));
    let rows = sqlx::query(&format!(
        "SELECT
            i.id,
            coalesce(o.channel_name, m.channel_name) AS channel_name,
            coalesce(o.status, {QUEUED_STATUS}) AS status,
            m.state::text AS state,
            {METHOD} AS method,
            coalesce(
                o.destination, m.destination,
                CASE WHEN o.id IS NULL OR strpos({named}, '://') > 0 THEN {named} END
            ) AS destination,
            {ordering_key} AS ordering_key,
            coalesce(o.attempts, m.attempts) AS attempts,
            epoch_us(coalesce(o.created_at, m.created_at)) AS created_at,
            CASE WHEN m.state NOT IN ('claimed', 'sending_once', 'halted') THEN epoch_us(
                m.attempt_at - CASE WHEN m.state = 'held'
                    THEN current_setting('requeuest.lease')::interval ELSE interval '0' END
            ) END AS due_at,
            epoch_us(o.finished_at) AS finished_at,
            coalesce(o.http_status, e.http_status) AS http_status,
            coalesce(o.error_class, e.error_class) AS error_class,
            coalesce(o.error, e.error) AS error,
            o.replayed_as
         FROM unnest($1::uuid[]) WITH ORDINALITY AS i(id, number)
         LEFT JOIN mq_msgs m ON m.id = ANY (ARRAY[i.id])
         LEFT JOIN outcomes o ON o.id = ANY (ARRAY[i.id])
         LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[i.id])
         CROSS JOIN LATERAL (SELECT coalesce(o.channel_args, m.channel_args) AS name) g
         LEFT JOIN LATERAL (
            SELECT a.http_status, a.error_class, a.error FROM attempts a
            WHERE a.id = i.id AND o.id IS NULL AND m.attempts > 0
            ORDER BY a.number DESC LIMIT 1
         ) e ON true
         WHERE m.id IS NOT NULL OR o.id IS NOT NULL
         ORDER BY i.number"
    ))
    .bind(ids)
    .persistent(false)
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| summary(row, sealer)).collect()
}

/// Whatever is in a row, it fails no list: what can't be read is left out.
fn summary(row: &PgRow, sealer: &Sealer) -> Result<RequestSummary, sqlx::Error> {
    let id = RequestId::from(row.try_get::<Uuid, _>("id")?);
    let status: Option<String> = readable(row, "status");
    let status = status.as_deref().and_then(Status::from_name);
    let state: Option<String> = readable(row, "state");
    let http_status: Option<i16> = readable(row, "http_status");
    let http_status = http_status.map(i16::unsigned_abs);
    let error_class: Option<String> = readable(row, "error_class");
    let error: Option<String> = readable(row, "error");
    let class = error_class.as_deref().unwrap_or_default();
    let error = error.map(|text| sealer.shown_error_text(id, class, text));
    let answered = || answered(http_status.filter(|_| status != Some(Status::Completed))?);
    let replayed_as: Option<Uuid> = readable(row, "replayed_as");
    let attempts: Option<i32> = readable(row, "attempts");
    let time = |name| readable::<i64>(row, name).map(at);
    Ok(RequestSummary {
        id,
        channel: readable(row, "channel_name").unwrap_or_default(),
        status,
        state: state.as_deref().and_then(RequestState::from_name),
        method: readable(row, "method"),
        destination: readable(row, "destination"),
        ordering_key: readable(row, "ordering_key"),
        attempts: attempts.unwrap_or_default().unsigned_abs(),
        created_at: at(readable(row, "created_at").unwrap_or_default()),
        due_at: time("due_at"),
        finished_at: time("finished_at"),
        http_status,
        error: error.or_else(answered),
        error_class,
        replayed_as: replayed_as.map(RequestId::from),
    })
}

/// A column, if it can be decoded.
fn readable<'r, T>(row: &'r PgRow, name: &str) -> Option<T>
where
    T: Decode<'r, Postgres> + Type<Postgres>,
    for<'n> &'n str: ColumnIndex<PgRow>,
{
    row.try_get::<Option<T>, _>(name).ok().flatten()
}
