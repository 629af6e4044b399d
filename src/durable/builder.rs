//! The configuration of a handle. Every default is a constant; every field is checked in one place.

use std::any::TypeId;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use http::HeaderName;
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;

use super::pass_through::{PassThrough, RequestHead};
use super::{Durable, Inner};
use crate::classify::{Classifier, Classify, Webhooks};
use crate::dead_letter::Reconcile;
use crate::destination::{DestinationEvent, DestinationPolicy, Policies};
use crate::engine::attempt::hooks::Hooks;
use crate::engine::attempt::transport::{self, HttpClient, ReqwestTransport, Transport, erase};
use crate::engine::runner::RunnerGuard;
use crate::engine::tasks::reconcile::ReconcileGuard;
use crate::engine::{Config, DestinationObserver, Engine};
use crate::error::{Error, chain};
#[cfg(feature = "ssrf-guard")]
use crate::guard::Guard;
use crate::hooks::AttemptHook;
use crate::idempotency_header::IdempotencyHeader;
use crate::migrate::{DEFAULT_SCHEMA, validate_schema};
use crate::options::{TOO_LONG, validate_channel, validate_timeout};
use crate::recorder::{Recorder, SharedRecorder};
use crate::redirects::Redirects;
use crate::repetition::FailedRequests;
use crate::retry::{MAX_DURATION, RetryPolicy};
use crate::runtime::Runtime;
use crate::sealer::Sealer;
use crate::store::{self, STATEMENT_TIMEOUT, Store, StoreConfig};
use crate::trace_context::{ForHook, TraceContextHook, Tracer, Tracing};

/// The channel of requests that name none: `default`.
pub const DEFAULT_CHANNEL: &str = "default";
/// How many attempts a handle makes at the same time: 256.
pub const DEFAULT_CONCURRENCY: usize = 256;
/// How long an attempt may take with [`DurableBuilder::webhooks`]: 20 seconds.
pub const WEBHOOKS_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(20);
/// The default of [`DurableBuilder::max_share`].
pub const DEFAULT_MAX_SHARE: f64 = 0.5;
/// How long other processes leave a claimed request alone if its process goes silent: 15 seconds.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(15);
/// How long one attempt may take: 30 seconds.
pub const DEFAULT_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest request body that is persisted: 8 MiB.
pub const DEFAULT_MAX_REQUEST_BODY: usize = 8 * 1024 * 1024;
/// The largest response body that is kept: 8 MiB.
pub const DEFAULT_MAX_RESPONSE_BODY: usize = 8 * 1024 * 1024;
/// How many requests may wait in a handle to be persisted: 100,000.
pub const DEFAULT_MAX_QUEUED_REQUESTS: usize = 100_000;
/// How many bytes of requests may wait in a handle to be persisted: 256 MiB.
pub const DEFAULT_MAX_QUEUED_BYTES: usize = 256 * 1024 * 1024;
/// How long a request waits for a key that another transaction holds: 30 seconds.
pub const DEFAULT_MAX_KEY_WAIT: Duration = Duration::from_secs(30);
/// How many bytes of large request bodies a handle's attempts have in memory: 256 MiB.
pub const DEFAULT_MAX_SENDING_BYTES: usize = 256 * 1024 * 1024;
/// How many bytes of results may wait in a handle for their commit before no further attempt
/// begins: 256 MiB.
pub const DEFAULT_MAX_UNSETTLED_BYTES: usize = 256 * 1024 * 1024;
/// How long outcomes are kept: 24 hours.
pub const DEFAULT_RETENTION: Duration = Duration::from_secs(24 * 60 * 60);
/// How long dead letters are kept: 90 days.
pub const DEFAULT_DEAD_LETTER_RETENTION: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// How many attempts of a request in a row may be lost with their processes: 5.
pub const DEFAULT_MAX_LOST_ATTEMPTS: u32 = 5;
/// How many outcomes of a channel handlers get at the same time in a handle: 4.
pub const DEFAULT_HANDLER_CONCURRENCY: usize = 4;
/// How long the hooks of an attempt may take together: 10 seconds.
pub const DEFAULT_HOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a handler of outcomes may take: 60 seconds.
pub const DEFAULT_HANDLER_TIMEOUT: Duration = Duration::from_secs(60);
/// After how many failures of its handler an outcome is parked: 100, which takes about 8 hours.
pub const DEFAULT_MAX_HANDLER_FAILURES: u32 = 100;
/// How many connections requeuest's own pool has at most: 8.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 8;

/// The largest body that can be configured: a `bytea` column and its text form must hold it.
const MAX_BODY: usize = 512 * 1024 * 1024;

/// Configures a [`Durable`]. Setters accept anything; [`build`](Self::build) checks every field and
/// names the one that is wrong.
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
    database: Database,
    deliver: Subscription,
    transport: TransportChoice,
    runner: bool,
    pass_through: Option<PassThrough>,
    reconcile: Option<Arc<dyn Reconcile>>,
    max_queued_bytes: Option<usize>,
    max_sending_bytes: Option<usize>,
    max_unsettled_bytes: Option<usize>,
    /// Checked by `build`.
    redact_headers: Vec<String>,
    /// Their patterns are checked by `build`.
    policies: Vec<(String, DestinationPolicy)>,
    /// Checked by `build`.
    strip_headers: Vec<String>,
    config: Config,
    store: StoreConfig,
}

enum Database {
    Pool(PgPool),
    /// Checked by `build`.
    Url(String),
}

/// The channels that the runner delivers.
enum Subscription {
    /// The handle's own channel.
    Own,
    All,
    List(Vec<Arc<str>>),
}

enum TransportChoice {
    Plain,
    Given {
        transport: Transport,
        /// It makes no spans.
        is_own: bool,
    },
    /// The first service that the layer wraps.
    Wrapped,
}

impl DurableBuilder {
    pub(super) fn new(pool: PgPool) -> Self {
        Self::on(Database::Pool(pool))
    }

    pub(super) fn from_url(url: String) -> Self {
        Self::on(Database::Url(url))
    }

    fn on(database: Database) -> Self {
        Self {
            database,
            deliver: Subscription::Own,
            transport: TransportChoice::Plain,
            runner: true,
            pass_through: None,
            reconcile: None,
            max_queued_bytes: None,
            max_sending_bytes: None,
            max_unsettled_bytes: None,
            policies: Vec::new(),
            redact_headers: Vec::new(),
            strip_headers: Vec::new(),
            config: Config {
                channel: DEFAULT_CHANNEL.into(),
                deliver: None,
                concurrency: DEFAULT_CONCURRENCY,
                max_share: DEFAULT_MAX_SHARE,
                policies: Policies::default(),
                destination_policy: DestinationPolicy::default(),
                on_destination_event: None,
                recorder: None,
                max_queued_requests: DEFAULT_MAX_QUEUED_REQUESTS,
                max_queued_bytes: DEFAULT_MAX_QUEUED_BYTES,
                max_key_wait: DEFAULT_MAX_KEY_WAIT,
                max_sending_bytes: DEFAULT_MAX_SENDING_BYTES,
                max_unsettled_bytes: DEFAULT_MAX_UNSETTLED_BYTES,
                attempt_timeout: DEFAULT_ATTEMPT_TIMEOUT,
                max_lost_attempts: DEFAULT_MAX_LOST_ATTEMPTS,
                handler_concurrency: DEFAULT_HANDLER_CONCURRENCY,
                handler_timeout: DEFAULT_HANDLER_TIMEOUT,
                max_handler_failures: DEFAULT_MAX_HANDLER_FAILURES,
                retry_awaited: RetryPolicy::awaited(),
                retry_fired: RetryPolicy::fired(),
                classifier: Classifier::default(),
                hooks: Hooks {
                    hooks: Vec::new(),
                    timeout: DEFAULT_HOOK_TIMEOUT,
                },
                tracing: None,
                strip_headers: Box::default(),
                idempotency_header: IdempotencyHeader::default(),
                redirects: Redirects::none(),
                #[cfg(feature = "ssrf-guard")]
                guard: None,
                redact_headers: Vec::new(),
            },
            store: StoreConfig {
                schema: DEFAULT_SCHEMA.to_owned(),
                lease: DEFAULT_LEASE,
                statement_timeout: STATEMENT_TIMEOUT,
                retention: DEFAULT_RETENTION,
                dead_letter_retention: Some(DEFAULT_DEAD_LETTER_RETENTION),
                max_request_body: DEFAULT_MAX_REQUEST_BODY,
                max_response_body: DEFAULT_MAX_RESPONSE_BODY,
                max_connections: DEFAULT_MAX_CONNECTIONS,
                notify_in_transactions: true,
                connect_options: None,
                measured: false,
                sealer: Sealer::default(),
            },
        }
    }

    /// The channel of requests whose [`Options`](crate::Options) name no other. 1 to 55 bytes.
    /// Defaults to [`DEFAULT_CHANNEL`].
    ///
    /// A channel names a client stack: every runner that delivers the channel must be able to send
    /// its requests. Two differently built clients in one application use two channels.
    pub fn channel(mut self, channel: impl Into<String>) -> Self {
        self.config.channel = channel.into().into();
        self
    }

    /// The channels that the runner delivers. Defaults to the handle's own
    /// [`channel`](Self::channel); include that one in the list if this process should deliver it
    /// too.
    pub fn deliver<I>(mut self, channels: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let channels = channels.into_iter().map(|channel| channel.into().into());
        self.deliver = Subscription::List(channels.collect());
        self
    }

    /// The runner delivers every channel of the schema, including channels that appear later.
    pub fn deliver_all(mut self) -> Self {
        self.deliver = Subscription::All;
        self
    }

    /// The client of attempts that don't run through a caller's own client. Defaults to a plain
    /// [`reqwest::Client`] that follows no redirects and has no retries of its own. It keeps about
    /// twice as many idle connections as the [`concurrency`](Self::concurrency) allows attempts, or
    /// 64 if that is more, to all hosts together, and each for up to 30 seconds.
    ///
    /// Wrap a [`reqwest::Client`] in [`ReqwestTransport`](crate::ReqwestTransport). It bounds its
    /// idle connections for each host only, so a client for thousands of hosts needs a short
    /// [`pool_idle_timeout`](reqwest::ClientBuilder::pool_idle_timeout).
    /// If a client follows redirects or retries
    /// by itself, those transmissions are neither counted nor recorded.
    pub fn transport<S: HttpClient>(mut self, service: S) -> Self {
        self.transport = TransportChoice::Given {
            transport: erase(service),
            is_own: TypeId::of::<S>() == TypeId::of::<ReqwestTransport>(),
        };
        self
    }

    /// Which redirects the crate's own transport follows. A [`transport`](Self::transport) of the
    /// caller's, or the service under a [layer](Self::build_layer), has rules of its own, so
    /// `build` refuses both together. Defaults to [`Redirects::none`].
    pub fn redirects(mut self, redirects: Redirects) -> Self {
        self.config.redirects = redirects;
        self
    }

    /// Where requests may go, or `None` for anywhere. See [`guard`](crate::guard) for what a guard
    /// denies and when it looks. Defaults to none, and with [`webhooks`](Self::webhooks) to a guard
    /// without rules.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::Durable;
    /// use requeuest::guard::Guard;
    ///
    /// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
    /// let guard = Guard::new().allow("10.20.0.0/16").allow_ports([443]);
    /// let durable = Durable::builder(pool).guard(guard).build()?;
    /// # Ok(()) }
    /// ```
    #[cfg(feature = "ssrf-guard")]
    pub fn guard(mut self, guard: impl Into<Option<Guard>>) -> Self {
        self.config.guard = guard.into().map(Arc::new);
        self
    }

    /// Whether this handle delivers. With `false` it only enqueues and waits, and other processes
    /// deliver: [`Durable::runners`] lists those that do. Defaults to `true`.
    pub fn runner(mut self, runner: bool) -> Self {
        self.runner = runner;
        self
    }

    /// Requests for which this returns `true` pass straight through the layer or middleware: they
    /// are not persisted and not retried. Defaults to none.
    pub fn pass_through(
        mut self,
        predicate: impl Fn(&RequestHead<'_>) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.pass_through = Some(Arc::new(predicate));
        self
    }

    /// How many attempts are made at the same time, from 1 to 100,000. During a backlog, new
    /// requests may use half of these slots, so that they can't starve the requests in the queue.
    /// Defaults to [`DEFAULT_CONCURRENCY`].
    pub fn concurrency(mut self, concurrency: usize) -> Self {
        self.config.concurrency = concurrency;
        self
    }

    /// The share of the [`concurrency`](Self::concurrency) that one destination (scheme, host and
    /// port) takes at most in this process, over 0 and up to 1: the rest is for the others. At
    /// least one attempt is made at a time. Requests over the share stay in the queue, and no
    /// attempt is counted. Defaults to [`DEFAULT_MAX_SHARE`].
    ///
    /// Destinations that take longer than 250 ms for an answer, or have not answered yet, have one
    /// such share among them, so that receivers that hang leave room for receivers that answer.
    /// Beyond it, each of them may make one attempt while enough slots are free. A destination that
    /// had no other beside it for a minute may take seven eighths of the slots.
    pub fn max_share(mut self, share: f64) -> Self {
        self.config.max_share = share;
        self
    }

    /// The policy of destinations that match a pattern: limits, a circuit breaker, a retry budget.
    /// Of several patterns that match, the most specific one counts. See [`DestinationPattern`] for
    /// their forms, and [`DestinationPolicy`] for what happens without a policy. All processes that
    /// deliver to a destination should set the same policy;
    /// [`DestinationHandle::set_policy`](crate::DestinationHandle::set_policy) replaces it at run
    /// time for all of them.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use requeuest::{DestinationPolicy, Durable, RateLimit};
    ///
    /// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
    /// let partner = DestinationPolicy::default()
    ///     .max_concurrency(10)
    ///     .rate(RateLimit::new(100, Duration::from_secs(1)));
    /// let durable = Durable::builder(pool).destination("api.partner.example", partner).build()?;
    /// # Ok(()) }
    /// ```
    ///
    /// [`DestinationPattern`]: crate::DestinationPattern
    pub fn destination(mut self, pattern: impl Into<String>, policy: DestinationPolicy) -> Self {
        self.policies.push((pattern.into(), policy));
        self
    }

    /// Tells the application what happens to destinations: a breaker opens or closes, a destination
    /// is paused or disabled, or comes near that. One process calls its observer for each event, on
    /// the handle's runtime, so the observer must not block. Each event is also an `info` line.
    /// Defaults to none.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::{DestinationEventKind, Durable};
    ///
    /// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
    /// let durable = Durable::builder(pool)
    ///     .on_destination_event(|event| {
    ///         if let DestinationEventKind::Disabled { reason } = &event.kind {
    ///             println!("{} is disabled: {reason}", event.destination);
    ///         }
    ///     })
    ///     .build()?;
    /// # Ok(()) }
    /// ```
    pub fn on_destination_event(
        mut self,
        observer: impl Fn(&DestinationEvent) + Send + Sync + 'static,
    ) -> Self {
        self.config.on_destination_event = Some(DestinationObserver(Arc::new(observer)));
        self
    }

    /// Tells a recorder what the handle counts and measures, for the application's metrics. Without
    /// one, nothing is measured. The feature `metrics` has a recorder.
    ///
    /// A handle with a runner also tells how deep the queue of all processes is: every 15 seconds
    /// one of those that have a recorder looks.
    ///
    /// # Examples
    ///
    /// ```
    /// # async fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
    /// use std::sync::Arc;
    ///
    /// use requeuest::recorder::{Finished, Recorder};
    ///
    /// struct DeadLetters;
    ///
    /// impl Recorder for DeadLetters {
    ///     fn finished(&self, finished: &Finished<'_>) {
    ///         if finished.is_dead_letter() {
    ///             println!("a dead letter for {}", finished.destination);
    ///         }
    ///     }
    /// }
    ///
    /// let durable = requeuest::Durable::builder(pool).recorder(Arc::new(DeadLetters)).build()?;
    /// # Ok(()) }
    /// ```
    pub fn recorder(mut self, recorder: Arc<dyn Recorder>) -> Self {
        self.store.measured = true;
        self.config.recorder = Some(SharedRecorder(recorder));
        self
    }

    /// Sets what [Standard Webhooks](https://www.standardwebhooks.com) asks of a sender.
    ///
    /// - Only a 2xx is a success of a fired request. After anything else it is sent again after 5
    ///   seconds, 5 and 30 minutes, 2, 5, 10, 14, 20 and 24 hours, each with jitter
    ///   ([`RetryPolicy::webhooks`]).
    /// - A 410 ends the request and disables the destination. 429, 502, 503 and 504 pause it. It
    ///   has a circuit breaker and a retry budget ([`DestinationPolicy::webhooks`]).
    /// - An attempt may take 20 seconds ([`WEBHOOKS_ATTEMPT_TIMEOUT`]).
    /// - With the feature `ssrf-guard`, requests go to the public internet only (`guard`). A
    ///   [`transport`](Self::transport) of the caller's has to check names by itself, with
    ///   `Guard::resolver`.
    ///
    /// Requests whose response is awaited keep their retries and their rules of success. Settings
    /// made after this one replace it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
    /// let durable = requeuest::Durable::builder(pool).webhooks().build()?;
    /// # Ok(()) }
    /// ```
    pub fn webhooks(mut self) -> Self {
        self.config.attempt_timeout = WEBHOOKS_ATTEMPT_TIMEOUT;
        self.config.retry_fired = RetryPolicy::webhooks();
        self.config.destination_policy = DestinationPolicy::webhooks();
        self.config.classifier = Classifier::new(Webhooks);
        #[cfg(feature = "ssrf-guard")]
        {
            self.config.guard = Some(Arc::default());
        }
        self
    }

    /// How long other processes leave a claimed request alone. The lease is renewed during an
    /// attempt, so attempts may take longer. After a crash, the requests in flight wait this long.
    /// From 1 second to 1 hour. Defaults to [`DEFAULT_LEASE`].
    pub fn lease(mut self, lease: Duration) -> Self {
        self.store.lease = lease;
        self
    }

    /// How long one attempt may take, from its start to the last byte of the response. Longer than
    /// zero. Defaults to [`DEFAULT_ATTEMPT_TIMEOUT`].
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.config.attempt_timeout = timeout;
        self
    }

    /// The policy of requests whose [`Options`](crate::Options) have none. Defaults to
    /// [`RetryPolicy::awaited`] for requests whose response is awaited, and [`RetryPolicy::fired`]
    /// for the others.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.config.retry_awaited = policy.clone();
        self.config.retry_fired = policy;
        self
    }

    /// Judges the results of this handle's attempts, except where a request has its own
    /// [`accept`](crate::Options::accept). Defaults to the rules of [`classify`](crate::classify).
    pub fn classify(mut self, classify: impl Classify) -> Self {
        self.config.classifier = Classifier::new(classify);
        self
    }

    /// Sees and changes each attempt before it is sent, and may refuse it: adds a token, signs the
    /// request, chooses another client. Several hooks run in the order in which they are added.
    /// [`hooks`](crate::hooks) has ready ones, and says when they run. Defaults to none.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::Durable;
    /// use requeuest::hooks::{OAuth2, only_to};
    ///
    /// # fn example(pool: sqlx::PgPool, secret: String) -> Result<(), requeuest::Error> {
    /// let login = "https://login.example.com/oauth/token";
    /// let oauth = OAuth2::client_credentials(login, "billing", secret).scope("charges");
    /// let durable = Durable::builder(pool)
    ///     .on_attempt(only_to("https://api.example.com", oauth))
    ///     .build()?;
    /// # Ok(()) }
    /// ```
    pub fn on_attempt(mut self, hook: impl AttemptHook) -> Self {
        self.config.hooks.hooks.push(Arc::new(hook));
        self
    }

    /// Carries the trace context of each call to the request's attempts, in every process that has
    /// the hook. Defaults to none. With the feature `otel`, `OpenTelemetry` is one that makes spans
    /// too, and the last one that is set counts.
    ///
    /// The context is stored with the request. An attempt whose request has a `traceparent` of its
    /// own keeps it, unless the hook replaces it.
    pub fn trace_context(self, hook: impl TraceContextHook) -> Self {
        self.tracer(ForHook(Arc::new(hook)))
    }

    pub(crate) fn tracer(mut self, tracer: impl Tracer + 'static) -> Self {
        self.config.tracing = Some(Tracing(Arc::new(tracer)));
        self
    }

    /// How long the [hooks](Self::on_attempt) of an attempt may take together, before its own
    /// [timeout](Self::attempt_timeout) begins. After that the attempt has failed, and nothing of
    /// it is sent. Longer than zero. Defaults to [`DEFAULT_HOOK_TIMEOUT`].
    pub fn hook_timeout(mut self, timeout: Duration) -> Self {
        self.config.hooks.timeout = timeout;
        self
    }

    /// Headers that are not stored. They are removed when a request is enqueued, and no attempt has
    /// them, not even the first one in the same process: a [hook](Self::on_attempt) adds them to
    /// each attempt, so that all attempts are alike. Trailers of these names are removed too.
    ///
    /// For the owner of a [key](crate::Options::key_owner), a header counts before it is removed.
    /// With the key, a hash of it is stored. Requests that pass through keep their headers. The
    /// header of [`idempotency_header`](Self::idempotency_header) can't be removed. Defaults to
    /// none.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::Durable;
    /// use requeuest::hooks::{header_fn, only_to};
    ///
    /// async fn from_vault() -> Result<String, std::io::Error> {
    ///     Ok("…".to_owned())
    /// }
    ///
    /// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
    /// let durable = Durable::builder(pool)
    ///     .strip_headers(["authorization", "cookie"])
    ///     .on_attempt(only_to("api.example.com", header_fn("authorization", from_vault)))
    ///     .build()?;
    /// # Ok(()) }
    /// ```
    pub fn strip_headers<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let names = names.into_iter().map(Into::into);
        self.strip_headers.extend(names);
        self
    }

    /// The largest request body that is persisted, in bytes, up to 512 MiB. Defaults to
    /// [`DEFAULT_MAX_REQUEST_BODY`].
    pub fn max_request_body(mut self, bytes: usize) -> Self {
        self.store.max_request_body = bytes;
        self
    }

    /// The largest response body that is kept, in bytes, up to 512 MiB. A request with a larger
    /// response counts as delivered; callers that wait for it get an error with its status and
    /// headers. Defaults to [`DEFAULT_MAX_RESPONSE_BODY`].
    pub fn max_response_body(mut self, bytes: usize) -> Self {
        self.store.max_response_body = bytes;
        self
    }

    /// How many requests may wait in this handle to be persisted, at least 1. Further ones are
    /// refused with [`Error::is_overloaded`] until the database has caught up. Requests inside
    /// [`fire_many`](Durable::fire_many) or a transaction of the caller don't count: they wait in
    /// their call. Defaults to [`DEFAULT_MAX_QUEUED_REQUESTS`].
    pub fn max_queued_requests(mut self, requests: usize) -> Self {
        self.config.max_queued_requests = requests;
        self
    }

    /// How many bytes of requests may wait in this handle to be persisted, at least 1: bodies,
    /// URLs, headers and metadata. Works like [`max_queued_requests`](Self::max_queued_requests).
    /// A larger request is taken while no other waits. Defaults to [`DEFAULT_MAX_QUEUED_BYTES`], or
    /// to four times [`max_request_body`](Self::max_request_body) if that is more.
    pub fn max_queued_bytes(mut self, bytes: usize) -> Self {
        self.max_queued_bytes = Some(bytes);
        self
    }

    /// How long a request waits for its [`key`](crate::Options::key),
    /// [`ordered`](crate::Options::ordered) or [`supersede`](crate::Options::supersede) key while
    /// another transaction holds it and no other request of this handle gets it. Then the call
    /// fails with [`Error::is_key_busy`], and nothing of it is persisted. Zero waits for nothing. A
    /// call that waits for a transaction of its own caller would otherwise never return.
    ///
    /// It doesn't apply to [`fire_in`](Durable::fire_in) and
    /// [`fire_many_in`](Durable::fire_many_in), whose statements wait on the caller's connection
    /// for as long as its `lock_timeout` says. Nor does it apply to
    /// [`fire_many`](Durable::fire_many), which waits five seconds. Up to 100 years. Defaults to
    /// [`DEFAULT_MAX_KEY_WAIT`].
    pub fn max_key_wait(mut self, wait: Duration) -> Self {
        self.config.max_key_wait = wait;
        self
    }

    /// How many bytes of request bodies over 64 KiB this handle's attempts may have in memory, at
    /// least 1. Such a body is read from the database once there is a slot and room for it, and
    /// keeps its room until its attempt is over; a new request whose body finds no room is left to
    /// the queue. A body that is larger than the whole limit is sent while no other large body is.
    /// Defaults to [`DEFAULT_MAX_SENDING_BYTES`], or to four times
    /// [`max_request_body`](Self::max_request_body) if that is more.
    pub fn max_sending_bytes(mut self, bytes: usize) -> Self {
        self.max_sending_bytes = Some(bytes);
        self
    }

    /// How many bytes of results may wait in this handle for their commit, at least 1: responses
    /// with their headers, and error texts. Beyond that, no attempt begins until the database has
    /// caught up. No result is dropped, so the attempts that are under way by then add up to
    /// [`max_response_body`](Self::max_response_body) each. Defaults to
    /// [`DEFAULT_MAX_UNSETTLED_BYTES`], or to four times `max_response_body` if that is more.
    pub fn max_unsettled_bytes(mut self, bytes: usize) -> Self {
        self.max_unsettled_bytes = Some(bytes);
        self
    }

    /// Encrypts what is stored of requests and responses with the first key of the ring, and reads
    /// what any of its keys encrypted. The keys must differ in their ids. Defaults to no
    /// encryption. See [`encryption`](crate::encryption).
    #[cfg(feature = "encryption")]
    pub fn encryption(mut self, keys: crate::encryption::Keyring) -> Self {
        self.store.sealer.set_keys(keys);
        self
    }

    /// Whether stored requests and responses that are not encrypted are refused. A request is
    /// [parked](crate::Status::Parked), and an outcome is an error for its id alone
    /// ([`Error::is_unreadable`]). So is a call whose [`key`](crate::Options::key) is stored with a
    /// fingerprint that is not encrypted. Needs [`encryption`](Self::encryption). Defaults to
    /// `false`.
    ///
    /// Without it, a role that may write the tables can put a request or a response of its own in
    /// place of an encrypted one. Before you set it, give the keys to all processes, and encrypt
    /// what is stored with [`Durable::reencrypt`]. A handle with this setting leaves what is not
    /// encrypted as it is, also in `reencrypt`: who wrote it is not known.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::Durable;
    /// use requeuest::encryption::Keyring;
    ///
    /// # fn example(pool: sqlx::PgPool, keys: Keyring) -> Result<(), requeuest::Error> {
    /// let durable = Durable::builder(pool).encryption(keys).require_encryption(true).build()?;
    /// # Ok(()) }
    /// ```
    #[cfg(feature = "encryption")]
    pub fn require_encryption(mut self, required: bool) -> Self {
        self.store.sealer.require(required);
        self
    }

    /// How long the outcomes of completed and cancelled requests are kept, from 1 minute to 100
    /// years. Defaults to [`DEFAULT_RETENTION`].
    pub fn retention(mut self, retention: Duration) -> Self {
        self.store.retention = retention;
        self
    }

    /// How long requests that end as dead letters in this handle are kept, from 1 minute to 100
    /// years. `None` keeps them until they are replayed, resolved or purged. Defaults to
    /// [`DEFAULT_DEAD_LETTER_RETENTION`].
    ///
    /// Expired dead letters are deleted with their [`key`](crate::Options::key)s, like those that
    /// are purged. A dead letter that halts its ordering key is kept until an operator acts,
    /// because the requests behind it would be sent. If the key is [resumed](Durable::resume), the
    /// retention begins anew. A dead letter that a handler ([`on_outcome`](Durable::on_outcome))
    /// has not taken yet is kept too.
    pub fn dead_letter_retention(mut self, retention: impl Into<Option<Duration>>) -> Self {
        self.store.dead_letter_retention = retention.into();
        self
    }

    /// How many attempts of a request in a row may be lost, from 1 to 1,000. An attempt is lost if
    /// no result is recorded before its lease runs out, because its process died. After that many
    /// the request ends as [`Status::Discarded`](crate::Status::Discarded) with the class `lost`,
    /// or it would end one process per [`lease`](Self::lease). Attempts that were given back at a
    /// shutdown don't count. Defaults to [`DEFAULT_MAX_LOST_ATTEMPTS`].
    ///
    /// Other requests in the hands of a process that dies are lost with it. So from the third
    /// attempt on, the requests of a channel that may be to blame are sent one at a time. With 1 or
    /// 2, every request that a process had may be given up.
    pub fn max_lost_attempts(mut self, attempts: u32) -> Self {
        self.config.max_lost_attempts = attempts;
        self
    }

    /// How many outcomes of a channel the handlers of this handle ([`Durable::on_outcome`]) get at
    /// the same time, from 1 to 1,000. Each takes a connection of the application's pool while its
    /// handler works. All channels together use up to half of that pool's connections, and at least
    /// one for each channel, so that handlers may take a second connection. Defaults to
    /// [`DEFAULT_HANDLER_CONCURRENCY`].
    pub fn handler_concurrency(mut self, concurrency: usize) -> Self {
        self.config.handler_concurrency = concurrency;
        self
    }

    /// How long a handler may take for one outcome, with the commit. Longer than zero. After that
    /// its transaction is rolled back, its connection is closed, and it counts as failed. Defaults
    /// to [`DEFAULT_HANDLER_TIMEOUT`].
    ///
    /// The handler's future is dropped. If the handler blocks its thread instead, its transaction
    /// still ends, but it keeps its place within
    /// [`handler_concurrency`](Self::handler_concurrency) until it returns.
    pub fn handler_timeout(mut self, timeout: Duration) -> Self {
        self.config.handler_timeout = timeout;
        self
    }

    /// How many times a handler may fail for one outcome, from 1 to 1,000,000. The handler is
    /// called again after one second, then after twice as long each time, up to five minutes. After
    /// that many failures the outcome is parked: it is not handed over any more until
    /// [`Durable::retry_hand_over`]. Defaults to [`DEFAULT_MAX_HANDLER_FAILURES`].
    pub fn max_handler_failures(mut self, failures: u32) -> Self {
        self.config.max_handler_failures = failures;
        self
    }

    /// The Postgres schema, as passed to [`Migrator::schema`](crate::migrate::Migrator::schema).
    /// Defaults to [`DEFAULT_SCHEMA`].
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.store.schema = schema.into();
        self
    }

    /// How many connections requeuest's own pool opens at most, besides one for waiting callers and
    /// two for the runner. At least 2. Defaults to [`DEFAULT_MAX_CONNECTIONS`].
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.store.max_connections = connections;
        self
    }

    /// Whether a commit after [`Durable::fire_in`] notifies runners. Commits with a notification
    /// wait for each other; without one, runners find the request within a second. So do callers
    /// whose request was superseded. Postgres refuses `PREPARE TRANSACTION` after a notification:
    /// for two-phase commits, set this to `false`. Defaults to `true`.
    pub fn notify_in_transactions(mut self, notify: bool) -> Self {
        self.store.notify_in_transactions = notify;
        self
    }

    /// Names of headers, of requests and of responses, whose values are secret and shown nowhere:
    /// they are [marked sensitive](http::HeaderValue::set_sensitive). Adds to those that always
    /// are: `Authorization`, `Proxy-Authorization`, `Cookie`, `Set-Cookie`, `X-Api-Key`, `Api-Key`,
    /// `Apikey`, `X-Auth-Token`, `X-Access-Token`, and values that are marked already. They are
    /// stored and sent as they are.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
    /// let builder = requeuest::Durable::builder(pool);
    /// let durable = builder.redact_headers(["x-partner-token"]).build()?;
    /// # Ok(()) }
    /// ```
    pub fn redact_headers<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.redact_headers
            .extend(names.into_iter().map(Into::into));
        self
    }

    /// The header by which receivers recognise repeated requests, for requests whose
    /// [`Options`](crate::Options) name none. Defaults to [`IdempotencyHeader::quoted`].
    pub fn idempotency_header(mut self, header: IdempotencyHeader) -> Self {
        self.config.idempotency_header = header;
        self
    }

    /// Asks the receiver about requests that ended as
    /// [`Status::Ambiguous`](crate::Status::Ambiguous), instead of leaving them to
    /// [`Durable::resolve`]. Defaults to none.
    ///
    /// The handle looks every few seconds for ambiguous requests of the channels that its runner
    /// delivers, also with [`runner(false)`](Self::runner). The hook may take a minute for each
    /// request. While it doesn't know or fails, it is called again: first after 5 seconds, later
    /// after up to 5 minutes. Several processes with a hook never ask about a request at the same
    /// time.
    pub fn reconcile(mut self, hook: impl Reconcile) -> Self {
        self.reconcile = Some(Arc::new(hook));
        self
    }

    /// Connect options for requeuest's own pool. Set this when your application's pool goes through
    /// a transaction-mode pooler such as `PgBouncer`: requeuest needs sessions that keep their
    /// settings. Defaults to the options of the application's pool.
    ///
    /// What the application's pool does in its `after_connect`, such as a `SET ROLE`, doesn't apply
    /// to requeuest's own connections. The startup option `role` does the same, here or in the
    /// options of the application's pool:
    ///
    /// ```no_run
    /// # fn example(pool: sqlx::PgPool) -> Result<requeuest::Durable, requeuest::Error> {
    /// let options = (*pool.connect_options()).clone().options([("role", "app")]);
    /// requeuest::Durable::builder(pool).connect_options(options).build()
    /// # }
    /// ```
    ///
    /// [`Durable::set_connect_options`] replaces them while the handle runs.
    pub fn connect_options(mut self, options: PgConnectOptions) -> Self {
        self.store.connect_options = Some(options);
        self
    }

    /// Builds the handle and starts its runner, as [`Durable::new`] does.
    ///
    /// # Errors
    ///
    /// If a field is not valid, with its name in [`Error::field`], or no TLS backend or thread can
    /// be had.
    pub fn build(self) -> Result<Durable, Error> {
        self.check()?;
        self.check_where_it_sends()?;
        let pool = match self.database {
            Database::Pool(pool) => Ok(pool),
            // A pool is made within a runtime.
            Database::Url(url) => Err(store::url::connect_options(&url)?),
        };
        let mut config = self.config;
        for (pattern, policy) in self.policies {
            config.policies.insert(pattern.parse()?, policy)?;
        }
        if !(config.max_share > 0.0 && config.max_share <= 1.0) {
            return Err(Error::config("max_share", "must be over 0 and up to 1"));
        }
        for name in &self.redact_headers {
            let name = name.parse().map_err(|_| {
                Error::config(
                    "redact_headers",
                    format!("not the name of a header: {name:?}"),
                )
            })?;
            config.redact_headers.push(name);
        }
        for hook in &config.hooks.hooks {
            hook.check()
                .map_err(|error| Error::config("on_attempt", chain(&*error)))?;
        }
        config.strip_headers = stripped(&self.strip_headers, &config.idempotency_header)?;
        config.policies.validate(config.attempt_timeout)?;
        config.destination_policy.validate(config.attempt_timeout)?;
        let (request, response) = (self.store.max_request_body, self.store.max_response_body);
        config.max_queued_bytes = budget(self.max_queued_bytes, config.max_queued_bytes, request);
        config.max_sending_bytes =
            budget(self.max_sending_bytes, config.max_sending_bytes, request);
        config.max_unsettled_bytes = budget(
            self.max_unsettled_bytes,
            config.max_unsettled_bytes,
            response,
        );
        config.deliver = match self.deliver {
            Subscription::Own => Some(vec![Arc::clone(&config.channel)]),
            Subscription::All => None,
            Subscription::List(channels) => Some(channels),
        };
        let runtime =
            Runtime::find().map_err(|error| Error::config("runtime", error.to_string()))?;
        let store = {
            let _context = runtime.handle().enter();
            Store::new(pool.unwrap_or_else(store::url::pool), self.store)
        };
        let engine = Engine::start(runtime, store, config);
        let (mut plain_transport, mut wrapped_transport) = (false, false);
        match self.transport {
            TransportChoice::Given { transport, is_own } => {
                engine.offer_transport(|| transport);
                engine.driver().transport.set_own(is_own);
            }
            TransportChoice::Wrapped => {
                wrapped_transport = true;
                if self.runner {
                    engine.expect_transport();
                }
            }
            TransportChoice::Plain => {
                plain_transport = true;
                let plain = transport::own(engine.config())?;
                engine.offer_transport(|| plain);
                engine.driver().transport.set_own(true);
            }
        }
        let driver = engine.driver();
        let runner = self.runner.then(|| RunnerGuard::start(driver));
        let reconciler = self
            .reconcile
            .map(|hook| ReconcileGuard::start(driver, hook));
        Ok(Durable {
            inner: Arc::new(Inner {
                engine,
                runner,
                _reconciler: reconciler,
                pass_through: self.pass_through,
                plain_transport,
                wrapped_transport,
                warned_of_second_service: AtomicBool::new(false),
                failed: FailedRequests::default(),
            }),
        })
    }

    pub(crate) fn send_with_wrapped_service(&mut self) {
        if matches!(self.transport, TransportChoice::Plain) {
            self.transport = TransportChoice::Wrapped;
        }
    }

    fn check(&self) -> Result<(), Error> {
        let ensure = |ok: bool, field: &'static str, reason: &'static str| {
            if ok {
                Ok(())
            } else {
                Err(Error::config(field, reason))
            }
        };
        let named = |field: &'static str| move |reason: &'static str| Error::config(field, reason);
        let (config, store) = (&self.config, &self.store);
        validate_channel(&config.channel).map_err(named("channel"))?;
        if let Subscription::List(channels) = &self.deliver {
            ensure(
                !channels.is_empty() || !self.runner,
                "deliver",
                "the list is empty; name a channel, or set `runner(false)`",
            )?;
            for channel in channels {
                validate_channel(channel).map_err(named("deliver"))?;
            }
        }
        validate_schema(&store.schema).map_err(named("schema"))?;
        store.sealer.validate()?;
        validate_timeout(config.attempt_timeout).map_err(named("attempt_timeout"))?;
        validate_timeout(config.hooks.timeout).map_err(named("hook_timeout"))?;
        config.retry_awaited.validate().map_err(named("retry"))?;
        config.retry_fired.validate().map_err(named("retry"))?;
        ensure(
            (1..=100_000).contains(&config.concurrency),
            "concurrency",
            "must be from 1 to 100,000",
        )?;
        ensure(
            config.max_queued_requests > 0,
            "max_queued_requests",
            "must be at least 1",
        )?;
        ensure(
            config.max_key_wait <= MAX_DURATION,
            "max_key_wait",
            TOO_LONG,
        )?;
        for (bytes, field) in [
            (self.max_queued_bytes, "max_queued_bytes"),
            (self.max_sending_bytes, "max_sending_bytes"),
            (self.max_unsettled_bytes, "max_unsettled_bytes"),
        ] {
            ensure(bytes != Some(0), field, "must be at least 1")?;
        }
        let lease = Duration::from_secs(1)..=Duration::from_secs(3600);
        ensure(
            lease.contains(&store.lease),
            "lease",
            "must be from one second to one hour",
        )?;
        ensure(
            store.max_request_body <= MAX_BODY,
            "max_request_body",
            "must be at most 512 MiB",
        )?;
        ensure(
            store.max_response_body <= MAX_BODY,
            "max_response_body",
            "must be at most 512 MiB",
        )?;
        let retention = Duration::from_secs(60)..=MAX_DURATION;
        ensure(
            retention.contains(&store.retention),
            "retention",
            "must be from one minute to a hundred years",
        )?;
        ensure(
            store
                .dead_letter_retention
                .is_none_or(|kept| retention.contains(&kept)),
            "dead_letter_retention",
            "must be from one minute to a hundred years, or `None`",
        )?;
        ensure(
            (1..=1000).contains(&config.max_lost_attempts),
            "max_lost_attempts",
            "must be from 1 to 1,000",
        )?;
        ensure(
            (1..=1000).contains(&config.handler_concurrency),
            "handler_concurrency",
            "must be from 1 to 1,000",
        )?;
        validate_timeout(config.handler_timeout).map_err(named("handler_timeout"))?;
        ensure(
            (1..=1_000_000).contains(&config.max_handler_failures),
            "max_handler_failures",
            "must be from 1 to 1,000,000",
        )?;
        ensure(
            store.max_connections >= 2,
            "max_connections",
            "must be at least 2",
        )
    }
}

impl DurableBuilder {
    /// Checks the settings of the crate's own transport.
    fn check_where_it_sends(&self) -> Result<(), Error> {
        let config = &self.config;
        let sends_itself = matches!(self.transport, TransportChoice::Plain);
        config.redirects.validate()?;
        if !sends_itself && config.redirects.max() > 0 {
            let reason = "a client of your own follows redirects by its own rules; set them there";
            return Err(Error::config("redirects", reason));
        }
        #[cfg(feature = "ssrf-guard")]
        if let Some(guard) = &config.guard {
            guard.validate()?;
            if !sends_itself && guard.proxy().is_some() {
                return Err(Error::config(
                    "guard",
                    "it trusts a proxy, which a client of your own doesn't know; give the proxy to \
                     the client",
                ));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for DurableBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DurableBuilder")
            .field("channel", &self.config.channel)
            .field("schema", &self.store.schema)
            .field("runner", &self.runner)
            .finish_non_exhaustive()
    }
}

/// The names of headers that are not stored.
fn stripped(names: &[String], idempotency: &IdempotencyHeader) -> Result<Box<[HeaderName]>, Error> {
    let invalid = |reason: String| Error::config("strip_headers", reason);
    let parse = |name: &String| {
        let parsed = HeaderName::try_from(&**name)
            .map_err(|_| invalid(format!("{name:?} is not the name of a header")))?;
        if idempotency.is_named(&parsed) {
            return Err(invalid(format!(
                "`{parsed}` is the header by which receivers recognise a repetition"
            )));
        }
        Ok(parsed)
    };
    names.iter().map(parse).collect()
}

/// A limit in bytes. By default the largest body takes a quarter of it at most, so that bodies of a
/// usual size find room beside it.
fn budget(wanted: Option<usize>, default: usize, max_body: usize) -> usize {
    wanted.unwrap_or_else(|| default.max(max_body.saturating_mul(4)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_body_leaves_room_for_others() {
        assert_eq!(budget(None, 1 << 28, 1 << 23), 1 << 28);
        assert_eq!(budget(None, 1 << 28, 1 << 29), 1 << 31);
        assert_eq!(budget(Some(7), 1 << 28, 1 << 29), 7);
    }
}
