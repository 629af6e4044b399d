//! Keeps secrets out of logs, errors and texts stored in the database: the credentials, the path
//! and the query of URLs, and the values of headers that carry credentials. Webhook URLs carry
//! their tokens in the path.

use std::any::Any;
use std::fmt;

use http::{HeaderMap, HeaderName};

/// The longest text of an error that is stored or shown, in bytes.
pub(crate) const MAX_ERROR_TEXT: usize = 2048;

/// Whether values of this header are secret, in requests and in responses.
pub(crate) fn is_secret(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "authorization"
            | "proxy-authorization"
            | "cookie"
            | "set-cookie"
            | "x-api-key"
            | "api-key"
            | "apikey"
            | "x-auth-token"
            | "x-access-token"
    )
}

/// Marks the values of secret headers, and of these others, as sensitive. Whatever prints the map
/// hides them from then on, and so does HTTP/2's compression.
pub(crate) fn mark_secrets(headers: &mut HeaderMap, others: &[HeaderName]) {
    for (name, value) in headers.iter_mut() {
        if is_secret(name) || others.contains(name) {
            value.set_sensitive(true);
        }
    }
}

/// Headers as they may be shown.
pub(crate) struct Shown<'a>(pub(crate) &'a HeaderMap);

impl fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for (name, value) in self.0 {
            if is_secret(name) {
                map.entry(name, &format_args!("Sensitive"));
            } else {
                map.entry(name, value);
            }
        }
        map.finish()
    }
}

/// The text of an error as it may be stored and shown.
pub(crate) fn error_text(text: &str) -> String {
    let mut shown = storable(&redact_urls(text));
    shorten(&mut shown);
    shown
}

/// Shortens the text of an error to what is stored and shown.
pub(crate) fn shorten(text: &mut String) {
    if text.len() > MAX_ERROR_TEXT {
        cut(text, MAX_ERROR_TEXT - '…'.len_utf8());
        text.push('…');
    }
}

/// How much of a panic's text is kept, in bytes.
const MAX_PANIC_TEXT: usize = 1000;

/// The text of a panic in code of the application's, as it may be stored and shown.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text.as_str(),
        (None, None) => "a value that is not text",
    };
    let mut shown = storable(&redact_urls(text));
    if cut(&mut shown, MAX_PANIC_TEXT) {
        shown.push('…');
    }
    shown
}

/// The text without NUL, which Postgres stores in no text.
pub(crate) fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// Shortens a text to at most this many bytes. Returns whether it was longer.
pub(crate) fn cut(text: &mut String, bytes: usize) -> bool {
    let is_longer = text.len() > bytes;
    if is_longer {
        let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
    }
    is_longer
}

/// Cuts the URLs in a text that this crate did not write down to scheme, host and port.
///
/// A URL is assumed to reach up to the next whitespace, because its end can't be told from the text
/// that follows.
pub(crate) fn redact_urls(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("://") {
        let (before, url) = rest.split_at(start + "://".len());
        shown.push_str(before);
        let (url, after) = url.split_at(url.find(char::is_whitespace).unwrap_or(url.len()));
        let (authority, hidden) = url.split_at(url.find(['/', '?', '#']).unwrap_or(url.len()));
        shown.push_str(authority.rsplit('@').next().unwrap_or_default());
        // Keep the surrounding text's punctuation.
        shown.push_str(&hidden[hidden.trim_end_matches([')', ':', ',', '.', '"']).len()..]);
        rest = after;
    }
    shown.push_str(rest);
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_panic_is_kept_without_secrets_and_up_to_a_limit() {
        let of = |panic: Box<dyn Any + Send>| panic_text(&*panic);
        assert_eq!(of(Box::new("static")), "static");
        assert_eq!(of(Box::new("a\0b".to_owned())), "a\u{fffd}b");
        assert_eq!(
            of(Box::new("at https://u:p@h/s?q".to_owned())),
            "at https://h"
        );
        assert_eq!(of(Box::new(7)), "a value that is not text");
        let long = of(Box::new("é".repeat(800)));
        assert_eq!(long, format!("{}…", "é".repeat(500)));
    }

    #[test]
    fn the_text_of_an_error_has_a_limit() {
        assert_eq!(error_text("short"), "short");
        let exact = "x".repeat(MAX_ERROR_TEXT);
        assert_eq!(error_text(&exact), exact);
        let long = error_text(&"é".repeat(MAX_ERROR_TEXT));
        assert!(long.len() <= MAX_ERROR_TEXT, "{}", long.len());
        assert!(long.ends_with("é…"));
    }

    #[test]
    fn headers_with_credentials_are_hidden() {
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", "hunter2".parse().unwrap());
        headers.append("set-cookie", "hunter2".parse().unwrap());
        headers.append("set-cookie", "hunter3".parse().unwrap());
        headers.insert("x-mine", "hunter2".parse().unwrap());
        headers.insert("accept", "text/plain".parse().unwrap());
        let shown = format!("{:?}", Shown(&headers));
        assert_eq!(shown.matches("hunter").count(), 1, "{shown}");
        mark_secrets(&mut headers, &[HeaderName::from_static("x-mine")]);
        for shown in [format!("{headers:?}"), format!("{:?}", Shown(&headers))] {
            assert!(!shown.contains("hunter"), "{shown}");
            assert!(shown.contains("text/plain"), "{shown}");
        }
    }

    #[test]
    fn urls_in_a_text_lose_their_secrets() {
        for (text, shown) in [
            ("no URL: at all?", "no URL: at all?"),
            (
                "url (http://a:b@h:1/p?q=(x)&y#z): refused",
                "url (http://h:1): refused",
            ),
            ("https://u@h and http://h?é", "https://h and http://h"),
            ("://", "://"),
        ] {
            assert_eq!(redact_urls(text), shown);
        }
    }
}
