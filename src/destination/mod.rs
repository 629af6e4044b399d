//! Destinations, and the groups that a poll is fair over.
//!
//! A destination is the scheme, host and port of a URL, or the caller's limit key. What it may be
//! asked to take is in [`policy`], which destinations a policy is for in [`pattern`], and what all
//! processes know of it in [`state`].
//!
//! A group is the second part of a row's queue (`channel_args`): `hhhh|o|key` for requests with an
//! ordering key, `hhhh|c|key` for requests with an ordering key that each channel orders
//! separately, and `hhhh|d|destination` for all others. The four hexadecimal digits are a hash of
//! the rest. They spread the groups evenly over the index, so that a runner can start its round
//! anywhere and skip from group to group.

mod breaker;
mod event;
mod name;
mod pattern;
mod policy;
mod retry_budget;
mod state;
mod streak;
mod window;

use std::borrow::Cow;
use std::fmt;

use http::Uri;

pub use self::event::{
    DestinationEvent, DestinationEventKind, DestinationState, DestinationStatus,
};
pub(crate) use self::name::{validate_limit_key, validate_name};
pub use self::pattern::DestinationPattern;
pub(crate) use self::pattern::Policies;
pub use self::policy::{AutoDisable, CircuitBreaker, DestinationPolicy, RateLimit, RetryBudget};
pub(crate) use self::retry_budget::RetryMeter;
pub(crate) use self::state::{Millis, Report, State, Until, millis};

/// The group of requests with this ordering key.
pub(crate) fn ordered_group(key: &str) -> String {
    group('o', key)
}

/// The group of requests with an ordering key that each channel orders separately, as the older API
/// does.
pub(crate) fn channel_ordered_group(key: &str) -> String {
    group('c', key)
}

/// The key of a group that is an ordering key.
pub(crate) fn ordering_key(group: &str) -> &str {
    group.get("hhhh|o|".len()..).unwrap_or_default()
}

/// The destination that a group of unordered requests names.
pub(crate) fn destination_of(group: &str) -> &str {
    group.get("hhhh|d|".len()..).unwrap_or_default()
}

/// The group of unordered requests: their destination, or a name of the caller's.
pub(crate) fn named_group(name: &str) -> String {
    group('d', name)
}

/// The name of a request's destination: its limit key, or scheme, host and port.
pub(crate) fn name_of<'a>(limit_key: Option<&'a str>, uri: &Uri) -> Cow<'a, str> {
    match limit_key {
        Some(key) => Cow::Borrowed(key),
        None => Cow::Owned(Destination::of(uri).to_string()),
    }
}

/// Scheme, host and port of a URL; the port is always included. No other part of a URL may be
/// shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Destination<'a> {
    scheme: &'a str,
    host: &'a str,
    port: u16,
}

impl<'a> Destination<'a> {
    pub(crate) fn of(uri: &'a Uri) -> Self {
        let scheme = uri.scheme_str().unwrap_or("http");
        Self {
            scheme,
            host: uri.host().unwrap_or_default(),
            port: uri
                .port_u16()
                .unwrap_or(if scheme == "https" { 443 } else { 80 }),
        }
    }
}

impl fmt::Display for Destination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.scheme)?;
        if self.host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            f.write_str(&self.host.to_ascii_lowercase())?;
        } else {
            f.write_str(self.host)?;
        }
        write!(f, ":{}", self.port)
    }
}

fn group(kind: char, name: &str) -> String {
    format!("{:04x}|{kind}|{name}", fnv1a(name.as_bytes()) as u16)
}

/// FNV-1a. Stored rows contain its result, so it must never change. The standard library's hashers
/// may change.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_scheme_host_and_port() {
        let group = |uri: &'static str| named_group(&name_of(None, &Uri::from_static(uri)));
        assert_eq!(group("http://A.example/x?y"), group("http://a.example:80/"));
        assert_ne!(group("http://a.example/"), group("https://a.example/"));
        assert!(group("https://user:pw@a.example/").ends_with("|d|https://a.example:443"));
        let uri = Uri::from_static("http://a.example/");
        assert_eq!(name_of(Some("tenant-7"), &uri), "tenant-7");
    }

    #[test]
    fn the_stored_hash_never_changes() {
        assert_eq!(ordered_group("invoice-42"), "90e1|o|invoice-42");
        assert_eq!(ordered_group(""), "2325|o|");
    }
}
