//! Reads what an attacker may have stored or given: nothing of it panics, and what is read can be
//! stored again.
//!
//! Each case is an entry of the corpus in `tests/corpus`, with changes at random places. More cases
//! run with `PROPTEST_CASES=100000 cargo test --lib codec::fuzz`.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::redact::error_text;

fn entries(corpus: &'static str) -> Vec<&'static str> {
    corpus.lines().collect()
}

/// What JSON, URLs and headers are made of.
const PIECES: [&str; 28] = [
    "",
    "\"",
    "\\",
    "\\u0000",
    "\\ud800",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "null",
    "true",
    "-1",
    "1e999",
    "18446744073709551616",
    "0",
    "@",
    "/",
    "?",
    "#",
    "%",
    "%zz",
    "\r\n",
    "\0",
    "\u{7f}",
    "\u{ff}",
    "\u{1f980}",
];

/// An entry of the corpus, changed in up to eight places.
pub(crate) fn changed(corpus: &'static str) -> impl Strategy<Value = String> {
    let change = (
        any::<Index>(),
        0usize..12,
        select(PIECES.to_vec()),
        0usize..4,
    );
    let changes = proptest::collection::vec(change, 0..8);
    (select(entries(corpus)), changes).prop_map(|(entry, changes)| {
        let mut text: Vec<char> = entry.chars().collect();
        for (at, removed, piece, times) in changes {
            let at = at.index(text.len() + 1);
            let end = (at + removed).min(text.len());
            text.splice(at..end, piece.repeat(times).chars().collect::<Vec<_>>());
        }
        text.into_iter().collect()
    })
}

const REQUESTS: &str = include_str!("../../tests/corpus/request_heads.txt");
const RESPONSES: &str = include_str!("../../tests/corpus/response_heads.txt");
const URLS: &str = include_str!("../../tests/corpus/urls.txt");

/// Nothing of a URL but scheme, host and port.
fn assert_hidden(shown: &str) {
    for secret in ["knryuser", "knrypass", "knrypath", "knryquery"] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

proptest! {
    #[test]
    fn a_stored_request_is_read_or_refused(head in changed(REQUESTS)) {
        match decode_request(&head) {
            Ok((request, uri, delivery)) => {
                let again = encode_request(&request, &uri, &delivery);
                let (_, back, _) = decode_request(&again).unwrap();
                prop_assert_eq!(back, uri);
            }
            Err(unreadable) => prop_assert!(unreadable.as_str().len() < 500),
        }
    }

    #[test]
    fn a_stored_response_is_read_or_refused(head in changed(RESPONSES), status in any::<u16>()) {
        let id = RequestId::generate();
        if let Ok(response) = decode_response(id, status, &head, Bytes::new()) {
            let again = encode_response(&response);
            let back = decode_response(id, status, &again, Bytes::new()).unwrap();
            prop_assert_eq!(back.headers, response.headers);
        }
    }

    #[test]
    fn a_url_is_taken_or_refused_and_its_secrets_are_hidden(url in changed(URLS)) {
        if let Ok(request) = http::Request::post(&url).body("x") {
            if let Ok(request) = Request::try_from(request) {
                let _ = format!("{request:?}");
                let _ = request.check_headers();
            }
        }
        if let Ok(url) = Url::parse(&url) {
            let request = Request::get(url, HeaderMap::new());
            let shown = request.uri().map(|uri| uri.to_string());
            let _ = (shown, format!("{request:?}"));
        }
        let _ = error_text(&url);
    }

    #[test]
    fn the_secret_parts_of_a_url_never_show(
        scheme in "https?",
        host in "[a-z0-9]{1,8}(\\.[a-z]{2,4})?(:[0-9]{1,4})?",
        more in "[a-z0-9@:;,()'\"!$&*+=~_.%-]{0,12}",
        around in "[a-z ():,\"]{0,6}",
    ) {
        let url = format!("{scheme}://knryuser{more}:knrypass@{host}/knrypath{more}?knryquery{more}");
        assert_hidden(&error_text(&format!("{around} {url} {around}")));
        if let Ok(request) = http::Request::post(&url).body("x") {
            match Request::try_from(request) {
                Ok(request) => {
                    assert_hidden(&format!("{request:?}"));
                    let refused = request.uri().map(drop);
                    assert_hidden(&format!("{refused:?}"));
                }
                Err(error) => assert_hidden(&format!("{error} {error:?}")),
            }
        }
    }

    #[test]
    fn headers_are_taken_or_refused(
        pairs in proptest::collection::vec(
            ("[!-~]{0,24}", proptest::collection::vec(any::<u8>(), 0..40)),
            0..20,
        ),
    ) {
        let mut request = Request::get(Url::parse("http://a/").unwrap(), HeaderMap::new());
        for (name, value) in pairs {
            if let (Ok(name), Ok(value)) =
                (HeaderName::from_str(&name), HeaderValue::from_bytes(&value))
            {
                request.headers.append(name, value);
            }
        }
        if request.check_headers().is_ok() {
            let json = to_json(&Headers::of(&request.headers));
            let back = serde_json::from_str::<Headers<'_>>(&json).unwrap().into_map().unwrap();
            prop_assert_eq!(back, request.headers);
        }
    }
}
