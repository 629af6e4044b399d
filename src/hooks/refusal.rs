//! Why a hook doesn't let an attempt be sent.

use std::error::Error as StdError;
use std::time::Duration;

use crate::error::{BoxError, chain};

/// Ends an attempt before it is sent. The reason is stored with the attempt and shown, so it must
/// not contain secrets; paths and queries of URLs are removed from it.
///
/// Any error becomes a refusal through `?`, as with [`failed`](Self::failed).
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use requeuest::hooks::Refusal;
///
/// let closed = Refusal::retry_after(Duration::from_secs(3600), "the branch is closed");
/// let gone = Refusal::discard("the customer has left");
/// ```
#[derive(Debug)]
pub struct Refusal {
    pub(crate) then: Then,
    pub(crate) reason: String,
}

/// What becomes of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// As the classifier says.
    Judge,
    /// Another attempt, but not before this time has passed.
    Retry(Duration),
    /// It is given up.
    Discard,
}

impl Refusal {
    /// The attempt is made again after the delay of the request's retry policy, for as long as the
    /// policy allows another one.
    pub fn retry(reason: impl Into<String>) -> Self {
        Self::retry_after(Duration::ZERO, reason)
    }

    /// As [`retry`](Self::retry), but not before this delay has passed. The request is given up if
    /// its policy's [`max_age`](crate::retry::RetryPolicy::max_age) or its deadline passes before
    /// that.
    pub fn retry_after(delay: Duration, reason: impl Into<String>) -> Self {
        Self {
            then: Then::Retry(delay),
            reason: reason.into(),
        }
    }

    /// The request is given up, and becomes a dead letter.
    pub fn discard(reason: impl Into<String>) -> Self {
        Self {
            then: Then::Discard,
            reason: reason.into(),
        }
    }

    /// The hook has failed. As after other failures, the [classifier](crate::classify) says whether
    /// the attempt is made again. By default it is.
    pub fn failed(error: impl Into<BoxError>) -> Self {
        Self {
            then: Then::Judge,
            reason: chain(&*error.into()),
        }
    }
}

impl<E: StdError + Send + Sync + 'static> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::failed(error)
    }
}
