//! What spans show of a URL.

use ::url::form_urlencoded;
use http::Uri;

/// Parameters of queries whose names contain these are secret.
const SECRET_PARTS: [&str; 9] = [
    "token",
    "secret",
    "passw",
    "signature",
    "credential",
    "auth",
    "session",
    "jwt",
    "accesskey",
];
/// So are those of these names, and those that end in `key`.
const SECRET_NAMES: [&str; 5] = ["sig", "code", "pwd", "pass", "otp"];

/// How much of URLs is shown.
#[derive(Debug, Default)]
pub(super) struct UrlDetail {
    /// The path and the query too.
    pub(super) full: bool,
    /// Parameters of queries whose values are hidden, besides those that always are. In lower case.
    pub(super) secret: Vec<String>,
}

/// Host and port of a URL, for the attributes of the server.
pub(super) fn server(uri: &Uri) -> (String, u16) {
    let default = if uri.scheme_str() == Some("https") {
        443
    } else {
        80
    };
    let host = uri.host().unwrap_or_default().to_ascii_lowercase();
    // The brackets of an IPv6 address belong to the URL.
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    (host, uri.port_u16().unwrap_or(default))
}

impl UrlDetail {
    /// The URL as it is shown.
    pub(super) fn shown(&self, uri: &Uri) -> String {
        let scheme = uri.scheme_str().unwrap_or("http");
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        // Without the user name and the password.
        let (_, host) = authority.rsplit_once('@').unwrap_or(("", authority));
        let mut shown = format!("{scheme}://{}", host.to_ascii_lowercase());
        if !self.full {
            return shown;
        }
        shown.push_str(uri.path());
        for (at, pair) in uri
            .query()
            .iter()
            .flat_map(|query| query.split('&'))
            .enumerate()
        {
            shown.push(if at == 0 { '?' } else { '&' });
            match pair.split_once('=') {
                Some((name, value)) => {
                    shown.push_str(name);
                    shown.push('=');
                    shown.push_str(if self.is_secret(name) {
                        "REDACTED"
                    } else {
                        value
                    });
                }
                // It may be a token without a name.
                None if !pair.is_empty() => shown.push_str("REDACTED"),
                None => {}
            }
        }
        shown
    }

    fn is_secret(&self, name: &str) -> bool {
        // As receivers read it.
        let decoded = form_urlencoded::parse(name.as_bytes()).next();
        let name = decoded.map_or_else(String::new, |(name, _)| name.to_lowercase());
        name.ends_with("key")
            || SECRET_NAMES.contains(&&*name)
            || SECRET_PARTS.iter().any(|part| name.contains(part))
            || self.secret.contains(&name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "https://hunter0:hunter1@A.example:8443/hooks/path?a=1&Api_Key=hunter2\
                       &X-Amz-Signature=hunter3&%74oken=hunter4&hunter5&mine=hunter6&b=2&c=";

    #[test]
    fn a_url_is_its_origin_by_default() {
        let shown = |uri| UrlDetail::default().shown(&Uri::from_static(uri));
        assert_eq!(shown(URL), "https://a.example:8443");
        assert_eq!(shown("http://u@[::1]/x"), "http://[::1]");
    }

    #[test]
    fn a_full_url_hides_credentials_and_secret_parameters() {
        let detail = UrlDetail {
            full: true,
            secret: vec!["mine".to_owned()],
        };
        assert_eq!(
            detail.shown(&Uri::from_static(URL)),
            "https://a.example:8443/hooks/path?a=1&Api_Key=REDACTED&X-Amz-Signature=REDACTED\
             &%74oken=REDACTED&REDACTED&mine=REDACTED&b=2&c="
        );
    }

    #[test]
    fn a_server_is_host_and_port() {
        let server = |uri| server(&Uri::from_static(uri));
        assert_eq!(server(URL), ("a.example".to_owned(), 8443));
        assert_eq!(server("http://[::1]/"), ("::1".to_owned(), 80));
        assert_eq!(server("https://a.example/"), ("a.example".to_owned(), 443));
    }
}
