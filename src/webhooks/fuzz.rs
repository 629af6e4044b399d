//! Reads signatures and keys that an attacker may have sent: nothing of them panics, and only what
//! a key has signed is verified.
//!
//! Each case is an entry of the corpus in `tests/corpus`, with changes at random places. More cases
//! run with `PROPTEST_CASES=100000 cargo test --lib webhooks::fuzz`.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue};
use proptest::prelude::*;

use super::key::{SigningKey, VerifyKey};
use super::{ID, SIGNATURE, TIMESTAMP, Verifier, signed};
use crate::codec::fuzz::changed;

const WEBHOOKS: &str = include_str!("../../tests/corpus/webhooks.txt");
const KEYS: &str = include_str!("../../tests/corpus/webhook_keys.txt");
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const PUBLIC: &str = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4=";

/// The headers of an entry: id, timestamp and signatures.
fn headers(entry: &str) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    let mut parts = entry.splitn(3, '|');
    for name in [ID, TIMESTAMP, SIGNATURE] {
        headers.insert(name, HeaderValue::from_str(parts.next()?).ok()?);
    }
    Some(headers)
}

fn is_verified(headers: &HeaderMap) -> bool {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let verifier = Verifier::new([SECRET, PUBLIC]).unwrap();
    let verified = verifier.verify_at(headers, b"body", now);
    verified.is_ok_and(|verified| headers[ID] == verified.id)
}

#[test]
fn the_corpus_has_webhooks_that_are_verified_and_others() {
    let all = || WEBHOOKS.lines().filter_map(headers);
    let verified = all().filter(is_verified).count();
    assert!(verified >= 3 && verified < all().count(), "{verified}");
}

proptest! {
    #[test]
    fn only_what_the_key_has_signed_is_verified(entry in changed(WEBHOOKS)) {
        let Some(headers) = headers(&entry) else { return Ok(()) };
        if is_verified(&headers) {
            let text = |name: &str| headers[name].to_str().unwrap();
            let signed = signed(text(ID), text(TIMESTAMP), b"body");
            let key: SigningKey = SECRET.parse().unwrap();
            let right = key.sign(&signed);
            let right = text(SIGNATURE).split(' ').any(|entry| entry == right);
            prop_assert!(right && !text(ID).contains('.'), "{}", entry);
        }
    }

    #[test]
    fn a_key_is_taken_or_refused_and_verifies_what_it_signs(text in changed(KEYS)) {
        let verifying = text.parse::<VerifyKey>();
        if let Ok(key) = text.parse::<SigningKey>() {
            let verifying = match key.public_key() {
                Some(public) => public.parse(),
                None => verifying,
            };
            prop_assert!(verifying.unwrap().verifies(&key.sign(b"signed"), b"signed"));
        }
    }
}
