//! For code written against the older crate of the same name; new code uses [`Durable`].
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

use std::time::Duration;

use sqlx::{PgExecutor, PgPool};
use uuid::Uuid;

use crate::classify::AcceptedResponse;
use crate::durable::Durable;
use crate::engine::runner::RunnerGuard;
use crate::error::{Error, SpawnError};
use crate::request::Request;
use crate::retry::RetryPolicy;

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
/// Spawns requests, and delivers the requests of its channels for as long as it, or its
/// [`Listener`], lives.
#[derive(Debug)]
pub struct Client {
    durable: Durable,
    listener: Option<Listener>,
}

/// Delivers the requests of a [`Client`]'s channels until the listener is dropped.
#[derive(Debug)]
pub struct Listener {
    _runner: RunnerGuard,
    _durable: Durable,
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
        let listener = Listener {
            _runner: RunnerGuard::start(durable.engine().driver()),
            _durable: durable.clone(),
        };
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
    pub async fn spawn(&self, channel: &str, request: &Request) -> Result<Uuid, SpawnError> {
        self.spawn_cfg(channel, request, |job| job).await
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
    ///         job.set_delay(Duration::from_secs(60)).set_retries(5)
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    pub async fn spawn_cfg(
        &self,
        channel: &str,
        request: &Request,
        configure: impl for<'j> FnOnce(&'j mut JobConfig) -> &'j mut JobConfig,
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
        channel: &str,
        request: &Request,
    ) -> Result<Uuid, SpawnError> {
        self.spawn_with_cfg(executor, channel, |job| job, request)
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
        channel: &str,
        configure: impl for<'j> FnOnce(&'j mut JobConfig) -> &'j mut JobConfig,
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
        channel: &str,
        request: &Request,
    ) -> Result<reqwest::Response, Error> {
        self.spawn_returning_cfg(channel, request, |job| job).await
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
        channel: &str,
        request: &Request,
        configure: impl for<'j> FnOnce(&'j mut JobConfig) -> &'j mut JobConfig,
    ) -> Result<reqwest::Response, Error> {
        let request = configured(channel, request, configure);
        Ok(self.durable.await_response(request).await?.into())
    }

    /// Takes the listener out. Delivery then continues for as long as the listener lives, with or
    /// without the client. `None` if the listener was taken before.
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
    channel: &str,
    request: &Request,
    configure: impl for<'j> FnOnce(&'j mut JobConfig) -> &'j mut JobConfig,
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
