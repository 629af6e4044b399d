//! Follows redirects for the crate's own transport. All requests of a chain are one attempt.

use std::error::Error as StdError;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tower::Service;

use super::PlainTransport;
use crate::body::Body;
use crate::error::BoxError;
#[cfg(feature = "ssrf-guard")]
use crate::guard::Guard;
use crate::redirects::{Hop, Redirects, Unfollowed};

/// [`PlainTransport`], and the redirects that it doesn't follow.
#[derive(Clone, Debug)]
pub(super) struct Following {
    plain: PlainTransport,
    rules: Arc<Rules>,
}

#[derive(Debug)]
pub(super) struct Rules {
    pub(super) redirects: Redirects,
    #[cfg(feature = "ssrf-guard")]
    pub(super) guard: Option<Arc<Guard>>,
}

impl Rules {
    /// The request that an answer asks for, if it is followed.
    fn next(&self, hop: &Hop, answer: &http::Response<reqwest::Body>) -> Result<Hop, Stop> {
        let next = hop.next(&self.redirects, answer.status(), answer.headers());
        let next = next.ok_or(Stop::Here)?;
        #[cfg(feature = "ssrf-guard")]
        if let Some(guard) = &self.guard {
            guard
                .admit(&next.uri)
                .map_err(|denied| Stop::Failed(denied.into()))?;
        }
        Ok(next)
    }
}

/// Why a chain ends.
enum Stop {
    /// The answer is the response.
    Here,
    #[cfg_attr(
        not(feature = "ssrf-guard"),
        expect(dead_code, reason = "only the guard fails")
    )]
    Failed(BoxError),
}

impl Following {
    pub(super) fn new(plain: PlainTransport, rules: Rules) -> Self {
        Self {
            plain,
            rules: Arc::new(rules),
        }
    }
}

impl Service<http::Request<Body>> for Following {
    type Response = http::Response<reqwest::Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (mut plain, rules) = (self.plain.clone(), Arc::clone(&self.rules));
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let max = match parts.extensions.get::<Unfollowed>() {
                Some(Unfollowed) => 0,
                None => rules.redirects.max(),
            };
            let mut hop = Hop {
                method: parts.method,
                uri: parts.uri,
                headers: parts.headers,
                has_body: true,
            };
            let mut followed = 0;
            loop {
                let mut request = http::Request::new(Body::empty());
                if hop.has_body {
                    *request.body_mut() = body.clone();
                }
                *request.method_mut() = hop.method.clone();
                *request.uri_mut() = hop.uri.clone();
                *request.version_mut() = parts.version;
                *request.headers_mut() = hop.headers.clone();
                let answer = match plain.call(request).await {
                    Ok(answer) => answer,
                    Err(error) if followed == 0 => return Err(error.into()),
                    Err(error) => return Err(AfterRedirect(error.without_url().into()).into()),
                };
                if followed == max {
                    return Ok(answer);
                }
                // The answer's body isn't read: nothing bounds it.
                hop = match rules.next(&hop, &answer) {
                    Ok(next) => next,
                    Err(Stop::Here) => return Ok(answer),
                    Err(Stop::Failed(error)) => return Err(AfterRedirect(error).into()),
                };
                followed += 1;
            }
        })
    }
}

/// The error of a request that a redirect asked for. An earlier request of the chain was answered.
#[derive(Debug)]
pub(in crate::engine::attempt) struct AfterRedirect(BoxError);

impl fmt::Display for AfterRedirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("after a redirect")
    }
}

impl StdError for AfterRedirect {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.0)
    }
}
