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
use crate::fingerprint::fingerprint;
use crate::id::RequestId;
use crate::options::Guarantee;
use crate::request::Request;
use crate::response::Response;
use crate::store::BoxFuture;
use crate::store::enqueue::{Initial, Key, NewRequest};

impl Durable {
    /// Checks a request and writes it down.
    pub(crate) fn prepare(&self, mut request: Request, mode: Mode) -> Result<Prepared, Error> {
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
            guarantee: options.guarantee,
        };
        let id = RequestId::generate();
        if options.guarantee == Guarantee::AtLeastOnce {
            let key = options.idempotency_header.as_ref();
            key.unwrap_or(&config.idempotency_header).apply(
                &request.method,
                id,
                &mut request.headers,
            );
        }
        let options = &request.options;
        let row = NewRequest {
            id,
            channel: Arc::clone(options.channel.as_ref().unwrap_or(&config.channel)),
            group: match (&options.ordered, &options.group) {
                (Some(key), _) if options.ordered_by_channel => {
                    destination::channel_ordered_group(key)
                }
                (Some(key), _) => destination::ordered_group(key),
                (None, Some(group)) => destination::named_group(group),
                (None, None) => destination::destination_group(&uri),
            },
            ordered: options.ordered.is_some(),
            halts: options.halt_on_discard,
            deadline: options.deadline,
            key: options.key.as_ref().map(|key| Key {
                key: Arc::clone(key),
                fingerprint: fingerprint(&request, &uri),
            }),
            supersede: options.supersede.clone(),
            delay: options.delay.unwrap_or_default(),
            head: codec::encode_request(&request, &uri, &delivery),
            body: request.body.clone(),
            waiter: (mode == Mode::Awaited).then_some(self.engine().shared().instance),
            initial: Initial::Waiting,
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
        let slot = may_start
            .then(|| engine.inline_slot(&row.channel, has_client))
            .flatten();
        let start = slot.map(|slot| Start {
            engine: Arc::clone(engine),
            slot,
            job,
            live,
        });
        let (id, inline) = (row.id, start.is_some());
        if let Some(start) = &start {
            row.initial = match start.job.delivery.guarantee {
                Guarantee::AtLeastOnce => Initial::Claimed,
                Guarantee::AtMostOnce => Initial::ClaimedOnce,
            };
        }
        let (done, enqueued) = oneshot::channel();
        engine.enqueue(Submission { row, start, done })?;
        Ok(Submitted {
            id,
            enqueued,
            inline,
        })
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
        let id = prepared.id();
        let waiter = waiters.subscribe(id, live);
        Ok(AwaitResponse {
            id,
            submitted: Some(self.hand_in(prepared, None, has_client)?),
            waiter,
            attached: None,
            durable: self.clone(),
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

/// A request that was handed to the engine. Waits for the commit of its insert.
pub(crate) struct Submitted {
    id: RequestId,
    enqueued: oneshot::Receiver<Result<RequestId, Error>>,
    /// This process makes the first attempt.
    inline: bool,
}

impl Future for Submitted {
    /// The request that is persisted: this one, or an earlier one with the same key.
    type Output = Result<RequestId, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let id = self.id;
        Pin::new(&mut self.enqueued).poll(cx).map(|enqueued| {
            // Lost on its way, perhaps after the commit: the engine's runtime has ended.
            enqueued.unwrap_or_else(|_| Err(Error::new(Kind::Indeterminate(None)).with_id(id)))
        })
    }
}

/// The way from the insert to the outcome. On any executor.
pub(crate) struct AwaitResponse {
    id: RequestId,
    submitted: Option<Submitted>,
    waiter: Waiter,
    /// An earlier request has the key: its response is the one to wait for.
    attached: Option<BoxFuture<'static, Result<Response, Error>>>,
    /// While somebody waits, the engine lives.
    durable: Durable,
}

impl Future for AwaitResponse {
    type Output = Result<Response, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Some(submitted) = &mut this.submitted {
            let persisted = ready!(Pin::new(&mut *submitted).poll(cx))?;
            let inline = submitted.inline;
            this.submitted = None;
            if persisted == this.id {
                this.waiter.arm(!inline);
            } else {
                let durable = this.durable.clone();
                this.attached = Some(Box::pin(async move { durable.response(persisted).await }));
            }
        }
        if let Some(attached) = &mut this.attached {
            return attached.as_mut().poll(cx);
        }
        Pin::new(&mut this.waiter)
            .poll(cx)
            .map(|waited| waited.and_then(crate::outcome::Outcome::into_result))
    }
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;
    use crate::testkit::Postgres;

    /// What no index takes: long, and hard to compress.
    fn overlong() -> String {
        std::iter::repeat_with(fastrand::alphanumeric)
            .take(20_000)
            .collect()
    }

    #[tokio::test]
    async fn rows_that_the_database_refuses_fail_alone() {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        crate::migrate(database.pool()).await.unwrap();
        let durable = Durable::builder(database.pool().clone()).runner(false);
        let durable = durable.build().unwrap();
        let mut prepared: Vec<Prepared> = (0..256)
            .map(|number| {
                let request = http::Request::post("http://a/").body(number.to_string());
                let request = Request::try_from(request.unwrap()).unwrap();
                durable.prepare(request, Mode::Fired).unwrap()
            })
            .collect();
        // The checks before let none of these come so far.
        prepared[17].row.head.push('\0');
        prepared[80].row.group = overlong();
        prepared[200].row.id = prepared[100].row.id;
        // Handed in at once: they are one batch.
        let submitted: Vec<_> = prepared
            .into_iter()
            .map(|prepared| durable.submit(prepared, None).unwrap())
            .collect();
        let mut refused = Vec::new();
        for (number, submitted) in submitted.into_iter().enumerate() {
            if let Err(error) = submitted.await {
                assert!(error.is_database(), "{error:?}");
                refused.push(number);
            }
        }
        assert_eq!(refused, [17, 80, 200]);
        for table in ["mq_msgs", "mq_payloads"] {
            let rows: i64 = sqlx::query_scalar(&format!("SELECT count(*) FROM requeuest.{table}"))
                .fetch_one(database.pool())
                .await
                .unwrap();
            assert_eq!(rows, 253, "{table}");
        }
    }
}
