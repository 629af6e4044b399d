//! What an application does with an outcome, in one transaction with its own data.

use std::future::Future;
use std::pin::Pin;

use sqlx::PgConnection;

use crate::error::BoxError;
use crate::outcome::Outcome;

/// Gets the outcomes of a channel: see [`Durable::on_outcome`](crate::Durable::on_outcome). Closures that return a boxed future are handlers.
pub trait OutcomeHandler: Send + Sync + 'static {
    /// Does what belongs to an outcome, on a connection that is in the transaction in which it is marked as handled.
    ///
    /// With `Ok` the transaction is committed, and both are true. With an error, or a panic, it is rolled back, and the outcome
    /// comes again later: after a second, then after twice as long each time, up to five minutes.
    fn handle<'a>(
        &'a self,
        transaction: &'a mut PgConnection,
        outcome: &'a Outcome,
    ) -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send + 'a>>;
}

impl<F> OutcomeHandler for F
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
        self(transaction, outcome)
    }
}
