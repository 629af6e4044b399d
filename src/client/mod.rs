//! For code written against the older crate of the same name; new code uses [`Durable`].
//!
//! The older crate is `requeuest` 0.1.1 to 0.6.0 on crates.io, licensed AGPL-3.0-only. This crate
//! shares its name and the shape of its API, but none of its code.
//!
//! - [`Request`]'s constructors, `Request::get(url, headers)` and so on, are those of its 0.2 and
//!   0.3. The builder of 0.4 to 0.6 is [`Request::builder`].
//! - [`Client`] has the methods of all releases: `spawn_with` and `spawn_with_cfg` of 0.2, which
//!   later releases have not, and `clear` of 0.4. It has no `spawn_returning_with`, because waiting
//!   inside an uncommitted transaction would never end.
//!
//! Users of that API expect that a request is retried for ever, until an accepted response (any 2xx
//! by default) comes. This module does the same, with a cap on delays and a timeout for attempts.
//!
//! # Examples
//!
//! ```no_run
//! use requeuest::{Channels, Client, HeaderMap, Request, Url};
//!
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! requeuest::migrate(&pool).await?;
//! let client = Client::new(pool, Channels::List(&["my_service"])).await?;
//!
//! let url = Url::parse("https://example.com/")?;
//! let request = Request::post(url, b"hello".to_vec(), HeaderMap::new());
//! client.spawn("my_service", &request).await?;
//! let response = client.spawn_returning("my_service", &request).await?;
//! println!("{}", response.status());
//! # Ok(()) }
//! ```
//!
//! # Coming from 0.6
//!
//! Requests:
//!
//! | 0.6 | here |
//! |---|---|
//! | `Request::builder()` with its setters | the same: [`RequestBuilder`] |
//! | `Request::get(url)?.build()` | `Request::get(url.parse()?, HeaderMap::new())` |
//! | `Request::head(url)?.build()` | `Request::head(url.parse()?, HeaderMap::new())` |
//! | `Request::delete(url)?.build()` | `Request::delete(url.parse()?, None, HeaderMap::new())` |
//! | `Request::post(url, body)?.build()` | `Request::post(url.parse()?, body, HeaderMap::new())` |
//! | `Request::put(url, body)?.build()` | `Request::put(url.parse()?, body, HeaderMap::new())` |
//! | `.headers(headers)` after these | the constructor's last argument |
//! | `.accept_responses(set)` after these | [`Request::accept_responses`] |
//! | fields of `Request` | methods: [`url`](Request::url), [`headers`](Request::headers), … |
//! | `Request::from_reqwest(request)` | the same, with `?`: streams are refused |
//! | `Request::from_http_body(request)` | the same |
//! | `Request::from_http_builder(builder, Some(body))` | the same, without the `Some` |
//! | `Request::from_http_builder(builder, None)` | `Request::from_http_empty(builder.body(())?)` |
//! | `Request::from_http_empty(request)` | the same, for `http::Request<()>` |
//! | `request::AcceptedResponse` | [`requeuest::AcceptedResponse`](AcceptedResponse) |
//! | `AcceptedResponse::Single(404)` | `AcceptedResponse::Status(404)` |
//! | `AcceptedResponse::Informational` | `AcceptedResponse::Range(100, 199)` |
//! | `AcceptedResponse::Redirection` | `AcceptedResponse::Range(300, 399)` |
//! | `AcceptedResponse::ClientError` | `AcceptedResponse::Range(400, 499)` |
//! | `AcceptedResponse::ServerError` | `AcceptedResponse::Range(500, 599)` |
//! | `accepted.accepts(status)` | [`accepted.matches(status)`](AcceptedResponse::matches) |
//!
//! The client:
//!
//! | 0.6 | here |
//! |---|---|
//! | `Client::new(pool, channels)` | the same; it fails for a bad name, not for a lost database |
//! | `spawn(channel, &request)` | the same |
//! | `spawn_cfg(channel, &request, …)` | the same; the closure's argument is a [`JobConfig`] |
//! | up to 100,000 retries, delays doubling | no limit of retries, delays of up to five minutes |
//! | ordering is disabled, says 0.6 | [`set_ordered`](JobConfig::set_ordered) works |
//! | `spawn_returning(channel, &request)` | the same, with the [`reqwest::Response`] of 0.13 |
//! | `take_listener()`, a `JoinHandle` | a [`Listener`], with the same methods |
//! | dropping that handle lets it run on | [`Listener::detach`]; dropping it stops the delivery |
//! | `clear(channels)` | the same; waiting callers get an error |
//!
//! Errors, features and versions:
//!
//! | 0.6 | here |
//! |---|---|
//! | `SpawnError::Sqlx(error)` | [`Error::is_database`], with the `sqlx::Error` as its source |
//! | `SpawnError::Receive(_)` | [`Error::is_closed`], [`Error::is_cancelled`] |
//! | `SpawnError::Serde(_)` | none: [`Error::is_request`] is a request that is refused |
//! | `sqlx::Error` of `Client::new` and `clear` | [`Error`] |
//! | `MigrateError` of `migrate` | the same, of sqlx 0.8 |
//! | `error::JobError` | none: attempts are in the log, and in [`Durable::dead_letters`] |
//! | `error::ConvertError` | [`Error`], with the name of the [`field`](Error::field) |
//! | `requeuest::{Pool, Postgres}` | `requeuest::sqlx::{Pool, Postgres}` |
//! | `requeuest::ParseError` | `url::ParseError` |
//! | features `runtime-…` | the same names |
//! | feature `http` | does nothing: it is always on |
//! | sqlx 0.6, reqwest 0.11, http 0.2 | sqlx 0.8, reqwest 0.13, http 1 |
//!
//! # What still waits in its tables
//!
//! The older crate's queue is the tables `mq_msgs` and `mq_payloads`, with functions `mq_…`, in the
//! first schema of the `search_path`, mostly `public`. This crate's are in a schema of their own,
//! `requeuest`. Neither touches the other, so both can run on one database at the same time, also
//! with the same names of channels. This crate doesn't read the older queue: its requests are in
//! the older crate's own encoding. So the older version drains it:
//!
//! 1. Release your program with this crate. Keep one process of the old program, or a small one
//!    that only makes a client of the old crate for `Channels::All` and waits. It must spawn
//!    nothing. Requests of the two queues are not ordered among each other: where order matters,
//!    drain before the new program spawns.
//! 2. Wait until the old queue has no rows but its own first one:
//!
//!    ```sql
//!    SELECT channel_name, count(*), max(attempt_at) AS last_due FROM public.mq_msgs
//!    WHERE id <> '00000000-0000-0000-0000-000000000000' GROUP BY channel_name;
//!    ```
//!
//!    A request that has failed often is due late, because its delays double without a cap. This
//!    makes the old process try all of them now:
//!
//!    ```sql
//!    UPDATE public.mq_msgs SET attempt_at = now()
//!    WHERE id <> '00000000-0000-0000-0000-000000000000' AND attempt_at > now();
//!    ```
//! 3. What remains will not end by itself: requests that their receiver never accepts, and requests
//!    of `spawn_returning` whose process has ended, for which the old crate has the error
//!    `JobError::MissingSender`. They may have arrived already, many times. Spawn here what is
//!    still wanted, from your own data, and delete them from the old queue with the old client's
//!    `clear`, or in SQL: `SELECT public.mq_clear(ARRAY['my_service'])`.
//! 4. Stop the old process. Unless another program uses plain sqlxmq in that schema, drop the two
//!    tables and the functions `mq_…`, and delete the old crate's four rows from
//!    `_sqlx_migrations`: 20210316025847, 20210921125434, 20211013151757 and 20220208120856.

mod listener;
mod request_builder;

use std::sync::Arc;
use std::time::Duration;

use sqlx::{PgExecutor, PgPool};
use uuid::Uuid;

use crate::classify::AcceptedResponse;
use crate::durable::Durable;
use crate::engine::runner::RunnerGuard;
use crate::error::{Error, SpawnError};
use crate::request::Request;
use crate::retry::RetryPolicy;

pub use self::listener::Listener;
pub use self::request_builder::RequestBuilder;

/// The channels that a [`Client`] delivers or clears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channels<'a> {
    /// Every channel of the database.
    All,
    /// These channels.
    List(&'a [&'a str]),
}

impl Channels<'_> {
    fn to_list(self) -> Option<Vec<String>> {
        match self {
            Self::All => None,
            Self::List(channels) => {
                Some(channels.iter().map(|&channel| channel.to_owned()).collect())
            }
        }
    }
}

/// For code written against the older crate of the same name; new code uses [`Durable`].
///
/// Spawns requests, and delivers the requests of its channels until it is dropped, or its
/// [`Listener`] once that was taken.
#[derive(Debug)]
pub struct Client {
    durable: Durable,
    listener: Option<Listener>,
}

impl Client {
    /// A client that spawns requests and delivers those of the given channels.
    ///
    /// # Errors
    ///
    /// If a channel's name is not valid. An unreachable database is no error here: later calls
    /// return errors, and the client waits for the database.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    #[expect(clippy::unused_async, reason = "the older crate's users await it")]
    pub async fn new(pool: PgPool, channels: Channels<'_>) -> Result<Self, Error> {
        let builder = Durable::builder(pool)
            .runner(false)
            .retry(RetryPolicy::exponential().for_ever());
        let builder = match channels.to_list() {
            None => builder.deliver_all(),
            Some(channels) => builder.deliver(channels),
        };
        Ok(Self::from_durable(builder.build()?))
    }

    fn from_durable(durable: Durable) -> Self {
        let listener = Listener::new(RunnerGuard::start(durable.engine().driver()));
        Self {
            durable,
            listener: Some(listener),
        }
    }

    /// Persists a request that is delivered in the background. Returns its id.
    ///
    /// # Errors
    ///
    /// If the request is refused or can't be persisted.
    ///
    /// # Cancel safety
    ///
    /// As for [`Durable::fire`].
    pub async fn spawn(
        &self,
        channel: impl Into<Arc<str>>,
        request: &Request,
    ) -> Result<Uuid, SpawnError> {
        self.spawn_cfg(channel, request, |_| {}).await
    }

    /// As [`spawn`](Self::spawn), with a configuration for this request.
    ///
    /// # Errors
    ///
    /// If the request or its configuration is refused, or it can't be persisted.
    ///
    /// # Cancel safety
    ///
    /// As for [`Durable::fire`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn example(
    /// #     client: requeuest::Client,
    /// #     request: requeuest::Request,
    /// # ) -> Result<(), requeuest::Error> {
    /// client
    ///     .spawn_cfg("my_service", &request, |job| {
    ///         job.set_delay(Duration::from_secs(60)).set_retries(5);
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    pub async fn spawn_cfg(
        &self,
        channel: impl Into<Arc<str>>,
        request: &Request,
        configure: impl FnOnce(&mut JobConfig),
    ) -> Result<Uuid, SpawnError> {
        let id = self
            .durable
            .fire(configured(channel, request, configure))
            .await?;
        Ok(id.into())
    }

    /// Persists a request on the given executor, which may be a transaction. A commit sends the
    /// request, a rollback never does.
    ///
    /// # Errors
    ///
    /// If the request is refused or the statement fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`Durable::fire_in`].
    pub async fn spawn_with<'c>(
        &self,
        executor: impl PgExecutor<'c>,
        channel: impl Into<Arc<str>>,
        request: &Request,
    ) -> Result<Uuid, SpawnError> {
        self.spawn_with_cfg(executor, channel, |_| {}, request)
            .await
    }

    /// As [`spawn_with`](Self::spawn_with), with a configuration for this request.
    ///
    /// # Errors
    ///
    /// If the request or its configuration is refused, or the statement fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`Durable::fire_in`].
    pub async fn spawn_with_cfg<'c>(
        &self,
        executor: impl PgExecutor<'c>,
        channel: impl Into<Arc<str>>,
        configure: impl FnOnce(&mut JobConfig),
        request: &Request,
    ) -> Result<Uuid, SpawnError> {
        let id = self
            .durable
            .fire_in(executor, configured(channel, request, configure))
            .await?;
        Ok(id.into())
    }

    /// Persists a request and waits until an accepted response comes.
    ///
    /// There is no form with an executor: waiting inside an uncommitted transaction would never
    /// end. Use [`spawn_with`](Self::spawn_with), commit, then wait:
    ///
    /// ```no_run
    /// # async fn example(
    /// #     pool: sqlx::PgPool,
    /// #     client: requeuest::Client,
    /// #     request: requeuest::Request,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut tx = pool.begin().await?;
    /// let id = client.spawn_with(&mut *tx, "my_service", &request).await?;
    /// tx.commit().await?;
    /// let response = client.durable().response(id.into()).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// If the request is refused or can't be persisted, or is cleared in the meantime.
    ///
    /// # Cancel safety
    ///
    /// As for [`Durable::await_response`]: once persisted, the request is delivered anyway.
    pub async fn spawn_returning(
        &self,
        channel: impl Into<Arc<str>>,
        request: &Request,
    ) -> Result<reqwest::Response, Error> {
        self.spawn_returning_cfg(channel, request, |_| {}).await
    }

    /// As [`spawn_returning`](Self::spawn_returning), with a configuration for this request.
    ///
    /// # Errors
    ///
    /// If the request or its configuration is refused, if the request can't be persisted, if its
    /// retries are used up without any response, or if it is cleared in the meantime.
    ///
    /// # Cancel safety
    ///
    /// As for [`Durable::await_response`]: once persisted, the request is delivered anyway.
    pub async fn spawn_returning_cfg(
        &self,
        channel: impl Into<Arc<str>>,
        request: &Request,
        configure: impl FnOnce(&mut JobConfig),
    ) -> Result<reqwest::Response, Error> {
        let request = configured(channel, request, configure);
        Ok(self.durable.await_response(request).await?.into())
    }

    /// Takes the handle of the background delivery, which then continues without the client, until
    /// the [`Listener`] is stopped, aborted or dropped. `None` if the listener was taken before.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(mut client: requeuest::Client) -> Result<(), requeuest::Error> {
    /// let listener = client.take_listener();
    /// drop(client); // its channels are still delivered
    ///
    /// if let Some(listener) = listener {
    ///     listener.stop().await?;
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use = "dropping the listener stops the delivery"]
    pub fn take_listener(&mut self) -> Option<Listener> {
        self.listener.take()
    }

    /// Whether the listener was taken.
    pub fn is_detached(&self) -> bool {
        self.listener.is_none()
    }

    /// The pool that the client was made with.
    pub fn pool(&self) -> &PgPool {
        self.durable.pool()
    }

    /// The handle underneath.
    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    /// Cancels every unfinished request of these channels. Requests in flight may still arrive,
    /// once.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, some of the requests may have been cancelled.
    pub async fn clear(&self, channels: Channels<'_>) -> Result<(), Error> {
        let channels = channels.to_list();
        self.durable.engine().cancel_channels(channels).await
    }
}

fn configured(
    channel: impl Into<Arc<str>>,
    request: &Request,
    configure: impl FnOnce(&mut JobConfig),
) -> Request {
    let mut job = JobConfig::default();
    configure(&mut job);
    let mut request = request.clone();
    let mut options = std::mem::take(&mut request.options).channel(channel);
    if options.accept.is_none() {
        options = options.accept([AcceptedResponse::Success]);
    }
    if let Some(delay) = job.delay {
        options = options.delay(delay);
    }
    if let Some(policy) = job.policy() {
        options = options.retry(policy);
    }
    options = match (job.ordered, job.channel_args) {
        (true, args) => options
            .ordered(args.unwrap_or_default())
            .ordered_by_channel(),
        (false, Some(args)) => options.group(args),
        (false, None) => options,
    };
    request.with(options)
}

/// The configuration of one spawned request, with the older crate's setters.
#[derive(Clone, Debug, Default)]
pub struct JobConfig {
    retries: Option<u32>,
    retry_backoff: Option<Duration>,
    delay: Option<Duration>,
    ordered: bool,
    channel_args: Option<String>,
}

impl JobConfig {
    /// How many attempts may follow the first one. Defaults to no limit.
    pub fn set_retries(&mut self, retries: u32) -> &mut Self {
        self.retries = Some(retries);
        self
    }

    /// The upper bound of the delay before the first retry. It doubles with each retry. At least
    /// one millisecond. Defaults to [`retry::DEFAULT_BASE`](crate::retry::DEFAULT_BASE).
    pub fn set_retry_backoff(&mut self, backoff: Duration) -> &mut Self {
        self.retry_backoff = Some(backoff);
        self
    }

    /// How long to wait before the first attempt. Defaults to no delay.
    pub fn set_delay(&mut self, delay: Duration) -> &mut Self {
        self.delay = Some(delay);
        self
    }

    /// Whether the request waits for earlier ones of the same channel and arguments. Defaults to
    /// `false`.
    pub fn set_ordered(&mut self, ordered: bool) -> &mut Self {
        self.ordered = ordered;
        self
    }

    /// The group within the channel, which is the scope of the order. Up to 255 bytes. Defaults to
    /// the empty group.
    pub fn set_channel_args(&mut self, args: impl Into<String>) -> &mut Self {
        self.channel_args = Some(args.into());
        self
    }

    fn policy(&self) -> Option<RetryPolicy> {
        if self.retries.is_none() && self.retry_backoff.is_none() {
            return None;
        }
        let mut policy = RetryPolicy::exponential().for_ever();
        if let Some(retries) = self.retries {
            policy = policy.max_attempts(retries.saturating_add(1));
        }
        if let Some(backoff) = self.retry_backoff {
            policy = policy
                .base(backoff)
                .cap(backoff.max(crate::retry::DEFAULT_CAP));
        }
        Some(policy)
    }
}
