//! The id of a persisted request.
//!
//! Ids are `UUIDv7` (RFC 9562, section 5.7). The client makes them, so that a retried insert can be
//! recognised. They increase with time, so that new rows land at the right-hand edge of an index.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::ParseNameError;

/// Identifies a persisted request, from [`Durable::fire`](crate::Durable::fire) to its outcome.
///
/// Store it as text or as a [`Uuid`] and use it later, from any process, with
/// [`Durable::response`](crate::Durable::response) and [`Durable::status`](crate::Durable::status).
///
/// # Examples
///
/// ```
/// use requeuest::RequestId;
///
/// let id: RequestId = "019ab7c2-3b6e-7cc0-98c4-dc0c0c07398f".parse()?;
/// assert_eq!(id.to_string(), "019ab7c2-3b6e-7cc0-98c4-dc0c0c07398f");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(Uuid);

impl RequestId {
    /// A new id, greater than all ids that this process made before.
    pub(crate) fn generate() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RequestId({})", self.0)
    }
}

impl FromStr for RequestId {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let id = text.parse();
        id.map(Self)
            .map_err(|_| ParseNameError::new("a request id, which is a UUID"))
    }
}

impl From<Uuid> for RequestId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl From<RequestId> for Uuid {
    fn from(id: RequestId) -> Self {
        id.0
    }
}
