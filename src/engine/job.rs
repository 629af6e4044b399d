//! What there is to send.

use std::sync::Arc;

use http::{Extensions, Uri};

use crate::codec::Delivery;
use crate::id::RequestId;
use crate::request::Request;

/// What is sent, and how. Shared by all attempts of one claim.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) id: RequestId,
    pub(crate) request: Arc<Request>,
    pub(crate) uri: Uri,
    pub(crate) delivery: Arc<Delivery>,
    /// What the live caller attached to the request. Each attempt gets a copy of its own.
    pub(crate) extensions: Extensions,
}
