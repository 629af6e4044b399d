//! Classifying clients' errors: above all, whether a part of the request may have been sent.

use std::error::Error as StdError;
use std::io::{self, ErrorKind};
use std::iter;

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use tower::Service;

use super::transport::AfterRedirect;
use crate::classify::FailureClass;

/// Why there is no tunnel through an HTTP proxy. The type has no public name of its own.
type TunnelError = <Tunnel<HttpConnector> as Service<Uri>>::Error;
/// Why there is no connection through a SOCKS proxy.
type SocksError = <SocksV5<HttpConnector> as Service<Uri>>::Error;

/// What is wrong with an answer in HTTP/2.
const BROKEN: [h2::Reason; 5] = [
    h2::Reason::PROTOCOL_ERROR,
    h2::Reason::FLOW_CONTROL_ERROR,
    h2::Reason::FRAME_SIZE_ERROR,
    h2::Reason::COMPRESSION_ERROR,
    h2::Reason::ENHANCE_YOUR_CALM,
];

/// The class of a client's error. Only an error that certainly came before the request was sent
/// gets a class that says so.
pub(super) fn class_of(error: &(dyn StdError + 'static)) -> FailureClass {
    if is_denied(error) {
        return FailureClass::Denied;
    }
    if is_unusable(error) {
        FailureClass::Unusable
    } else if causes(error).any(is_connect) {
        while_connecting(error)
    } else if causes(error).any(is_refused) {
        FailureClass::Refused
    } else {
        after_connecting(error)
    }
}

/// Whether a guard denied what the error is about.
pub(crate) fn is_denied(error: &(dyn StdError + 'static)) -> bool {
    #[cfg(feature = "ssrf-guard")]
    return causes(error).any(super::transport::is_denied);
    #[cfg(not(feature = "ssrf-guard"))]
    {
        let _ = error;
        false
    }
}

/// Whether a forward proxy is certainly to blame, and not the destination behind it.
///
/// Only a tunnel tells. Without TLS, a request goes to an HTTP proxy as it goes to a destination,
/// and so do the errors.
pub(super) fn is_of_proxy(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|error| {
        if let Some(error) = error.downcast_ref::<TunnelError>() {
            // The proxy has refused, and may have done so because it can't reach the destination:
            // its status isn't known.
            return !matches!(error, TunnelError::TunnelUnsuccessful);
        }
        let error = error.downcast_ref::<SocksError>();
        error.is_some_and(|error| !matches!(error, SocksError::V4(_) | SocksError::V5(_)))
    })
}

/// Whether the request was answered with a redirect, and the request after it failed.
pub(super) fn is_after_redirect(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|error| {
        error.is::<AfterRedirect>()
            || error
                .downcast_ref::<reqwest::Error>()
                .is_some_and(reqwest::Error::is_redirect)
    })
}

/// An error and what caused it.
fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    iter::successors(Some(error), |&error: &&'a (dyn StdError + 'static)| {
        // The `source` of an `io::Error` skips the error inside it.
        match error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
        {
            Some(inner) => Some(inner as &(dyn StdError + 'static)),
            None => error.source(),
        }
    })
}

fn io_kind(error: &(dyn StdError + 'static)) -> Option<ErrorKind> {
    error.downcast_ref::<io::Error>().map(io::Error::kind)
}

/// Checks only the outermost error: middleware may have sent requests of its own after this one.
fn is_unusable(error: &(dyn StdError + 'static)) -> bool {
    error
        .downcast_ref::<reqwest::Error>()
        .is_some_and(reqwest::Error::is_builder)
}

fn is_connect(error: &(dyn StdError + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
        return error.is_connect();
    }
    // An established connection never reports this.
    io_kind(error) == Some(ErrorKind::ConnectionRefused)
}

/// RFC 9113 section 8.7: neither stream has been processed.
fn is_refused(error: &(dyn StdError + 'static)) -> bool {
    let Some(error) = error.downcast_ref::<h2::Error>() else {
        return false;
    };
    error.is_remote()
        && (error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM)
            || error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR))
}

fn while_connecting(error: &(dyn StdError + 'static)) -> FailureClass {
    if causes(error).any(is_dns) {
        FailureClass::Dns
    } else if causes(error).any(is_timeout) {
        FailureClass::ConnectTimeout
    } else if causes(error).any(is_tls) {
        FailureClass::Tls
    } else {
        FailureClass::Connect
    }
}

fn is_dns(error: &(dyn StdError + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<reqwest::Error>() {
        return error.is_dns();
    }
    // The error type of hyper's connector is private; only its text tells.
    error.to_string() == "dns error"
}

fn is_tls(error: &(dyn StdError + 'static)) -> bool {
    #[cfg(feature = "_rustls")]
    if error.is::<rustls::Error>() {
        return true;
    }
    #[cfg(feature = "_native-tls")]
    if error.is::<native_tls::Error>() {
        return true;
    }
    // A connection that breaks before the request is sent breaks during the handshake.
    matches!(
        io_kind(error),
        Some(ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
    )
}

fn is_timeout(error: &(dyn StdError + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<reqwest::Error>() {
        return error.is_timeout();
    }
    if let Some(error) = error.downcast_ref::<hyper::Error>() {
        return error.is_timeout();
    }
    error.is::<tower::timeout::error::Elapsed>()
        || error.is::<tokio::time::error::Elapsed>()
        || io_kind(error) == Some(ErrorKind::TimedOut)
}

fn after_connecting(error: &(dyn StdError + 'static)) -> FailureClass {
    if causes(error).any(is_timeout) {
        FailureClass::Timeout
    } else if causes(error).any(is_malformed) {
        FailureClass::Protocol
    } else if causes(error).any(|error| error.is::<hyper::Error>() || error.is::<io::Error>()) {
        FailureClass::Reset
    } else if causes(error).any(is_undecodable) {
        FailureClass::Protocol
    } else {
        FailureClass::Other
    }
}

fn is_malformed(error: &(dyn StdError + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<hyper::Error>() {
        return error.is_parse();
    }
    if let Some(error) = error.downcast_ref::<h2::Error>() {
        // This side has found the answer to be wrong. Heads over the limit are among that.
        return error.is_library()
            && error
                .reason()
                .is_some_and(|reason| BROKEN.contains(&reason));
    }
    matches!(
        io_kind(error),
        Some(ErrorKind::InvalidData | ErrorKind::InvalidInput)
    )
}

/// A body that is not in the encoding that its header names.
fn is_undecodable(error: &(dyn StdError + 'static)) -> bool {
    error
        .downcast_ref::<reqwest::Error>()
        .is_some_and(reqwest::Error::is_decode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socks_proxy_that_is_down_is_to_blame() {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        drop(listener);
        let uri = |text: String| text.parse::<Uri>().unwrap();
        let proxy = uri(format!("socks5://{addr}"));
        let mut socks = SocksV5::new(proxy, HttpConnector::new());
        let destination = uri(format!("http://{addr}"));
        let error = socks.call(destination.clone()).await.unwrap_err();
        assert!(is_of_proxy(&error), "{error:?}");
        let error = HttpConnector::new().call(destination).await.unwrap_err();
        assert!(!is_of_proxy(&error), "{error:?}");
    }
}
