//! The configuration of a handle: every default is a constant, every field is checked in one place.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http_body::Body as HttpBody;
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use tower::Service;

use super::pass_through::{PassThrough, RequestHead};
use super::{Durable, Handle};
use crate::body::Body;
use crate::classify::{Classifier, Classify};
use crate::dead_letter::Reconcile;
use crate::engine::reconcile::ReconcileGuard;
use crate::engine::runner::RunnerGuard;
use crate::engine::transport::{ReqwestTransport, Transport, erase};
use crate::engine::{Config, Engine};
use crate::error::{BoxError, Error};
use crate::idempotency_header::IdempotencyHeader;
use crate::migrate::{DEFAULT_SCHEMA, validate_schema};
use crate::options::{validate_channel, validate_timeout};
use crate::retry::{MAX_DURATION, RetryPolicy};

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
    classifier: Classifier,
    max_request_body: usize,
    max_response_body: usize,
    retention: Duration,
    schema: String,
    max_connections: u32,
    notify_in_transactions: bool,
    connect: Option<PgConnectOptions>,
    idempotency_header: IdempotencyHeader,
    reconcile: Option<Arc<dyn Reconcile>>,
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
    pub(super) fn new(pool: PgPool) -> Self {
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
            classifier: Classifier::default(),
            max_request_body: DEFAULT_MAX_REQUEST_BODY,
            max_response_body: DEFAULT_MAX_RESPONSE_BODY,
            retention: DEFAULT_RETENTION,
            schema: DEFAULT_SCHEMA.to_owned(),
            max_connections: DEFAULT_MAX_CONNECTIONS,
            notify_in_transactions: true,
            connect: None,
            idempotency_header: IdempotencyHeader::default(),
            reconcile: None,
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
    pub fn deliver<I>(mut self, channels: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.channels = Subscription::List(channels.into_iter().map(Into::into).collect());
        self
    }

    /// The runner delivers every channel of the schema, those that appear later included.
    pub fn deliver_all(mut self) -> Self {
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

    /// How many attempts are made at a time, at least 1. While there is a backlog, new requests may use half of them, so that they can't
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

    /// How the results of attempts are judged that this handle makes, except where a request has its own
    /// [`accept`](crate::Options::accept). Defaults to what [`classify`](crate::classify) says.
    pub fn classify(mut self, classify: impl Classify) -> Self {
        self.classifier = Classifier::new(classify);
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

    /// How many connections the crate's own pool opens at most, besides one for waiting and two for the runner. At least 2.
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

    /// The header by which receivers can recognise repetitions of requests whose [`Options`](crate::Options) name none. Defaults to
    /// [`IdempotencyHeader::quoted`].
    pub fn idempotency_header(mut self, key: IdempotencyHeader) -> Self {
        self.idempotency_header = key;
        self
    }

    /// Asks the other side about requests that ended as [`Status::Ambiguous`](crate::Status::Ambiguous), instead of leaving them to
    /// [`Durable::resolve`]. Defaults to none.
    ///
    /// The handle looks every few seconds for those of the channels that its runner delivers, with or without a runner. The hook may take a
    /// minute for each; it is asked again, after 5 seconds at first and up to 5 minutes later, while it doesn't know or fails. Several
    /// processes with a hook never ask about a request at the same time.
    pub fn reconcile(mut self, hook: impl Reconcile) -> Self {
        self.reconcile = Some(Arc::new(hook));
        self
    }

    /// Connect options for the crate's own pool, which needs sessions of its own: to be given where the application's pool goes
    /// through a pooler in transaction mode. Defaults to the options of the application's pool.
    pub fn connect_options(mut self, options: PgConnectOptions) -> Self {
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
        let reconciler = self
            .reconcile
            .map(|hook| ReconcileGuard::start(&engine, hook));
        Ok(Durable {
            handle: Arc::new(Handle {
                engine,
                runner,
                _reconciler: reconciler,
                pass_through: self.pass_through,
                plain_transport,
            }),
        })
    }

    pub(crate) fn send_with_wrapped_service(&mut self) {
        if matches!(self.transport, TransportChoice::Plain) {
            self.transport = TransportChoice::Wrapped;
        }
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
                    "deliver",
                    "the runner has none to deliver",
                )?;
                for channel in channels {
                    validate_channel(channel).map_err(named("deliver"))?;
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
            classifier: self.classifier.clone(),
            max_request_body: self.max_request_body,
            max_response_body: self.max_response_body,
            retention: self.retention,
            schema: self.schema.clone(),
            max_connections: self.max_connections,
            notify_in_transactions: self.notify_in_transactions,
            connect: self.connect.clone(),
            idempotency_header: self.idempotency_header.clone(),
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
