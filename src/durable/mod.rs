//! [`Durable`], the handle behind every entry point.

mod again;
mod builder;
mod bulk;
mod dead_letters;
mod destination;
#[cfg(feature = "encryption")]
mod encryption;
mod hand_overs;
mod outcomes;
mod parked;
mod pass_through;
mod runners;
mod statement;
mod submit;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{PgExecutor, PgPool};

use crate::engine::Engine;
use crate::engine::runner::RunnerGuard;
use crate::engine::tasks::reconcile::ReconcileGuard;
use crate::error::Error;
use crate::health::{BackgroundTask, SweepPart};
use crate::id::RequestId;
use crate::into_request::IntoRequest;
use crate::outcome::Outcome;
use crate::repetition::FailedRequests;
use crate::request::Request;
use crate::response::Response;
use crate::status::Status;

pub use self::builder::{
    DEFAULT_ATTEMPT_TIMEOUT, DEFAULT_CHANNEL, DEFAULT_CONCURRENCY, DEFAULT_DEAD_LETTER_RETENTION,
    DEFAULT_HANDLER_CONCURRENCY, DEFAULT_HANDLER_TIMEOUT, DEFAULT_HOOK_TIMEOUT, DEFAULT_LEASE,
    DEFAULT_MAX_CONNECTIONS, DEFAULT_MAX_HANDLER_FAILURES, DEFAULT_MAX_KEY_WAIT,
    DEFAULT_MAX_LOST_ATTEMPTS, DEFAULT_MAX_QUEUED_BYTES, DEFAULT_MAX_QUEUED_REQUESTS,
    DEFAULT_MAX_REQUEST_BODY, DEFAULT_MAX_RESPONSE_BODY, DEFAULT_MAX_SENDING_BYTES,
    DEFAULT_MAX_SHARE, DEFAULT_MAX_UNSETTLED_BYTES, DEFAULT_RETENTION, DurableBuilder,
    WEBHOOKS_ATTEMPT_TIMEOUT,
};
pub use self::destination::DestinationHandle;
#[cfg(feature = "encryption")]
pub use self::encryption::{KeyUsage, Reencryption, ReencryptionProgress};
pub use self::outcomes::OutcomeSubscription;
pub use self::pass_through::RequestHead;
pub(crate) use self::submit::{Awaiting, Mode};

use self::pass_through::PassThrough;

/// Persists HTTP requests in Postgres and drives them until they are answered.
///
/// A handle, cheap to clone. Its runner stops when the last clone is dropped. Persisted requests
/// stay in the database, for the next process.
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
    inner: Arc<Inner>,
}

struct Inner {
    engine: Arc<Engine>,
    runner: Option<RunnerGuard>,
    _reconciler: Option<ReconcileGuard>,
    pass_through: Option<PassThrough>,
    /// Background attempts go through a plain client that the crate built.
    plain_transport: bool,
    /// Background attempts go through the first service that the layer wraps.
    wrapped_transport: bool,
    warned_of_second_service: AtomicBool,
    /// The last requests of the fronts that were given up.
    failed: FailedRequests,
}

impl Durable {
    /// A handle with the defaults of [`DurableBuilder`]. Its runner starts at once: on the current
    /// tokio runtime, or without one, on a thread of its own.
    ///
    /// Nothing is connected yet. If the database is unreachable or the schema missing, calls return
    /// errors, and the runner waits.
    ///
    /// Attempts that don't run through a caller's own client (direct calls on this handle, fired
    /// requests, anything that outlives its caller) use a plain [`reqwest::Client`]. It knows
    /// nothing of your proxies, certificates, default headers or middleware. If that matters, pass
    /// your client to [`DurableBuilder::transport`].
    ///
    /// # Panics
    ///
    /// If no TLS backend can be initialised or no thread can be started, as with
    /// [`reqwest::Client::new`]. [`builder`](Self::builder) returns an error instead.
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

    /// Begins to configure a handle for the database at a URL, such as
    /// `postgres://user:password@host:5432/database?sslmode=require`. The application needs no sqlx.
    ///
    /// The handle has a pool with sqlx's defaults instead of the application's, for
    /// [`pool`](Self::pool) and for handlers of outcomes. It connects on first use. A URL that is
    /// not valid is an error of [`build`](DurableBuilder::build), which names the field `url` and
    /// shows nothing of the URL.
    ///
    /// What the URL leaves out comes from the environment (`PGHOST`, `PGUSER`, `PGPASSWORD` and so
    /// on) and from `.pgpass`, as for `psql`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(url: &str) -> Result<(), requeuest::Error> {
    /// let durable = requeuest::Durable::builder_from_url(url).channel("billing").build()?;
    /// # Ok(()) }
    /// ```
    pub fn builder_from_url(url: impl Into<String>) -> DurableBuilder {
        DurableBuilder::from_url(url.into())
    }

    /// A handle with the defaults of [`DurableBuilder`] for the database at a URL: see
    /// [`builder_from_url`](Self::builder_from_url). Connects, and looks whether the schema is
    /// there. Where a database that is away must not keep the application from starting, build the
    /// handle with `builder_from_url`, which connects on first use.
    ///
    /// # Errors
    ///
    /// If the URL is not valid, with `url` as its [`Error::field`]; if the database can't be
    /// reached; if the schema is not installed or doesn't fit
    /// ([`Error::is_not_migrated`]): see [`migrate_url`](crate::migrate::migrate_url).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let url = "postgres://localhost/app";
    /// requeuest::migrate_url(url).await?;
    /// let durable = requeuest::Durable::connect(url).await?;
    /// # Ok(()) }
    /// ```
    pub async fn connect(url: impl Into<String>) -> Result<Self, Error> {
        let durable = Self::builder_from_url(url).build()?;
        durable
            .engine()
            .with_store(|store| async move { store.verify().await })
            .await?;
        Ok(durable)
    }

    /// Persists a request and returns. The request is delivered in the background.
    ///
    /// # Errors
    ///
    /// If the request is refused, or can't be persisted. Then it will not be sent, except after
    /// [`Error::is_indeterminate`], when it may be. With [`Error::is_overloaded`] if too many
    /// requests wait to be persisted, and with [`Error::is_key_busy`] if another transaction holds
    /// one of the request's keys for longer than
    /// [`max_key_wait`](DurableBuilder::max_key_wait).
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped before it returns, the request may or may not have
    /// been persisted.
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
        R: IntoRequest,
    {
        let request = self.read(request).await?;
        let prepared = self.prepare(request, Mode::Fired)?;
        self.submit(prepared, None)?.await
    }

    /// Persists a request in the caller's transaction. A commit sends the request, a rollback never
    /// does.
    ///
    /// The executor may be a pool, a connection or a transaction. One statement runs on it. The
    /// commit notifies runners; with [`DurableBuilder::notify_in_transactions`] off, they find the
    /// request with their next poll, within a second.
    ///
    /// A request that is [`ordered`](crate::Options::ordered), or has a
    /// [`key`](crate::Options::key) or [`supersede`](crate::Options::supersede), locks that key
    /// until the transaction ends. Two transactions that take two keys in opposite order deadlock,
    /// and Postgres aborts one of them (SQLSTATE 40P01). A key that another transaction holds is
    /// waited for, without a limit unless the connection has a `lock_timeout`. If the other
    /// transaction is the caller's own, that is for ever.
    ///
    /// Ordered requests are sent in the order of the commits, at every isolation level. Above `READ
    /// COMMITTED`, a transaction doesn't see a `key` that was committed after it started: the
    /// request is refused with a serialization failure (40001), and the transaction must be run
    /// again. Nor does such a transaction see that another channel has taken its ordering key
    /// since.
    ///
    /// # Errors
    ///
    /// If the request is refused, or the statement fails. A failed statement aborts the
    /// transaction.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, roll the transaction back.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     pool: sqlx::PgPool,
    /// #     durable: requeuest::Durable,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut tx = pool.begin().await?;
    /// sqlx::query("INSERT INTO orders (id) VALUES (1)").execute(&mut *tx).await?;
    /// let request = http::Request::post("https://example.com/orders").body("1")?;
    /// let id = durable.fire_in(&mut *tx, request).await?;
    /// tx.commit().await?;
    /// # Ok(()) }
    /// ```
    pub async fn fire_in<'c, R>(
        &self,
        executor: impl PgExecutor<'c>,
        request: R,
    ) -> Result<RequestId, Error>
    where
        R: IntoRequest,
    {
        let request = self.read(request).await?;
        let prepared = self.prepare(request, Mode::Fired)?;
        self.engine().ensure_not_closing()?;
        let row = &prepared.row;
        let store = self.engine().store();
        let inserted = store.insert_for_caller(executor, row).await;
        let persisted = inserted.and_then(|inserted| {
            self.engine().left_to_runners([&row.channel]);
            inserted.persisted(row)
        });
        if let Some(span) = prepared.span {
            span.end(persisted.as_ref().copied());
        }
        let id = persisted?;
        if id == row.id {
            self.engine().driver().meter.enqueued([(row, None)]);
        }
        Ok(id)
    }

    /// Persists a request, delivers it and waits for its response: a final one, or the last one
    /// once the retries are used up.
    ///
    /// # Errors
    ///
    /// If the request is refused or can't be persisted; if it was given up without any response
    /// ([`Error::is_discarded`]) or cancelled; if the response is too large to keep.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future never cancels a persisted request, which is delivered anyway. If it is
    /// dropped early, the request may or may not have been persisted.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), Box<dyn std::error::Error>> {
    /// let request = http::Request::get("https://example.com/").body("")?;
    /// let response = durable.await_response(request).await?;
    /// println!("{}: {}", response.status(), response.text()?);
    /// # Ok(()) }
    /// ```
    pub async fn await_response<R>(&self, request: R) -> Result<Response, Error>
    where
        R: IntoRequest,
    {
        let request = self.read(request).await?;
        let prepared = self.prepare(request, Mode::Awaited)?;
        self.submit_awaited(prepared, None)?.await?.into_result()
    }

    /// Waits for the response of a request that was persisted earlier, by any process and before
    /// any restart.
    ///
    /// # Errors
    ///
    /// As for [`await_response`](Self::await_response). Also if there is no such request, or its
    /// outcome has expired ([`Error::is_unknown_id`]): outcomes are kept for the retention. If this
    /// version can't read the outcome: [`Error::is_unreadable`].
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
    /// If the request doesn't exist, or its outcome has expired ([`Error::is_unknown_id`]); if this
    /// version can't read the outcome ([`Error::is_unreadable`]); if the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing is lost, and it can be called again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     durable: requeuest::Durable,
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// let outcome = durable.outcome(id).await?;
    /// println!("{} after {} attempts", outcome.status(), outcome.attempts());
    /// # Ok(()) }
    /// ```
    pub async fn outcome(&self, id: RequestId) -> Result<Outcome, Error> {
        self.engine().outcome(id).await
    }

    /// The status of a request, or `None` if there is no such request or its outcome has expired.
    ///
    /// # Errors
    ///
    /// If a newer version gave the request a status that this one doesn't know
    /// ([`Error::is_unreadable`]), or the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     durable: requeuest::Durable,
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// let done = durable.status(id).await?.is_some_and(|status| status.is_terminal());
    /// # Ok(()) }
    /// ```
    pub async fn status(&self, id: RequestId) -> Result<Option<Status>, Error> {
        self.engine()
            .with_store(|store| async move { store.status(id).await })
            .await
    }

    /// Cancels a request. A waiting request is never sent. A request in flight is not sent again
    /// and ends as cancelled, whatever its answer. Callers that wait for it get an error
    /// ([`Error::is_cancelled`]). Returns `false`, with nothing changed, if the request has already
    /// finished.
    ///
    /// # Errors
    ///
    /// If there is no such request, or its outcome has expired ([`Error::is_unknown_id`]); if the
    /// database fails.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, the request may or may not have been cancelled.
    /// It can be called again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     durable: requeuest::Durable,
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// if !durable.cancel(id).await? {
    ///     println!("too late: {:?}", durable.status(id).await?);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn cancel(&self, id: RequestId) -> Result<bool, Error> {
        self.engine().cancel(id).await
    }

    /// Stops claiming, waits up to `grace` for the attempts in flight, gives the remaining requests
    /// back to other processes, and closes the crate's connections. Attempts still in flight after
    /// `grace` may have reached the receiver: they are recorded as failed and retried after the
    /// usual backoff. The caller's pool stays open. Waiting calls and later calls end with
    /// [`Error::is_closed`].
    ///
    /// Dropping every handle without a shutdown loses nothing either: another process takes the
    /// requests in flight over once their leases run out.
    ///
    /// # Errors
    ///
    /// If the runtime has ended.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// durable.shutdown(std::time::Duration::from_secs(10)).await?;
    /// # Ok(()) }
    /// ```
    pub async fn shutdown(&self, grace: Duration) -> Result<(), Error> {
        if let Some(runner) = &self.inner.runner {
            runner.stop();
        }
        let engine = Arc::clone(self.engine());
        self.engine().run(engine.shutdown(grace)).await
    }

    /// A caller's request, with its body in memory.
    async fn read(&self, request: impl IntoRequest) -> Result<Request, Error> {
        let unread = request.into_request()?;
        unread.read(self.max_request_body()).await
    }

    /// The pool that the handle was built with, or that it has made for its URL.
    pub fn pool(&self) -> &PgPool {
        self.engine().store().caller_pool()
    }

    /// The largest request body that is persisted, in bytes.
    pub(crate) fn max_request_body(&self) -> usize {
        self.engine().store().config().max_request_body
    }

    /// How the parts of this handle's sweep fare, which deletes what has outlived its retention.
    /// Reads no database, so it may be called as often as metrics are collected. Empty until the
    /// first run, which comes within 90 seconds.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(durable: requeuest::Durable) {
    /// for part in durable.sweep_parts() {
    ///     if part.failures > 3 || part.behind {
    ///         println!("{} pile up: {:?}", part.name, part.error);
    ///     }
    /// }
    /// # }
    /// ```
    pub fn sweep_parts(&self) -> Vec<SweepPart> {
        self.engine().sweep_parts()
    }

    /// From now on, new connections of requeuest's own pool use these options: the password has
    /// changed, or the server has moved. They replace those of
    /// [`DurableBuilder::connect_options`].
    ///
    /// A handle without options of its own needs no call. It uses those that the application's
    /// pool has at the time: see [`PgPool::set_connect_options`](sqlx::Pool::set_connect_options).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(
    /// #     durable: requeuest::Durable,
    /// #     direct: sqlx::postgres::PgConnectOptions,
    /// #     password: &str,
    /// # ) {
    /// durable.set_connect_options(direct.password(password));
    /// # }
    /// ```
    pub fn set_connect_options(&self, options: PgConnectOptions) {
        self.engine().store().set_connect_options(options);
    }

    /// The tasks that this handle has run in the background, and how often each has panicked and
    /// begun again. Reads no database.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(durable: requeuest::Durable) {
    /// for task in durable.background_tasks() {
    ///     if task.panics > 0 {
    ///         println!("{} has panicked {} times", task.name, task.panics);
    ///     }
    /// }
    /// # }
    /// ```
    pub fn background_tasks(&self) -> Vec<BackgroundTask> {
        self.engine().driver().panics.tasks()
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.inner.engine
    }

    pub(crate) fn passes_through(&self, head: &RequestHead<'_>) -> bool {
        self.inner
            .pass_through
            .as_ref()
            .is_some_and(|passes| passes(head))
    }

    /// Warns, once for each handle, if its layer wraps a service after the one that makes
    /// background attempts. Whether the two differ can't be seen.
    pub(crate) fn warn_of_second_service(&self) {
        let inner = &self.inner;
        if inner.wrapped_transport && !inner.warned_of_second_service.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                channel = &*self.engine().config().channel,
                "a DurableLayer wraps a second service, and requests that outlive their caller are \
                 sent by the first one, with its credentials; build a layer with a channel of its \
                 own for each client, or set DurableBuilder::transport"
            );
        }
    }

    /// Warns callers with a client of their own: attempts that outlive them use another one.
    pub(crate) fn warn_of_plain_transport(&self) {
        static ONCE: Once = Once::new();
        if self.inner.plain_transport {
            ONCE.call_once(|| {
                tracing::warn!(
                    "requests that outlive their caller are sent by a plain reqwest client, which \
                     knows nothing of the application's proxy, certificates or middleware; set \
                     DurableBuilder::transport"
                );
            });
        }
    }
}

impl fmt::Debug for Durable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Durable")
            .field("channel", &self.engine().config().channel)
            .field("schema", &self.engine().store().config().schema)
            .field("runner", &self.inner.runner.is_some())
            .finish_non_exhaustive()
    }
}
