//! Durable outgoing HTTP. Every request is written to your Postgres before it is sent, and retried
//! until it is answered, also if the process that made the call dies.
//!
//! ```no_run
//! use requeuest::Durable;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = sqlx::PgPool::connect("postgres://localhost/app").await?;
//! requeuest::migrate(&pool).await?; // into its own schema, `requeuest`
//! let durable = Durable::new(pool);
//!
//! let hook = http::Request::post("https://example.com/hook").body("{}")?;
//! let id = durable.fire(hook).await?; // persisted when this returns
//! println!("{:?}", durable.status(id).await?);
//!
//! let charge = http::Request::post("https://pay.example.com/charges").body("amount=5")?;
//! let response = durable.await_response(charge).await?; // waits through failures and retries
//! println!("{}: {}", response.status(), response.text()?);
//! # Ok(()) }
//! ```
//!
//! # The guarantee
//!
//! - **At least once.** A persisted request is sent until a final answer comes or its
//!   [`RetryPolicy`](retry::RetryPolicy) gives it up, by any process that delivers its channel. All
//!   attempts of a request have the same [idempotency key](IdempotencyHeader), by which a receiver
//!   recognises a repetition. [`Guarantee::AtMostOnce`] is for receivers that can't.
//! - **A repeated call is one request**, with [`Options::key`]: it attaches to the first one, from
//!   any process, also after a crash in between.
//! - **A response that a caller has seen is stored.** [`Durable::response`] returns it by the
//!   request's id, from any process, for the [`retention`](DurableBuilder::retention).
//! - **A call keeps its meaning.** The caller gets the response that a patient client would have
//!   got: a 404 is a response. Once the retries are used up, it gets the last response, or an
//!   [`Error`] if there never was one.
//!
//! # Entry points
//!
//! They all feed the same queue.
//!
//! - [`Durable`], a handle: [`fire`](Durable::fire) and [`fire_many`](Durable::fire_many) persist
//!   and return, [`await_response`](Durable::await_response) waits. Cheap to clone; create one per
//!   process with [`Durable::new`] or [`Durable::builder`], or from a URL with
//!   [`Durable::connect`].
//! - [`Durable::fire_in`], in your transaction: a commit sends the request, a rollback never does.
//!   [`Durable::statement`] does the same for any other driver.
//!   In the other direction, [`Durable::on_outcome`] hands each outcome to your code in a
//!   transaction.
//! - [`DurableLayer`], a tower layer over any [`HttpClient`]: hyper's client, [`ReqwestTransport`],
//!   or a stack of your own.
//! - `Durable` is a `reqwest_middleware::Middleware`:
//!   `ClientBuilder::new(client).with(durable).build()`.
//! - [`Client`], the API of the older crate of this name.
//!
//! In a stack of layers or middleware, put requeuest first and remove the retry layer. The [guide]
//! has the tables of what belongs above and below.
//!
//! [`hooks`] change each attempt before it is sent: tokens, signatures, other clients.
//!
//! [`Durable::response`] and [`Durable::outcome`] re-attach to a request by its id, and
//! [`Durable::dead_letters`] lists the requests that were given up. [`Options`] are the settings of
//! one request, [`DurableBuilder`] those of a handle. [`migrate()`] installs the schema. It needs
//! Postgres 14 or newer and no extensions.
//!
//! # sqlx 0.8
//!
//! Pools, transactions and handlers take types of sqlx 0.8, which is re-exported as [`sqlx`]. An
//! application with another version or driver gives a URL to [`Durable::connect`], and persists
//! requests in its own transactions by [`Durable::statement`]. [`http`] 1, [`reqwest`] 0.13,
//! reqwest-middleware 0.5 and tower 0.5 are part of the API too.
//!
//! # Features
//!
//! | feature | default | |
//! |---|---|---|
//! | `runtime-tokio-rustls` | yes | TLS by rustls, for HTTP and for Postgres |
//! | `runtime-tokio-native-tls` | | TLS by the platform's library |
//! | `runtime-actix-rustls`, `runtime-actix-native-tls` | | aliases: actix-rt runs on tokio |
//! | `runtime-async-std-rustls`, `runtime-async-std-native-tls` | | for a pool on async-std |
//! | `reqwest-middleware` | yes | `Durable` is a middleware |
//! | `ssrf-guard` | | [`guard`] keeps requests out of your own network |
//! | `axum` | | converts between [`Body`] and axum's body |
//! | `encryption` | | [`encryption`] encrypts what is stored, with your keys |
//! | `webhooks` | | signs and verifies as Standard Webhooks asks: [`webhooks`] |
//! | `otel` | | spans by OpenTelemetry's conventions: [`otel`] |
//! | `metrics` | | a [`recorder`] for the facade of that name: [`metrics`] |
//! | `cli` | | the program `requeuest` for operators: `cargo install requeuest --features cli` |
//! | `testkit` | | [`testkit`] finds or starts a Postgres for your tests |
//! | `testkit-download` | | `testkit`, and downloads a Postgres where none is installed |
//! | `http` | | does nothing; kept for dependents of the older crate |
//!
//! async-std is discontinued (RUSTSEC-2025-0052) and supported for existing code only. Outside a
//! tokio runtime the crate works on a thread of its own.
//!
//! The minimum supported Rust version is 1.85.
//!
//! [guide]: https://github.com/requeuest/requeuest/blob/main/docs/guide.md
#![cfg_attr(feature = "testkit", doc = "[`testkit`]: mod@testkit")]
#![cfg_attr(not(feature = "testkit"), doc = "[`testkit`]: #features")]
#![cfg_attr(feature = "ssrf-guard", doc = "[`guard`]: mod@guard")]
#![cfg_attr(not(feature = "ssrf-guard"), doc = "[`guard`]: #features")]
#![cfg_attr(feature = "encryption", doc = "[`encryption`]: mod@encryption")]
#![cfg_attr(not(feature = "encryption"), doc = "[`encryption`]: #features")]
#![cfg_attr(feature = "otel", doc = "[`otel`]: mod@otel")]
#![cfg_attr(not(feature = "otel"), doc = "[`otel`]: #features")]
#![cfg_attr(feature = "webhooks", doc = "[`webhooks`]: mod@webhooks")]
#![cfg_attr(not(feature = "webhooks"), doc = "[`webhooks`]: #features")]
#![cfg_attr(feature = "metrics", doc = "[`metrics`]: mod@metrics")]
#![cfg_attr(not(feature = "metrics"), doc = "[`metrics`]: #features")]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod admin;
pub mod classify;
pub mod client;
#[cfg(feature = "encryption")]
pub mod encryption;
pub mod error;
#[cfg(feature = "ssrf-guard")]
pub mod guard;
pub mod hooks;
#[cfg(feature = "metrics")]
pub mod metrics;
pub mod migrate;
#[cfg(feature = "otel")]
pub mod otel;
pub mod recorder;
pub mod retry;
#[cfg(feature = "testkit")]
pub mod testkit;
#[cfg(feature = "webhooks")]
pub mod webhooks;

mod activity;
mod base64;
mod body;
mod change;
mod codec;
mod context;
mod dead_letter;
mod destination;
mod durable;
mod engine;
mod finding;
mod fingerprint;
mod health;
mod id;
mod idempotency_header;
mod inspection;
mod into_request;
mod layer;
mod metadata;
#[cfg(feature = "reqwest-middleware")]
mod middleware;
mod operation;
mod options;
mod outbox;
mod outcome;
mod redact;
mod redirects;
mod repetition;
mod request;
mod response;
mod runtime;
mod sealer;
mod status;
mod store;
mod target;
mod trace_context;

pub use body::{Body, BodyError, IntoBody};
pub use classify::{AcceptedResponse, Classify, FailureClass, Verdict};
#[doc(no_inline)]
pub use client::{Channels, Client};
pub use context::{AttemptNumber, Channel};
pub use dead_letter::{
    DEFAULT_DEAD_LETTER_LIMIT, DeadLetter, DeadLetterFilter, HaltedKey, MAX_DEAD_LETTER_COUNT,
    Reconcile, Resolution,
};
pub use destination::{
    AutoDisable, CircuitBreaker, DestinationEvent, DestinationEventKind, DestinationPattern,
    DestinationPolicy, DestinationState, DestinationStatus, RateLimit, RetryBudget,
};
pub use durable::{
    DEFAULT_ATTEMPT_TIMEOUT, DEFAULT_CHANNEL, DEFAULT_CONCURRENCY, DEFAULT_DEAD_LETTER_RETENTION,
    DEFAULT_HANDLER_CONCURRENCY, DEFAULT_HANDLER_TIMEOUT, DEFAULT_HOOK_TIMEOUT, DEFAULT_LEASE,
    DEFAULT_MAX_CONNECTIONS, DEFAULT_MAX_HANDLER_FAILURES, DEFAULT_MAX_KEY_WAIT,
    DEFAULT_MAX_LOST_ATTEMPTS, DEFAULT_MAX_QUEUED_BYTES, DEFAULT_MAX_QUEUED_REQUESTS,
    DEFAULT_MAX_REQUEST_BODY, DEFAULT_MAX_RESPONSE_BODY, DEFAULT_MAX_SENDING_BYTES,
    DEFAULT_MAX_SHARE, DEFAULT_MAX_UNSETTLED_BYTES, DEFAULT_RETENTION, DestinationHandle, Durable,
    DurableBuilder, OutcomeSubscription, RequestHead, WEBHOOKS_ATTEMPT_TIMEOUT,
};
#[cfg(feature = "encryption")]
pub use durable::{KeyUsage, Reencryption, ReencryptionProgress};
#[cfg(feature = "reqwest-middleware")]
pub use engine::attempt::transport::MiddlewareTransport;
pub use engine::attempt::transport::{HttpClient, MapBody, ReqwestFuture, ReqwestTransport};
pub use error::Error;
pub use health::{
    BackgroundTask, FailedHandOver, HANDLER_GONE_AFTER, HandledChannel, RunnerInfo, SweepPart,
};
pub use hooks::AttemptHook;
pub use id::RequestId;
pub use idempotency_header::IdempotencyHeader;
pub use into_request::IntoRequest;
pub use layer::{DurableLayer, DurableService, REQUEST_ID_HEADER, ResponseFuture};
pub use metadata::MAX_METADATA_LEN;
pub use migrate::{migrate, migrate_url};
pub use options::{Guarantee, Options, Priority};
pub use outbox::OutboxStatement;
pub use outcome::Outcome;
pub use redirects::{MAX_REDIRECTS, Redirects};
pub use request::{MAX_HEADERS, MAX_HEADERS_LEN, MAX_URL_LEN, Request};
pub use response::Response;
pub use status::{ParkedRequest, Status};
pub use store::hand_over::{OutcomeFn, OutcomeFnWith, OutcomeHandler, outcome_fn, outcome_fn_with};
pub use trace_context::{TraceContext, TraceContextHook};

pub use http::{self, HeaderMap, Method, StatusCode};
pub use reqwest;
pub use sqlx;
pub use url::Url;
pub use uuid::Uuid;

// Compiles the snippets of the pages.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../docs/guide.md")]
struct Guide;

#[cfg(all(doctest, feature = "metrics"))]
#[doc = include_str!("../docs/metrics.md")]
struct MetricsPage;
