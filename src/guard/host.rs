//! What a URL's host is: an address, in whatever notation, or a name.
//!
//! Clients connect to what the URL means after it was parsed by the rules of browsers, so that is
//! what is judged: 0177.1, 2130706433, `%31%32%37.0.0.1` and `１２７.0.0.1` are all 127.0.0.1. Only
//! a host that no client rewrites is taken as it is.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::borrow::Cow;

use http::Uri;
use url::Host as Parsed;

use super::rule::normal;

/// A host.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Host<'a> {
    Address(IpAddr),
    /// In lower case and without the dot at its end.
    Name(Cow<'a, str>),
}

impl<'a> Host<'a> {
    /// `None` if the host is neither an address nor a name that can be looked up.
    pub(super) fn of(uri: &'a Uri) -> Option<Self> {
        Self::parse(uri.host()?)
    }

    pub(super) fn parse(host: &'a str) -> Option<Self> {
        if let Ok(address) = host.parse::<Ipv4Addr>() {
            return Some(Self::Address(address.into()));
        }
        if let Some(inside) = host.strip_prefix('[') {
            let address = inside.strip_suffix(']')?.parse::<Ipv6Addr>().ok()?;
            return Some(Self::Address(address.into()));
        }
        if is_plain_name(host) {
            return Some(Self::Name(normal(host)));
        }
        match Parsed::parse(host).ok()? {
            Parsed::Ipv4(address) => Some(Self::Address(address.into())),
            Parsed::Ipv6(address) => Some(Self::Address(address.into())),
            Parsed::Domain(name) => {
                let name = normal(&name).into_owned();
                (!name.is_empty()).then_some(Self::Name(Cow::Owned(name)))
            }
        }
    }
}

/// A name that no client rewrites, except for its case. If the last label begins with a digit, the
/// name may be an address in another notation.
fn is_plain_name(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host);
    let last = name.rsplit('.').next().unwrap_or_default();
    last.starts_with(|char: char| char.is_ascii_alphabetic())
        && !name.contains("--")
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use url::Url;

    use super::*;

    #[test]
    fn an_address_is_recognised_in_every_notation() {
        for host in [
            "127.0.0.1",
            "127.0.0.1.",
            "0177.0.0.1",
            "0x7f.0.0.1",
            "0x7f000001",
            "0X7F.1",
            "127.1",
            "127.0.1",
            "2130706433",
            "017700000001",
            "%31%32%37.0.0.1",
            "127%2e0%2e0%2e1",
            "１２７.0.0.1",
            "127。0。0。1",
        ] {
            let expected = Host::Address(IpAddr::V4(Ipv4Addr::LOCALHOST));
            assert_eq!(Host::parse(host), Some(expected), "{host}");
        }
        for host in ["[::1]", "[0:0::1]", "[0000::0.0.0.1]"] {
            let expected = Host::Address(IpAddr::V6(Ipv6Addr::LOCALHOST));
            assert_eq!(Host::parse(host), Some(expected), "{host}");
        }
    }

    #[test]
    fn what_is_no_host_is_told() {
        for host in [
            "",
            ".",
            "[::1",
            "[127.0.0.1]",
            "[localhost]",
            "[fe80::1%25eth0]",
            "[fe80::1%eth0]",
            "127.0.0.256",
            "256.1",
            "1.2.3.4.5",
            "a b",
            "a%00b",
            "example.com.1",
        ] {
            assert_eq!(Host::parse(host), None, "{host}");
        }
    }

    #[test]
    fn a_name_is_in_lower_case_and_ends_without_a_dot() {
        for (host, name) in [
            ("Hooks.Example.com", "hooks.example.com"),
            ("hooks.example.com.", "hooks.example.com"),
            ("bücher.example", "xn--bcher-kva.example"),
            ("LOCALHOST.", "localhost"),
            ("ｌｏｃａｌｈｏｓｔ", "localhost"),
            ("a_b.example", "a_b.example"),
        ] {
            assert_eq!(Host::parse(host), Some(Host::Name(name.into())), "{host}");
        }
    }

    proptest! {
        /// Whatever reqwest connects to is what was judged.
        #[test]
        fn a_host_is_what_a_url_makes_of_it(host in "[0-9a-fA-FxX.%\\[\\]:_-]{1,16}") {
            let Ok(url) = Url::parse(&format!("http://{host}/")) else {
                return Ok(());
            };
            let Some(parsed) = url.host() else { return Ok(()) };
            // A colon begins the port, except inside brackets.
            let given = match host.find(']') {
                Some(end) => &host[..=end],
                None => host.split(':').next().unwrap_or_default(),
            };
            let own = Host::parse(given);
            match parsed {
                Parsed::Ipv4(address) => {
                    prop_assert_eq!(own, Some(Host::Address(address.into())));
                }
                Parsed::Ipv6(address) => {
                    prop_assert_eq!(own, Some(Host::Address(address.into())));
                }
                Parsed::Domain(name) => {
                    let name = normal(name);
                    let expected = (!name.is_empty()).then_some(Host::Name(name));
                    prop_assert_eq!(own, expected);
                }
            }
        }
    }
}
