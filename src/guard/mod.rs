//! Keeps requests to addresses that other people choose out of your own network (SSRF).
//!
//! # Defaults
//!
//! A [`Guard`] without rules denies every address that is not on the public internet:
//!
//! - loopback (`127.0.0.0/8`, `::1`), `0.0.0.0/8` and `::`;
//! - private networks (`10.0.0.0/8`, `172.16.0.0/12`, `192.168.0.0/16`, `fc00::/7`, `fec0::/10`)
//!   and those of carriers (`100.64.0.0/10`);
//! - link-local addresses (`169.254.0.0/16`, `fe80::/10`), multicast, broadcast, and whatever is
//!   reserved, unassigned, or set aside for documentation and benchmarks;
//! - where clouds hand out credentials, such as `169.254.169.254`, `100.100.100.200`,
//!   `168.63.129.16` and `fd00:ec2::254`;
//! - IPv6 that leads to a denied IPv4 address: mapped, compatible, translated, NAT64, 6to4, Teredo
//!   and ISATAP.
//!
//! # When it looks
//!
//! - **When a request is enqueued**, at the URL: an address in any notation, the port, the name. A
//!   denied request is refused at once, with [`Error::is_denied`], and nothing is persisted.
//! - **At each attempt**, at the URL again: the rules may have changed, and a row may have been
//!   written by other means. The request is discarded with
//!   [`FailureClass::Denied`](crate::FailureClass::Denied), and its destination isn't blamed.
//! - **At each connect**, at the addresses that a name resolves to. They are looked up once, and
//!   the connection goes to one of the addresses that were judged, so a name can't mean something
//!   else a moment later. A name with one bad address among good ones is denied.
//! - **At each redirect**: see [`Redirects`](crate::Redirects).
//!
//! A denial is final by default, also where a name resolves to a denied address, because the owner
//! of a name that does so once will do it again. If your own names do so for a while, return
//! [`Verdict::Retry`](crate::Verdict::Retry) for [`FailureClass::Denied`] from a
//! [`Classify`](crate::Classify).
//!
//! # Whose connections
//!
//! The crate's own transport looks at URLs, connects and redirects, and ignores the proxies of the
//! environment and the system: behind a proxy, the guard would only see the proxy's address. Name
//! a proxy that checks by itself with [`Guard::trust_proxy`].
//!
//! A transport of your own ([`DurableBuilder::transport`](crate::DurableBuilder::transport)), and
//! the client under a layer or a middleware, connects by itself. Only URLs are checked then. Build
//! such a client with [`Guard::resolver`] and [`Guard::redirect_policy`], and without proxies.
//!
//! # Examples
//!
//! ```no_run
//! use requeuest::Durable;
//! use requeuest::guard::Guard;
//!
//! # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
//! let guard = Guard::new()
//!     .allow("10.20.0.0/16") // a partner behind a private link
//!     .allow("*.hooks.internal.example")
//!     .deny("*.example.org")
//!     .allow_ports([80, 443, 8443]);
//! let durable = Durable::builder(pool).guard(guard).build()?;
//! # Ok(()) }
//! ```
//!
//! [`FailureClass::Denied`]: crate::FailureClass::Denied

mod address;
mod denied;
mod host;
mod rule;

use core::net::{IpAddr, Ipv4Addr};
use std::fmt;
use std::sync::Arc;

use http::Uri;
use reqwest::dns::Resolve;
use url::Url;

use self::denied::Reason;
use self::host::Host;
use self::rule::Rule;
use crate::error::Error;

pub(crate) use self::denied::Denied;

/// Names that always mean an address, whatever the resolver says.
const KNOWN_NAMES: [(&str, Ipv4Addr); 3] = [
    ("localhost", Ipv4Addr::LOCALHOST),
    (
        "metadata.google.internal",
        Ipv4Addr::new(169, 254, 169, 254),
    ),
    ("metadata.goog", Ipv4Addr::new(169, 254, 169, 254)),
];

/// Decides where requests may go. See the [module](self) for what it denies and when it looks.
///
/// Setters accept anything. [`DurableBuilder::build`](crate::DurableBuilder::build) and the methods
/// that use the guard return an error that names the field `guard` and shows the wrong rule.
///
/// # Rules
///
/// | rule | for |
/// |---|---|
/// | `10.20.0.0/16`, `fd12:3456::/32` | the addresses of this network |
/// | `10.20.0.7`, `fd12:3456::7` | this address |
/// | `hooks.example.com` | this host, whatever it resolves to |
/// | `*.example.com` | its subdomains at any depth, not `example.com` itself |
///
/// A rule that denies wins over one that allows, and a rule that allows wins over the defaults.
/// Only a rule for exactly one address allows an address of cloud metadata: a network that has it,
/// or a host that resolves to it, doesn't. A rule for IPv4 addresses counts for IPv6 addresses that
/// lead to them, too.
#[derive(Clone, Default)]
pub struct Guard {
    allow: Vec<Rule>,
    deny: Vec<Rule>,
    /// Empty for all ports.
    allow_ports: Vec<u16>,
    deny_ports: Vec<u16>,
    proxy: Option<Box<str>>,
    resolver: Option<Arc<dyn Resolve>>,
    /// The first setting that is wrong, and why.
    wrong: Option<Box<str>>,
}

impl Guard {
    /// Denies what is not on the public internet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows addresses or hosts that would be denied: see [rules](#rules).
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::guard::Guard;
    ///
    /// let guard = Guard::new().allow("10.20.0.0/16");
    /// assert!(guard.check("http://10.20.0.7/").is_ok());
    /// assert!(guard.check("http://10.30.0.7/").is_err());
    /// ```
    #[must_use]
    pub fn allow(mut self, rule: impl AsRef<str>) -> Self {
        if let Some(rule) = self.parsed(rule.as_ref()) {
            self.allow.push(rule);
        }
        self
    }

    /// Denies addresses or hosts that would be allowed: see [rules](#rules).
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::guard::Guard;
    ///
    /// let guard = Guard::new().deny("*.example.com");
    /// assert!(guard.check("https://hooks.example.com/").unwrap_err().is_denied());
    /// ```
    #[must_use]
    pub fn deny(mut self, rule: impl AsRef<str>) -> Self {
        if let Some(rule) = self.parsed(rule.as_ref()) {
            self.deny.push(rule);
        }
        self
    }

    /// Allows these ports only, and those of further calls. Defaults to all ports.
    #[must_use]
    pub fn allow_ports(mut self, ports: impl IntoIterator<Item = u16>) -> Self {
        self.allow_ports.extend(ports);
        self
    }

    /// Denies these ports. Defaults to none.
    #[must_use]
    pub fn deny_ports(mut self, ports: impl IntoIterator<Item = u16>) -> Self {
        self.deny_ports.extend(ports);
        self
    }

    /// Sends every request through this HTTP proxy, which has to check by itself where it connects
    /// to, as [Smokescreen](https://github.com/stripe/smokescreen) does. A user and a password in
    /// the URL become its `Proxy-Authorization`.
    ///
    /// The guard still checks URLs, but names are looked up by the proxy, and no request goes past
    /// it: the environment's `NO_PROXY` has no effect. It is a setting of the crate's own
    /// transport, so it can't be combined with a
    /// [`transport`](crate::DurableBuilder::transport).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::Durable;
    /// use requeuest::guard::Guard;
    ///
    /// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
    /// let guard = Guard::new().trust_proxy("http://smokescreen.internal:4750");
    /// let durable = Durable::builder(pool).webhooks().guard(guard).build()?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn trust_proxy(mut self, url: impl AsRef<str>) -> Self {
        let url = url.as_ref();
        let is_proxy = Url::parse(url)
            .is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.host().is_some());
        if is_proxy {
            self.proxy = Some(url.into());
        } else {
            // Without the URL: it may hold a password.
            let reason = "the proxy must be an absolute http or https URL";
            self.wrong.get_or_insert_with(|| reason.into());
        }
        self
    }

    /// Looks names up with this resolver, in place of the system's. The guard judges its answers.
    #[must_use]
    pub fn resolve_with(mut self, resolver: impl Resolve + 'static) -> Self {
        self.resolver = Some(Arc::new(resolver));
        self
    }

    /// Whether a request may be sent to this URL, as far as the URL tells: what a name resolves to
    /// is not looked up. For the form in which a customer enters the URL.
    ///
    /// # Errors
    ///
    /// With [`Error::is_denied`] if not, and [`Error::is_config`] if the guard itself is wrong.
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::guard::Guard;
    ///
    /// let guard = Guard::new();
    /// assert!(guard.check("https://hooks.example.com/orders").is_ok());
    /// for url in ["http://169.254.169.254/", "http://0x7f.1/", "http://[::ffff:10.0.0.1]/"] {
    ///     assert!(guard.check(url).unwrap_err().is_denied());
    /// }
    /// ```
    pub fn check(&self, url: impl AsRef<str>) -> Result<(), Error> {
        self.validate()?;
        let url = Url::parse(url.as_ref())
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"));
        let uri = url.and_then(|url| url.as_str().parse::<Uri>().ok());
        let Some(uri) = uri else {
            return Err(Error::request("url", "must be a valid http or https URL"));
        };
        self.admit(&uri).map_err(|denied| Error::denied(&denied))
    }

    /// Refuses a guard with a setting that is wrong.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        match &self.wrong {
            Some(reason) => Err(Error::config("guard", reason.to_string())),
            None => Ok(()),
        }
    }

    pub(crate) fn proxy(&self) -> Option<&str> {
        self.proxy.as_deref()
    }

    /// The caller's own resolver.
    pub(crate) fn own_resolver(&self) -> Option<&Arc<dyn Resolve>> {
        self.resolver.as_ref()
    }

    /// Judges where a request goes, by its URL.
    pub(crate) fn admit(&self, uri: &Uri) -> Result<(), Denied> {
        let shown = uri.host().unwrap_or_default();
        let denied = |reason| Denied::new(shown, reason);
        let Some(host) = Host::of(uri) else {
            return Err(denied(Reason::Unreadable));
        };
        let is_https = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_https { 443 } else { 80 });
        let is_listed = self.allow_ports.is_empty() || self.allow_ports.contains(&port);
        if !is_listed || self.deny_ports.contains(&port) {
            return Err(denied(Reason::Port(port)));
        }
        match host {
            Host::Address(address) => self.judge(address, false),
            Host::Name(name) => self.judge_name(&name),
        }
        .map_err(denied)
    }

    /// Judges the addresses that a name resolves to. One bad one denies all.
    pub(crate) fn admit_resolved(
        &self,
        name: &str,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Result<(), Denied> {
        let Some(host) = Host::parse(name) else {
            return Err(Denied::new(name, Reason::Unreadable));
        };
        let denied = |reason| Denied::new(name, reason);
        let is_trusted = match &host {
            Host::Address(_) => false,
            Host::Name(name) => {
                self.judge_name(name).map_err(denied)?;
                self.allow.iter().any(|rule| rule.names(name))
            }
        };
        for address in addresses {
            self.judge(address, is_trusted)
                .map_err(|reason| denied(Reason::Resolves(address, Box::new(reason))))?;
        }
        Ok(())
    }

    fn judge_name(&self, name: &str) -> Result<(), Reason> {
        if self.deny.iter().any(|rule| rule.names(name)) {
            return Err(Reason::Rule);
        }
        if self.allow.iter().any(|rule| rule.names(name)) {
            return Ok(());
        }
        let known = KNOWN_NAMES.iter().find(|(known, _)| {
            let parent = name.strip_suffix(known);
            parent.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        });
        known.map_or(Ok(()), |(_, address)| self.judge((*address).into(), false))
    }

    /// Judges an address and the IPv4 addresses that it carries. A rule that allows the host has
    /// decided about all addresses but those of metadata.
    fn judge(&self, address: IpAddr, is_trusted: bool) -> Result<(), Reason> {
        self.judge_alone(address, is_trusted)
            .map_err(|kind| kind.map_or(Reason::Rule, Reason::Address))?;
        // A rule for the address itself knows what it carries.
        let is_trusted = is_trusted || self.allow.iter().any(|rule| rule.has(address));
        for inner in address::carried(address) {
            let inner = IpAddr::V4(inner);
            self.judge_alone(inner, is_trusted)
                .map_err(|kind| kind.map_or(Reason::Rule, |kind| Reason::Carries(inner, kind)))?;
        }
        Ok(())
    }

    /// Returns what kind of address it is if it is denied, or `None` if a rule denies it.
    fn judge_alone(&self, address: IpAddr, is_trusted: bool) -> Result<(), Option<address::Kind>> {
        if self.deny.iter().any(|rule| rule.has(address)) {
            return Err(None);
        }
        if address::is_metadata(address) {
            let is_allowed = self.allow.iter().any(|rule| rule.is_exactly(address));
            return if is_allowed {
                Ok(())
            } else {
                Err(Some(address::METADATA))
            };
        }
        match address::denied(address) {
            Some(kind) if !is_trusted && !self.allow.iter().any(|rule| rule.has(address)) => {
                Err(Some(kind))
            }
            _ => Ok(()),
        }
    }

    fn parsed(&mut self, rule: &str) -> Option<Rule> {
        match Rule::parse(rule) {
            Ok(parsed) => Some(parsed),
            Err(reason) => {
                let wrong = || format!("the rule {rule:?}: {reason}").into();
                self.wrong.get_or_insert_with(wrong);
                None
            }
        }
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("allow", &self.allow)
            .field("deny", &self.deny)
            .field("allow_ports", &self.allow_ports)
            .field("deny_ports", &self.deny_ports)
            // Its URL may hold a password.
            .field("trusts_proxy", &self.proxy.is_some())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
