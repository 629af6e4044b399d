//! Which destinations a policy is for.
//!
//! Of any two patterns that match one destination, one is more specific. Only equal patterns would
//! leave it open which policy counts, so only these are refused.

use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::name::{host_and_port, limit_key_fault, origin};
use super::policy::DestinationPolicy;
use crate::error::Error;

/// The destinations that a [`DestinationPolicy`] is for, parsed from a text.
///
/// | pattern | destinations |
/// |---|---|
/// | `https://api.example.com:8443` | this origin; without a port, the scheme's default port |
/// | `api.example.com:8443` | this host and port, with both schemes |
/// | `api.example.com` | this host, with any scheme and port |
/// | `*.example.com` | its subdomains at any depth, not `example.com` itself |
/// | `key:tenant-7` | this limit key |
/// | `key:tenant-*` | limit keys that begin with `tenant-` |
/// | `key:*` | all limit keys |
/// | `*` | all destinations |
///
/// The most specific pattern counts: the table is in this order, and longer hosts and prefixes are
/// more specific. Hosts are compared without case, limit keys with it. A limit key that ends with
/// `*` can't be named exactly.
///
/// # Errors
///
/// Parsing returns an [`Error`] whose [`field`](Error::field) is `destination`. It doesn't show the
/// text.
///
/// # Examples
///
/// ```
/// use requeuest::DestinationPattern;
///
/// let pattern: DestinationPattern = "*.Example.com".parse()?;
/// assert_eq!(pattern.to_string(), "*.example.com");
/// assert!("https://example.com/path".parse::<DestinationPattern>().is_err());
/// # Ok::<(), requeuest::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationPattern(Kind);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Origin {
        scheme: String,
        host: String,
        port: u16,
    },
    Host {
        host: String,
        port: Option<u16>,
    },
    /// `.example.com`
    Subdomains(String),
    Key(String),
    /// Empty for all limit keys.
    KeyPrefix(String),
    All,
}

impl DestinationPattern {
    /// Orders patterns that match one destination: the most specific has the greatest value.
    fn specificity(&self) -> (u8, usize) {
        match &self.0 {
            Kind::All => (0, 0),
            Kind::KeyPrefix(prefix) => (1, prefix.len()),
            Kind::Subdomains(suffix) => (1, suffix.len()),
            Kind::Key(_) | Kind::Host { port: None, .. } => (2, 0),
            Kind::Host { port: Some(_), .. } => (3, 0),
            Kind::Origin { .. } => (4, 0),
        }
    }

    /// Whether it matches a destination of this name.
    pub(crate) fn is_for(&self, name: &str) -> bool {
        self.matches(&Parts::of(name))
    }

    /// Whether it matches limit keys only.
    pub(crate) fn is_of_limit_key(&self) -> bool {
        matches!(self.0, Kind::Key(_) | Kind::KeyPrefix(_))
    }

    fn matches(&self, destination: &Parts<'_>) -> bool {
        match (&self.0, destination) {
            (Kind::All, _) => true,
            (Kind::Key(key), Parts::Key(found)) => key == found,
            (Kind::KeyPrefix(prefix), Parts::Key(found)) => found.starts_with(prefix.as_str()),
            (Kind::Subdomains(suffix), Parts::Origin { host, .. }) => {
                host.len() > suffix.len() && host.ends_with(suffix.as_str())
            }
            (
                Kind::Host { host, port: wanted },
                Parts::Origin {
                    host: found, port, ..
                },
            ) => host == found && wanted.is_none_or(|wanted| Some(wanted) == *port),
            (
                Kind::Origin { scheme, host, port },
                Parts::Origin {
                    scheme: found,
                    host: found_host,
                    port: found_port,
                },
            ) => scheme == found && host == found_host && Some(*port) == *found_port,
            _ => false,
        }
    }
}

impl FromStr for DestinationPattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text)
            .map(Self)
            .map_err(|reason| Error::config("destination", reason))
    }
}

fn parse(text: &str) -> Result<Kind, &'static str> {
    const STAR: &str = "`*` must be the first label of a host or the end of a limit key";
    if text.is_empty() {
        return Err("must not be empty; `*` is for all destinations");
    }
    if text == "*" {
        return Ok(Kind::All);
    }
    if let Some(key) = text.strip_prefix("key:") {
        if let Some(prefix) = key.strip_suffix('*') {
            if prefix.contains('*') {
                return Err(STAR);
            }
            return match limit_key_fault(prefix) {
                Some(reason) if !prefix.is_empty() => Err(reason),
                _ => Ok(Kind::KeyPrefix(prefix.to_owned())),
            };
        }
        if key.contains('*') {
            return Err(STAR);
        }
        return match limit_key_fault(key) {
            Some(reason) => Err(reason),
            None => Ok(Kind::Key(key.to_owned())),
        };
    }
    if text.contains("://") {
        let (scheme, host, port) = origin(text)?;
        return Ok(Kind::Origin { scheme, host, port });
    }
    if text.contains(['/', '?', '#', '@', '\\']) {
        return Err("must not have a user, a path or a query");
    }
    if let Some(parent) = text.strip_prefix("*.") {
        return match host_and_port(parent)? {
            (host, None) if !host.starts_with('[') => Ok(Kind::Subdomains(format!(".{host}"))),
            (_, None) => Err("an address has no subdomains"),
            (_, Some(_)) => Err("subdomains can't be limited to a port"),
        };
    }
    if text.contains('*') {
        return Err(STAR);
    }
    let (host, port) = host_and_port(text)?;
    Ok(Kind::Host { host, port })
}

impl fmt::Display for DestinationPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::All => f.write_str("*"),
            Kind::Key(key) => write!(f, "key:{key}"),
            Kind::KeyPrefix(prefix) => write!(f, "key:{prefix}*"),
            Kind::Subdomains(suffix) => write!(f, "*{suffix}"),
            Kind::Host { host, port: None } => f.write_str(host),
            Kind::Host {
                host,
                port: Some(port),
            } => write!(f, "{host}:{port}"),
            Kind::Origin { scheme, host, port } => write!(f, "{scheme}://{host}:{port}"),
        }
    }
}

/// The name of a destination, taken apart.
enum Parts<'a> {
    Key(&'a str),
    Origin {
        scheme: &'a str,
        host: &'a str,
        port: Option<u16>,
    },
}

impl<'a> Parts<'a> {
    fn of(name: &'a str) -> Self {
        let Some((scheme, rest)) = name.split_once("://") else {
            return Self::Key(name);
        };
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().ok()),
            None => (rest, None),
        };
        Self::Origin { scheme, host, port }
    }
}

/// The policies that an application sets by code.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Policies {
    /// The most specific first.
    policies: Vec<(DestinationPattern, DestinationPolicy)>,
}

impl Policies {
    /// Adds a policy. Refuses a pattern that has one.
    pub(crate) fn insert(
        &mut self,
        pattern: DestinationPattern,
        policy: DestinationPolicy,
    ) -> Result<(), Error> {
        if self.policies.iter().any(|(other, _)| *other == pattern) {
            let reason = format!(
                "there are two policies for the pattern {:?}",
                pattern.to_string()
            );
            return Err(Error::config("destination", reason));
        }
        let rank = Reverse(pattern.specificity());
        let at = self
            .policies
            .partition_point(|(other, _)| Reverse(other.specificity()) <= rank);
        self.policies.insert(at, (pattern, policy));
        Ok(())
    }

    /// The policy of a destination, by its name.
    pub(crate) fn of(&self, destination: &str) -> Option<&DestinationPolicy> {
        if self.policies.is_empty() {
            return None;
        }
        let parts = Parts::of(destination);
        self.policies
            .iter()
            .find_map(|(pattern, policy)| pattern.matches(&parts).then_some(policy))
    }

    /// Checks all policies.
    pub(crate) fn validate(&self, attempt_timeout: Duration) -> Result<(), Error> {
        self.policies
            .iter()
            .try_for_each(|(_, policy)| policy.validate(attempt_timeout))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> DestinationPattern {
        text.parse().unwrap()
    }

    #[test]
    fn a_pattern_matches_what_the_table_says() {
        for (text, matching, others) in [
            (
                "https://API.example.com",
                &["https://api.example.com:443"][..],
                &["http://api.example.com:443", "https://api.example.com:80"][..],
            ),
            (
                "api.example.com:8443",
                &[
                    "http://api.example.com:8443",
                    "https://api.example.com:8443",
                ],
                &["https://api.example.com:443", "api.example.com:8443"],
            ),
            (
                "api.example.com",
                &["http://api.example.com:80", "https://api.example.com:8443"],
                &[
                    "https://example.com:443",
                    "https://x.api.example.com:443",
                    "https://xapi.example.com:443",
                    "api.example.com",
                ],
            ),
            (
                "*.Example.com",
                &["https://a.example.com:443", "http://a.b.example.com:80"],
                &[
                    "https://example.com:443",
                    "https://xexample.com:443",
                    "https://.example.com:443",
                    "a.example.com",
                ],
            ),
            (
                "[::1]:8080",
                &["http://[::1]:8080"],
                &["http://[::1]:80", "http://[::2]:8080"],
            ),
            ("[::1]", &["http://[::1]:8080"], &["http://[::2]:8080"]),
            (
                "key:tenant-7",
                &["tenant-7"],
                &["tenant-77", "Tenant-7", "https://tenant-7:443"],
            ),
            (
                "key:tenant-*",
                &["tenant-", "tenant-7"],
                &["tenant", "https://tenant-7:443"],
            ),
            ("key:*", &["a", "tenant-7"], &["https://a.example:443"]),
            ("*", &["a", "https://a.example:443"], &[]),
        ] {
            let pattern = pattern(text);
            for name in matching {
                assert!(pattern.matches(&Parts::of(name)), "{text} {name}");
            }
            for name in others {
                assert!(!pattern.matches(&Parts::of(name)), "{text} {name}");
            }
            assert_eq!(
                pattern.to_string().parse::<DestinationPattern>().unwrap(),
                pattern
            );
        }
    }

    #[test]
    fn bad_patterns_are_refused_and_not_shown() {
        for text in [
            "",
            " ",
            "**",
            "*secret.example",
            "*.",
            "*.*.secret",
            "a.*.secret",
            "secret.*",
            "*.secret.example:80",
            "*.[::1]",
            "https://*.secret.example",
            "https://user:secret@a.example",
            "https://a.example/secret",
            "a.example/secret",
            "a.example?secret",
            "user:secret@a.example",
            "a.example:secret",
            "a.example:",
            "a.example:0",
            "::1",
            "ftp://secret.example",
            "key:",
            "key:a*secret",
            "key:**",
            "key:\0*",
            "key:a://secret",
            &format!("key:{}", "k".repeat(256)),
        ] {
            let error = text.parse::<DestinationPattern>().unwrap_err();
            assert_eq!(error.field(), Some("destination"), "{text}");
            assert!(error.is_config());
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("secret"), "{shown}");
        }
    }

    #[test]
    fn the_most_specific_policy_counts_whatever_their_order() {
        let order = [
            "https://api.example.com:443",
            "api.example.com:443",
            "api.example.com",
            "*.example.com",
            "*.com",
            "*",
        ];
        let keys = ["key:tenant-7", "key:tenant-*", "key:t*", "key:*", "*"];
        for (name, order) in [
            ("https://api.example.com:443", &order[..]),
            ("tenant-7", &keys[..]),
        ] {
            for reverse in [false, true] {
                let mut policies = Policies::default();
                let mut numbered: Vec<_> = order.iter().zip(1u32..).collect();
                if reverse {
                    numbered.reverse();
                }
                for (text, number) in numbered {
                    let policy = DestinationPolicy::default().max_concurrency(number);
                    policies.insert(pattern(text), policy).unwrap();
                }
                // Without the most specific, the next one counts.
                for number in 1..=order.len() as u32 {
                    let found = policies.of(name).unwrap();
                    assert_eq!(found.max_concurrency, Some(number), "{name}");
                    policies
                        .policies
                        .retain(|(_, policy)| policy.max_concurrency != Some(number));
                }
                assert_eq!(policies.of(name), None);
            }
        }
    }

    #[test]
    fn two_policies_for_one_pattern_are_refused() {
        for (one, other) in [
            ("https://A.example", "https://a.example:443/"),
            ("A.example", "a.example"),
            ("*.a.example", "*.A.example"),
            ("key:*", "key:*"),
            ("*", "*"),
        ] {
            let mut policies = Policies::default();
            let policy = DestinationPolicy::default();
            policies.insert(pattern(one), policy.clone()).unwrap();
            let before = policies.clone();
            let error = policies
                .insert(pattern(other), policy.max_concurrency(1))
                .unwrap_err();
            assert_eq!(error.field(), Some("destination"));
            assert_eq!(policies, before);
        }
        let mut policies = Policies::default();
        for text in [
            "a.example",
            "a.example:80",
            "http://a.example",
            "key:a",
            "key:A",
        ] {
            policies
                .insert(pattern(text), DestinationPolicy::default())
                .unwrap();
        }
        policies.validate(Duration::from_secs(1)).unwrap();
    }
}
