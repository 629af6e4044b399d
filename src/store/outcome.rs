//! Reading the status and the outcome of requests.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{Store, StoreError};
use crate::codec::{self, Unreadable};
use crate::error::Error;
use crate::id::RequestId;
use crate::metadata::Metadata;
use crate::outcome::{Fault, Outcome};
use crate::response::Response;
use crate::sealer::Sealer;
use crate::status::Status;

/// How many bytes of responses one look-up brings. One response that is larger comes alone.
const MAX_FETCHED: usize = 8 * 1024 * 1024;

/// What the database knows of an id.
#[derive(Debug)]
pub(crate) enum Found {
    Pending,
    Finished(Box<Outcome>),
    /// Finished, with an outcome for which this look-up had no room.
    Unfetched,
    /// The request has finished, and this process can't read its outcome.
    Unreadable(Unreadable),
    Unknown,
}

impl Store {
    /// Looks requests up in the queue and among the outcomes. The outcome of the first one that has
    /// finished is fetched, and further ones up to [`MAX_FETCHED`].
    pub(crate) async fn find(
        &self,
        ids: &[RequestId],
    ) -> Result<Vec<(RequestId, Found)>, StoreError> {
        let bytes = self.config().max_response_body.max(MAX_FETCHED);
        self.run_large("outcome.find", bytes, async |connection| {
            find(connection, ids, self.sealer()).await
        })
        .await
    }

    /// Whether any of these requests has not finished.
    pub(crate) async fn any_pending(&self, ids: &[RequestId]) -> Result<bool, StoreError> {
        self.run("outcome.pending", async |connection| {
            any_pending(connection, ids).await
        })
        .await
    }

    /// As [`find`](Self::find) for one request of a caller's.
    pub(crate) async fn find_one(&self, id: RequestId) -> Result<Found, Error> {
        let bytes = self.config().max_response_body;
        let found = self
            .run_verified_large("outcome.find", bytes, async |connection| {
                find(connection, &[id], self.sealer()).await
            })
            .await?;
        Ok(found
            .into_iter()
            .next()
            .map_or(Found::Unknown, |(_, found)| found))
    }

    /// Marks an unfinished request as waited for by this instance, so that the process that settles
    /// it notifies the instance. If another instance waits already, every instance is notified.
    pub(crate) async fn watch(&self, id: RequestId, instance: Uuid) -> Result<(), Error> {
        self.run_verified("outcome.watch", async |connection| {
            watch(connection, id, instance).await
        })
        .await
    }

    /// The status of a request, or `None` if there is no such request.
    pub(crate) async fn status(&self, id: RequestId) -> Result<Option<Status>, Error> {
        self.run_verified("outcome.status", async |connection| {
            status(connection, id).await
        })
        .await?
        .transpose()
        .map_err(|unreadable| Error::from(unreadable).with_id(id))
    }
}

/// One statement reads both tables: with two, a row that moves from the queue to the outcomes in
/// between would look unknown. The statement reads a column that the index by id doesn't have,
/// because an index-only scan could run through the whole index.
///
/// Postgres knows the lengths of heads and bodies without reading them, so it reads only those that
/// are fetched.
async fn find(
    connection: &mut PgConnection,
    ids: &[RequestId],
    sealer: &Sealer,
) -> Result<Vec<(RequestId, Found)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT
            f.id, f.queued, f.fetched, f.format, f.status, f.attempts, f.http_status,
            f.error_class, f.error, f.metadata,
            CASE WHEN f.fetched THEN f.head END AS head,
            CASE WHEN f.fetched THEN f.body END AS body,
            f.destination
         FROM (
            SELECT
                s.*,
                -- The first response comes in any case, and further ones as long as they fit.
                sum(s.bytes) OVER so_far <= $2 OR sum(s.bytes) OVER so_far = s.bytes AS fetched
            FROM (
                SELECT
                    i.number, i.id, m.claim_no IS NOT NULL AS queued,
                    o.format, o.status, o.attempts, o.http_status, o.head, o.body,
                    o.error_class, o.error, o.metadata::text, o.destination,
                    coalesce(octet_length(o.head), 0)::bigint + coalesce(octet_length(o.body), 0)
                        AS bytes
                FROM unnest($1::uuid[]) WITH ORDINALITY AS i(id, number)
                LEFT JOIN mq_msgs m ON m.id = ANY (ARRAY[i.id])
                LEFT JOIN outcomes o ON o.id = ANY (ARRAY[i.id])
            ) s
            WINDOW so_far AS (ORDER BY s.number)
         ) f",
    )
    .bind(ids.iter().copied().map(Uuid::from).collect::<Vec<_>>())
    .bind(MAX_FETCHED as i64)
    .fetch_all(connection)
    .await?;
    // Each row is dropped once it is decoded, so that no response is in memory twice for long.
    rows.into_iter()
        .map(|row| {
            let id = RequestId::from(row.try_get::<Uuid, _>("id")?);
            // One that can't be read must not fail the others.
            match found(&row, id, sealer) {
                Ok(found) => Ok((id, found)),
                Err(RowError::Unreadable(unreadable)) => Ok((id, Found::Unreadable(unreadable))),
                Err(RowError::Database(error)) => Err(error),
            }
        })
        .collect()
}

fn found(row: &PgRow, id: RequestId, sealer: &Sealer) -> Result<Found, RowError> {
    let Some(status) = row.try_get::<Option<String>, _>("status")? else {
        return Ok(if row.try_get("queued")? {
            Found::Pending
        } else {
            Found::Unknown
        });
    };
    if !row.try_get::<bool, _>("fetched")? {
        return Ok(Found::Unfetched);
    }
    Ok(Found::Finished(Box::new(outcome(
        row, id, &status, sealer,
    )?)))
}

async fn any_pending(
    connection: &mut PgConnection,
    ids: &[RequestId],
) -> Result<bool, sqlx::Error> {
    let queued: Vec<bool> = sqlx::query_scalar(
        "SELECT m.claim_no IS NOT NULL
         FROM unnest($1::uuid[]) AS i(id) LEFT JOIN mq_msgs m ON m.id = ANY (ARRAY[i.id])",
    )
    .bind(ids.iter().copied().map(Uuid::from).collect::<Vec<_>>())
    .fetch_all(connection)
    .await?;
    Ok(queued.contains(&true))
}

/// Why a row's outcome can't be returned.
enum RowError {
    /// Only this row's.
    Unreadable(Unreadable),
    Database(sqlx::Error),
}

impl From<Unreadable> for RowError {
    fn from(unreadable: Unreadable) -> Self {
        Self::Unreadable(unreadable)
    }
}

impl From<sqlx::Error> for RowError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            // Text that is not UTF-8, in a database that doesn't check it.
            sqlx::Error::ColumnDecode { .. } => Unreadable::new("a column can't be decoded").into(),
            error => Self::Database(error),
        }
    }
}

fn outcome(row: &PgRow, id: RequestId, name: &str, sealer: &Sealer) -> Result<Outcome, RowError> {
    codec::check_outcome_format(row.try_get("format")?)?;
    let status = Status::stored(name)?;
    if !status.is_terminal() {
        return Err(Unreadable::status(name).into());
    }
    let attempts: i32 = row.try_get("attempts")?;
    let mut outcome = Outcome {
        id,
        status,
        attempts: attempts.max(0) as u32,
        response: response(row, id, sealer)?,
        fault: None,
        metadata: row
            .try_get::<Option<String>, _>("metadata")?
            .map(Metadata::stored),
        without_attempt: false,
    };
    if let Some(class) = row.try_get::<Option<String>, _>("error_class")? {
        let text: Option<String> = row.try_get("error")?;
        let destination: Option<String> = row.try_get("destination")?;
        let text = text
            .map(|text| sealer.read_error_text(id, &class, text))
            .transpose()?;
        let mut fault = Fault::new(class, text.unwrap_or_default());
        fault.destination = destination.map(String::into_boxed_str);
        outcome.fault = Some(fault);
    }
    Ok(outcome)
}

fn response(row: &PgRow, id: RequestId, sealer: &Sealer) -> Result<Option<Response>, RowError> {
    let http_status: Option<i16> = row.try_get("http_status")?;
    let head: Option<String> = row.try_get("head")?;
    match (http_status, head) {
        (Some(http_status), Some(head)) => {
            let body: Option<Vec<u8>> = row.try_get("body")?;
            Ok(Some(sealer.read_response(
                id,
                http_status as u16,
                &head,
                body,
            )?))
        }
        (None, None) => Ok(None),
        (_, _) => Err(Unreadable::new("the response has no status or no head").into()),
    }
}

async fn watch(
    connection: &mut PgConnection,
    id: RequestId,
    instance: Uuid,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH locked AS MATERIALIZED (
            SELECT m.id FROM mq_msgs m WHERE m.id = ANY ($1) AND m.waiter IS DISTINCT FROM $2
                AND m.waiter IS DISTINCT FROM $3
            ORDER BY m.id FOR UPDATE
        )
        UPDATE mq_msgs m SET waiter = CASE WHEN m.waiter IS NULL THEN $2 ELSE $3 END
        FROM locked WHERE m.id = ANY (ARRAY[locked.id])",
    )
    .bind([Uuid::from(id)])
    .bind(instance)
    .bind(Uuid::nil())
    .execute(connection)
    .await?;
    Ok(())
}

/// The notification channel of an instance. The nil instance's channel belongs to every instance.
pub(super) fn notification_channel(instance: Uuid) -> String {
    format!("requeuest_{}", instance.simple())
}

/// Tells instances which of the requests that they wait for have finished. The ids are a hint.
pub(super) async fn notify_waiters(
    connection: &mut PgConnection,
    ended: &[(Uuid, RequestId)],
) -> Result<(), sqlx::Error> {
    let (instances, ids): (Vec<Uuid>, Vec<Uuid>) = ended
        .iter()
        .map(|(instance, id)| (*instance, Uuid::from(*id)))
        .unzip();
    // A payload has to be shorter than 8000 bytes: 200 ids are 7400.
    sqlx::query(
        "SELECT
            pg_notify(
                'requeuest_' || replace(i.instance::text, '-', ''), string_agg(i.id::text, ',')
            )
         FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS i(instance, id, number)
         GROUP BY i.instance, i.number / 200",
    )
    .bind(instances)
    .bind(ids)
    .execute(connection)
    .await?;
    Ok(())
}

/// The view says what each status means, in plain SQL too.
pub(super) async fn status(
    connection: &mut PgConnection,
    id: RequestId,
) -> Result<Option<Result<Status, Unreadable>>, sqlx::Error> {
    let name: Option<String> =
        sqlx::query_scalar("SELECT r.status FROM requests r WHERE r.id = $1")
            .bind(Uuid::from(id))
            .fetch_optional(connection)
            .await?;
    Ok(name.as_deref().map(Status::stored))
}
