//! Removes the secrets of URLs from logs, errors and texts stored in the database: credentials,
//! path and query. Webhook URLs carry their tokens in the path.

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
