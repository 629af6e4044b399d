//! The keys of signatures.

use std::error::Error as StdError;
use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use ed25519_dalek::{Signature, Signer as _, SigningKey as Ed25519, VerifyingKey};
use hmac::digest::KeyInit;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::base64;

const SECRET: &str = "whsec_";
const PRIVATE: &str = "whsk_";
const PUBLIC: &str = "whpk_";

/// A key that signs webhooks: a secret (`whsec_…`) or a private Ed25519 key (`whsk_…`). Parsed from
/// its text.
///
/// # Errors
///
/// Parsing returns a [`KeyError`], which says what is wrong and doesn't show the text.
///
/// # Examples
///
/// ```
/// use requeuest::webhooks::SigningKey;
///
/// let key: SigningKey = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse()?;
/// assert_eq!(format!("{key:?}"), "SigningKey(v1)");
/// assert!("whsec_c2hvcnQ=".parse::<SigningKey>().is_err());
/// # Ok::<(), requeuest::webhooks::KeyError>(())
/// ```
#[derive(Clone)]
pub struct SigningKey {
    kind: Kind,
    until: Option<SystemTime>,
}

#[derive(Clone)]
enum Kind {
    Secret(Secret),
    // Overwrites itself when it is dropped.
    Private(Box<Ed25519>),
}

/// The block that HMAC makes of a secret of 24 to 64 bytes: zeros are appended (RFC 2104 section
/// 2).
#[derive(Clone)]
pub(super) struct Secret(Box<Zeroizing<[u8; 64]>>);

impl SigningKey {
    /// Signs until this time and not after it, for a key that is replaced. Defaults to always.
    #[must_use]
    pub fn valid_until(mut self, time: SystemTime) -> Self {
        self.until = Some(time);
        self
    }

    pub(super) fn is_valid(&self, now: SystemTime) -> bool {
        self.until.is_none_or(|until| now <= until)
    }

    /// The public key of a private one, `whpk_…`, to hand to receivers. `None` for a secret.
    pub fn public_key(&self) -> Option<String> {
        match &self.kind {
            Kind::Secret(_) => None,
            Kind::Private(key) => {
                let public = base64::encode(key.verifying_key().as_bytes());
                Some(format!("{PUBLIC}{public}"))
            }
        }
    }

    /// An entry of the list of signatures.
    pub(super) fn sign(&self, signed: &[u8]) -> String {
        match &self.kind {
            Kind::Secret(secret) => {
                let code = secret.mac(signed).finalize().into_bytes();
                format!("v1,{}", base64::encode(&code))
            }
            Kind::Private(key) => {
                format!("v1a,{}", base64::encode(&key.sign(signed).to_bytes()))
            }
        }
    }
}

impl FromStr for SigningKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let kind = if let Some(text) = text.strip_prefix(SECRET) {
            Kind::Secret(Secret::parse(text)?)
        } else if let Some(text) = text.strip_prefix(PRIVATE) {
            Kind::Private(Box::new(private(text)?))
        } else if text.starts_with(PUBLIC) {
            return Err(KeyError("`whpk_` is a public key, which can't sign"));
        } else {
            return Err(KeyError("it must begin with `whsec_` or `whsk_`"));
        };
        Ok(Self { kind, until: None })
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::Secret(_) => "SigningKey(v1)",
            Kind::Private(_) => "SigningKey(v1a)",
        })
    }
}

impl Secret {
    fn parse(text: &str) -> Result<Self, KeyError> {
        let bytes = base64::decode(text).map(Zeroizing::new);
        let bytes = bytes.ok_or(KeyError("the text after `whsec_` is not Base64"))?;
        if !(24..=64).contains(&bytes.len()) {
            return Err(KeyError("a secret must have 24 to 64 bytes"));
        }
        let mut block = Box::new(Zeroizing::new([0; 64]));
        block[..bytes.len()].copy_from_slice(&bytes);
        Ok(Self(block))
    }

    fn mac(&self, signed: &[u8]) -> Hmac<Sha256> {
        let mut mac = <Hmac<Sha256> as KeyInit>::new((&**self.0).into());
        mac.update(signed);
        mac
    }
}

fn private(text: &str) -> Result<Ed25519, KeyError> {
    let bytes = base64::decode(text).map(Zeroizing::new);
    let bytes = bytes.ok_or(KeyError("the text after `whsk_` is not Base64"))?;
    if let Ok(seed) = <&[u8; 32]>::try_from(&**bytes) {
        return Ok(Ed25519::from_bytes(seed));
    }
    let pair = <&[u8; 64]>::try_from(&**bytes)
        .map_err(|_| KeyError("a private key must have 32 or 64 bytes"))?;
    Ed25519::from_keypair_bytes(pair)
        .map_err(|_| KeyError("the two halves of the private key don't belong together"))
}

/// What a receiver checks signatures with.
#[derive(Clone)]
pub(super) enum VerifyKey {
    Secret(Secret),
    Public(Box<VerifyingKey>),
}

impl VerifyKey {
    /// Whether this entry of the list is this key's signature. In constant time for secrets.
    pub(super) fn verifies(&self, entry: &str, signed: &[u8]) -> bool {
        let Some((version, signature)) = entry.split_once(',') else {
            return false;
        };
        match self {
            Self::Secret(secret) if version == "v1" => base64::decode(signature)
                .is_some_and(|code| secret.mac(signed).verify_slice(&code).is_ok()),
            Self::Public(key) if version == "v1a" => base64::decode(signature)
                .and_then(|bytes| Signature::from_slice(&bytes).ok())
                .is_some_and(|signature| key.verify_strict(signed, &signature).is_ok()),
            _ => false,
        }
    }
}

impl FromStr for VerifyKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        if let Some(text) = text.strip_prefix(SECRET) {
            return Secret::parse(text).map(Self::Secret);
        }
        if let Some(text) = text.strip_prefix(PUBLIC) {
            let bytes = base64::decode(text);
            let bytes = bytes.ok_or(KeyError("the text after `whpk_` is not Base64"))?;
            let bytes = <&[u8; 32]>::try_from(&*bytes)
                .map_err(|_| KeyError("a public key must have 32 bytes"))?;
            let key = VerifyingKey::from_bytes(bytes).ok();
            let key = key.filter(|key| !key.is_weak());
            let key = key.ok_or(KeyError("the bytes are not a usable public key"))?;
            return Ok(Self::Public(Box::new(key)));
        }
        if text.starts_with(PRIVATE) {
            return Err(KeyError(
                "`whsk_` is a private key; a receiver has the public one",
            ));
        }
        Err(KeyError("it must begin with `whsec_` or `whpk_`"))
    }
}

/// A text is no key. Says why, and doesn't show the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyError(&'static str);

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid webhook key: {}", self.0)
    }
}

impl StdError for KeyError {}

#[cfg(test)]
mod tests {
    use super::super::signed;
    use super::*;

    // The vectors of the libraries of Standard Webhooks, and of Svix's server for Ed25519.
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const TIME: &str = "1614265330";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const WHSEC: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const V1: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
    const WHSK: &str = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJ\
                        p4AJ6p9lMicMFs6Kvg==";
    const SEED: &str = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbc=";
    const WHPK: &str = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4=";
    const V1A: &str = "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVL\
                       Po3mNl8EM+m7TBAg==";

    #[test]
    fn the_published_vectors() {
        let signed = signed(ID, TIME, BODY);
        for (key, signature) in [(WHSEC, V1), (WHSK, V1A), (SEED, V1A)] {
            let key: SigningKey = key.parse().unwrap();
            assert_eq!(key.sign(&signed), signature);
        }
        let key: SigningKey = WHSK.parse().unwrap();
        assert_eq!(key.public_key().as_deref(), Some(WHPK));
        for (key, signature, other) in [(WHSEC, V1, V1A), (WHPK, V1A, V1)] {
            let key: VerifyKey = key.parse().unwrap();
            assert!(key.verifies(signature, &signed));
            assert!(!key.verifies(other, &signed));
            assert!(!key.verifies(signature, &signed[1..]));
            let (version, code) = signature.split_once(',').unwrap();
            for entry in [
                String::new(),
                code.to_owned(),
                format!("v2,{code}"),
                format!("{version},"),
                format!("{version},{}", &code[4..]),
                format!("{version} ,{code}"),
            ] {
                assert!(!key.verifies(&entry, &signed), "{entry}");
            }
        }
    }

    #[test]
    fn other_texts_are_errors_that_do_not_show_them() {
        let of_length = |length| base64::encode(&vec![7; length]);
        let swapped = format!("whsk_{}", base64::encode(&[7; 64]));
        for text in [
            String::new(),
            "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned(),
            "WHSEC_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned(),
            "whsec_".to_owned(),
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS".to_owned(),
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS-".to_owned(),
            " whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned(),
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n".to_owned(),
            format!("whsec_{}", of_length(23)),
            format!("whsec_{}", of_length(65)),
            format!("whsk_{}", of_length(31)),
            swapped,
            WHPK.to_owned(),
        ] {
            let error = text.parse::<SigningKey>().unwrap_err().to_string();
            assert!(error.starts_with("invalid webhook key: "));
            assert!(
                !error.contains("MfKQ") && !error.contains("BwcH"),
                "{error}"
            );
        }
        for length in [24, 64] {
            let text = format!("whsec_{}", of_length(length));
            assert!(text.parse::<SigningKey>().is_ok());
        }
        for text in [WHSK, "", "whpk_", "whpk_AAAA"] {
            assert!(text.parse::<VerifyKey>().is_err(), "{text}");
        }
        // The neutral element verifies anything.
        let weak = format!("whpk_{}", base64::encode(&[&[1][..], &[0; 31]].concat()));
        assert!(weak.parse::<VerifyKey>().is_err());
    }

    #[test]
    fn a_key_signs_until_its_end() {
        let end = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000);
        let key: SigningKey = WHSEC.parse().unwrap();
        assert!(key.is_valid(SystemTime::now()));
        let key = key.valid_until(end);
        assert!(key.is_valid(end));
        assert!(!key.is_valid(end + std::time::Duration::from_nanos(1)));
        assert_eq!(format!("{key:?}"), "SigningKey(v1)");
    }
}
