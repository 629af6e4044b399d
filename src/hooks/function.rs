//! Hooks from async functions.

use std::fmt;
use std::future::Future;

use super::{AttemptHook, Before, OutgoingAttempt, Refusal};

/// An [`AttemptHook`] from an async function: an `async fn`, or an async closure that captures
/// nothing and names the type of its argument. Its error may be any, or a [`Refusal`].
/// [`hook_fn_with`] passes state.
///
/// # Examples
///
/// ```
/// use requeuest::hooks::{OutgoingAttempt, Refusal, hook_fn};
///
/// async fn sign(attempt: &mut OutgoingAttempt) -> Result<(), Refusal> {
///     let length = attempt.body().len();
///     attempt.set_header("x-length", length)
/// }
///
/// let signing = hook_fn(sign);
/// ```
pub fn hook_fn<F>(function: F) -> HookFn<F>
where
    F: for<'a> BeforeFn<'a> + Send + Sync + 'static,
{
    HookFn(function)
}

/// As [`hook_fn`], for a function that takes a reference to `state` first: a client, a pool, a
/// cache.
///
/// # Examples
///
/// ```
/// use requeuest::hooks::{OutgoingAttempt, Refusal, hook_fn_with};
///
/// # fn example(pool: sqlx::PgPool) {
/// let with_secret = hook_fn_with(
///     pool,
///     async |pool: &sqlx::PgPool, attempt: &mut OutgoingAttempt| {
///         let key: Option<String> = sqlx::query_scalar("SELECT key FROM customers WHERE url = $1")
///             .bind(attempt.destination())
///             .fetch_optional(pool)
///             .await?;
///         let key = key.ok_or_else(|| Refusal::discard("the customer is gone"))?;
///         attempt.set_secret_header("x-api-key", key)
///     },
/// );
/// # drop(with_secret);
/// # }
/// ```
pub fn hook_fn_with<S, F>(state: S, function: F) -> HookFnWith<S, F>
where
    S: Send + Sync + 'static,
    F: for<'a> BeforeFnWith<'a, S> + Send + Sync + 'static,
{
    HookFnWith { state, function }
}

// A bound on `AsyncFn` can't ask for a future that is `Send`; these traits name the future.

/// An async function of an attempt. Implemented by every function of that shape.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an async function of `(&mut OutgoingAttempt)`",
    label = "expected an `async fn` or an async closure without captures",
    note = "the function returns `Result<(), E>`, and its future must be `Send`",
    note = "pass what a closure would capture as the state of `requeuest::hooks::hook_fn_with`"
)]
pub trait BeforeFn<'a>: Fn(&'a mut OutgoingAttempt) -> Self::Future {
    /// The function's future.
    type Future: Future<Output = Result<(), Self::Error>> + Send + 'a;
    /// The function's error.
    type Error: Into<Refusal>;
}

#[diagnostic::do_not_recommend]
impl<'a, F, R, E> BeforeFn<'a> for F
where
    F: Fn(&'a mut OutgoingAttempt) -> R,
    R: Future<Output = Result<(), E>> + Send + 'a,
    E: Into<Refusal>,
{
    type Future = R;
    type Error = E;
}

/// An async function of state and an attempt. Implemented by every function of that shape.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an async function of `(&{S}, &mut OutgoingAttempt)`",
    label = "expected an `async fn` or an async closure without captures",
    note = "the function returns `Result<(), E>`, and its future must be `Send`"
)]
pub trait BeforeFnWith<'a, S: 'a>: Fn(&'a S, &'a mut OutgoingAttempt) -> Self::Future {
    /// The function's future.
    type Future: Future<Output = Result<(), Self::Error>> + Send + 'a;
    /// The function's error.
    type Error: Into<Refusal>;
}

#[diagnostic::do_not_recommend]
impl<'a, S, F, R, E> BeforeFnWith<'a, S> for F
where
    S: 'a,
    F: Fn(&'a S, &'a mut OutgoingAttempt) -> R,
    R: Future<Output = Result<(), E>> + Send + 'a,
    E: Into<Refusal>,
{
    type Future = R;
    type Error = E;
}

/// The hook that [`hook_fn`] returns.
#[derive(Clone, Copy)]
pub struct HookFn<F>(F);

impl<F> AttemptHook for HookFn<F>
where
    F: for<'a> BeforeFn<'a> + Send + Sync + 'static,
{
    fn before<'a>(&'a self, attempt: &'a mut OutgoingAttempt) -> Before<'a> {
        let hooked = (self.0)(attempt);
        Box::pin(async move { hooked.await.map_err(Into::into) })
    }
}

impl<F> fmt::Debug for HookFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HookFn")
    }
}

/// The hook that [`hook_fn_with`] returns.
#[derive(Clone, Copy)]
pub struct HookFnWith<S, F> {
    state: S,
    function: F,
}

impl<S, F> AttemptHook for HookFnWith<S, F>
where
    S: Send + Sync + 'static,
    F: for<'a> BeforeFnWith<'a, S> + Send + Sync + 'static,
{
    fn before<'a>(&'a self, attempt: &'a mut OutgoingAttempt) -> Before<'a> {
        let hooked = (self.function)(&self.state, attempt);
        Box::pin(async move { hooked.await.map_err(Into::into) })
    }
}

impl<S, F> fmt::Debug for HookFnWith<S, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HookFnWith")
    }
}
