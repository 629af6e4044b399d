#![doc = include_str!("../README.md")]

pub mod classify;
pub mod client;
pub mod error;
pub mod migrate;
pub mod retry;
#[cfg(feature = "testkit")]
pub mod testkit;

mod body;
mod codec;
mod dead_letter;
mod destination;
mod durable;
mod engine;
mod fingerprint;
mod id;
mod idempotency_header;
mod into_request;
mod layer;
#[cfg(feature = "reqwest-middleware")]
mod middleware;
mod options;
mod outcome;
mod redact;
mod request;
mod response;
mod runtime;
mod status;
mod store;

pub use body::{Body, BodyError, IntoBody};
pub use classify::{AcceptedResponse, Classify, FailureClass, Verdict};
#[doc(no_inline)]
pub use client::{Channels, Client};
pub use dead_letter::{
    DEFAULT_DEAD_LETTER_LIMIT, DeadLetter, DeadLetterFilter, HaltedKey, Reconcile, Resolution,
};
pub use durable::{
    DEFAULT_ATTEMPT_TIMEOUT, DEFAULT_CHANNEL, DEFAULT_CONCURRENCY, DEFAULT_LEASE,
    DEFAULT_MAX_CONNECTIONS, DEFAULT_MAX_REQUEST_BODY, DEFAULT_MAX_RESPONSE_BODY,
    DEFAULT_RETENTION, Durable, DurableBuilder, OutcomeSubscription, RequestHead,
};
#[cfg(feature = "reqwest-middleware")]
pub use engine::attempt::transport::MiddlewareTransport;
pub use engine::attempt::transport::{HttpClient, MapBody, ReqwestFuture, ReqwestTransport};
pub use error::Error;
pub use id::RequestId;
pub use idempotency_header::IdempotencyHeader;
pub use into_request::IntoRequest;
pub use layer::{DurableLayer, DurableService, REQUEST_ID_HEADER, ResponseFuture};
pub use migrate::migrate;
pub use options::{Guarantee, Options};
pub use outcome::Outcome;
pub use request::{MAX_URL_LEN, Request};
pub use response::Response;
pub use status::Status;
pub use store::hand_over::{OutcomeFn, OutcomeFnWith, OutcomeHandler, outcome_fn, outcome_fn_with};

pub use http::{self, HeaderMap, Method, StatusCode};
pub use reqwest;
pub use sqlx;
pub use url::Url;
pub use uuid::Uuid;
