//! The entry point for reqwest-middleware: a [`Durable`] is a middleware.
//!
//! While its caller waits, an attempt goes through the rest of the caller's stack, so inner
//! middleware and the client apply. [`Next`] borrows the client, so such an attempt runs inside the
//! caller's future. Attempts that outlive their caller go through the handle's transport.
//!
//! If the last attempt went through the caller's stack and brought no response, the caller gets the
//! stack's own error, as it would without this middleware.
//!
//! A retry middleware outside makes the same call again with the same extensions. Such a call, up
//! to five minutes after one that failed, attaches to the request that is persisted already.

use std::time::{Duration, Instant};

use http::Extensions;
use reqwest_middleware::{Error as MiddlewareError, Middleware, Next, Result as MiddlewareResult};
use url::Url;

use crate::body::{Body, in_memory};
use crate::context;
use crate::durable::{Durable, Mode, RequestHead};
use crate::engine::attempt::caller_client::CallerClient;
use crate::engine::attempt::send::{KeptByCaller, Sender};
use crate::engine::attempt::transport::from_reqwest;
use crate::error::{BoxError, Error};
use crate::id::RequestId;
use crate::into_request::collect;
use crate::layer::accepted;
use crate::options::Options;
use crate::repetition::Marker;
use crate::request::Request;
use crate::response::Response;
use crate::runtime::BoxFuture;

/// How much later than reqwest an attempt gives up, if both have the same timeout.
const TIMEOUT_MARGIN: Duration = Duration::from_millis(100);

#[async_trait::async_trait]
impl Middleware for Durable {
    async fn handle(
        &self,
        mut request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> MiddlewareResult<reqwest::Response> {
        // An attempt comes here if a transport contains this or another handle. The one that makes
        // it may have no guard of its own.
        let passes = context::is_attempt(extensions)
            || self.passes_through(&RequestHead::of_reqwest(&request));
        if passes {
            self.admit_url(request.url()).map_err(refused)?;
            return next.run(request, extensions).await;
        }
        self.warn_of_plain_transport();
        let options = extensions.get::<Options>().cloned().unwrap_or_default();
        let limit = self.max_request_body();
        let (body, trailers) = match request.body_mut().take() {
            None => (None, None),
            Some(body) => buffer(body, limit).await.map_err(refused)?,
        };
        let fire = options.fire;
        let mode = if fire { Mode::Fired } else { Mode::Awaited };
        let durable_request =
            Request::from_reqwest_head(&request, body, trailers).with_over_timeout(options);
        let prepared = self
            .prepare_call(durable_request, mode, extensions.remove())
            .map_err(refused)?;
        let (id, marker) = (prepared.id(), self.marker(&prepared));
        let original = extensions.clone();
        // From here on, because the call may be dropped.
        extensions.insert(marker.clone());
        if fire {
            let submitted = self.submit(prepared, None).map_err(refused)?.await;
            let marker = submitted.is_err().then(|| marker.ended(Instant::now()));
            leave(extensions, id, submitted.as_ref().copied(), marker);
            return submitted.map(|id| accepted(id).into()).map_err(refused);
        }
        let (client, mut claims) = CallerClient::future();
        let outcome = self
            .submit_awaited(prepared, Some(client))
            .map_err(refused)?;
        let mut sender = Inner {
            next,
            template: request,
            original,
            latest: None,
            failed: None,
        };
        let outcome = tokio::select! {
            // First, because it also ends the wait between two attempts.
            biased;
            outcome = outcome => outcome,
            never = claims.drive(&mut sender) => match never {},
        };
        // Outer middleware sees the extensions that inner middleware set during the last attempt.
        if let Some(latest) = sender.latest {
            *extensions = latest;
            context::detach(extensions);
        }
        let (response, marker) = self.end_call(marker, outcome);
        leave(extensions, id, response.as_ref().map(Response::id), marker);
        response
            .map(Into::into)
            .map_err(|error| match sender.failed {
                // As if the stack had been called without this middleware.
                Some(own) if error.is_with_caller() => own,
                _ => refused(error),
            })
    }
}

/// Leaves the id of the call's request in the caller's extensions, and the call's marker if a
/// repetition should attach to the request.
fn leave(
    extensions: &mut Extensions,
    id: RequestId,
    ended: Result<RequestId, &Error>,
    marker: Option<Marker>,
) {
    // With a caller's key, it may be an earlier request.
    extensions.insert(ended.unwrap_or_else(|error| error.request_id().unwrap_or(id)));
    match marker {
        Some(marker) => drop(extensions.insert(marker)),
        None => drop(extensions.remove::<Marker>()),
    }
}

fn refused(error: Error) -> MiddlewareError {
    MiddlewareError::middleware(error)
}

type Buffered = (Option<bytes::Bytes>, Option<http::HeaderMap>);

async fn buffer(body: reqwest::Body, limit: usize) -> Result<Buffered, Error> {
    let body = match in_memory(body) {
        Ok(data) => return Ok((Some(data), None)),
        Err(stream) => stream,
    };
    let collected = collect(body, limit).await?;
    let trailers = collected.trailers().cloned();
    Ok((Some(collected.to_bytes()), trailers))
}

/// The URL without its credentials, path, query and fragment.
fn origin(url: &Url) -> Url {
    let mut origin = url.clone();
    // A URL that can't have them has none.
    let _ = origin.set_username("");
    let _ = origin.set_password(None);
    origin.set_path("");
    origin.set_query(None);
    origin.set_fragment(None);
    origin
}

/// Sends through the rest of the caller's stack.
struct Inner<'a> {
    next: Next<'a>,
    /// The caller's request without its body. It keeps reqwest's private settings of the request.
    template: reqwest::Request,
    original: Extensions,
    latest: Option<Extensions>,
    /// The stack's own error, if the latest attempt failed.
    failed: Option<MiddlewareError>,
}

impl Sender for Inner<'_> {
    fn send(
        &mut self,
        request: http::Request<Body>,
    ) -> BoxFuture<'_, Result<http::Response<Body>, BoxError>> {
        Box::pin(self.pass_on(request))
    }

    fn keep(&mut self, error: BoxError) -> BoxError {
        match error.downcast::<reqwest::Error>() {
            Ok(error) => self.fails(MiddlewareError::Reqwest(*error)).into(),
            Err(error) => error,
        }
    }

    fn timeout_margin(&self) -> Duration {
        // The client's own timeout is the same one, and its error is the one that the caller knows.
        match self.template.timeout() {
            Some(_) => TIMEOUT_MARGIN,
            None => Duration::ZERO,
        }
    }
}

impl Inner<'_> {
    async fn pass_on(
        &mut self,
        request: http::Request<Body>,
    ) -> Result<http::Response<Body>, BoxError> {
        let (head, body) = request.into_parts();
        // A request without a body can always be cloned.
        let mut attempt = self
            .template
            .try_clone()
            .ok_or("the request can't be cloned")?;
        *attempt.headers_mut() = head.headers;
        if body.is_present() {
            *attempt.body_mut() = Some(body.into());
        }
        // Each attempt gets fresh extensions, so that attempts don't see each other's.
        self.failed = None;
        let extensions = self.latest.insert(self.original.clone());
        extensions.extend(head.extensions);
        match self.next.clone().run(attempt, extensions).await {
            Ok(response) => Ok(from_reqwest(response).map(Body::wrap)),
            Err(error) => Err(self.fails(error).into()),
        }
    }

    /// Keeps the stack's error for the caller. Returns what the attempt says of it.
    fn fails(&mut self, error: MiddlewareError) -> KeptByCaller {
        // Unwrapped, because the wrapper hides the error: it isn't part of the chain of sources.
        let (kept, error) = match error {
            MiddlewareError::Reqwest(error) => {
                let origin = error.url().map(origin);
                let error = error.without_url();
                let kept = KeptByCaller::of(&error);
                // The rest of the URL may be secret.
                let error = match origin {
                    Some(origin) => error.with_url(origin),
                    None => error,
                };
                (kept, MiddlewareError::Reqwest(error))
            }
            MiddlewareError::Middleware(error) => {
                let kept = KeptByCaller::of(error.as_ref());
                (kept, MiddlewareError::Middleware(error))
            }
        };
        self.failed = Some(error);
        kept
    }
}
