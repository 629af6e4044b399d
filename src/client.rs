//! The API of an older crate of the same name, on top of [`Durable`].
//!
//! Its users expect that a request is retried for ever, until an accepted response (by default any 2xx) comes. So it is here;
//! delays have a cap and attempts a timeout.
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
//! let request = Request::post(Url::parse("https://example.com/")?, b"hello".to_vec(), HeaderMap::new());
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

/// Spawns requests, and delivers those of its channels for as long as it, or its [`Listener`], lives.
#[derive(Debug)]
pub struct Client {
    durable: Durable,
    listener: Option<Listener>,
}

/// Delivers the requests of a [`Client`]'s channels until it is dropped.
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
    /// If a channel's name is not valid. An unreachable database shows in the calls, and the client waits for it.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    #[allow(clippy::unused_async)] // as it was in the older crate, so that its users' code compiles
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
            _runner: RunnerGuard::start(durable.engine()),
            _durable: durable.clone(),
        };
        Self {
            durable,
            listener: Some(listener),
        }
    }

    /// Persists a request, to be delivered in the background. Returns its id.
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
    /// # async fn example(client: requeuest::Client, request: requeuest::Request) -> Result<(), requeuest::Error> {
    /// client
    ///     .spawn_cfg("my_service", &request, |job| job.set_delay(Duration::from_secs(60)).set_retries(5))
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

    /// Persists a request on the given executor, which may be a transaction: a commit sends it, a rollback never does.
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
    /// There is no form of it with an executor: waiting inside a transaction that has not committed would never end. Use
    /// [`spawn_with`](Self::spawn_with), commit, then wait:
    ///
    /// ```no_run
    /// # async fn example(pool: sqlx::PgPool, client: requeuest::Client, request: requeuest::Request)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// let mut tx = pool.begin().await?;
    /// let id = client.spawn_with(&mut *tx, "my_service", &request).await?;
    /// tx.commit().await?;
    /// let response = client.durable().response(id.into()).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// If the request is refused or can't be persisted, or is cleared meanwhile.
    ///
    /// # Cancel safety
    ///
    /// As for [`Durable::await_response`]: once persisted, the request is delivered all the same.
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
    /// If the request or its configuration is refused, it can't be persisted, its retries are used up without any response, or it is
    /// cleared meanwhile.
    ///
    /// # Cancel safety
    ///
    /// As for [`Durable::await_response`]: once persisted, the request is delivered all the same.
    pub async fn spawn_returning_cfg(
        &self,
        channel: &str,
        request: &Request,
        configure: impl for<'j> FnOnce(&'j mut JobConfig) -> &'j mut JobConfig,
    ) -> Result<reqwest::Response, Error> {
        let request = configured(channel, request, configure);
        Ok(self.durable.await_response(request).await?.into())
    }

    /// Takes the listener out: delivery then goes on for as long as it lives, whatever becomes of the client. `None` if it was taken.
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

    /// Cancels every request of these channels that has not ended. Those in flight may still arrive, once.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, it may or may not have taken effect.
    pub async fn clear(&self, channels: Channels<'_>) -> Result<(), Error> {
        self.durable.clear(channels.to_list()).await?;
        Ok(())
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

/// The configuration of a single spawned request, with the setters that the older crate's users know.
#[derive(Clone, Debug, Default)]
pub struct JobConfig {
    retries: Option<u32>,
    retry_backoff: Option<Duration>,
    delay: Option<Duration>,
    ordered: bool,
    channel_args: Option<String>,
}

impl JobConfig {
    /// How often the request is tried again after the first attempt. Defaults to for ever.
    pub fn set_retries(&mut self, retries: u32) -> &mut Self {
        self.retries = Some(retries);
        self
    }

    /// The bound of the delay before the first retry, doubled with each. At least one millisecond. Defaults to
    /// [`retry::DEFAULT_BASE`](crate::retry::DEFAULT_BASE).
    pub fn set_retry_backoff(&mut self, backoff: Duration) -> &mut Self {
        self.retry_backoff = Some(backoff);
        self
    }

    /// How long to wait before the first attempt. Defaults to none.
    pub fn set_delay(&mut self, delay: Duration) -> &mut Self {
        self.delay = Some(delay);
        self
    }

    /// Whether the request waits for earlier ones of the same channel and arguments. Defaults to `false`.
    pub fn set_ordered(&mut self, ordered: bool) -> &mut Self {
        self.ordered = ordered;
        self
    }

    /// The group within the channel: the scope of the order. Up to 255 bytes. Defaults to the empty one.
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
