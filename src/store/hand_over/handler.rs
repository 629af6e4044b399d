//! What an application hands outcomes to: a type of its own, or an async function.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use sqlx::PgConnection;

use crate::error::BoxError;
use crate::outcome::Outcome;

/// Handles the outcomes of a channel. Registered with
/// [`Durable::on_outcome`](crate::Durable::on_outcome). Async functions become handlers through
/// [`outcome_fn`] and [`outcome_fn_with`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler of outcomes",
    label = "expected an `OutcomeHandler`",
    note = "wrap an async function in `requeuest::outcome_fn(function)`, or in \
            `requeuest::outcome_fn_with(state, function)`"
)]
pub trait OutcomeHandler: Send + Sync + 'static {
    /// Handles an outcome on a connection that is inside the transaction that marks the outcome as
    /// handled.
    ///
    /// `Ok` commits the transaction. An error or a panic rolls it back, and the handler is called
    /// again later: after one second, then after twice as long each time, up to five minutes. After
    /// [`max_handler_failures`](crate::DurableBuilder::max_handler_failures) the outcome is parked.
    ///
    /// These count as failures too:
    ///
    /// - The future takes longer than
    ///   [`handler_timeout`](crate::DurableBuilder::handler_timeout). It is dropped, and its
    ///   transaction is rolled back.
    /// - `Ok` after a database error outside a savepoint: Postgres has aborted the transaction by
    ///   then. Return the error, or make the statement in a transaction of
    ///   [`Connection::begin`](sqlx::Connection::begin), which becomes a savepoint.
    /// - `Ok` after a `COMMIT` or `ROLLBACK` of the transaction itself, or with a nested
    ///   transaction that is still open.
    fn handle<'a>(
        &'a self,
        transaction: &'a mut PgConnection,
        outcome: &'a Outcome,
    ) -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send + 'a>>;
}

/// The result of a handler, sent to the engine's runtime.
type Handled<'a> = Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send + 'a>>;

/// An [`OutcomeHandler`] from an async function: an `async fn`, or an async closure that captures
/// nothing and names the types of its arguments. Its error may be any that converts into a boxed
/// one. [`outcome_fn_with`] passes state.
///
/// # Examples
///
/// ```
/// use requeuest::{Durable, Outcome, outcome_fn};
/// use sqlx::PgConnection;
///
/// async fn mark_paid(tx: &mut PgConnection, outcome: &Outcome) -> Result<(), sqlx::Error> {
///     sqlx::query("UPDATE orders SET paid = true WHERE request = $1")
///         .bind(requeuest::Uuid::from(outcome.id()))
///         .execute(tx)
///         .await?;
///     Ok(())
/// }
///
/// # async fn example(durable: Durable) -> Result<(), requeuest::Error> {
/// let payments = durable.on_outcome("payments", outcome_fn(mark_paid)).await?;
///
/// let log = outcome_fn(async |_: &mut PgConnection, outcome: &Outcome| {
///     println!("{}: {}", outcome.id(), outcome.status());
///     Ok::<_, sqlx::Error>(())
/// });
/// let others = durable.on_outcome("others", log).await?;
/// # drop((payments, others));
/// # Ok(()) }
/// ```
pub fn outcome_fn<F>(function: F) -> OutcomeFn<F>
where
    F: for<'a> HandlerFn<'a> + Send + Sync + 'static,
{
    OutcomeFn(function)
}

/// As [`outcome_fn`], for a function that takes a reference to `state` first: a client, a cache, a
/// sender.
///
/// # Examples
///
/// ```
/// use requeuest::{Outcome, outcome_fn_with};
/// use sqlx::PgConnection;
/// use tokio::sync::mpsc::UnboundedSender;
///
/// let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
/// let tell = outcome_fn_with(
///     sender,
///     async |sender: &UnboundedSender<String>, _: &mut PgConnection, outcome: &Outcome| {
///         sender.send(outcome.id().to_string())
///     },
/// );
/// # drop((tell, receiver));
/// ```
pub fn outcome_fn_with<S, F>(state: S, function: F) -> OutcomeFnWith<S, F>
where
    S: Send + Sync + 'static,
    F: for<'a> HandlerFnWith<'a, S> + Send + Sync + 'static,
{
    OutcomeFnWith { state, function }
}

// A bound on `AsyncFn` can't ask for a future that is `Send`; these traits name the future.

/// An async function of an outcome. Implemented by every function of that shape.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an async function of `(&mut PgConnection, &Outcome)`",
    label = "expected an `async fn` or an async closure without captures",
    note = "the function returns `Result<(), E>`, and its future must be `Send`",
    note = "pass what a closure would capture as the state of `requeuest::outcome_fn_with`"
)]
pub trait HandlerFn<'a>: Fn(&'a mut PgConnection, &'a Outcome) -> Self::Future {
    /// The function's future.
    type Future: Future<Output = Result<(), Self::Error>> + Send + 'a;
    /// The function's error.
    type Error: Into<BoxError>;
}

#[diagnostic::do_not_recommend]
impl<'a, F, R, E> HandlerFn<'a> for F
where
    F: Fn(&'a mut PgConnection, &'a Outcome) -> R,
    R: Future<Output = Result<(), E>> + Send + 'a,
    E: Into<BoxError>,
{
    type Future = R;
    type Error = E;
}

/// An async function of state and an outcome. Implemented by every function of that shape.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an async function of `(&{S}, &mut PgConnection, &Outcome)`",
    label = "expected an `async fn` or an async closure without captures",
    note = "the function returns `Result<(), E>`, and its future must be `Send`"
)]
pub trait HandlerFnWith<'a, S: 'a>:
    Fn(&'a S, &'a mut PgConnection, &'a Outcome) -> Self::Future
{
    /// The function's future.
    type Future: Future<Output = Result<(), Self::Error>> + Send + 'a;
    /// The function's error.
    type Error: Into<BoxError>;
}

#[diagnostic::do_not_recommend]
impl<'a, S, F, R, E> HandlerFnWith<'a, S> for F
where
    S: 'a,
    F: Fn(&'a S, &'a mut PgConnection, &'a Outcome) -> R,
    R: Future<Output = Result<(), E>> + Send + 'a,
    E: Into<BoxError>,
{
    type Future = R;
    type Error = E;
}

/// The handler that [`outcome_fn`] returns.
#[derive(Clone, Copy)]
pub struct OutcomeFn<F>(F);

impl<F> OutcomeHandler for OutcomeFn<F>
where
    F: for<'a> HandlerFn<'a> + Send + Sync + 'static,
{
    fn handle<'a>(
        &'a self,
        transaction: &'a mut PgConnection,
        outcome: &'a Outcome,
    ) -> Handled<'a> {
        let handled = (self.0)(transaction, outcome);
        Box::pin(async move { handled.await.map_err(Into::into) })
    }
}

impl<F> fmt::Debug for OutcomeFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutcomeFn")
    }
}

/// The handler that [`outcome_fn_with`] returns.
#[derive(Clone, Copy)]
pub struct OutcomeFnWith<S, F> {
    state: S,
    function: F,
}

impl<S, F> OutcomeHandler for OutcomeFnWith<S, F>
where
    S: Send + Sync + 'static,
    F: for<'a> HandlerFnWith<'a, S> + Send + Sync + 'static,
{
    fn handle<'a>(
        &'a self,
        transaction: &'a mut PgConnection,
        outcome: &'a Outcome,
    ) -> Handled<'a> {
        let handled = (self.function)(&self.state, transaction, outcome);
        Box::pin(async move { handled.await.map_err(Into::into) })
    }
}

impl<S, F> fmt::Debug for OutcomeFnWith<S, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutcomeFnWith")
    }
}
