//! The handle that everything else is a front for.

mod builder;
mod bulk;
mod dead_letters;
mod outcomes;
mod pass_through;
mod submit;

use std::fmt;
use std::sync::{Arc, Once};
use std::time::Duration;

use sqlx::{PgExecutor, PgPool};

use crate::engine::Engine;
use crate::engine::reconcile::ReconcileGuard;
use crate::engine::runner::RunnerGuard;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::request::Request;
use crate::response::Response;
use crate::status::Status;
use crate::store::enqueue;
use crate::store::inspect::{self, Cancelled};
use crate::store::outcome;

pub use self::builder::{
    DEFAULT_ATTEMPT_TIMEOUT, DEFAULT_CHANNEL, DEFAULT_CONCURRENCY, DEFAULT_LEASE,
    DEFAULT_MAX_CONNECTIONS, DEFAULT_MAX_REQUEST_BODY, DEFAULT_MAX_RESPONSE_BODY,
    DEFAULT_RETENTION, DurableBuilder,
};
pub use self::outcomes::OutcomeSubscription;
pub use self::pass_through::RequestHead;
pub(crate) use self::submit::{AwaitResponse, Mode, Submitted};

use self::pass_through::PassThrough;

/// Persists HTTP requests in Postgres and drives them until they are answered.
///
/// A handle, cheap to clone. Its runner stops when the last clone is dropped; what it had persisted stays, for the next process.
///
/// # Examples
///
/// ```no_run
/// use requeuest::Durable;
///
/// # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// requeuest::migrate(&pool).await?;
/// let durable = Durable::new(pool);
///
/// // Fire and forget: persisted when this returns.
/// let hook = http::Request::post("https://example.com/hook").body("{}")?;
/// let id = durable.fire(hook).await?;
///
/// // Persist, deliver and wait for the answer.
/// let charge = http::Request::post("https://pay.example.com/charges").body("amount=5")?;
/// let response = durable.await_response(charge).await?;
/// println!("{}", response.status());
///
/// // The answer to the first one, now or after a restart.
/// println!("{}", durable.response(id).await?.status());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Durable {
    handle: Arc<Handle>,
}

struct Handle {
    engine: Arc<Engine>,
    runner: Option<RunnerGuard>,
    _reconciler: Option<ReconcileGuard>,
    pass_through: Option<PassThrough>,
    /// Background attempts go through a client of the crate's own making.
    plain_transport: bool,
}

impl Durable {
    /// A handle with the defaults of [`DurableBuilder`]. Its runner starts here: on the current tokio runtime, or on a thread
    /// of its own where there is none.
    ///
    /// Nothing is connected yet; an unreachable database or a missing schema shows in the calls' errors, and the runner waits for it.
    ///
    /// What no caller's own client sends, through the layer or the middleware, is sent by a plain [`reqwest::Client`] of the crate's
    /// own: this handle's own calls, fired requests, and whatever outlives its caller. It knows nothing of your proxies,
    /// certificates, default headers or middleware: give your client with [`DurableBuilder::transport`] if that matters.
    ///
    /// # Panics
    ///
    /// If no TLS backend can be initialised or no thread be started, as with [`reqwest::Client::new`]. [`builder`](Self::builder)
    /// returns an error instead.
    pub fn new(pool: PgPool) -> Self {
        match Self::builder(pool).build() {
            Ok(durable) => durable,
            Err(error) => panic!("{error}"),
        }
    }

    /// Begins to configure a handle.
    pub fn builder(pool: PgPool) -> DurableBuilder {
        DurableBuilder::new(pool)
    }

    /// Persists a request and returns. It is delivered in the background.
    ///
    /// # Errors
    ///
    /// If the request is refused, or can't be persisted: then it will not be sent, except after
    /// [`Error::is_indeterminate`], when it may be.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: dropped before it returns, the request may or may not have been persisted.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), Box<dyn std::error::Error>> {
    /// let id = durable.fire(http::Request::post("https://example.com/hook").body("{}")?).await?;
    /// # Ok(()) }
    /// ```
    pub async fn fire<R>(&self, request: R) -> Result<RequestId, Error>
    where
        R: TryInto<Request>,
        R::Error: Into<Error>,
    {
        let request = request.try_into().map_err(Into::into)?;
        let prepared = self.prepare(request, Mode::Fired)?;
        self.submit(prepared, None)?.await
    }

    /// Persists a request in the caller's transaction: a commit sends it, a rollback never does.
    ///
    /// The executor may be a pool, a connection or a transaction; one statement is run on it. Runners are told at the
    /// commit, unless [`DurableBuilder::notify_in_transactions`] leaves it to their next look a second later at most.
    ///
    /// An [`ordered`](crate::Options::ordered) request locks its key until the transaction ends, and so does one with a
    /// [`key`](crate::Options::key) or [`supersede`](crate::Options::supersede). Two transactions that take two keys in opposite order deadlock, and
    /// Postgres ends one of them (SQLSTATE 40P01) with all that it did.
    ///
    /// The order is that of the commits at each isolation level. Above `READ COMMITTED` a transaction doesn't see a `key` that was
    /// committed after its start: it is refused with a serialization failure (40001), and must be run again. Nor does it see that another
    /// channel has taken its ordering key since.
    ///
    /// # Errors
    ///
    /// If the request is refused, or the statement fails; the transaction is then as broken as after any failed statement.
    ///
    /// # Cancel safety
    ///
    /// As safe as the executor: dropped before it returns, the transaction should be rolled back.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(pool: sqlx::PgPool, durable: requeuest::Durable) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut tx = pool.begin().await?;
    /// sqlx::query("INSERT INTO orders (id) VALUES (1)").execute(&mut *tx).await?;
    /// let id = durable.fire_in(&mut *tx, http::Request::post("https://example.com/orders").body("1")?).await?;
    /// tx.commit().await?;
    /// # Ok(()) }
    /// ```
    pub async fn fire_in<'c, R>(
        &self,
        executor: impl PgExecutor<'c>,
        request: R,
    ) -> Result<RequestId, Error>
    where
        R: TryInto<Request>,
        R::Error: Into<Error>,
    {
        let request = request.try_into().map_err(Into::into)?;
        let prepared = self.prepare(request, Mode::Fired)?;
        if self.engine().is_closing() {
            return Err(Error::new(Kind::Closed));
        }
        let config = self.engine().config();
        let how = config.inserting_for_caller();
        enqueue::insert_one(executor, &config.schema, &prepared.row, how)
            .await?
            .persisted(prepared.id())
    }

    /// Persists a request, delivers it and waits for its response: a final one, or the last one when retries are used up.
    ///
    /// # Errors
    ///
    /// If the request is refused or can't be persisted; if it was given up without any response
    /// ([`Error::is_discarded`]) or cancelled; if the response is too large to keep.
    ///
    /// # Cancel safety
    ///
    /// Dropping it never cancels a persisted request: it is delivered all the same. Dropped early, it may or may not have been persisted.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), Box<dyn std::error::Error>> {
    /// let response = durable.await_response(http::Request::get("https://example.com/").body("")?).await?;
    /// println!("{}: {}", response.status(), response.text()?);
    /// # Ok(()) }
    /// ```
    pub async fn await_response<R>(&self, request: R) -> Result<Response, Error>
    where
        R: TryInto<Request>,
        R::Error: Into<Error>,
    {
        let request = request.try_into().map_err(Into::into)?;
        let prepared = self.prepare(request, Mode::Awaited)?;
        self.submit_awaited(prepared, None)?.await
    }

    /// Waits for the response of a request that was persisted before: by this process or another one, also before a restart.
    ///
    /// # Errors
    ///
    /// As for [`await_response`](Self::await_response), and if no such request exists, or no more
    /// ([`Error::is_unknown_id`]): outcomes are kept for the retention.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing is lost, and it can be called again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), Box<dyn std::error::Error>> {
    /// let id: requeuest::RequestId = std::env::args().nth(1).unwrap_or_default().parse()?;
    /// println!("{}", durable.response(id).await?.status());
    /// # Ok(()) }
    /// ```
    pub async fn response(&self, id: RequestId) -> Result<Response, Error> {
        self.outcome(id).await?.into_result()
    }

    /// Waits for the outcome of a request that was persisted earlier, whether it succeeded or not.
    ///
    /// # Errors
    ///
    /// If the request doesn't exist, or its outcome has expired ([`Error::is_unknown_id`]); if the
    /// database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing is lost, and it can be called again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable, id: requeuest::RequestId) -> Result<(), requeuest::Error> {
    /// let outcome = durable.outcome(id).await?;
    /// println!("{} after {} attempts", outcome.status(), outcome.attempts());
    /// # Ok(()) }
    /// ```
    pub async fn outcome(&self, id: RequestId) -> Result<Outcome, Error> {
        let shared = self.engine().shared();
        // Before asking, or an outcome could come in between.
        let waiter = shared.waiters.subscribe(id, None);
        let found = self
            .engine()
            .query_large(shared.config.max_response_body, move |connection| {
                Box::pin(async move { outcome::find(connection, &[id]).await })
            })
            .await?;
        match found.into_iter().next() {
            Some((_, outcome::Found::Finished(outcome))) => Ok(*outcome),
            Some((_, outcome::Found::Pending)) => {
                let elsewhere = !shared.leases.is_driven(id);
                if elsewhere {
                    let instance = shared.instance;
                    self.engine()
                        .query(move |connection| {
                            Box::pin(
                                async move { outcome::watch(connection, &[id], instance).await },
                            )
                        })
                        .await?;
                }
                waiter.arm(elsewhere);
                waiter.await
            }
            _ => Err(Error::new(Kind::UnknownId).with_id(id)),
        }
    }

    /// Where a request stands, or `None` if it doesn't exist, or no more.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable, id: requeuest::RequestId) -> Result<(), requeuest::Error> {
    /// let done = durable.status(id).await?.is_some_and(|status| status.is_terminal());
    /// # Ok(()) }
    /// ```
    pub async fn status(&self, id: RequestId) -> Result<Option<Status>, Error> {
        self.engine()
            .query(move |connection| Box::pin(async move { outcome::status(connection, id).await }))
            .await
    }

    /// Cancels a request. One that waits is never sent; one that is being sent is not sent again, and whatever its answer, it ends as
    /// cancelled. Whoever waits for it gets an error ([`Error::is_cancelled`]). Returns `false`, with nothing changed, if it has ended already.
    ///
    /// # Errors
    ///
    /// If no such request exists, or no more ([`Error::is_unknown_id`]), or the database fails.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, it may or may not have taken effect. It can be called again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable, id: requeuest::RequestId) -> Result<(), requeuest::Error> {
    /// if !durable.cancel(id).await? {
    ///     println!("too late: {:?}", durable.status(id).await?);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn cancel(&self, id: RequestId) -> Result<bool, Error> {
        let shared = self.engine().shared();
        let retention = shared.config.retention;
        let cancelled = self
            .engine()
            .query(move |connection| {
                Box::pin(async move { inspect::cancel(connection, id, retention).await })
            })
            .await?;
        match cancelled {
            Cancelled::Now => {
                shared.leases.forget(id);
                shared.waiters.ask_soon(vec![id]);
                Ok(true)
            }
            Cancelled::Ended => Ok(false),
            Cancelled::Unknown => Err(Error::new(Kind::UnknownId).with_id(id)),
        }
    }

    /// Stops claiming, waits up to `grace` for the attempts in flight, gives the rest back for others and closes the
    /// crate's connections. What is still being sent then may have arrived: it counts as a failed attempt, with its normal delay. The caller's pool stays open. Calls that wait, and calls made later, end with [`Error::is_closed`].
    ///
    /// Dropping every handle without it loses nothing either: what was in flight is then taken over when its lease ends.
    ///
    /// # Errors
    ///
    /// If the runtime has ended.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// durable.shutdown(std::time::Duration::from_secs(10)).await?;
    /// # Ok(()) }
    /// ```
    pub async fn shutdown(&self, grace: Duration) -> Result<(), Error> {
        if let Some(runner) = &self.handle.runner {
            runner.stop();
        }
        let engine = Arc::clone(self.engine());
        self.engine().run(engine.shutdown(grace)).await
    }

    /// The caller's pool.
    pub fn pool(&self) -> &PgPool {
        self.engine().user_pool()
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.handle.engine
    }

    pub(crate) fn passes_through(&self, head: &RequestHead<'_>) -> bool {
        self.handle
            .pass_through
            .as_ref()
            .is_some_and(|passes| passes(head))
    }

    /// For callers that have a client of their own, which what outlives them doesn't go through.
    pub(crate) fn warn_of_plain_transport(&self) {
        static ONCE: Once = Once::new();
        if self.handle.plain_transport {
            ONCE.call_once(|| {
                log::warn!(
                    "requests that outlive their caller are sent by a plain reqwest client, which knows nothing of the \
                     application's proxy, certificates or middleware: see DurableBuilder::transport"
                );
            });
        }
    }

    /// Cancels what has not ended of these channels, a batch at a time: one statement for everything could outlast its timeout.
    pub(crate) async fn clear(&self, channels: Option<Vec<String>>) -> Result<(), Error> {
        const BATCH: i32 = 1000;
        let shared = self.engine().shared();
        let retention = shared.config.retention;
        loop {
            let channels = channels.clone();
            let cancelled = self
                .engine()
                .query(move |connection| {
                    Box::pin(async move {
                        inspect::clear(connection, channels.as_deref(), retention, BATCH).await
                    })
                })
                .await?;
            for id in &cancelled {
                shared.leases.forget(*id);
            }
            let was_last = cancelled.len() < BATCH as usize;
            // Those who wait here find the outcome in the database.
            shared.waiters.ask_soon(cancelled);
            if was_last {
                return Ok(());
            }
        }
    }
}

impl fmt::Debug for Durable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Durable")
            .field("channel", &self.engine().config().channel)
            .field("schema", &self.engine().config().schema)
            .field("runner", &self.handle.runner.is_some())
            .finish_non_exhaustive()
    }
}
