//! The guard where connections are made: its resolver, and its policy of redirects for reqwest.
//!
//! A name is looked up once, and the addresses that were judged are the ones that the client
//! connects to. So a name can't mean another address between the check and the connect.

use core::net::SocketAddr;
use std::fmt;
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{ClientBuilder, Proxy};
use url::Url;

use super::plain::Setup;
use crate::error::{BoxError, Error};
use crate::guard::{Denied, Guard};

/// Variables of the environment that name a proxy.
const ENVIRONMENT: [&str; 6] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
];

impl Guard {
    /// A resolver for [`ClientBuilder::dns_resolver`] that fails for names that resolve to a denied
    /// address. Disable the proxies of such a client, and check its redirects with
    /// [`redirect_policy`](Self::redirect_policy). Addresses in URLs never reach a resolver: a
    /// handle with a guard, or [`check`](Self::check), looks at them.
    ///
    /// # Errors
    ///
    /// If the guard has a setting that is wrong, or [trusts a proxy](Self::trust_proxy): the client
    /// would look up the proxy's name and no other.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::guard::Guard;
    /// use requeuest::{Durable, ReqwestTransport};
    ///
    /// # fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
    /// let guard = Guard::new();
    /// let client = reqwest::Client::builder()
    ///     .no_proxy()
    ///     .dns_resolver(guard.resolver()?)
    ///     .redirect(guard.redirect_policy(3)?)
    ///     .referer(false)
    ///     .user_agent("billing/1.0")
    ///     .build()?;
    /// let durable = Durable::builder(pool)
    ///     .guard(guard)
    ///     .transport(ReqwestTransport::new(client))
    ///     .build()?;
    /// # Ok(()) }
    /// ```
    pub fn resolver(&self) -> Result<Arc<dyn Resolve>, Error> {
        self.validate()?;
        if self.proxy().is_some() {
            return Err(Error::config(
                "guard",
                "a resolver doesn't see what a trusted proxy connects to; give the client the \
                 proxy, and no resolver",
            ));
        }
        Ok(Arc::new(GuardResolver {
            guard: Arc::new(self.clone()),
            proxy: None,
        }))
    }

    /// A policy for [`ClientBuilder::redirect`] that follows up to `max` redirects, fails for one
    /// that leads to a denied URL, and follows none from https to http. A redirect that it doesn't
    /// follow is the response.
    ///
    /// reqwest drops credentials for the first request to another origin, and sends them again with
    /// the next one to that origin. So this policy doesn't follow redirects within another origin.
    /// reqwest doesn't know other credentials than `Authorization`, `Cookie` and
    /// `Proxy-Authorization`, and names the last URL with its path, unless
    /// [`referer`](ClientBuilder::referer) is off. The crate's own transport has none of these
    /// faults: see [`Redirects`](crate::Redirects).
    ///
    /// # Errors
    ///
    /// If the guard has a setting that is wrong.
    pub fn redirect_policy(&self, max: usize) -> Result<Policy, Error> {
        self.validate()?;
        let guard = self.clone();
        Ok(Policy::custom(move |attempt| {
            let (next, previous) = (attempt.url(), attempt.previous());
            let is_followed = match (previous.first(), previous.last()) {
                (Some(first), Some(last)) => {
                    let is_downgrade = last.scheme() == "https" && next.scheme() != "https";
                    let gets_credentials =
                        last.origin() == next.origin() && first.origin() != next.origin();
                    previous.len() <= max && !is_downgrade && !gets_credentials
                }
                _ => false,
            };
            if !is_followed {
                return attempt.stop();
            }
            match attempt.url().as_str().parse().map(|uri| guard.admit(&uri)) {
                Ok(Ok(())) => attempt.follow(),
                Ok(Err(denied)) => attempt.error(denied),
                Err(_) => attempt.stop(),
            }
        }))
    }
}

/// Looks names up, and judges the answers.
#[derive(Clone)]
struct GuardResolver {
    guard: Arc<Guard>,
    /// The host of the proxy that every request goes through. It isn't judged.
    proxy: Option<Box<str>>,
}

impl GuardResolver {
    fn is_proxy(&self, name: &str) -> bool {
        let proxy = self.proxy.as_deref();
        proxy.is_some_and(|proxy| proxy.eq_ignore_ascii_case(name))
    }
}

impl Resolve for GuardResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let is_judged = !self.is_proxy(name.as_str());
        let guard = Arc::clone(&self.guard);
        Box::pin(async move {
            let host = name.as_str().to_owned();
            if is_judged {
                // Before the lookup, which would tell the owner of the name that there is one.
                guard.admit_resolved(&host, [])?;
            }
            let found: Vec<SocketAddr> = match guard.own_resolver() {
                Some(resolver) => resolver.resolve(name).await?.collect(),
                None => tokio::net::lookup_host((host.as_str(), 0)).await?.collect(),
            };
            if is_judged {
                guard.admit_resolved(&host, found.iter().map(SocketAddr::ip))?;
            }
            let found: Addrs = Box::new(found.into_iter());
            Ok::<_, BoxError>(found)
        })
    }
}

/// Whether the guard denied what this error is about: that of the handle, or of another one in its
/// transport.
pub(in crate::engine::attempt) fn is_denied(error: &(dyn std::error::Error + 'static)) -> bool {
    error.is::<Denied>() || error.downcast_ref::<Error>().is_some_and(Error::is_denied)
}

/// How the crate's own client is built with this guard.
pub(super) fn setup(guard: &Arc<Guard>) -> Result<Setup, Error> {
    let refused = |error: &dyn fmt::Display| Error::config("guard", format!("the proxy: {error}"));
    let mut resolver = GuardResolver {
        guard: Arc::clone(guard),
        proxy: None,
    };
    let mut proxy = None;
    if guard.proxy().is_none()
        && ENVIRONMENT
            .iter()
            .any(|name| std::env::var_os(name).is_some())
    {
        tracing::warn!(
            "a handle with a guard ignores the environment's proxy; name a proxy that checks by \
             itself with Guard::trust_proxy"
        );
    }
    if let Some(url) = guard.proxy() {
        let host = Url::parse(url).map_err(|error| refused(&error))?;
        resolver.proxy = host.host_str().map(Box::from);
        // reqwest's error has the URL.
        let given = Proxy::all(url).map_err(|error| refused(&error.without_url()))?;
        proxy = Some(given.no_proxy(None));
    }
    Ok(Arc::new(move |client: ClientBuilder| {
        let client = client.no_proxy().dns_resolver(resolver.clone());
        match &proxy {
            Some(proxy) => client.proxy(proxy.clone()),
            None => client,
        }
    }))
}
