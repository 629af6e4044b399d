//! [`Listener`], the handle of a client's background delivery.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::task::JoinError;

use crate::engine::runner::RunnerGuard;
use crate::error::Error;

/// The handle of the task that delivers the requests of a [`Client`](super::Client)'s channels,
/// from [`Client::take_listener`](super::Client::take_listener).
///
/// | | what becomes of the delivery |
/// |---|---|
/// | drop the client | nothing: it continues without the client |
/// | [`stop`](Self::stop) | it stops; the call waits until the attempts in flight have ended |
/// | [`abort`](Self::abort), or drop the listener | it stops; nothing waits |
/// | [`detach`](Self::detach) | it continues without a handle |
/// | `listener.await` | it continues; resolves once the delivery has ended |
///
/// Once the delivery is stopped, this process claims no request, and requests that it held for a
/// retry go back to the queue, also those of callers that wait. Attempts in flight are never cut
/// off, because a request that may have been sent would have to be sent again: they end, and are
/// recorded, for as long as the runtime lives. A client that is still there spawns and waits as
/// before; its requests are delivered by other processes.
///
/// # Awaiting it
///
/// Like a [`JoinHandle`](tokio::task::JoinHandle), the listener is a future, and so is `&mut
/// listener`. It doesn't resolve because the database or a receiver fails: the delivery waits for
/// them. It resolves once the delivery has ended, with
///
/// - `Ok(())` after [`Durable::shutdown`](crate::Durable::shutdown) of the client's handle;
/// - an error with [`JoinError::is_cancelled`] after [`abort`](Self::abort), or if the tokio
///   runtime on which the client was made has ended;
/// - an error with [`JoinError::is_panic`] if the delivery panicked, which is a fault of this
///   crate.
///
/// # Panics
///
/// If it is awaited again after it has resolved.
///
/// # Cancel safety
///
/// Awaiting `&mut listener` is cancel safe. Dropping a future that owns the listener drops the
/// listener, which stops the delivery.
///
/// # Examples
///
/// ```no_run
/// # async fn example(
/// #     mut client: requeuest::Client,
/// #     shutdown: impl Future<Output = ()>,
/// # ) -> Result<(), Box<dyn std::error::Error>> {
/// let mut listener = client.take_listener().ok_or("taken before")?;
/// tokio::select! {
///     () = shutdown => listener.stop().await?,
///     ended = &mut listener => ended?,
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "dropping the listener stops the delivery; `detach` lets it run on by itself"]
pub struct Listener {
    runner: RunnerGuard,
}

impl Listener {
    pub(super) fn new(runner: RunnerGuard) -> Self {
        Self { runner }
    }

    /// Stops the delivery and waits until the attempts in flight have ended and are recorded.
    ///
    /// Requests that this process has claimed already are still sent. So while the database
    /// answers, this takes as long as an attempt may take, 30 s by default, or a little longer. It
    /// has no limit of its own, because a result that the database doesn't take is kept and tried
    /// again: set one with [`tokio::time::timeout`]. After a timeout nothing is lost: other
    /// processes take over what is left once its leases run out.
    ///
    /// # Errors
    ///
    /// With [`Error::is_closed`], if the runtime has ended.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the delivery stops anyway, and its attempts in flight end
    /// unwatched.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut client: requeuest::Client) -> Result<(), requeuest::Error> {
    /// if let Some(listener) = client.take_listener() {
    ///     listener.stop().await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn stop(self) -> Result<(), Error> {
        let drained = self.runner.drained();
        // Before the wait, because this stops the delivery.
        drop(self);
        drained.await
    }

    /// Stops the delivery without waiting for anything. Attempts in flight continue.
    ///
    /// The listener then resolves with an error whose [`is_cancelled`](JoinError::is_cancelled) is
    /// `true`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut listener: requeuest::client::Listener) {
    /// listener.abort();
    /// let ended = (&mut listener).await;
    /// assert!(ended.is_err_and(|error| error.is_cancelled()));
    /// # }
    /// ```
    pub fn abort(&self) {
        self.runner.abort();
    }

    /// Whether the delivery has ended. `true` a moment after [`abort`](Self::abort).
    pub fn is_finished(&self) -> bool {
        self.runner.is_finished()
    }

    /// Lets the delivery run on by itself, without a handle, until its runtime or the process ends,
    /// or [`Durable::shutdown`](crate::Durable::shutdown) of the client's handle stops it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(mut client: requeuest::Client) {
    /// if let Some(listener) = client.take_listener() {
    ///     listener.detach();
    /// }
    /// drop(client); // its channels are still delivered
    /// # }
    /// ```
    pub fn detach(self) {
        // Spawned by a clone, because the task owns the listener.
        let driver = Arc::clone(self.runner.driver());
        driver.spawn(async move {
            // A finished one may have been awaited, and must not be again.
            if !self.is_finished() {
                let _ = self.await;
            }
        });
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.runner.release();
    }
}

impl Future for Listener {
    type Output = Result<(), JoinError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.runner.poll_ended(cx)
    }
}
