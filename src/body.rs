//! The body type used at the crate's edges.
//!
//! A persisted request has its body in memory, so that each attempt can send it again. A request or
//! response that only passes through keeps streaming. One concrete type serves both, because a
//! layer that is generic over its inner body can't name the body it sends.

use std::fmt;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;

use crate::error::BoxError;

/// An [`http_body::Body`] over [`Bytes`]. Wrapped services send it, and callers get it back.
///
/// # Examples
///
/// ```
/// use requeuest::Body;
///
/// let request = http::Request::post("https://example.com/").body(Body::from("hello"))?;
/// # Ok::<(), http::Error>(())
/// ```
pub struct Body(Inner);

enum Inner {
    /// `None` once the bytes have been read. An absent body is `None` from the start.
    Buffered {
        data: Option<Bytes>,
        trailers: Option<HeaderMap>,
    },
    // The mutex is never contended. It only makes the type `Sync`, which reqwest's `Body::wrap`
    // requires and boxed bodies are not.
    Stream(Mutex<UnsyncBoxBody<Bytes, BoxError>>),
}

impl Body {
    /// No body.
    pub fn empty() -> Self {
        Self::buffered(None, None)
    }

    /// Wraps any body that is `Send`, without reading it.
    pub fn wrap<B>(body: B) -> Self
    where
        B: HttpBody + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        let body = body
            .map_frame(|frame| frame.map_data(|mut data| data.copy_to_bytes(data.remaining())))
            .map_err(Into::into)
            .boxed_unsync();
        Self(Inner::Stream(Mutex::new(body)))
    }

    pub(crate) fn buffered(data: Option<Bytes>, trailers: Option<HeaderMap>) -> Self {
        Self(Inner::Buffered { data, trailers })
    }

    /// Whether there is a body, even an empty one.
    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn is_present(&self) -> bool {
        !matches!(
            &self.0,
            Inner::Buffered {
                data: None,
                trailers: None
            }
        )
    }

    /// The whole body, if it is in memory and has not been read yet.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match &self.0 {
            Inner::Buffered { data, .. } => Some(data.as_deref().unwrap_or_default()),
            Inner::Stream(_) => None,
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Inner::Buffered { data, trailers } => {
                let frame = match data.take() {
                    Some(data) if !data.is_empty() => Some(Frame::data(data)),
                    _ => trailers.take().map(Frame::trailers),
                };
                Poll::Ready(frame.map(Ok))
            }
            Inner::Stream(body) => {
                let body = body.get_mut().unwrap_or_else(PoisonError::into_inner);
                Pin::new(body).poll_frame(cx)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Buffered { data, trailers } => {
                data.as_ref().is_none_or(Bytes::is_empty) && trailers.is_none()
            }
            Inner::Stream(body) => locked(body).is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Buffered { data, .. } => {
                SizeHint::with_exact(data.as_ref().map_or(0, Bytes::len) as u64)
            }
            Inner::Stream(body) => locked(body).size_hint(),
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl From<Bytes> for Body {
    fn from(data: Bytes) -> Self {
        Self::buffered(Some(data), None)
    }
}

impl From<Vec<u8>> for Body {
    fn from(data: Vec<u8>) -> Self {
        Bytes::from(data).into()
    }
}

impl From<String> for Body {
    fn from(data: String) -> Self {
        Bytes::from(data).into()
    }
}

impl From<&'static str> for Body {
    fn from(data: &'static str) -> Self {
        Bytes::from_static(data.as_bytes()).into()
    }
}

impl From<&'static [u8]> for Body {
    fn from(data: &'static [u8]) -> Self {
        Bytes::from_static(data).into()
    }
}

impl From<Body> for reqwest::Body {
    fn from(body: Body) -> Self {
        match body.0 {
            // Passed as bytes, so that reqwest can resend the body if the connection turns out to
            // be dead.
            Inner::Buffered {
                data,
                trailers: None,
            } => data.unwrap_or_default().into(),
            inner => reqwest::Body::wrap(Body(inner)),
        }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Inner::Buffered { data, .. } => {
                write!(f, "Body({} bytes)", data.as_ref().map_or(0, Bytes::len))
            }
            Inner::Stream(_) => f.write_str("Body(stream)"),
        }
    }
}
