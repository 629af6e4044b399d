//! The entry point for reqwest-middleware: a [`Durable`] is a middleware.
//!
//! While its caller waits, an attempt goes through the rest of the caller's stack, so inner
//! middleware and the client apply. [`Next`] borrows the client, so such an attempt runs inside the
//! caller's future. Attempts that outlive their caller go through the handle's transport.

use http::Extensions;
use http_body::Body as _;
use http_body_util::{BodyExt, Limited};
use reqwest_middleware::{Error as MiddlewareError, Middleware, Next, Result as MiddlewareResult};

use crate::body::{Body, in_memory};
use crate::durable::{Durable, Mode, RequestHead};
use crate::engine::attempt::caller_client::CallerClient;
use crate::engine::attempt::send::Sender;
use crate::engine::attempt::transport::from_reqwest;
use crate::error::{BoxError, Error};
use crate::into_request::body_error;
use crate::layer::accepted;
use crate::options::Options;
use crate::request::Request;
use crate::runtime::BoxFuture;

#[async_trait::async_trait]
impl Middleware for Durable {
    async fn handle(
        &self,
        mut request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> MiddlewareResult<reqwest::Response> {
        if self.passes_through(&RequestHead::of_reqwest(&request)) {
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
        let durable_request =
            Request::from_reqwest_head(&request, body, trailers).with_over_timeout(options);
        if fire {
            let prepared = self
                .prepare(durable_request, Mode::Fired)
                .map_err(refused)?;
            let submitted = self.submit(prepared, None).map_err(refused)?;
            let id = submitted.await.map_err(refused)?;
            return Ok(accepted(id).into());
        }
        let prepared = self
            .prepare(durable_request, Mode::Awaited)
            .map_err(refused)?;
        let (client, mut claims) = CallerClient::future();
        let response = self
            .submit_awaited(prepared, Some(client))
            .map_err(refused)?;
        let mut sender = Inner {
            next,
            template: request,
            original: extensions.clone(),
            latest: None,
        };
        let response = tokio::select! {
            // First, because it also ends the wait between two attempts.
            biased;
            response = response => response,
            never = claims.drive(&mut sender) => match never {},
        };
        // Outer middleware sees the extensions that inner middleware set during the last attempt.
        if let Some(latest) = sender.latest {
            *extensions = latest;
        }
        response.map(Into::into).map_err(refused)
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
    // A declared length over the limit is refused before the body is read.
    if body.size_hint().lower() > limit as u64 {
        return Err(Error::body_too_large(limit));
    }
    let collected = Limited::new(body, limit)
        .collect()
        .await
        .map_err(|error| body_error(error, limit))?;
    let trailers = collected.trailers().cloned();
    Ok((Some(collected.to_bytes()), trailers))
}

/// Sends through the rest of the caller's stack.
struct Inner<'a> {
    next: Next<'a>,
    /// The caller's request without its body. It keeps reqwest's private settings of the request.
    template: reqwest::Request,
    original: Extensions,
    latest: Option<Extensions>,
}

impl Sender for Inner<'_> {
    fn send(
        &mut self,
        request: http::Request<Body>,
    ) -> BoxFuture<'_, Result<http::Response<Body>, BoxError>> {
        Box::pin(self.pass_on(request))
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
        let extensions = self.latest.insert(self.original.clone());
        match self.next.clone().run(attempt, extensions).await {
            Ok(response) => Ok(from_reqwest(response).map(Body::wrap)),
            // Unwrapped, because the wrapper hides the error: it isn't part of the chain of
            // sources.
            Err(MiddlewareError::Reqwest(error)) => Err(error.into()),
            Err(MiddlewareError::Middleware(error)) => Err(error.into()),
        }
    }
}
