//! The digest of a request that has a caller's key, so that a guess can't be compared with it.
//!
//! What is stored is a form number, the id of the key, a keyed hash, and the digest itself,
//! encrypted. Two calls that mean the same have equal forms while one key encrypts, and Postgres
//! compares these. The encrypted digest is there for the next key.

use super::cipher::{Part, TAG_LEN, XNonce};
use super::key::{Key, Keyring, hmac};
use crate::codec::Unreadable;

const FORM: u8 = 1;
const DIGEST_LEN: usize = 32;

/// Whose digest it is: the channel and the caller's key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyOf<'a> {
    pub(crate) channel: &'a str,
    pub(crate) key: &'a str,
}

impl KeyOf<'_> {
    fn bytes(self) -> Vec<u8> {
        let len = (self.channel.len() as u64).to_be_bytes();
        let (channel, key) = (self.channel.as_bytes(), self.key.as_bytes());
        [&[FORM, Part::Digest as u8][..], &len, channel, key].concat()
    }
}

impl Key {
    fn seal_digest(&self, of: KeyOf<'_>, digest: &[u8; DIGEST_LEN]) -> Vec<u8> {
        let data = of.bytes();
        let hash = hmac(&*self.hashing, &[&data, digest]);
        let mut sealed = *digest;
        // From the content, so that equal digests have equal forms.
        let tag = self.encrypt(&nonce(&hash), &data, &mut sealed);
        let id = self.id().as_bytes();
        // An id has at most 64 bytes.
        let len = id.len() as u8;
        [&[FORM, len][..], id, &hash, &sealed, &tag].concat()
    }
}

fn nonce(hash: &[u8; 32]) -> XNonce {
    let mut nonce = XNonce::default();
    nonce.copy_from_slice(&hash[..24]);
    nonce
}

/// A stored form, taken apart: the id of the key, the hash, and the encrypted digest.
fn parse(stored: &[u8]) -> Option<(&str, &[u8; 32], &[u8])> {
    let (header, rest) = stored.split_at_checked(2)?;
    let (id, rest) = rest.split_at_checked(usize::from(header[1]))?;
    let (hash, sealed) = rest.split_at_checked(32)?;
    let id = std::str::from_utf8(id).ok()?;
    let is_known = header[0] == FORM && sealed.len() == DIGEST_LEN + TAG_LEN;
    is_known.then_some((id, hash.try_into().ok()?, sealed))
}

impl Keyring {
    /// The form in which a digest is stored.
    pub(crate) fn seal_digest(&self, of: KeyOf<'_>, digest: &[u8; DIGEST_LEN]) -> Vec<u8> {
        self.writer().seal_digest(of, digest)
    }

    /// The digest of a stored form.
    pub(crate) fn open_digest(
        &self,
        of: KeyOf<'_>,
        stored: &[u8],
    ) -> Result<[u8; DIGEST_LEN], Unreadable> {
        let malformed = || Unreadable::new("what its key is compared by is malformed");
        let (id, hash, sealed) = parse(stored).ok_or_else(malformed)?;
        let key = self.find(id)?;
        let mut bytes = sealed.to_vec();
        key.decrypt(&nonce(hash), &of.bytes(), &mut bytes)?;
        bytes.truncate(DIGEST_LEN);
        let digest = bytes.try_into().map_err(|_| malformed())?;
        if key.seal_digest(of, &digest) == stored {
            Ok(digest)
        } else {
            Err(malformed())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OF: KeyOf<'_> = KeyOf {
        channel: "c",
        key: "k",
    };

    fn key(id: &str, seed: u8) -> Key {
        let bytes: Vec<u8> = (0..32).map(|byte| byte ^ seed).collect();
        Key::new(id, bytes).unwrap()
    }

    proptest! {
        #[test]
        fn a_digest_opens_for_its_own_key_alone(digest: [u8; 32], flipped: prop::sample::Index) {
            let ring = Keyring::new(key("a", 1));
            let stored = ring.seal_digest(OF, &digest);
            prop_assert_eq!(&ring.seal_digest(OF, &digest), &stored);
            let rotated = Keyring::new(key("b", 2)).and_read(key("a", 1));
            prop_assert_eq!(rotated.open_digest(OF, &stored).unwrap(), digest);
            prop_assert_ne!(&rotated.seal_digest(OF, &digest), &stored);
            for other in [KeyOf { channel: "d", ..OF }, KeyOf { key: "l", ..OF }] {
                prop_assert!(ring.open_digest(other, &stored).is_err());
            }
            prop_assert!(Keyring::new(key("a", 2)).open_digest(OF, &stored).is_err());
            let mut changed = stored.clone();
            changed[flipped.index(stored.len())] ^= 1;
            prop_assert!(ring.open_digest(OF, &changed).is_err());
            prop_assert!(!stored.windows(8).any(|part| part == &digest[..8]));
        }

        #[test]
        fn any_bytes_are_opened_or_refused(bytes: Vec<u8>) {
            let ring = Keyring::new(key("a", 1));
            prop_assert!(ring.open_digest(OF, &bytes).is_err());
            prop_assert!(ring.open_digest(OF, &[&[1, 1, b'a'][..], &bytes].concat()).is_err());
        }
    }
}
