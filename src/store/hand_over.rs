//! Handing outcomes to the application, in a transaction of its own database.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use sqlx::{PgConnection, PgExecutor, Row};
use uuid::Uuid;

use super::outcome::outcome;
use super::{millis, quoted};
use crate::error::BoxError;
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::status::Status;

/// Handles the outcomes of a channel. Registered with
/// [`Durable::on_outcome`](crate::Durable::on_outcome); closures become handlers through [`outcome_fn`].
pub trait OutcomeHandler: Send + Sync + 'static {
    /// Handles an outcome on a connection that is inside the transaction that marks the outcome as
    /// handled.
    ///
    /// `Ok` commits the transaction. An error or a panic rolls it back, and the handler is called
    /// again later: after one second, then after twice as long each time, up to five minutes.
    fn handle<'a>(
        &'a self,
        transaction: &'a mut PgConnection,
        outcome: &'a Outcome,
    ) -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send + 'a>>;
}

/// An [`OutcomeHandler`] from a function or closure.
///
/// # Examples
///
/// ```
/// use requeuest::outcome_fn;
///
/// let log = outcome_fn(|_transaction, outcome| {
///     println!("{}: {}", outcome.id(), outcome.status());
///     Box::pin(async { Ok(()) })
/// });
/// ```
pub fn outcome_fn<F>(function: F) -> OutcomeFn<F>
where
    F: for<'a> Fn(
            &'a mut PgConnection,
            &'a Outcome,
        ) -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send + 'a>>
        + Send
        + Sync
        + 'static,
{
    OutcomeFn(function)
}

/// The handler that [`outcome_fn`] returns.
#[derive(Clone, Copy)]
pub struct OutcomeFn<F>(F);

impl<F> OutcomeHandler for OutcomeFn<F>
where
    F: for<'a> Fn(
            &'a mut PgConnection,
            &'a Outcome,
        ) -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send + 'a>>
        + Send
        + Sync
        + 'static,
{
    fn handle<'a>(
        &'a self,
        transaction: &'a mut PgConnection,
        outcome: &'a Outcome,
    ) -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send + 'a>> {
        (self.0)(transaction, outcome)
    }
}

impl<F> fmt::Debug for OutcomeFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutcomeFn")
    }
}

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
