//! Why a guard denies a request.

use core::net::IpAddr;
use std::error::Error as StdError;
use std::fmt;

use super::address::Kind;
use crate::redact::{cut, storable};

/// How much of a host is shown, in bytes. No name that can be looked up is longer.
const MAX_SHOWN: usize = 255;

/// The error of a request that a guard denies. Shows the host and nothing else of the URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Denied {
    host: String,
    reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// The host is such an address.
    Address(Kind),
    /// The address carries such an IPv4 address.
    Carries(IpAddr, Kind),
    /// The name resolves to an address that is denied.
    Resolves(IpAddr, Box<Reason>),
    /// A rule of the guard denies it.
    Rule,
    Port(u16),
    /// The URL has no host that can be judged.
    Unreadable,
}

impl Denied {
    pub(super) fn new(host: &str, reason: Reason) -> Self {
        let mut host = storable(host);
        if cut(&mut host, MAX_SHOWN) {
            host.push('…');
        }
        Self { host, reason }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(kind) => f.write_str(kind),
            Self::Carries(inner, kind) => write!(f, "an address that leads to {inner}, {kind}"),
            Self::Resolves(address, reason) => match &**reason {
                Self::Rule => write!(f, "it resolves to {address}, which a rule denies"),
                reason => write!(f, "it resolves to {address}, {reason}"),
            },
            Self::Rule => f.write_str("a rule denies it"),
            Self::Port(port) => write!(f, "port {port} is not permitted"),
            Self::Unreadable => f.write_str("it is neither an address nor a name"),
        }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guard denies {}: {}", self.host, self.reason)
    }
}

impl StdError for Denied {}
