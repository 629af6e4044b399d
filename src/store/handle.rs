//! Handing outcomes over, in a transaction of the application's.

use std::time::Duration;

use sqlx::{PgConnection, PgExecutor, Row};
use uuid::Uuid;

use super::outcome::outcome;
use super::{millis, quoted};
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::status::Status;

/// From now on outcomes of the channel wait to be handled.
pub(crate) async fn register(
    connection: &mut PgConnection,
    channel: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO handled_channels (channel_name) VALUES ($1) ON CONFLICT DO NOTHING")
        .bind(channel)
        .execute(connection)
        .await?;
    Ok(())
}

/// Outcomes of the channel wait for nobody any more.
pub(crate) async fn unregister(
    connection: &mut PgConnection,
    channel: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH gone AS (DELETE FROM handled_channels WHERE channel_name = $1)
         DELETE FROM unhandled WHERE channel_name = $1",
    )
    .bind(channel)
    .execute(connection)
    .await?;
    Ok(())
}

/// What there was to take.
#[derive(Debug)]
pub(crate) enum Taken {
    Nothing,
    /// It was due, but its outcome is known no more.
    Gone,
    Outcome(Box<Outcome>),
}

/// Takes an outcome that is due (`prepared`: by a statement that may stay so in the session), for as long as the transaction lasts; a commit makes it handled.
pub(crate) async fn take<'c>(
    executor: impl PgExecutor<'c>,
    schema: &str,
    channel: &str,
    prepared: bool,
) -> Result<Taken, sqlx::Error> {
    // On the caller's connection nothing may depend on its search_path.
    let call = format!("SELECT * FROM {}.take_unhandled($1)", quoted(schema));
    let row = sqlx::query(&call)
        .bind(channel)
        .persistent(prepared)
        .fetch_optional(executor)
        .await?;
    let Some(row) = row else {
        return Ok(Taken::Nothing);
    };
    let id = RequestId::from(row.try_get::<Uuid, _>("id")?);
    let status: Option<String> = row.try_get("status")?;
    Ok(match status.as_deref().and_then(Status::from_name) {
        Some(status) => Taken::Outcome(Box::new(outcome(&row, id, status)?)),
        None => Taken::Gone,
    })
}

/// It was not taken: it is due again after a delay that doubles, from one second to five minutes.
pub(crate) async fn put_off(
    connection: &mut PgConnection,
    id: RequestId,
    error: &str,
    cap: Duration,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE unhandled
         SET failures = failures + 1, error = $2,
             due_at = clock_timestamp() + least(power(2, least(failures, 20)) * 1000, $3) * interval '1 millisecond'
         WHERE id = $1",
    )
    .bind(Uuid::from(id))
    .bind(error)
    .bind(millis(cap))
    .execute(connection)
    .await?;
    Ok(())
}
