//! Why a body could not be read or decoded.

use std::error::Error as StdError;
use std::fmt;
use std::str::Utf8Error;

use crate::error::{BoxError, chain};
use crate::redact::error_text;

/// Why a [`Body`](crate::Body) could not be read or decoded. Its source is the client's or the
/// decoder's error.
///
/// Reading a body in memory never fails, and the body of a stored response is always in memory.
pub struct BodyError(Kind);

enum Kind {
    Read(BoxError),
    CloneOfStream,
    Text(Utf8Error),
    Json(serde_json::Error),
}

impl BodyError {
    pub(super) fn read(error: BoxError) -> Self {
        Self(Kind::Read(error))
    }

    pub(super) fn clone_of_stream() -> Self {
        Self(Kind::CloneOfStream)
    }

    pub(super) fn text(error: Utf8Error) -> Self {
        Self(Kind::Text(error))
    }

    pub(crate) fn json(error: serde_json::Error) -> Self {
        Self(Kind::Json(error))
    }

    /// The error of the client that was reading, if there is one.
    pub(crate) fn into_read_error(self) -> Result<BoxError, Self> {
        match self.0 {
            Kind::Read(error) => Ok(error),
            kind => Err(Self(kind)),
        }
    }
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Read(_) => "the body could not be read",
            Kind::CloneOfStream => {
                "the body is the clone of a stream, which can be read only once; call \
                 Body::into_bytes before cloning"
            }
            Kind::Text(_) => "the body is not UTF-8",
            Kind::Json(_) => "the body is not the expected JSON",
        })
    }
}

impl fmt::Debug for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An error from outside this crate may show secrets of a URL.
        write!(f, "BodyError({})", error_text(&chain(self)))
    }
}

impl StdError for BodyError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0 {
            Kind::Read(error) => Some(error.as_ref()),
            Kind::CloneOfStream => None,
            Kind::Text(error) => Some(error),
            Kind::Json(error) => Some(error),
        }
    }
}
