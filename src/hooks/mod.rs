//! Code of the application that runs before each attempt, and may change or refuse it.
//!
//! A stored request can't have what is only true at the moment of sending: a token that expires, a
//! signature with a timestamp, a secret that must not be in the database. An [`AttemptHook`] adds
//! that to each attempt. Set it with [`DurableBuilder::on_attempt`].
//!
//! - [`header_fn`] sets a header from a closure.
//! - [`OAuth2`] adds a token of OAuth 2 client credentials.
//! - `webhooks::Signer`, with the feature `webhooks`, signs as [Standard Webhooks] asks.
//! - [`only_to`] limits a hook to some destinations.
//! - [`hook_fn`] and [`hook_fn_with`] make a hook from an async function.
//!
//! # When hooks run
//!
//! They run before every attempt that this process makes, first or repeated: of the runner, of the
//! layer, and of the middleware while its caller waits. Several hooks run in the order in which
//! they were added. They see the stored request, and each attempt starts from it: what a hook
//! changes is sent, and not stored. Requests that pass through
//! ([`pass_through`](crate::DurableBuilder::pass_through)) are no attempts.
//!
//! A hook is code and is not stored with the request. So all handles that deliver a channel should
//! have the same hooks.
//!
//! The hooks of an attempt may take 10 seconds together
//! ([`hook_timeout`](crate::DurableBuilder::hook_timeout)). The attempt's own timeout begins after
//! them. Meanwhile the attempt has its slot, and counts for its destination's limits.
//!
//! # Refusing
//!
//! A [`Refusal`] ends the attempt before anything is sent. So does an error, a panic, or the
//! timeout. The attempt is recorded with the class
//! [`hook`](crate::FailureClass::Hook) and counts as one, so that the retry policy's limits hold: a
//! hook that refuses for ever doesn't keep a request for ever. Nothing of it counts against the
//! destination. A request that is sent at most once is sent later, because it certainly hasn't been
//! sent.
//!
//! # After the attempt
//!
//! [`AttemptHook::after`] sees the result of each attempt that was sent. It may have the attempt
//! repeated: [`OAuth2`] does so after a 401 to an old token.
//!
//! # Examples
//!
//! ```
//! use requeuest::Durable;
//! use requeuest::hooks::{OutgoingAttempt, Refusal, hook_fn};
//!
//! # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
//! let durable = Durable::builder(pool)
//!     .on_attempt(hook_fn(async |attempt: &mut OutgoingAttempt| {
//!         if attempt.number() > 1 {
//!             attempt.set_header("x-attempt", attempt.number())?;
//!         }
//!         Ok::<_, Refusal>(())
//!     }))
//!     .build()?;
//! # Ok(()) }
//! ```
//!
//! A client of its own for one destination, with a TLS identity or a forward proxy:
//!
//! ```
//! use requeuest::hooks::{OutgoingAttempt, Refusal, hook_fn_with, only_to};
//! use requeuest::{Durable, ReqwestTransport};
//!
//! # fn example(
//! #     pool: sqlx::PgPool,
//! #     with_identity: reqwest::Client,
//! # ) -> Result<(), requeuest::Error> {
//! let to_bank = hook_fn_with(
//!     ReqwestTransport::new(with_identity),
//!     async |client: &ReqwestTransport, attempt: &mut OutgoingAttempt| {
//!         attempt.send_with(client.clone());
//!         Ok::<_, Refusal>(())
//!     },
//! );
//! let durable = Durable::builder(pool)
//!     .on_attempt(only_to("https://api.bank.example", to_bank))
//!     .build()?;
//! # Ok(()) }
//! ```
//!
//! [`DurableBuilder::on_attempt`]: crate::DurableBuilder::on_attempt
//! [Standard Webhooks]: https://www.standardwebhooks.com

mod attempt;
mod function;
mod header;
mod oauth2;
mod only_to;
mod refusal;

use std::future::Future;
use std::pin::Pin;

use http::{HeaderMap, StatusCode};

pub use self::attempt::OutgoingAttempt;
pub use self::function::{HookFn, HookFnWith, hook_fn, hook_fn_with};
pub use self::header::{HeaderFn, header_fn};
pub use self::oauth2::OAuth2;
pub use self::only_to::{OnlyTo, only_to};
pub use self::refusal::Refusal;
pub(crate) use self::refusal::Then;
use crate::classify::{FailureClass, Verdict};
use crate::error::BoxError;

/// Sees and changes each attempt before it is sent. See the [module](self).
///
/// Async functions become hooks through [`hook_fn`] and [`hook_fn_with`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a hook of attempts",
    label = "expected an `AttemptHook`",
    note = "wrap an async function in `requeuest::hooks::hook_fn(function)`, or in \
            `requeuest::hooks::hook_fn_with(state, function)`"
)]
pub trait AttemptHook: Send + Sync + 'static {
    /// Called before the attempt is sent.
    ///
    /// # Errors
    ///
    /// A [`Refusal`], after which nothing is sent.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the time of the hooks is over, when a waiting caller that makes
    /// the attempt itself goes away, and when a shutdown's grace time runs out.
    fn before<'a>(
        &'a self,
        attempt: &'a mut OutgoingAttempt,
    ) -> Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send + 'a>>;

    /// Called after the attempt, with the status and headers of its response, or why there is none.
    /// Not called if a hook refused the attempt. It must not block.
    ///
    /// `None`, the default, leaves the verdict to the other hooks and the
    /// [classifier](crate::classify). `Some` decides in their place, and then the result doesn't
    /// count against the destination. [`Options::accept`](crate::Options::accept) comes before
    /// both.
    fn after(
        &self,
        _attempt: &OutgoingAttempt,
        _result: Result<(StatusCode, &HeaderMap), FailureClass>,
    ) -> Option<Verdict> {
        None
    }

    /// Checks the hook's settings when the handle is built.
    ///
    /// # Errors
    ///
    /// Why the hook can't work. [`DurableBuilder::build`](crate::DurableBuilder::build) fails with
    /// it, and [`Error::field`](crate::Error::field) is `on_attempt`.
    fn check(&self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// The future of [`AttemptHook::before`].
type Before<'a> = Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send + 'a>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_are_object_safe() {
        let hook = hook_fn(async |_: &mut OutgoingAttempt| Ok::<_, Refusal>(()));
        let hook: Box<dyn AttemptHook> = Box::new(hook);
        assert!(hook.check().is_ok());
    }
}
