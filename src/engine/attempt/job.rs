//! What there is to send.

use std::borrow::Cow;
use std::sync::Arc;

use http::{Extensions, Uri};

use crate::codec::Delivery;
use crate::destination::{Destination, name_of};
use crate::id::RequestId;
use crate::request::Request;

/// What is sent, and how. Shared by all attempts of one claim.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) id: RequestId,
    pub(crate) request: Arc<Request>,
    pub(crate) uri: Uri,
    pub(crate) delivery: Arc<Delivery>,
    pub(crate) channel: Arc<str>,
    /// What a waiting caller attached to the request. Each attempt gets its own copy.
    pub(crate) extensions: Extensions,
}

impl Job {
    pub(crate) fn new(
        id: RequestId,
        channel: Arc<str>,
        request: Request,
        uri: Uri,
        delivery: Delivery,
    ) -> Self {
        Self {
            id,
            request: Arc::new(request),
            uri,
            delivery: Arc::new(delivery),
            channel,
            extensions: Extensions::new(),
        }
    }

    /// The key of limits, breakers and pauses: the request's limit key, or where it goes.
    pub(crate) fn limit_name(&self) -> Cow<'_, str> {
        name_of(self.delivery.limit_key.as_deref(), &self.uri)
    }

    /// Where the request goes, and what logs show of its URL.
    pub(crate) fn destination(&self) -> Destination<'_> {
        Destination::of(&self.uri)
    }
}
