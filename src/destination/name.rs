//! The names of destinations: `scheme://host:port`, or a limit key.
//!
//! A limit key can't contain `://`, so one text says which of them it is.

use url::{Host, Url};

use crate::error::Error;

/// Limit keys are part of the index over waiting requests, as ordering keys are.
const MAX_LIMIT_KEY_LEN: usize = 255;

/// Checks the limit key of a request.
pub(crate) fn validate_limit_key(key: &str) -> Result<(), Error> {
    match limit_key_fault(key) {
        None => Ok(()),
        Some(reason) => Err(Error::request("limit_key", reason)),
    }
}

/// Why a text can't be a limit key.
pub(super) fn limit_key_fault(key: &str) -> Option<&'static str> {
    if key.is_empty() {
        Some("must not be empty")
    } else if key.len() > MAX_LIMIT_KEY_LEN {
        Some("must be at most 255 bytes long")
    } else if key.contains('\0') {
        Some("must not contain a NUL character")
    } else if key.contains("://") {
        Some("must not contain `://`, which marks an origin")
    } else {
        None
    }
}

/// The name of a destination as it is stored. An origin gets lower case and a port; a limit key
/// stays as it is. Errors don't show the text, which may hold a password.
pub(crate) fn validate_name(name: &str) -> Result<String, Error> {
    let refused = |reason| Error::request("destination", reason);
    if name.contains("://") {
        origin(name)
            .map(|(scheme, host, port)| format!("{scheme}://{host}:{port}"))
            .map_err(refused)
    } else {
        match limit_key_fault(name) {
            None => Ok(name.to_owned()),
            Some(reason) => Err(refused(reason)),
        }
    }
}

/// Scheme, host and port of an origin. A single `/` may follow it, as after [`Url`]'s `to_string`.
pub(super) fn origin(text: &str) -> Result<(String, String, u16), &'static str> {
    // `Url` removes tabs and line breaks, and takes `\` for `/`.
    if text.contains(|char: char| char.is_whitespace() || char.is_control() || char == '\\') {
        return Err("must not contain spaces, control characters or backslashes");
    }
    let url = Url::parse(text).map_err(|_| "must be an origin: `https://host` or with a port")?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("its scheme must be http or https");
    }
    let after = text.split_once("://").map_or("", |(_, rest)| rest);
    let end = after.find(['/', '?', '#']).unwrap_or(after.len());
    let (authority, rest) = after.split_at(end);
    if authority.contains('@') {
        return Err("must not have a user or a password");
    }
    if !matches!(rest, "" | "/") {
        return Err("must not have a path, a query or a fragment");
    }
    match (host_and_port(authority)?, url.port_or_known_default()) {
        ((host, _), Some(port)) if port != 0 => Ok((url.scheme().to_owned(), host, port)),
        _ => Err("its port must be from 1 to 65535"),
    }
}

/// The host, in lower case and as URLs have it, and the port of `host` or `host:port`.
pub(super) fn host_and_port(text: &str) -> Result<(String, Option<u16>), &'static str> {
    let (host, port) = match text.rsplit_once(':') {
        // The colon is one of an IPv6 address.
        Some((_, rest)) if rest.ends_with(']') => (text, None),
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let port = match port {
        None => None,
        Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => match port.parse() {
            Ok(port) if port != 0 => Some(port),
            _ => return Err("its port must be from 1 to 65535"),
        },
        Some(_) => return Err("its port must be a number"),
    };
    if host.contains('*') {
        return Err("must not have `*` within a host");
    }
    match Host::parse(host) {
        Ok(host) => Ok((host.to_string(), port)),
        Err(_) => Err("must have a valid host"),
    }
}

#[cfg(test)]
mod tests {
    use http::Uri;

    use super::*;
    use crate::destination::name_of;

    #[test]
    fn names_are_normalised() {
        for (given, name) in [
            ("https://api.example.com", "https://api.example.com:443"),
            ("https://api.example.com/", "https://api.example.com:443"),
            ("HTTP://API.Example.com", "http://api.example.com:80"),
            ("http://a.example:443", "http://a.example:443"),
            ("https://a.example:443", "https://a.example:443"),
            ("https://a.example:8443", "https://a.example:8443"),
            ("https://[::1]", "https://[::1]:443"),
            ("https://[2001:DB8::1]:1", "https://[2001:db8::1]:1"),
            ("http://127.0.0.1:9", "http://127.0.0.1:9"),
            (
                "https://bücher.example",
                "https://xn--bcher-kva.example:443",
            ),
            ("Tenant-7", "Tenant-7"),
            ("api.example.com", "api.example.com"),
            ("a b:c/d@e", "a b:c/d@e"),
        ] {
            let found = validate_name(given).unwrap();
            assert_eq!(found, name, "{given}");
            assert_eq!(validate_name(&found).unwrap(), name);
            if let (true, true) = (given.contains("://"), given.is_ascii()) {
                let uri: Uri = given.to_lowercase().parse().unwrap();
                assert_eq!(name_of(None, &uri), name);
            }
        }
    }

    #[test]
    fn bad_names_are_refused_and_not_shown() {
        for name in [
            "",
            "\0",
            "://",
            "https://",
            "ftp://secret.example",
            "secret://a.example",
            "https://secret@a.example",
            "https://user:secret@a.example:8443",
            "https://@a.example",
            "https://a.example/secret",
            "https://a.example//",
            "https://a.example?secret",
            "https://a.example/?",
            "https://a.example#secret",
            "https://a.example:secret",
            "https://a.example:",
            "https://a.example:0",
            "https://a.example:65536",
            "https://a.example:+80",
            "https://sec ret.example",
            " https://secret.example",
            "https://sec\tret.example",
            "https:\\secret://a",
            "https://*.secret.example",
            "tenant://secret",
            &"k".repeat(256),
        ] {
            let error = validate_name(name).unwrap_err();
            assert_eq!(error.field(), Some("destination"), "{name}");
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("secret"), "{shown}");
        }
    }

    #[test]
    fn limit_keys_are_checked() {
        for key in ["a", "tenant:7", "a:/b", "*", "ключ", &"k".repeat(255)] {
            validate_limit_key(key).unwrap();
        }
        for key in [
            "",
            "a\0b",
            "a://b",
            "://",
            &"k".repeat(256),
            &"é".repeat(128),
        ] {
            let error = validate_limit_key(key).unwrap_err();
            assert!(error.is_request());
            assert_eq!(error.field(), Some("limit_key"), "{key}");
        }
    }
}
