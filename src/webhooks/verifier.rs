//! The receiver's side.

use std::error::Error as StdError;
use std::fmt;
use std::time::{Duration, SystemTime};

use http::HeaderMap;

use super::key::{KeyError, VerifyKey};
use super::{ID, SIGNATURE, TIMESTAMP, signed};

/// How far a webhook's timestamp may be from the receiver's clock: five minutes.
pub const DEFAULT_TOLERANCE: Duration = Duration::from_secs(5 * 60);

/// How many signatures are looked at. Each costs time.
const MAX_SIGNATURES: usize = 32;

/// Checks the signatures of webhooks, in a receiver.
///
/// # Examples
///
/// ```
/// use requeuest::http::HeaderMap;
/// use requeuest::webhooks::{Verifier, VerifyError};
///
/// fn receive(verifier: &Verifier, headers: &HeaderMap, body: &[u8]) -> Result<(), VerifyError> {
///     let webhook = verifier.verify(headers, body)?;
///     // A webhook comes again if its answer was lost. Its id tells.
///     println!("{}", webhook.id);
///     Ok(())
/// }
///
/// let verifier = Verifier::new(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])?;
/// assert_eq!(receive(&verifier, &HeaderMap::new(), b""), Err(VerifyError::MissingHeader));
/// # Ok::<(), requeuest::webhooks::KeyError>(())
/// ```
#[derive(Clone)]
pub struct Verifier {
    keys: Vec<VerifyKey>,
    tolerance: Duration,
}

/// A webhook whose signature is right.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// The same whenever this webhook is sent again.
    pub id: String,
    /// When the attempt was made, by the sender's clock.
    pub timestamp: SystemTime,
}

/// Why a webhook is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VerifyError {
    /// One of the three headers is missing, is there twice, or isn't text.
    MissingHeader,
    /// The id is empty or has a dot, so it isn't certain where it ended in what was signed.
    MalformedId,
    /// The timestamp is not a number of seconds.
    MalformedTimestamp,
    /// The timestamp is too old. The webhook may be a copy of an earlier one.
    TooOld,
    /// The timestamp is in the future.
    TooNew,
    /// None of the signatures is right.
    NoMatch,
}

impl Verifier {
    /// Accepts signatures of any of these keys: `whsec_…` or `whpk_…`.
    ///
    /// # Errors
    ///
    /// If one of the texts is not such a key.
    pub fn new<I>(keys: I) -> Result<Self, KeyError>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let keys = keys.into_iter().map(|key| key.as_ref().parse());
        Ok(Self {
            keys: keys.collect::<Result<_, _>>()?,
            tolerance: DEFAULT_TOLERANCE,
        })
    }

    /// How far the timestamp may be from this computer's clock, before and after it. Defaults to
    /// [`DEFAULT_TOLERANCE`].
    #[must_use]
    pub fn tolerance(mut self, tolerance: Duration) -> Self {
        self.tolerance = tolerance;
        self
    }

    /// Checks a webhook: its three headers, and its body as it was received.
    ///
    /// # Errors
    ///
    /// Why it must be refused.
    pub fn verify(&self, headers: &HeaderMap, body: &[u8]) -> Result<Verified, VerifyError> {
        self.verify_at(headers, body, SystemTime::now())
    }

    pub(super) fn verify_at(
        &self,
        headers: &HeaderMap,
        body: &[u8],
        now: SystemTime,
    ) -> Result<Verified, VerifyError> {
        let id = only(headers, ID)?;
        // With a dot, the same signature would be right for other parts: what begins the body could
        // stand for the timestamp.
        if id.is_empty() || id.contains('.') {
            return Err(VerifyError::MalformedId);
        }
        let timestamp = only(headers, TIMESTAMP)?;
        let signatures = only(headers, SIGNATURE)?;
        let time = time(timestamp).ok_or(VerifyError::MalformedTimestamp)?;
        if now
            .duration_since(time)
            .is_ok_and(|age| age > self.tolerance)
        {
            return Err(VerifyError::TooOld);
        }
        if time
            .duration_since(now)
            .is_ok_and(|early| early > self.tolerance)
        {
            return Err(VerifyError::TooNew);
        }
        let signed = signed(id, timestamp, body);
        let mut entries = signatures.split(' ').take(MAX_SIGNATURES);
        let matches = |entry| self.keys.iter().any(|key| key.verifies(entry, &signed));
        if !entries.any(matches) {
            return Err(VerifyError::NoMatch);
        }
        Ok(Verified {
            id: id.to_owned(),
            timestamp: time,
        })
    }
}

/// The only value of a header.
fn only<'a>(headers: &'a HeaderMap, name: &str) -> Result<&'a str, VerifyError> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().map_err(|_| VerifyError::MissingHeader),
        _ => Err(VerifyError::MissingHeader),
    }
}

/// Only digits: other texts of the same number would be other texts that are signed.
fn time(seconds: &str) -> Option<SystemTime> {
    let is_number = seconds.bytes().all(|byte| byte.is_ascii_digit());
    let seconds = is_number.then(|| seconds.parse().ok()).flatten()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("keys", &self.keys.len())
            .field("tolerance", &self.tolerance)
            .finish()
    }
}

impl fmt::Display for VerifyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MissingHeader => "a header of the webhook's signature is missing or repeated",
            Self::MalformedId => "the webhook's id is empty or has a dot",
            Self::MalformedTimestamp => "the webhook's timestamp is not a number",
            Self::TooOld => "the webhook's timestamp is too old",
            Self::TooNew => "the webhook's timestamp is in the future",
            Self::NoMatch => "no signature of the webhook is right",
        })
    }
}

impl StdError for VerifyError {}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::super::key::SigningKey;
    use super::*;

    const KEY: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const OTHER: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX";

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn headers(id: &str, timestamp: &str, signature: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in [(ID, id), (TIMESTAMP, timestamp), (SIGNATURE, signature)] {
            headers.insert(name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn signed_at(timestamp: &str) -> HeaderMap {
        let key: SigningKey = KEY.parse().unwrap();
        let signature = key.sign(&signed("id", timestamp, b"body"));
        headers("id", timestamp, &signature)
    }

    fn verify(headers: &HeaderMap, now: u64) -> Result<Verified, VerifyError> {
        let verifier = Verifier::new([OTHER, KEY]).unwrap();
        verifier.verify_at(headers, b"body", at(now))
    }

    #[test]
    fn a_timestamp_holds_for_five_minutes_before_and_after() {
        let headers = signed_at("1000");
        let verified = verify(&headers, 1300).unwrap();
        assert_eq!((&*verified.id, verified.timestamp), ("id", at(1000)));
        assert!(verify(&headers, 700).is_ok());
        assert_eq!(verify(&headers, 1301), Err(VerifyError::TooOld));
        assert_eq!(verify(&headers, 699), Err(VerifyError::TooNew));
        for timestamp in [
            "",
            "-1",
            "+1000",
            "1000.0",
            " 1000",
            "1e3",
            "99999999999999999999",
        ] {
            let mut headers = signed_at("1000");
            headers.insert(TIMESTAMP, HeaderValue::from_str(timestamp).unwrap());
            let error = verify(&headers, 1000).unwrap_err();
            assert_eq!(error, VerifyError::MalformedTimestamp, "{timestamp}");
        }
        let end = signed_at(&u64::MAX.to_string());
        assert!(verify(&end, 1000).is_err());
    }

    #[test]
    fn one_right_signature_among_others_is_enough() {
        let right = signed_at("1000")[SIGNATURE].to_str().unwrap().to_owned();
        for list in [
            format!("v1,AAAA {right}"),
            format!("v1a,AAAA v9,x  nonsense {right} v1,BBBB"),
        ] {
            assert!(
                verify(&headers("id", "1000", &list), 1000).is_ok(),
                "{list}"
            );
        }
        let many = format!("{}{right}", "v1,AAAA ".repeat(MAX_SIGNATURES));
        for list in ["", "v1,", "v1,AAAA", &right[3..], &many] {
            let verified = verify(&headers("id", "1000", list), 1000);
            assert_eq!(verified, Err(VerifyError::NoMatch), "{list}");
        }
    }

    #[test]
    fn what_was_signed_is_what_counts() {
        let right = signed_at("1000");
        let signature = right[SIGNATURE].to_str().unwrap();
        for changed in [
            headers("id-", "1000", signature),
            headers("id", "1001", signature),
        ] {
            assert_eq!(verify(&changed, 1000), Err(VerifyError::NoMatch));
        }
        let verifier = Verifier::new([KEY]).unwrap();
        assert!(verifier.verify_at(&right, b"bodY", at(1000)).is_err());
        let other = Verifier::new([OTHER]).unwrap();
        assert!(other.verify_at(&right, b"body", at(1000)).is_err());
    }

    #[test]
    fn a_dot_in_the_id_moves_nothing_of_the_body_into_the_timestamp() {
        let key: SigningKey = KEY.parse().unwrap();
        let body = b"2000.body";
        let signature = key.sign(&signed("id", "1000", body));
        let verifier = Verifier::new([KEY]).unwrap();
        let verify = |id, timestamp, body: &[u8]| {
            verifier.verify_at(&headers(id, timestamp, &signature), body, at(2000))
        };
        assert_eq!(verify("id", "1000", body), Err(VerifyError::TooOld));
        // The same bytes are signed.
        assert_eq!(
            verify("id.1000", "2000", b"body"),
            Err(VerifyError::MalformedId)
        );
        assert_eq!(verify("", "2000", b"body"), Err(VerifyError::MalformedId));
    }

    #[test]
    fn each_header_is_there_once() {
        for name in [ID, TIMESTAMP, SIGNATURE] {
            let mut twice = signed_at("1000");
            twice.append(name, twice[name].clone());
            assert_eq!(verify(&twice, 1000), Err(VerifyError::MissingHeader));
            twice.remove(name);
            assert_eq!(verify(&twice, 1000), Err(VerifyError::MissingHeader));
        }
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic_or_a_signature(
            id in "[ -~]{0,20}",
            timestamp in "[0-9 .+-]{0,22}",
            signature in "(v1a?,[A-Za-z0-9+/=]{0,90} ?){0,4}",
        ) {
            let keys = [KEY, "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="];
            let verifier = Verifier::new(keys).unwrap().tolerance(Duration::MAX);
            let headers = headers(&id, &timestamp, &signature);
            prop_assert!(verifier.verify_at(&headers, b"", at(1000)).is_err());
        }

        #[test]
        fn no_text_is_a_panic_of_a_key(text in "(whsec_|whsk_|whpk_)?[A-Za-z0-9+/=]{0,90}") {
            let _ = text.parse::<SigningKey>();
            let _ = text.parse::<VerifyKey>();
        }
    }
}
