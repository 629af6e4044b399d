//! The body type used at the crate's edges.
//!
//! A persisted request has its body in memory, so that each attempt can send it again. A request or
//! response that only passes through keeps streaming. One concrete type serves both, because a
//! layer that is generic over its inner body can't name the body it sends.

mod convert;
mod error;

use std::any::Any;
use std::fmt;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use serde::de::DeserializeOwned;

use crate::error::BoxError;

pub use self::convert::IntoBody;
pub(crate) use self::convert::in_memory;
pub use self::error::BodyError;

/// An [`http_body::Body`] over [`Bytes`]. Wrapped services send it, and callers get it back.
///
/// A body is either in memory, or a stream that can be read once. Persisted requests and their
/// responses have bodies in memory; only requests that pass through have streams. A clone of a body
/// in memory shares its bytes. A clone of a stream can't be read: reading it fails with a
/// [`BodyError`] that says so, and the original is not affected.
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
    /// The clone of a stream. Reading it is an error.
    CloneOfStream,
}

impl Body {
    /// No body.
    pub fn empty() -> Self {
        Self::buffered(None, None)
    }

    /// Wraps any body that is `Send`, without reading it. A [`Body`] stays as it is.
    pub fn wrap<B>(body: B) -> Self
    where
        B: HttpBody + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        let mut body = Some(body);
        // As a stream, a body in memory could not be sent again, nor be taken as bytes.
        let own = (&mut body as &mut dyn Any).downcast_mut::<Option<Self>>();
        if let Some(own) = own.and_then(Option::take) {
            return own;
        }
        let Some(body) = body else {
            return Self::empty();
        };
        let body = body
            .map_frame(|frame| frame.map_data(|mut data| data.copy_to_bytes(data.remaining())))
            .map_err(Into::into)
            .boxed_unsync();
        Self(Inner::Stream(Mutex::new(body)))
    }

    /// Whether the body is a stream, which can be read once and has no usable clone.
    pub fn is_stream(&self) -> bool {
        !matches!(self.0, Inner::Buffered { .. })
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

    /// Reads the whole body. A body in memory is returned without a copy.
    ///
    /// Only bodies that pass through are streams, and those are read without a limit.
    ///
    /// # Errors
    ///
    /// If a stream fails.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped, the data that was read is lost.
    ///
    /// # Examples
    ///
    /// ```
    /// # async fn example(response: http::Response<requeuest::Body>)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// let bytes = response.into_body().into_bytes().await?;
    /// # Ok(()) }
    /// ```
    pub async fn into_bytes(self) -> Result<Bytes, BodyError> {
        match self.0 {
            Inner::Buffered { data, .. } => Ok(data.unwrap_or_default()),
            stream => {
                let collected = Body(stream).collect().await?;
                Ok(collected.to_bytes())
            }
        }
    }

    /// Reads the whole body as UTF-8 text. See [`into_bytes`](Self::into_bytes).
    ///
    /// # Errors
    ///
    /// If a stream fails, or the body is not UTF-8.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped, the data that was read is lost.
    ///
    /// # Examples
    ///
    /// ```
    /// # async fn example(response: http::Response<requeuest::Body>)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// println!("{}", response.into_body().text().await?);
    /// # Ok(()) }
    /// ```
    pub async fn text(self) -> Result<String, BodyError> {
        let bytes = self.into_bytes().await?;
        String::from_utf8(bytes.into()).map_err(|error| BodyError::text(error.utf8_error()))
    }

    /// Reads the whole body and parses it as JSON. See [`into_bytes`](Self::into_bytes).
    ///
    /// # Errors
    ///
    /// If a stream fails, or the body is not JSON for a `T`.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped, the data that was read is lost.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[derive(serde::Deserialize)]
    /// # struct Charge;
    /// # async fn example(response: http::Response<requeuest::Body>)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// let charge: Charge = response.into_body().json().await?;
    /// # Ok(()) }
    /// ```
    pub async fn json<T: DeserializeOwned>(self) -> Result<T, BodyError> {
        let bytes = self.into_bytes().await?;
        serde_json::from_slice(&bytes).map_err(BodyError::json)
    }

    /// The whole body, if it is in memory and has not been read yet.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match &self.0 {
            Inner::Buffered { data, .. } => Some(data.as_deref().unwrap_or_default()),
            Inner::Stream(_) | Inner::CloneOfStream => None,
        }
    }

    /// The bytes and trailers of a body in memory, or the stream.
    #[expect(clippy::result_large_err, reason = "the body is as large as its parts")]
    pub(crate) fn into_buffered(self) -> Result<(Option<Bytes>, Option<HeaderMap>), Self> {
        match self.0 {
            Inner::Buffered { data, trailers } => Ok((data, trailers)),
            stream => Err(Self(stream)),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
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
                Pin::new(body).poll_frame(cx).map_err(BodyError::read)
            }
            Inner::CloneOfStream => Poll::Ready(Some(Err(BodyError::clone_of_stream()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Buffered { data, trailers } => {
                data.as_ref().is_none_or(Bytes::is_empty) && trailers.is_none()
            }
            Inner::Stream(body) => locked(body).is_end_stream(),
            Inner::CloneOfStream => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Buffered { data, .. } => {
                SizeHint::with_exact(data.as_ref().map_or(0, Bytes::len) as u64)
            }
            Inner::Stream(body) => locked(body).size_hint(),
            Inner::CloneOfStream => SizeHint::default(),
        }
    }
}

impl Clone for Body {
    fn clone(&self) -> Self {
        match &self.0 {
            Inner::Buffered { data, trailers } => Self::buffered(data.clone(), trailers.clone()),
            Inner::Stream(_) | Inner::CloneOfStream => Self(Inner::CloneOfStream),
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Inner::Buffered { data, .. } => {
                write!(f, "Body({} bytes)", data.as_ref().map_or(0, Bytes::len))
            }
            Inner::Stream(_) => f.write_str("Body(stream)"),
            Inner::CloneOfStream => f.write_str("Body(clone of a stream)"),
        }
    }
}
