//! From a request to the engine, and back with its response.
//!
//! Every front takes this path: a request is prepared (checked and encoded), submitted, and perhaps
//! awaited. The futures use channels only, so they work on any executor.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::Durable;
use crate::codec::Delivery;
use crate::destination;
use crate::engine::attempt::caller_client::CallerClient;
use crate::engine::attempt::job::Job;
use crate::engine::enqueue::{AwaitOutcome, Submitted};
use crate::error::Error;
use crate::fingerprint::fingerprint;
use crate::id::RequestId;
use crate::options::Guarantee;
use crate::outcome::Outcome;
use crate::redact::mark_secrets;
use crate::repetition::Marker;
use crate::request::Request;
use crate::store::enqueue::{Initial, Key, NewRequest};
use crate::trace_context::{EnqueueSpan, Enqueuing, Tracing};

impl Durable {
    /// Checks a request and encodes it.
    pub(crate) fn prepare(&self, request: Request, mode: Mode) -> Result<Prepared, Error> {
        self.prepare_as(RequestId::generate(), request, mode)
    }

    pub(super) fn prepare_as(
        &self,
        id: RequestId,
        mut request: Request,
        mode: Mode,
    ) -> Result<Prepared, Error> {
        let config = self.engine().config();
        let options = &request.options;
        options.validate()?;
        let uri = request.uri()?;
        config.admit(&uri)?;
        request.check_headers()?;
        let max_request_body = self.max_request_body();
        if request
            .body
            .as_ref()
            .is_some_and(|body| body.len() > max_request_body)
        {
            return Err(Error::body_too_large(max_request_body));
        }
        let delivery = Delivery {
            attempt_timeout: options.attempt_timeout.unwrap_or(config.attempt_timeout),
            retry: options.retry.clone().unwrap_or_else(|| match mode {
                Mode::Awaited => config.retry_awaited.clone(),
                Mode::Fired => config.retry_fired.clone(),
            }),
            accept: options.accept.as_ref().map(|accept| accept.to_vec()),
            guarantee: options.guarantee,
            priority: options.priority,
            limit_key: options.limit_key.as_deref().map(Box::from),
            awaited: mode == Mode::Awaited,
        };
        // The caller's credentials tell who owns the key, also where they are not stored.
        let is_keyed = options.key.is_some();
        let of_caller = is_keyed.then(|| fingerprint(&request, &uri));
        for name in &config.strip_headers {
            request.headers.remove(name);
            if let Some(trailers) = &mut request.trailers {
                trailers.remove(name);
            }
        }
        let options = &request.options;
        if options.guarantee == Guarantee::AtLeastOnce {
            let header = options.idempotency_header.as_ref();
            header.unwrap_or(&config.idempotency_header).apply(
                &request.method,
                id,
                &mut request.headers,
            );
        }
        let sealer = self.engine().driver().store.sealer();
        let options = &request.options;
        let channel = Arc::clone(options.channel.as_ref().unwrap_or(&config.channel));
        let key = options.key.as_ref().zip(of_caller);
        let key = key.map(|(key, fingerprint)| Key {
            text: Arc::clone(key),
            sealed: sealer.fingerprint(&channel, key, &fingerprint),
            fingerprint,
        });
        // Later than the fingerprint, to which a sensitive value belongs.
        mark_secrets(&mut request.headers, &config.redact_headers);
        if let Some(trailers) = &mut request.trailers {
            mark_secrets(trailers, &config.redact_headers);
        }
        let span = self.begin_enqueue(id, &channel, &mut request);
        let (head, body) = sealer.request(id, &request, &uri, &delivery);
        let options = &request.options;
        let destination = destination::name_of(options.limit_key.as_deref(), &uri);
        let row = NewRequest {
            id,
            channel,
            group: match (&options.ordered, &options.group) {
                (Some(key), _) if options.ordered_by_channel => {
                    destination::channel_ordered_group(key)
                }
                (Some(key), _) => destination::ordered_group(key),
                (None, Some(group)) => destination::named_group(group),
                (None, None) => destination::named_group(&destination),
            },
            destination: (options.ordered.is_some() || options.group.is_some())
                .then(|| destination.into_owned()),
            ordered: options.ordered.is_some(),
            halts: options.halt_on_discard,
            deadline: options.deadline,
            key,
            supersede: options.supersede.clone(),
            delay: options.delay.unwrap_or_default(),
            head,
            body,
            metadata: options.metadata.clone(),
            priority: options.priority,
            waiter: (mode == Mode::Awaited).then_some(self.engine().driver().instance),
            initial: Initial::Waiting,
        };
        let job = Job::new(id, Arc::clone(&row.channel), request, uri, delivery);
        Ok(Prepared {
            row,
            job,
            earlier: None,
            span,
        })
    }

    /// Begins the span of an enqueue, and adds the context of its trace to the request.
    fn begin_enqueue(
        &self,
        id: RequestId,
        channel: &str,
        request: &mut Request,
    ) -> Option<EnqueueSpan> {
        // A request that was read from a dead letter has the context of another call.
        request.trace = None;
        let Tracing(tracer) = self.engine().config().tracing.as_ref()?;
        let (context, span) = tracer.enqueue(&Enqueuing {
            id,
            channel,
            headers: &request.headers,
        });
        request.trace = context.map(Box::new);
        span
    }

    /// Enqueues a request that no caller waits for. `client` is the one that the request came
    /// through.
    pub(crate) fn submit(
        &self,
        prepared: Prepared,
        client: Option<CallerClient>,
    ) -> Result<Submitted, Error> {
        let Prepared {
            row,
            job,
            earlier,
            span,
        } = prepared;
        self.engine().submit(row, job, client, earlier, span)
    }

    /// Enqueues a request and waits for its outcome. While the caller waits, every attempt that
    /// this process makes goes through `client`, if there is one.
    pub(crate) fn submit_awaited(
        &self,
        prepared: Prepared,
        client: Option<CallerClient>,
    ) -> Result<Awaiting, Error> {
        let Prepared {
            row,
            job,
            earlier,
            span,
        } = prepared;
        let engine = self.engine();
        Ok(Awaiting {
            outcome: engine.submit_awaited(row, job, client, earlier, span)?,
            durable: self.clone(),
        })
    }
}

/// Whether a caller waits for the response. Decides how long the request is retried by default, and
/// whether a final response without success completes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Awaited,
    Fired,
}

/// A request that was checked and encoded.
pub(crate) struct Prepared {
    pub(super) row: NewRequest,
    job: Job,
    /// The call that made the same request before. It may have persisted it.
    pub(super) earlier: Option<Marker>,
    /// The span of the enqueue.
    pub(super) span: Option<EnqueueSpan>,
}

impl Prepared {
    pub(crate) fn id(&self) -> RequestId {
        self.row.id
    }

    pub(super) fn request(&self) -> Arc<Request> {
        Arc::clone(&self.job.request)
    }

    pub(super) fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.job.request, &self.job.uri)
    }
}

/// Waits for the outcome of a request that was submitted. Runs on any executor.
pub(crate) struct Awaiting {
    outcome: AwaitOutcome,
    /// While a caller waits, the handle's runner keeps running.
    durable: Durable,
}

impl Awaiting {
    /// The handle that the request was submitted to.
    pub(crate) fn durable(&self) -> &Durable {
        &self.durable
    }
}

impl Future for Awaiting {
    type Output = Result<Outcome, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.outcome).poll(cx)
    }
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;
    use crate::testkit::Postgres;

    /// Too long for an index, and hard to compress.
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
        // No front lets any of these get this far.
        prepared[17].row.head.push('\0');
        prepared[80].row.group = overlong();
        prepared[200].row.id = prepared[100].row.id;
        // Submitted at once, so they are one batch.
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
