//! The bodies that convert into [`Body`], and the two clients' bodies that it converts into.

use std::borrow::Cow;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use http_body::Body as HttpBody;
use http_body_util::combinators::{BoxBody, UnsyncBoxBody};
use http_body_util::{Empty, Full};

use super::{Body, Inner};
use crate::error::BoxError;

/// A body that a request for [`Durable::fire`](crate::Durable::fire) may have: nothing, bytes,
/// text, or the bodies of http-body-util, hyper, reqwest and (with the feature `axum`) axum.
///
/// Each of them also converts into [`Body`] by `From`. It can't be implemented outside this crate;
/// [`Body::wrap`] makes a [`Body`] of any other [`http_body::Body`].
#[diagnostic::on_unimplemented(
    message = "requeuest can't read a request body of type `{Self}`",
    label = "this body is none of `()`, bytes, text, `Full`, `Empty`, `BoxBody`, `reqwest::Body`, \
             `requeuest::Body`",
    note = "wrap any other body that implements `http_body::Body`: \
            `request.map(requeuest::Body::wrap)`",
    note = "`axum::body::Body` needs requeuest's feature `axum`"
)]
pub trait IntoBody: sealed::IntoBody {}

mod sealed {
    pub trait IntoBody: Into<super::Body> {}
}

macro_rules! into_body {
    ($($(#[$attribute:meta])* $(@$error:ident)? $type:ty: $convert:expr;)*) => {$(
        $(#[$attribute])*
        impl$(<$error: Into<BoxError> + 'static>)? From<$type> for Body {
            fn from(body: $type) -> Self {
                let convert: fn($type) -> Body = $convert;
                convert(body)
            }
        }

        $(#[$attribute])*
        impl$(<$error: Into<BoxError> + 'static>)? sealed::IntoBody for $type {}

        $(#[$attribute])*
        impl$(<$error: Into<BoxError> + 'static>)? IntoBody for $type {}
    )*};
}

impl sealed::IntoBody for Body {}

impl IntoBody for Body {}

into_body! {
    (): |()| Body::empty();
    Bytes: |data| Body::buffered(Some(data), None);
    BytesMut: |data| data.freeze().into();
    Vec<u8>: |data| Bytes::from(data).into();
    Box<[u8]>: |data| Bytes::from(data).into();
    &'static [u8]: |data| Bytes::from_static(data).into();
    String: |text| Bytes::from(text).into();
    &'static str: |text| Bytes::from_static(text.as_bytes()).into();
    Cow<'static, str>: |text| match text {
        Cow::Borrowed(text) => text.into(),
        Cow::Owned(text) => text.into(),
    };
    Full<Bytes>: |body| full(body);
    Empty<Bytes>: |_| Body::empty();
    @E BoxBody<Bytes, E>: |body| Body::wrap(body);
    @E UnsyncBoxBody<Bytes, E>: |body| Body::wrap(body);
    hyper::body::Incoming: |body| Body::wrap(body);
    reqwest::Body: |body| match in_memory(body) {
        Ok(data) => data.into(),
        Err(stream) => Body::wrap(stream),
    };
    #[cfg(feature = "axum")]
    axum_core::body::Body: |body| Body::wrap(body);
}

/// Takes the bytes of a body that is a single frame, without a copy.
fn full(mut body: Full<Bytes>) -> Body {
    let len = HttpBody::size_hint(&body).lower();
    single_frame(&mut body, len).unwrap_or_default().into()
}

/// Takes the bytes of a body that holds them in memory, without a copy.
pub(crate) fn in_memory(mut body: reqwest::Body) -> Result<Bytes, reqwest::Body> {
    let Some(len) = body.as_bytes().map(<[u8]>::len) else {
        return Err(body);
    };
    single_frame(&mut body, len as u64).ok_or(body)
}

/// The whole of a body in memory: a single frame that is ready at once, or none if it is empty.
fn single_frame<B>(body: &mut B, len: u64) -> Option<Bytes>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    if len == 0 {
        return Some(Bytes::new());
    }
    let mut context = Context::from_waker(Waker::noop());
    match Pin::new(body).poll_frame(&mut context) {
        Poll::Ready(Some(Ok(frame))) => {
            let data = frame.into_data().ok()?;
            (data.len() as u64 == len).then_some(data)
        }
        _ => None,
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

#[cfg(feature = "axum")]
impl From<Body> for axum_core::body::Body {
    fn from(body: Body) -> Self {
        match body.0 {
            Inner::Buffered {
                data,
                trailers: None,
            } => data.unwrap_or_default().into(),
            inner => axum_core::body::Body::new(Body(inner)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_in_memory_are_taken_without_a_copy() {
        let data = Bytes::from(vec![7; 1000]);
        let taken = in_memory(reqwest::Body::from(data.clone())).unwrap();
        assert_eq!(taken.as_ptr(), data.as_ptr());
        let body = Body::from(Full::new(data.clone()));
        assert_eq!(body.as_bytes().unwrap().as_ptr(), data.as_ptr());
    }

    #[test]
    fn a_clone_of_a_stream_says_so() {
        let body = Body::wrap(Full::new(Bytes::from("hello")));
        let mut clone = body.clone();
        assert!(body.is_stream() && clone.is_stream());
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(Some(Err(error))) = Pin::new(&mut clone).poll_frame(&mut context) else {
            panic!("the clone was read");
        };
        assert!(error.to_string().contains("stream"), "{error}");
    }
}
