//! How a request ended, and what its caller gets.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::metadata::Metadata;
use crate::redact::shorten;
use crate::response::Response;
use crate::status::Status;

/// The class of an outcome whose response body exceeds the limit.
pub(crate) const RESPONSE_TOO_LARGE: &str = "response_too_large";

/// The class of an outcome whose request a newer request superseded, as the migrations write it.
const SUPERSEDED: &str = "superseded";

/// The final result of a request.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub(crate) id: RequestId,
    pub(crate) status: Status,
    pub(crate) attempts: u32,
    pub(crate) response: Option<Response>,
    pub(crate) fault: Option<Fault>,
    pub(crate) metadata: Option<Metadata>,
    /// The claim that ended the request made no attempt, so the claim is not counted as one.
    pub(crate) without_attempt: bool,
}

/// Why there is no response, or no complete one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fault {
    pub(crate) class: Cow<'static, str>,
    pub(crate) text: String,
    /// Where a request that was given up was going.
    pub(crate) destination: Option<Box<str>>,
    pub(crate) cause: Option<Cause>,
}

impl Fault {
    pub(crate) fn new(class: impl Into<Cow<'static, str>>, mut text: String) -> Self {
        shorten(&mut text);
        Self {
            class: class.into(),
            text,
            destination: None,
            cause: None,
        }
    }
}

/// The error behind a failed attempt, if this process made it. Only its text is stored.
#[derive(Clone)]
pub(crate) enum Cause {
    Error(Arc<dyn StdError + Send + Sync>),
    /// The caller made the attempt through its own stack, and has the error.
    #[cfg_attr(
        not(feature = "reqwest-middleware"),
        expect(dead_code, reason = "only the middleware's callers send by themselves")
    )]
    WithCaller,
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The error may show secrets of a URL, and its text is in the fault.
        f.write_str(match self {
            Self::Error(_) => "Error",
            Self::WithCaller => "WithCaller",
        })
    }
}

impl Outcome {
    /// The id of the request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// How the request ended: a terminal status.
    pub fn status(&self) -> Status {
        self.status
    }

    /// How many attempts were made.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The response. If the request was given up, its last response, if there was one.
    pub fn response(&self) -> Option<&Response> {
        self.response.as_ref()
    }

    /// Why there is no response, or no complete one.
    pub fn error(&self) -> Option<&str> {
        self.fault.as_ref().map(|fault| &*fault.text)
    }

    /// What the application attached to the request with
    /// [`Options::metadata`](crate::Options::metadata). Parsed at the first call; outcomes are read
    /// without parsing it.
    pub fn metadata(&self) -> Option<&serde_json::Value> {
        self.metadata.as_ref()?.value()
    }

    /// An outcome with a response: a final one, or the last one of a request that is given up.
    pub(crate) fn answered(status: Status, response: Response) -> Self {
        Self {
            id: response.id,
            status,
            attempts: 0,
            response: Some(response),
            fault: None,
            metadata: None,
            without_attempt: false,
        }
    }

    /// An outcome with a response whose body exceeds the limit.
    pub(crate) fn too_large(status: Status, response: Response, limit: usize) -> Self {
        let text = format!("the response body is longer than {limit} bytes");
        let fault = Fault::new(RESPONSE_TOO_LARGE, text);
        Self {
            fault: Some(fault),
            ..Self::answered(status, response)
        }
    }

    /// Drops the body, as if it exceeded the limit, because the database refuses it. Returns
    /// whether there was a body.
    pub(crate) fn drop_body(&mut self) -> bool {
        match &mut self.response {
            Some(response) if !response.body.is_empty() => {
                response.body = Bytes::new();
                response.trailers = None;
                let text = "the database refused the response body".to_owned();
                self.fault = Some(Fault::new(RESPONSE_TOO_LARGE, text));
                true
            }
            _ => false,
        }
    }

    /// An outcome of a request that is given up without a response to the last attempt.
    pub(crate) fn discarded(id: RequestId, fault: Fault) -> Self {
        Self {
            id,
            status: Status::Discarded,
            attempts: 0,
            response: None,
            fault: Some(fault),
            metadata: None,
            without_attempt: false,
        }
    }

    /// Marks the outcome as that of a claim that made no attempt.
    pub(crate) fn without_attempt(mut self) -> Self {
        self.without_attempt = true;
        self
    }

    /// An outcome of a request that may have been sent, got no answer, and must not be sent again.
    pub(crate) fn ambiguous(id: RequestId, fault: Fault) -> Self {
        Self {
            status: Status::Ambiguous,
            ..Self::discarded(id, fault)
        }
    }

    /// What a waiting caller gets: the last response if there is one, else why there is none.
    ///
    /// # Errors
    ///
    /// The same errors as [`Durable::response`](crate::Durable::response).
    pub fn into_result(self) -> Result<Response, Error> {
        let too_large = self
            .fault
            .as_ref()
            .is_some_and(|fault| fault.class == RESPONSE_TOO_LARGE);
        let superseded = self
            .fault
            .as_ref()
            .is_some_and(|fault| fault.class == SUPERSEDED);
        let kind = match (self.status, self.response) {
            (Status::Completed | Status::Discarded, Some(response)) if too_large => {
                Kind::ResponseTooLarge {
                    status: response.status,
                    headers: Box::new(response.headers),
                }
            }
            (Status::Completed | Status::Discarded, Some(response)) => return Ok(response),
            (Status::Cancelled, _) => Kind::Cancelled { superseded },
            (Status::Ambiguous, _) => Kind::Ambiguous(Box::new(self.fault.unwrap_or_default())),
            (Status::Completed, None) => Kind::ResponseUnknown,
            (_, _) => Kind::Discarded {
                attempts: self.attempts,
                fault: Box::new(self.fault.unwrap_or_default()),
            },
        };
        Err(Error::new(kind).with_id(self.id))
    }
}
