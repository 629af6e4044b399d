//! Rules that allow or deny addresses and hosts, parsed from a text.

use core::net::IpAddr;
use std::borrow::Cow;

use url::Host;

use super::address::shares_prefix;

/// What a rule is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    Addresses {
        network: IpAddr,
        prefix: u8,
    },
    /// A name in lower case, without the dot at its end.
    Name(String),
    /// `.example.com`
    Subdomains(String),
}

impl Rule {
    /// Parses an address, a network in CIDR notation, a host, or `*.` and a host.
    pub(super) fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        if let Some((network, prefix)) = text.split_once('/') {
            return cidr(network, prefix);
        }
        if let Some(network) = literal(text) {
            let prefix = longest(network);
            return Ok(Self::Addresses { network, prefix });
        }
        let (text, is_wildcard) = match text.strip_prefix("*.") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        if text.contains('*') {
            return Err("a `*` stands only before the first dot, as in `*.example.com`".into());
        }
        match Host::parse(text) {
            Ok(Host::Domain(name)) => {
                let name = normal(&name).into_owned();
                Ok(if is_wildcard {
                    Self::Subdomains(format!(".{name}"))
                } else {
                    Self::Name(name)
                })
            }
            // An address in another notation. Such a rule could be read in two ways.
            Ok(_) => Err("write the address in its usual form".into()),
            Err(_) => Err("must be an address, a network such as 10.0.0.0/8, or a host".into()),
        }
    }

    /// Whether the rule is for this address.
    pub(super) fn has(&self, address: IpAddr) -> bool {
        match self {
            Self::Addresses { network, prefix } => shares_prefix(address, *network, *prefix),
            Self::Name(_) | Self::Subdomains(_) => false,
        }
    }

    /// Whether the rule is for this address and no other.
    pub(super) fn is_exactly(&self, address: IpAddr) -> bool {
        match self {
            Self::Addresses { network, prefix } => {
                *network == address && *prefix == longest(address)
            }
            Self::Name(_) | Self::Subdomains(_) => false,
        }
    }

    /// Whether the rule is for this name, which is in its [`normal`] form.
    pub(super) fn names(&self, name: &str) -> bool {
        match self {
            Self::Addresses { .. } => false,
            Self::Name(own) => own == name,
            Self::Subdomains(suffix) => {
                name.len() > suffix.len() && name.ends_with(suffix.as_str())
            }
        }
    }
}

/// A name in lower case and without the dot at its end.
pub(super) fn normal(name: &str) -> Cow<'_, str> {
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(name.to_ascii_lowercase())
    } else {
        Cow::Borrowed(name)
    }
}

/// An address in its usual form. IPv6 may be in brackets.
fn literal(text: &str) -> Option<IpAddr> {
    let inner = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    match inner {
        Some(inner) => inner.parse().ok().map(IpAddr::V6),
        None => text.parse().ok(),
    }
}

fn longest(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn cidr(network: &str, prefix: &str) -> Result<Rule, Cow<'static, str>> {
    let Some(network) = literal(network) else {
        return Err("must have an address before the `/`".into());
    };
    let longest = longest(network);
    // `u8` would take a sign.
    let is_number = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix = prefix.parse::<u8>().ok().filter(|_| is_number);
    let Some(prefix) = prefix.filter(|prefix| *prefix <= longest) else {
        return Err(format!("must have a number up to {longest} after the `/`").into());
    };
    let unused = longest - prefix;
    let has_host_bits = match network {
        IpAddr::V4(network) => u32::from(network).trailing_zeros() < u32::from(unused),
        IpAddr::V6(network) => u128::from(network).trailing_zeros() < u32::from(unused),
    };
    if has_host_bits {
        return Err(format!("the address has bits after the first {prefix}; clear them").into());
    }
    Ok(Rule::Addresses { network, prefix })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_for_addresses_or_names() {
        let rule = |text: &str| Rule::parse(text).unwrap();
        let has = |text: &str, address: &str| rule(text).has(address.parse().unwrap());
        assert!(has("10.1.0.0/16", "10.1.255.255"));
        assert!(!has("10.1.0.0/16", "10.2.0.0"));
        assert!(has("0.0.0.0/0", "255.255.255.255"));
        assert!(!has("0.0.0.0/0", "::"));
        assert!(has("10.1.2.3", "10.1.2.3"));
        assert!(!has("10.1.2.3", "10.1.2.2"));
        assert!(has("fd00::/8", "fd12::1"));
        assert!(has("[fd00::1]", "fd00::1"));
        assert!(has("::/0", "2001:db8::1"));
        assert!(!has("example.com", "10.0.0.1"));
        assert!(rule("Hooks.Example.com").names("hooks.example.com"));
        assert!(rule("hooks.example.com.").names("hooks.example.com"));
        assert!(!rule("example.com").names("hooks.example.com"));
        assert!(rule("*.example.com").names("a.b.example.com"));
        assert!(!rule("*.example.com").names("example.com"));
        assert!(!rule("*.example.com").names("badexample.com"));
        assert!(!rule("10.0.0.0/8").names("10"));
        assert!(rule("bücher.example").names("xn--bcher-kva.example"));
        let exactly = |text: &str| rule(text).is_exactly("169.254.169.254".parse().unwrap());
        assert!(exactly("169.254.169.254"));
        assert!(exactly("169.254.169.254/32"));
        assert!(!exactly("169.254.169.254/31"));
        assert!(!exactly("169.254.169.253"));
    }

    #[test]
    fn a_rule_that_could_mean_something_else_is_refused() {
        for (text, reason) in [
            ("10.0.0.0/33", "up to 32"),
            ("fd00::/129", "up to 128"),
            ("10.0.0.0/", "up to 32"),
            ("10.0.0.0/+8", "up to 32"),
            ("10.0.0.0/-1", "up to 32"),
            ("10.0.0.0/999", "up to 32"),
            ("10.0.0.0/8/8", "up to 32"),
            ("10.0.0.1/8", "clear them"),
            ("fd00::1/8", "clear them"),
            ("10.0.0/8", "before the `/`"),
            ("example.com/8", "before the `/`"),
            ("012.0.0.1", "usual form"),
            ("0x7f.1", "usual form"),
            ("127.1", "usual form"),
            ("2130706433", "usual form"),
            ("*", "`*`"),
            ("*.*.example.com", "`*`"),
            ("a*.example.com", "`*`"),
            ("", "must be"),
            ("*.", "must be"),
            ("example.com:443", "must be"),
            ("https://example.com", "before the `/`"),
            ("fe80::1%eth0", "must be"),
            ("exa mple.com", "must be"),
        ] {
            let refused = Rule::parse(text).unwrap_err();
            assert!(refused.contains(reason), "{text}: {refused}");
        }
    }
}
