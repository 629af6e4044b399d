//! The names of attributes, and the values that they have for requests.

use http::{Method, Version};
use opentelemetry::KeyValue;

use crate::id::RequestId;

pub(super) const ERROR_TYPE: &str = "error.type";
pub(super) const MESSAGE_ID: &str = "messaging.message.id";

/// An error without a better name.
pub(super) const OTHER: &str = "_OTHER";

/// Of a request on its way to or from the queue.
pub(super) fn messaging(operation: &'static str, channel: &str, id: RequestId) -> Vec<KeyValue> {
    vec![
        KeyValue::new("messaging.system", "requeuest"),
        KeyValue::new("messaging.operation.name", operation),
        // The types are named as these operations are.
        KeyValue::new("messaging.operation.type", operation),
        KeyValue::new("messaging.destination.name", channel.to_owned()),
        KeyValue::new(MESSAGE_ID, id.to_string()),
    ]
}

/// The method by its name, if the conventions know it. Others would be names without a bound.
pub(super) fn known_method(method: &Method) -> Option<&'static str> {
    // Methods are case-sensitive. `PATCH` is of RFC 5789, the others of RFC 9110.
    [
        "CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE",
    ]
    .into_iter()
    .find(|known| *known == method.as_str())
}

pub(super) fn protocol_version(version: Version) -> &'static str {
    match version {
        Version::HTTP_09 => "0.9",
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        Version::HTTP_3 => "3",
        _ => "1.1",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_known_by_their_exact_name() {
        assert_eq!(known_method(&Method::PATCH), Some("PATCH"));
        for other in [&b"get"[..], b"PURGE", b"HUNTER2"] {
            assert_eq!(known_method(&Method::from_bytes(other).unwrap()), None);
        }
    }
}
