//! Keys, and the ring of those that a process has.

use std::fmt;

use aws_lc_rs::hmac::{self, HMAC_SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use zeroize::Zeroizing;

use crate::codec::Unreadable;
use crate::error::Error;

/// How long a key is, in bytes: 32.
pub const KEY_LEN: usize = 32;
/// How long the id of a key may be, in bytes: 64.
pub const MAX_KEY_ID_LEN: usize = 64;

/// A secret key with its id.
///
/// The id is stored beside everything that the key encrypts. `Debug` shows the id alone, and the
/// memory of the key is overwritten when it is dropped.
///
/// # Examples
///
/// ```
/// use requeuest::encryption::Key;
///
/// // 32 random bytes, from where your secrets are: `openssl rand -base64 32` makes them.
/// let text = "dnqEIVTB7T5hLsFo0VP1ARTFsU4MPn8ZJXCpPHsSqxM=";
/// let key = Key::from_base64("2026-01", text)?;
/// assert_eq!(key.id(), "2026-01");
/// # Ok::<(), requeuest::Error>(())
/// ```
pub struct Key {
    id: Box<str>,
    pub(super) sealing: Zeroizing<[u8; KEY_LEN]>,
    pub(super) hashing: Zeroizing<[u8; KEY_LEN]>,
}

impl Key {
    /// A key of 32 random bytes. Its id is 1 to 64 letters, digits, `-`, `_` and `.` of ASCII, and
    /// never names another key.
    ///
    /// # Errors
    ///
    /// If the id or the length of the key is not valid, with `encryption_key_id` or
    /// `encryption_key` in [`Error::field`].
    pub fn new(id: impl Into<String>, key: impl AsRef<[u8]>) -> Result<Self, Error> {
        let id = id.into();
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=MAX_KEY_ID_LEN).contains(&id.len()) || !id.bytes().all(is_allowed) {
            return Err(Error::config(
                "encryption_key_id",
                "must be 1 to 64 letters, digits, `-`, `_` and `.` of ASCII",
            ));
        }
        let key = key.as_ref();
        if key.len() != KEY_LEN {
            let reason = format!("must be {KEY_LEN} bytes long, but has {}", key.len());
            return Err(Error::config("encryption_key", reason));
        }
        if key.iter().all(|byte| *byte == key[0]) {
            let reason = "must be random, but all of its bytes are the same";
            return Err(Error::config("encryption_key", reason));
        }
        Ok(Self {
            id: id.into(),
            sealing: derived(key, b"requeuest seal"),
            hashing: derived(key, b"requeuest digest"),
        })
    }

    /// As [`new`](Self::new), from the text of the key in Base64, padded or not. White space around
    /// it is ignored.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and if the text is not Base64.
    pub fn from_base64(id: impl Into<String>, key: &str) -> Result<Self, Error> {
        let text = key.trim();
        let bytes = STANDARD
            .decode(text)
            .or_else(|_| STANDARD_NO_PAD.decode(text))
            .map_err(|_| Error::config("encryption_key", "is not Base64"))?;
        Self::new(id, Zeroizing::new(bytes))
    }

    /// The name of the key, which is stored beside what it encrypts.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Each use has a key of its own.
fn derived(key: &[u8], purpose: &[u8]) -> Zeroizing<[u8; KEY_LEN]> {
    let mut derived = Zeroizing::new([0; KEY_LEN]);
    derived.copy_from_slice(&hmac(key, &[purpose]));
    derived
}

/// HMAC-SHA256 (RFC 2104) over the parts, one behind the other.
pub(super) fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(HMAC_SHA256, key));
    for part in parts {
        context.update(part);
    }
    let mut tag = [0; 32];
    tag.copy_from_slice(context.sign().as_ref());
    tag
}

/// The keys of a process. The first one encrypts, and all of them decrypt.
///
/// To rotate keys:
///
/// 1. Give the new key to all processes, to read with: `Keyring::new(old).and_read(new)`.
/// 2. Have all processes write with it: `Keyring::new(new).and_read(old)`.
/// 3. Call [`Durable::reencrypt`](crate::Durable::reencrypt), or wait until everything older has
///    expired.
/// 4. Remove the old key once [`Durable::encryption_keys`](crate::Durable::encryption_keys) lists
///    nothing that needs it.
///
/// A request that reaches a process without its key is parked, so a process that is late delays
/// some requests and loses none.
#[derive(Debug)]
pub struct Keyring {
    keys: Vec<Key>,
}

impl Keyring {
    /// A ring with this key, which encrypts and decrypts.
    pub fn new(key: Key) -> Self {
        Self { keys: vec![key] }
    }

    /// Adds a key that only decrypts.
    #[must_use]
    pub fn and_read(mut self, key: Key) -> Self {
        self.keys.push(key);
        self
    }

    /// The ids of the keys, the one that encrypts first.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(Key::id)
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        for (number, key) in self.keys.iter().enumerate() {
            if self.keys[..number].iter().any(|other| other.id == key.id) {
                let reason = format!("has two keys with the id `{}`", key.id);
                return Err(Error::config("encryption", reason));
            }
        }
        Ok(())
    }

    /// The key that encrypts.
    pub(super) fn writer(&self) -> &Key {
        &self.keys[0]
    }

    pub(super) fn find(&self, id: &str) -> Result<&Key, Unreadable> {
        let found = self.keys.iter().find(|key| &*key.id == id);
        found.ok_or_else(|| {
            let reason = "it is encrypted with a key that this process does not have";
            Unreadable::new(format!("{reason}: `{id}`"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_not_valid_is_an_error_that_names_the_field() {
        let field = |key: Result<Key, Error>| key.unwrap_err().field().map(str::to_owned);
        let bytes: Vec<u8> = (0..32).collect();
        for id in ["", "a b", "a:b", "ä", &"a".repeat(65)] {
            assert_eq!(field(Key::new(id, &bytes)).unwrap(), "encryption_key_id");
        }
        for len in [0, 16, 31] {
            let key = Key::new("a", &bytes[..len]);
            assert_eq!(field(key).unwrap(), "encryption_key");
        }
        assert_eq!(field(Key::new("a", [0; 32])).unwrap(), "encryption_key");
        for text in ["", "hunter2!", "AAECAw=="] {
            let error = Key::from_base64("a", text).unwrap_err();
            assert_eq!(error.field(), Some("encryption_key"));
            assert!(!format!("{error:?} {error}").contains("hunter2"));
        }
        assert!(Key::new("a".repeat(64), bytes).is_ok());
    }

    #[test]
    fn two_keys_of_one_ring_have_different_ids() {
        let key = |id: &str, first: u8| Key::new(id, [[first; 16], [1; 16]].concat()).unwrap();
        let ring = Keyring::new(key("a", 0)).and_read(key("b", 2));
        assert!(ring.validate().is_ok());
        assert_eq!(ring.ids().collect::<Vec<_>>(), ["a", "b"]);
        let error = ring.and_read(key("a", 3)).validate().unwrap_err();
        assert_eq!(error.field(), Some("encryption"));
        assert!(error.to_string().contains("`a`"), "{error}");
    }

    #[test]
    fn debug_shows_ids_alone() {
        let bytes: Vec<u8> = (0..32).map(|byte| byte + 0x60).collect();
        let ring = Keyring::new(Key::new("2026-01", &bytes).unwrap());
        let shown = format!("{ring:?}");
        assert_eq!(shown, r#"Keyring { keys: [Key { id: "2026-01", .. }] }"#);
    }
}
