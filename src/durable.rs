//! The handle that everything else is a front for, and its configuration.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Extensions, HeaderMap, Method};
use http_body::Body as HttpBody;
use sqlx::postgres::PgConnectOptions;
use sqlx::{PgExecutor, PgPool};
use tokio::sync::oneshot;
use tower::Service;
use uuid::Uuid;

use crate::body::Body;
use crate::codec::{self, Delivery};
use crate::destination;
use crate::engine::attempt::Job;
use crate::engine::enqueue::{Start, Submission};
use crate::engine::live::Live;
use crate::engine::runner::RunnerGuard;
use crate::engine::transport::{ReqwestTransport, Transport, erase};
use crate::engine::waiters::Waiter;
use crate::engine::{Config, Engine};
use crate::error::{BoxError, Error, Kind};
use crate::id::RequestId;
use crate::layer::DurableLayer;
use crate::migrate::{DEFAULT_SCHEMA, validate_schema};
use crate::options::{validate_channel, validate_timeout};
use crate::request::Request;
use crate::response::Response;
use crate::retry::{MAX_DURATION, RetryPolicy};
use crate::status::Status;
use crate::store::enqueue::{self, InsertOne, NewRequest};
use crate::store::{inspect, outcome};

/// The channel of requests that name none: `default`.
pub const DEFAULT_CHANNEL: &str = "default";
/// How many attempts a handle makes at a time: 256.
pub const DEFAULT_CONCURRENCY: usize = 256;
/// How long a claimed request is left alone by others if its process says nothing more: 15 seconds.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(15);
/// How long one attempt may take: 30 seconds.
pub const DEFAULT_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest request body that is persisted: 8 MiB.
pub const DEFAULT_MAX_REQUEST_BODY: usize = 8 * 1024 * 1024;
/// The largest response body that is kept: 8 MiB.
pub const DEFAULT_MAX_RESPONSE_BODY: usize = 8 * 1024 * 1024;
/// How long outcomes can be asked for: 24 hours.
pub const DEFAULT_RETENTION: Duration = Duration::from_secs(24 * 60 * 60);
/// How many connections the crate's own pool has at most: 8.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 8;

/// What a bytea column can hold of a body, and a byte more than anybody should want.
const MAX_BODY: usize = 512 * 1024 * 1024;

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
    pass_through: Option<PassThrough>,
    /// Background attempts go through a client of the crate's own making.
    plain_transport: bool,
}

type PassThrough = Arc<dyn Fn(&RequestHead<'_>) -> bool + Send + Sync>;

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
        let id = prepared.id();
        enqueued(self.submit(prepared, None)?.enqueued).await?;
        Ok(id)
    }

    /// Persists a request in the caller's transaction: a commit sends it, a rollback never does.
    ///
    /// The executor may be a pool, a connection or a transaction; one statement is run on it. Runners are told at the
    /// commit, unless [`DurableBuilder::notify_in_transactions`] leaves it to their next look a second later at most.
    ///
    /// An [`ordered`](crate::Options::ordered) request locks its key until the transaction ends. Two transactions that take
    /// two keys in opposite order deadlock, and Postgres ends one of them.
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
        let how = InsertOne {
            notify: config.notify_in_transactions && prepared.row.needs_runner(),
            wait: true,
        };
        enqueue::insert_one(executor, &config.schema, &prepared.row, how).await?;
        Ok(prepared.id())
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
        let shared = self.engine().shared();
        // Before asking, or an outcome could come in between.
        let waiter = shared.waiters.subscribe(id, None);
        let found = self
            .engine()
            .query(move |connection| {
                Box::pin(async move { outcome::find(connection, &[id]).await })
            })
            .await?;
        match found.into_iter().next() {
            Some((_, outcome::Found::Finished(outcome))) => outcome.into_result(),
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
                waiter.await?.into_result()
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

    /// Stops claiming, waits up to `grace` for the attempts in flight, gives the rest back for others and closes the
    /// crate's connections. The caller's pool stays open. Calls that wait, and calls made later, end with [`Error::is_closed`].
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

    /// A [`tower::Layer`] over this handle.
    ///
    /// The wrapped service sends the attempts of live callers; background attempts go through the handle's own
    /// [`transport`](DurableBuilder::transport). With [`DurableLayer::new`] or [`DurableBuilder::layer`] the wrapped service
    /// sends both.
    pub fn layer(&self) -> DurableLayer {
        DurableLayer::from(self.clone())
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

    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn has_plain_transport(&self) -> bool {
        self.handle.plain_transport
    }

    /// Checks a request and writes it down.
    pub(crate) fn prepare(&self, request: Request, mode: Mode) -> Result<Prepared, Error> {
        let config = self.engine().config();
        let options = &request.options;
        options.validate()?;
        let uri = request.uri()?;
        if request
            .body
            .as_ref()
            .is_some_and(|body| body.len() > config.max_request_body)
        {
            return Err(too_large(config.max_request_body));
        }
        let delivery = Delivery {
            attempt_timeout: options.attempt_timeout.unwrap_or(config.attempt_timeout),
            retry: options.retry.clone().unwrap_or_else(|| match mode {
                Mode::Awaited => config.retry_awaited.clone(),
                Mode::Fired => config.retry_fired.clone(),
            }),
            accept: options.accept.as_ref().map(|accept| accept.to_vec()),
        };
        let id = RequestId::generate();
        let row = NewRequest {
            id,
            channel: Arc::clone(options.channel.as_ref().unwrap_or(&config.channel)),
            group: match (&options.ordered, &options.group) {
                (Some(key), _) => destination::ordered_group(key),
                (None, Some(group)) => destination::named_group(group),
                (None, None) => destination::destination_group(&uri),
            },
            ordered: options.ordered.is_some(),
            delay: options.delay.unwrap_or_default(),
            head: codec::encode_request(&request, &uri, &delivery),
            body: request.body.clone(),
            waiter: (mode == Mode::Awaited).then_some(self.engine().shared().instance),
            claimed: false,
        };
        let job = Job {
            id,
            request: Arc::new(request),
            uri,
            delivery: Arc::new(delivery),
            extensions: Extensions::new(),
        };
        Ok(Prepared { row, job })
    }

    /// Hands a request to the engine that nobody waits for. If this process may, it makes the first attempt at once, through the
    /// client that the request came through, or its own.
    pub(crate) fn submit(
        &self,
        prepared: Prepared,
        live: Option<Live>,
    ) -> Result<Submitted, Error> {
        let Prepared { mut row, job } = prepared;
        let engine = self.engine();
        let may_start = !row.ordered && row.delay.is_zero();
        let slots = may_start
            .then(|| engine.inline_slots(&row.channel))
            .flatten();
        let start = slots.map(|slots| Start {
            engine: Arc::clone(engine),
            slots,
            job,
            live,
        });
        row.claimed = start.is_some();
        let inline = row.claimed;
        let (done, enqueued) = oneshot::channel();
        engine.enqueue(Submission { row, start, done })?;
        Ok(Submitted { enqueued, inline })
    }

    /// Hands a request to the engine and waits for its response. While somebody waits, every attempt that this process
    /// makes goes through the client that the request came through.
    pub(crate) fn submit_awaited(
        &self,
        prepared: Prepared,
        live: Option<Live>,
    ) -> Result<AwaitResponse, Error> {
        let waiters = &self.engine().shared().waiters;
        let waiter = waiters.subscribe(prepared.id(), live);
        Ok(AwaitResponse {
            submitted: Some(self.submit(prepared, None)?),
            waiter,
            _durable: self.clone(),
        })
    }

    /// Cancels what has not ended of these channels, a batch at a time: one statement for everything could outlast its timeout.
    pub(crate) async fn clear(&self, channels: Option<Vec<String>>) -> Result<(), Error> {
        const BATCH: i32 = 1000;
        let shared = self.engine().shared();
        let (retention, instance) = (shared.config.retention, shared.instance);
        loop {
            let channels = channels.clone();
            let cancelled = self
                .engine()
                .query(move |connection| {
                    Box::pin(async move {
                        let cancelled =
                            inspect::clear(&mut *connection, channels.as_deref(), retention, BATCH)
                                .await?;
                        let waiters = cancelled.iter().filter_map(|(_, waiter)| *waiter);
                        let mut others: Vec<Uuid> =
                            waiters.filter(|waiter| *waiter != instance).collect();
                        others.sort_unstable();
                        others.dedup();
                        if !others.is_empty() {
                            outcome::notify_waiters(connection, &others).await?;
                        }
                        Ok(cancelled)
                    })
                })
                .await?;
            for (id, _) in &cancelled {
                shared.leases.forget(*id);
            }
            // Those who wait here find the outcome in the database.
            shared.waiters.poke();
            if cancelled.len() < BATCH as usize {
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

pub(crate) fn too_large(limit: usize) -> Error {
    Error::new(Kind::BodyTooLarge { limit })
}

/// Whether anybody waits for the response, which decides how long it is retried by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Awaited,
    Fired,
}

/// A request that was checked and written down.
pub(crate) struct Prepared {
    row: NewRequest,
    job: Job,
}

impl Prepared {
    pub(crate) fn id(&self) -> RequestId {
        self.row.id
    }
}

/// A request that was handed to the engine.
pub(crate) struct Submitted {
    pub(crate) enqueued: oneshot::Receiver<Result<(), Error>>,
    /// This process makes the first attempt.
    inline: bool,
}

/// Waits for the commit of an insert.
pub(crate) async fn enqueued(enqueued: oneshot::Receiver<Result<(), Error>>) -> Result<(), Error> {
    enqueued
        .await
        .unwrap_or_else(|_| Err(Error::new(Kind::Closed)))
}

/// The way from the insert to the outcome. On any executor.
pub(crate) struct AwaitResponse {
    submitted: Option<Submitted>,
    waiter: Waiter,
    /// While somebody waits, the engine lives.
    _durable: Durable,
}

impl Future for AwaitResponse {
    type Output = Result<Response, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Some(submitted) = &mut this.submitted {
            let enqueued = ready!(Pin::new(&mut submitted.enqueued).poll(cx));
            let inline = submitted.inline;
            this.submitted = None;
            match enqueued {
                Ok(Ok(())) => this.waiter.arm(!inline),
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => return Poll::Ready(Err(Error::new(Kind::Closed))),
            }
        }
        Pin::new(&mut this.waiter)
            .poll(cx)
            .map(|waited| waited.and_then(crate::outcome::Outcome::into_result))
    }
}

/// What [`DurableBuilder::pass_through`] decides by.
#[derive(Debug)]
pub struct RequestHead<'a> {
    method: &'a Method,
    url: UrlRef<'a>,
    headers: &'a HeaderMap,
}

#[derive(Debug)]
enum UrlRef<'a> {
    Uri(&'a http::Uri),
    #[cfg(feature = "reqwest-middleware")]
    Url(&'a url::Url),
}

impl<'a> RequestHead<'a> {
    pub(crate) fn of_http<B>(request: &'a http::Request<B>) -> Self {
        Self {
            method: request.method(),
            url: UrlRef::Uri(request.uri()),
            headers: request.headers(),
        }
    }

    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn of_reqwest(request: &'a reqwest::Request) -> Self {
        Self {
            method: request.method(),
            url: UrlRef::Url(request.url()),
            headers: request.headers(),
        }
    }

    /// The method.
    pub fn method(&self) -> &Method {
        self.method
    }

    /// The host of the URL.
    pub fn host(&self) -> Option<&str> {
        match &self.url {
            UrlRef::Uri(uri) => uri.host(),
            #[cfg(feature = "reqwest-middleware")]
            UrlRef::Url(url) => url.host_str(),
        }
    }

    /// The path of the URL.
    pub fn path(&self) -> &str {
        match &self.url {
            UrlRef::Uri(uri) => uri.path(),
            #[cfg(feature = "reqwest-middleware")]
            UrlRef::Url(url) => url.path(),
        }
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        self.headers
    }
}

/// Configures a [`Durable`]. Setters take everything; [`build`](Self::build) checks it all and names the field that is wrong.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use requeuest::{Durable, retry::RetryPolicy};
///
/// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
/// let durable = Durable::builder(pool)
///     .channel("billing")
///     .attempt_timeout(Duration::from_secs(10))
///     .retry(RetryPolicy::exponential().max_age(Duration::from_secs(3600)))
///     .pass_through(|request| request.method().is_safe())
///     .build()?;
/// # Ok(()) }
/// ```
#[must_use = "a builder does nothing until it is built"]
pub struct DurableBuilder {
    pool: PgPool,
    channel: String,
    channels: Subscription,
    transport: TransportChoice,
    runner: bool,
    pass_through: Option<PassThrough>,
    concurrency: usize,
    lease: Duration,
    attempt_timeout: Duration,
    retry_awaited: RetryPolicy,
    retry_fired: RetryPolicy,
    max_request_body: usize,
    max_response_body: usize,
    retention: Duration,
    schema: String,
    max_connections: u32,
    notify_in_transactions: bool,
    connect: Option<PgConnectOptions>,
}

enum Subscription {
    /// The handle's own channel.
    Own,
    All,
    List(Vec<String>),
}

enum TransportChoice {
    Plain,
    Given(Transport),
    /// The first service that the layer wraps.
    Wrapped,
}

impl DurableBuilder {
    fn new(pool: PgPool) -> Self {
        Self {
            pool,
            channel: DEFAULT_CHANNEL.to_owned(),
            channels: Subscription::Own,
            transport: TransportChoice::Plain,
            runner: true,
            pass_through: None,
            concurrency: DEFAULT_CONCURRENCY,
            lease: DEFAULT_LEASE,
            attempt_timeout: DEFAULT_ATTEMPT_TIMEOUT,
            retry_awaited: RetryPolicy::awaited(),
            retry_fired: RetryPolicy::fired(),
            max_request_body: DEFAULT_MAX_REQUEST_BODY,
            max_response_body: DEFAULT_MAX_RESPONSE_BODY,
            retention: DEFAULT_RETENTION,
            schema: DEFAULT_SCHEMA.to_owned(),
            max_connections: DEFAULT_MAX_CONNECTIONS,
            notify_in_transactions: true,
            connect: None,
        }
    }

    /// The channel that requests go to unless their [`Options`](crate::Options) name another. 1 to 55 bytes. Defaults to [`DEFAULT_CHANNEL`].
    ///
    /// A channel names a client stack: every runner that subscribes to it must be able to send its requests. Two differently built
    /// clients in one application use two channels.
    pub fn channel(mut self, channel: impl Into<String>) -> Self {
        self.channel = channel.into();
        self
    }

    /// The channels that the runner delivers. Defaults to the handle's own.
    pub fn channels<I>(mut self, channels: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.channels = Subscription::List(channels.into_iter().map(Into::into).collect());
        self
    }

    /// The runner delivers every channel of the schema, those that appear later included.
    pub fn all_channels(mut self) -> Self {
        self.channels = Subscription::All;
        self
    }

    /// The client that sends whatever no live caller's own client sends. Defaults to a plain [`reqwest::Client`] that follows
    /// no redirects and has no retries of its own.
    ///
    /// A [`reqwest::Client`] is given as [`ReqwestTransport`]. A client with redirects or retries of its own makes
    /// transmissions that are neither counted nor recorded.
    pub fn transport<S, B>(mut self, service: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: HttpBody + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        self.transport = TransportChoice::Given(erase(service));
        self
    }

    /// Whether this handle delivers. With `false` it only enqueues and waits, and other processes deliver. Defaults to `true`.
    pub fn runner(mut self, runner: bool) -> Self {
        self.runner = runner;
        self
    }

    /// Requests for which this is true go straight through the layer or middleware: not persisted, not retried. Defaults to none.
    pub fn pass_through(
        mut self,
        predicate: impl Fn(&RequestHead<'_>) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.pass_through = Some(Arc::new(predicate));
        self
    }

    /// How many attempts are made at a time, at least 1. New requests may use half of them, so that they can't
    /// starve those in the queue. Defaults to [`DEFAULT_CONCURRENCY`].
    pub fn concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = concurrency;
        self
    }

    /// How long a claimed request is left alone by others; renewed while its attempt goes on, so attempts may take longer.
    /// After a crash, this is how long its requests wait. 1 second to 1 hour. Defaults to [`DEFAULT_LEASE`].
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long one attempt may take, from its start to the last byte of the response. Longer than zero.
    /// Defaults to [`DEFAULT_ATTEMPT_TIMEOUT`].
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = timeout;
        self
    }

    /// The policy of every request whose [`Options`](crate::Options) give none. Defaults to [`RetryPolicy::awaited`] for requests whose
    /// response is awaited and [`RetryPolicy::fired`] for the others.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry_awaited = policy.clone();
        self.retry_fired = policy;
        self
    }

    /// The largest request body that is persisted, in bytes, up to 512 MiB. Defaults to [`DEFAULT_MAX_REQUEST_BODY`].
    pub fn max_request_body(mut self, bytes: usize) -> Self {
        self.max_request_body = bytes;
        self
    }

    /// The largest response body that is kept, in bytes, up to 512 MiB. A request whose response is larger counts as delivered;
    /// who waits for it gets an error with its status and headers. Defaults to [`DEFAULT_MAX_RESPONSE_BODY`].
    pub fn max_response_body(mut self, bytes: usize) -> Self {
        self.max_response_body = bytes;
        self
    }

    /// How long the outcomes of completed and cancelled requests can be asked for, at least 1 minute. Defaults to [`DEFAULT_RETENTION`].
    pub fn retention(mut self, retention: Duration) -> Self {
        self.retention = retention;
        self
    }

    /// The Postgres schema, as it was given to [`Migrator::schema`](crate::migrate::Migrator::schema).
    /// Defaults to [`DEFAULT_SCHEMA`].
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// How many connections the crate's own pool opens at most, besides two for listening. At least 2.
    /// Defaults to [`DEFAULT_MAX_CONNECTIONS`].
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.max_connections = connections;
        self
    }

    /// Whether [`Durable::fire_in`] wakes runners at the commit. A notification makes commits of its transactions wait for
    /// each other; without it, runners find the request within a second. Defaults to `true`.
    pub fn notify_in_transactions(mut self, notify: bool) -> Self {
        self.notify_in_transactions = notify;
        self
    }

    /// Connect options for the crate's own pool, which needs sessions of its own: to be given where the application's pool goes
    /// through a pooler in transaction mode. Defaults to the options of the application's pool.
    pub fn runner_connect(mut self, options: PgConnectOptions) -> Self {
        self.connect = Some(options);
        self
    }

    /// Builds the handle and starts its runner, as [`Durable::new`] does.
    ///
    /// # Errors
    ///
    /// If a field is not valid, with its name in [`Error::field`], or no TLS backend or thread can be had.
    pub fn build(self) -> Result<Durable, Error> {
        let config = self.check()?;
        let engine = Engine::start(self.pool, config)?;
        let mut plain_transport = false;
        match self.transport {
            TransportChoice::Given(transport) => engine.offer_transport(|| transport),
            TransportChoice::Wrapped => {}
            TransportChoice::Plain => {
                plain_transport = true;
                let plain = ReqwestTransport::plain()
                    .map_err(|error| Error::config("transport", error.to_string()))?;
                engine.offer_transport(|| erase(plain));
            }
        }
        let runner = self.runner.then(|| RunnerGuard::start(&engine));
        Ok(Durable {
            handle: Arc::new(Handle {
                engine,
                runner,
                pass_through: self.pass_through,
                plain_transport,
            }),
        })
    }

    /// Builds a layer whose wrapped service sends everything, background attempts included: its runner starts to deliver
    /// once the first service was wrapped.
    ///
    /// # Errors
    ///
    /// As for [`build`](Self::build).
    pub fn layer(mut self) -> Result<DurableLayer, Error> {
        if matches!(self.transport, TransportChoice::Plain) {
            self.transport = TransportChoice::Wrapped;
        }
        self.build().map(DurableLayer::from)
    }

    fn check(&self) -> Result<Config, Error> {
        let ensure = |ok: bool, field: &'static str, reason: &'static str| {
            if ok {
                Ok(())
            } else {
                Err(Error::config(field, reason))
            }
        };
        let named = |field: &'static str| move |reason: &'static str| Error::config(field, reason);
        validate_channel(&self.channel).map_err(named("channel"))?;
        let channels = match &self.channels {
            Subscription::Own => Some(vec![Arc::from(&*self.channel)]),
            Subscription::All => None,
            Subscription::List(channels) => {
                ensure(
                    !channels.is_empty() || !self.runner,
                    "channels",
                    "the runner has none to deliver",
                )?;
                for channel in channels {
                    validate_channel(channel).map_err(named("channels"))?;
                }
                Some(
                    channels
                        .iter()
                        .map(|channel| Arc::from(&**channel))
                        .collect(),
                )
            }
        };
        validate_schema(&self.schema).map_err(named("schema"))?;
        validate_timeout(self.attempt_timeout).map_err(named("attempt_timeout"))?;
        self.retry_awaited.validate().map_err(named("retry"))?;
        self.retry_fired.validate().map_err(named("retry"))?;
        ensure(
            (1..=100_000).contains(&self.concurrency),
            "concurrency",
            "must be from 1 to 100,000",
        )?;
        let lease = Duration::from_secs(1)..=Duration::from_secs(3600);
        ensure(
            lease.contains(&self.lease),
            "lease",
            "must be from one second to one hour",
        )?;
        ensure(
            self.max_request_body <= MAX_BODY,
            "max_request_body",
            "is over 512 MiB",
        )?;
        ensure(
            self.max_response_body <= MAX_BODY,
            "max_response_body",
            "is over 512 MiB",
        )?;
        let retention = Duration::from_secs(60)..=MAX_DURATION;
        ensure(
            retention.contains(&self.retention),
            "retention",
            "must be from one minute to a hundred years",
        )?;
        ensure(
            self.max_connections >= 2,
            "max_connections",
            "must be at least 2",
        )?;
        Ok(Config {
            channel: Arc::from(&*self.channel),
            channels,
            concurrency: self.concurrency,
            lease: self.lease,
            attempt_timeout: self.attempt_timeout,
            retry_awaited: self.retry_awaited.clone(),
            retry_fired: self.retry_fired.clone(),
            max_request_body: self.max_request_body,
            max_response_body: self.max_response_body,
            retention: self.retention,
            schema: self.schema.clone(),
            max_connections: self.max_connections,
            notify_in_transactions: self.notify_in_transactions,
            connect: self.connect.clone(),
        })
    }
}

impl fmt::Debug for DurableBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DurableBuilder")
            .field("channel", &self.channel)
            .field("schema", &self.schema)
            .field("runner", &self.runner)
            .finish_non_exhaustive()
    }
}
