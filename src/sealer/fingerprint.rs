//! Fingerprints of requests that have a caller's key.

use super::{Sealer, no_keys};
use crate::codec::Unreadable;
#[cfg(feature = "encryption")]
use crate::encryption::KeyOf;

impl Sealer {
    /// The form in which a fingerprint is stored, if it is encrypted.
    pub(crate) fn fingerprint(
        &self,
        channel: &str,
        key: &str,
        fingerprint: &[u8; 32],
    ) -> Option<Box<[u8]>> {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            let of = KeyOf { channel, key };
            return Some(keys.seal_digest(of, fingerprint).into());
        }
        let _ = (channel, key, fingerprint);
        None
    }

    /// Whether a stored fingerprint of this key is this one.
    pub(crate) fn is_fingerprint(
        &self,
        channel: &str,
        key: &str,
        fingerprint: &[u8; 32],
        stored: &[u8],
    ) -> Result<bool, Unreadable> {
        // An encrypted one is longer.
        if stored.len() <= fingerprint.len() {
            self.admit_plain()?;
            return Ok(stored == fingerprint);
        }
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            let of = KeyOf { channel, key };
            return keys
                .open_digest(of, stored)
                .map(|opened| opened == *fingerprint);
        }
        let _ = (channel, key);
        Err(no_keys())
    }

    /// A stored fingerprint, encrypted by the first key.
    #[cfg(feature = "encryption")]
    pub(crate) fn reseal_fingerprint(
        &self,
        channel: &str,
        key: &str,
        stored: &[u8],
    ) -> Result<Box<[u8]>, Unreadable> {
        let fingerprint = match (<[u8; 32]>::try_from(stored), &self.keys) {
            (Ok(plain), _) => {
                self.admit_plain()?;
                plain
            }
            (Err(_), Some(keys)) => keys.open_digest(KeyOf { channel, key }, stored)?,
            (Err(_), None) => return Err(no_keys()),
        };
        let sealed = self.fingerprint(channel, key, &fingerprint);
        Ok(sealed.unwrap_or_else(|| stored.into()))
    }
}
