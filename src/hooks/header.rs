//! A header whose value comes from a closure.

use std::fmt;
use std::future::Future;

use http::{HeaderName, HeaderValue};

use super::{AttemptHook, Before, OutgoingAttempt, Refusal};
use crate::error::BoxError;

/// A hook that sets a header on each attempt, to the value that the function returns at that
/// moment: a token from a cache, a key from a vault. The value is marked as
/// [sensitive](HeaderValue::set_sensitive). An error fails the attempt, and so does a value that is
/// not valid in HTTP.
///
/// Every destination of the handle gets the header. Use [`only_to`](super::only_to) where only one
/// should.
///
/// # Examples
///
/// ```
/// use std::sync::{Arc, RwLock};
/// use requeuest::Durable;
/// use requeuest::hooks::{header_fn, only_to};
///
/// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
/// let key = Arc::new(RwLock::new("replaced at run time".to_owned()));
/// let header = header_fn("x-api-key", move || {
///     let key = key.read().map(|key| key.clone());
///     let key = key.map_err(|_| "the key is poisoned");
///     async { key }
/// });
/// let durable = Durable::builder(pool)
///     .strip_headers(["x-api-key"]) // never stored
///     .on_attempt(only_to("api.partner.example", header))
///     .build()?;
/// # Ok(()) }
/// ```
pub fn header_fn<F, Fut, V, E>(name: impl Into<String>, function: F) -> HeaderFn<F>
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<V, E>> + Send + 'static,
    V: TryInto<HeaderValue> + Send,
    E: Into<BoxError>,
{
    HeaderFn {
        name: name.into(),
        function,
    }
}

/// The hook that [`header_fn`] returns.
#[derive(Clone)]
pub struct HeaderFn<F> {
    /// Checked when the handle is built.
    name: String,
    function: F,
}

impl<F, Fut, V, E> AttemptHook for HeaderFn<F>
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<V, E>> + Send + 'static,
    V: TryInto<HeaderValue> + Send,
    E: Into<BoxError>,
{
    fn before<'a>(&'a self, attempt: &'a mut OutgoingAttempt) -> Before<'a> {
        let value = (self.function)();
        Box::pin(async move {
            let value = value.await.map_err(Refusal::failed)?;
            attempt.set_secret_header(&self.name, value)
        })
    }

    fn check(&self) -> Result<(), BoxError> {
        match HeaderName::try_from(&*self.name) {
            Ok(_) => Ok(()),
            Err(_) => Err(format!("{:?} is not the name of a header", self.name).into()),
        }
    }
}

impl<F> fmt::Debug for HeaderFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HeaderFn").field(&self.name).finish()
    }
}
