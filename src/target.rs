//! Whether every client sends a URL as it was given.
//!
//! Attempts of one request may go through different clients. Those over [`Uri`] send its target
//! byte for byte. Those over [`Url`], as reqwest's are, normalize it first: they resolve `.` and
//! `..`, also as `%2e`, and encode some characters. Two attempts of one request could then ask for
//! two resources. So a URL is refused if its normal form is another one.

use http::Uri;
use url::Url;

/// Whether the host, path and query are in their normal form.
pub(crate) fn is_normal(uri: &Uri) -> bool {
    if uri.host().is_some_and(is_plain_host) && is_plain(uri) {
        return true;
    }
    // Most URLs don't get here: parsing one takes longer than all other checks of a request.
    Url::parse(&uri.to_string()).is_ok_and(|url| {
        let same_host = match (url.host_str(), uri.host()) {
            (Some(normal), Some(given)) => normal.eq_ignore_ascii_case(given),
            _ => false,
        };
        same_host && url.path() == uri.path() && url.query() == uri.query()
    })
}

/// A domain name or an IPv4 address that no client rewrites, except for its case.
fn is_plain_host(host: &str) -> bool {
    // A name whose last label begins with a digit may be a number in another form, as `0x7f.1` is.
    let last = host.rsplit('.').next().unwrap_or_default();
    let is_name = last.starts_with(|char: char| char.is_ascii_alphabetic())
        && !host.contains("xn--")
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'));
    is_name || is_ipv4(host)
}

/// Four decimal numbers without leading zeros.
fn is_ipv4(host: &str) -> bool {
    let is_number = |part: &str| {
        part.bytes().all(|byte| byte.is_ascii_digit())
            && (part.len() == 1 || !part.starts_with('0'))
            && part.parse::<u8>().is_ok()
    };
    host.split('.').count() == 4 && host.split('.').all(is_number)
}

/// Whether the path and the query have no character, and the path no segment, that is ever
/// rewritten.
fn is_plain(uri: &Uri) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/_~-!$&()*+,;=:@.%".contains(byte);
    let path = uri.path().as_bytes();
    // A segment that begins with a dot may be `.` or `..`, and `%2e` is a dot.
    let is_dotted = |window: &[u8]| match window {
        [b'/', b'.', ..] => true,
        [b'%', b'2', last] => last.eq_ignore_ascii_case(&b'e'),
        _ => false,
    };
    let has_dots = path.windows(3).any(is_dotted) || path.ends_with(b"/.");
    !has_dots
        && path.iter().all(plain)
        && uri
            .query()
            .is_none_or(|query| query.bytes().all(|byte| plain(&byte) || byte == b'?'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_url_in_its_normal_form_is_told_from_others() {
        for url in [
            "http://a",
            "http://Example.COM:80/",
            "https://u:p@a.example/b/c.json?d=e&f=%zz?/..",
            "http://127.0.0.1:8080/a//b/...c",
            "http://[::1]/a/.well-known/b",
            "http://a/%7Euser/%C3%A9?x=%27|y{z}",
            "http://xn--bcher-kva.example/",
            "http://a/?",
        ] {
            assert!(is_normal(&url.parse().unwrap()), "{url}");
        }
        for url in [
            "http://a/a/../b",
            "http://a/a/.",
            "http://a/a/./b",
            "http://a/a/%2e%2E/b",
            "http://a/.%2e/b",
            "http://a/b?x='y'",
            "http://a/b\"c",
            "http://a/{b}",
            "http://0x7f.1/",
            "http://127.1/",
            "http://127.0.0.01/",
            "http://127.0.0.256.example.1/",
            "http://[0::1]/",
        ] {
            assert!(!is_normal(&url.parse().unwrap()), "{url}");
        }
    }

    proptest! {
        /// The quick check says yes only where the library says so.
        #[test]
        fn a_url_that_passes_is_sent_unchanged(
            host in "[a-z0-9.-]{1,8}",
            target in "/[!-~]{0,8}(/[.%2eE]{0,6}){0,3}([?][!-~]{0,12})?",
        ) {
            let Ok(uri) = format!("http://{host}{target}").parse::<Uri>() else {
                return Ok(());
            };
            if is_normal(&uri) {
                let url = Url::parse(&uri.to_string()).unwrap();
                prop_assert_eq!(url.path(), uri.path());
                prop_assert_eq!(url.query(), uri.query());
                prop_assert_eq!(url.host_str(), uri.host());
            }
        }
    }
}
