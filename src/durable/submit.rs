//! From a request to the engine, and back with its outcome.
//!
//! Every front goes this way: a request is prepared (checked and written down), submitted, and perhaps awaited. The futures use
//! channels only, so that they work on any executor.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::Extensions;
use tokio::sync::oneshot;

use super::Durable;
use crate::codec::{self, Delivery};
use crate::destination;
use crate::engine::enqueue::{Start, Submission};
use crate::engine::job::Job;
use crate::engine::live::Live;
use crate::engine::waiters::Waiter;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::request::Request;
use crate::response::Response;
use crate::store::enqueue::NewRequest;

impl Durable {
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
            return Err(Error::body_too_large(config.max_request_body));
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
        let has_client = live.is_some();
        self.hand_in(prepared, live, has_client)
    }

    fn hand_in(
        &self,
        prepared: Prepared,
        live: Option<Live>,
        has_client: bool,
    ) -> Result<Submitted, Error> {
        let Prepared { mut row, job } = prepared;
        let engine = self.engine();
        let may_start = !row.ordered && row.delay.is_zero();
        let slots = may_start
            .then(|| engine.inline_slots(&row.channel, has_client))
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
        let has_client = live.is_some();
        let waiter = waiters.subscribe(prepared.id(), live);
        Ok(AwaitResponse {
            submitted: Some(self.hand_in(prepared, None, has_client)?),
            waiter,
            _durable: self.clone(),
        })
    }
}

/// Whether anybody waits for the response, which decides how long it is retried by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Awaited,
    Fired,
}

/// A request that was checked and written down.
pub(crate) struct Prepared {
    pub(super) row: NewRequest,
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
