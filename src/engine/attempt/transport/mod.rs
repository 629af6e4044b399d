//! The clients that send: a wrapped service, or a client of reqwest.

#[cfg(feature = "ssrf-guard")]
mod guarded;
mod map_body;
#[cfg(feature = "reqwest-middleware")]
mod middleware;
mod plain;
mod redirect;
mod reqwest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use http_body::Body as HttpBody;
use tower::util::{BoxCloneService, MapErr};
use tower::{Service, ServiceExt};

use crate::body::Body;
use crate::engine::config::Config;
use crate::error::{BoxError, Error};

#[cfg(feature = "ssrf-guard")]
pub(super) use self::guarded::is_denied;
pub use self::map_body::MapBody;
#[cfg(feature = "reqwest-middleware")]
pub use self::middleware::MiddlewareTransport;
pub(crate) use self::plain::PlainTransport;
pub(super) use self::redirect::AfterRedirect;
pub(crate) use self::reqwest::ResponseUrl;
#[cfg(feature = "reqwest-middleware")]
pub(crate) use self::reqwest::from_reqwest;
pub use self::reqwest::{ReqwestFuture, ReqwestTransport};

/// The services that send for this crate: an alias of the bound in its `where` clause, which holds
/// for every type that meets it. It can't be implemented otherwise.
///
/// A client over another body type becomes one through [`MapBody`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an HTTP client that requeuest can send with",
    label = "expected a `Service<http::Request<requeuest::Body>>` that answers with an \
             `http::Response` and is `Clone + Send + 'static`",
    note = "adapt a client over another body with `requeuest::MapBody::new(client, convert)`",
    note = "wrap a `reqwest::Client` in `requeuest::ReqwestTransport::new(client)`"
)]
pub trait HttpClient: sealed::HttpClient {}

#[diagnostic::do_not_recommend]
impl<S: sealed::HttpClient> HttpClient for S {}

mod sealed {
    use super::{Body, BoxError, HttpBody, Service};

    /// A [`Service`] from requests to responses with any body.
    pub trait HttpClient:
        Service<
            http::Request<Body>,
            Response = http::Response<Self::ResponseBody>,
            Error: Into<BoxError>,
            Future: Send + 'static,
        > + Clone
        + Send
        + 'static
    {
        type ResponseBody: HttpBody<Data: Send, Error: Into<BoxError>> + Send + 'static;
    }

    #[diagnostic::do_not_recommend]
    impl<S, B> HttpClient for S
    where
        S: Service<http::Request<Body>, Response = http::Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: HttpBody + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        type ResponseBody = B;
    }
}

/// Any HTTP client, with its type erased.
pub(crate) type Transport = BoxCloneService<http::Request<Body>, http::Response<Body>, BoxError>;

/// Erases a service's type.
pub(crate) fn erase<S: HttpClient>(service: S) -> Transport {
    let service: MapErr<_, fn(S::Error) -> BoxError> = service
        .map_response(wrap_body::<S::ResponseBody> as fn(_) -> _)
        .map_err(Into::into);
    BoxCloneService::new(service)
}

/// The transport of handles that were given none.
pub(crate) fn own(config: &Config) -> Result<Transport, Error> {
    #[cfg(feature = "ssrf-guard")]
    let setup = config.guard.as_ref().map(guarded::setup).transpose()?;
    #[cfg(not(feature = "ssrf-guard"))]
    let setup = None;
    let plain = PlainTransport::new(config.concurrency, setup)
        .map_err(|error| Error::config("transport", error.to_string()))?;
    if config.redirects.max() == 0 {
        return Ok(erase(plain));
    }
    let rules = redirect::Rules {
        redirects: config.redirects.clone(),
        #[cfg(feature = "ssrf-guard")]
        guard: config.guard.clone(),
    };
    Ok(erase(redirect::Following::new(plain, rules)))
}

fn wrap_body<B>(response: http::Response<B>) -> http::Response<Body>
where
    B: HttpBody + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    response.map(Body::wrap)
}

/// The transport of attempts that don't run through a caller's own client. The runner claims
/// nothing until it is known.
#[derive(Default)]
pub(crate) struct DefaultTransport {
    // `BoxCloneService` isn't `Sync`.
    transport: Mutex<Option<Transport>>,
    /// It is the crate's own, which makes no spans.
    is_own: AtomicBool,
    known: tokio::sync::Notify,
}

impl DefaultTransport {
    /// Sets the transport unless one is set. Returns whether it was set.
    pub(crate) fn offer(&self, transport: impl FnOnce() -> Transport) -> bool {
        let mut current = self
            .transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if current.is_some() {
            return false;
        }
        *current = Some(transport());
        self.known.notify_waiters();
        true
    }

    pub(crate) fn set_own(&self, is_own: bool) {
        self.is_own.store(is_own, Ordering::Relaxed);
    }

    pub(crate) fn is_own(&self) -> bool {
        self.is_own.load(Ordering::Relaxed)
    }

    pub(crate) fn is_known(&self) -> bool {
        self.transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    pub(crate) fn get(&self) -> Option<Transport> {
        self.transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until a transport is known.
    pub(crate) async fn known(&self) {
        loop {
            let known = self.known.notified();
            if self.is_known() {
                return;
            }
            known.await;
        }
    }
}
