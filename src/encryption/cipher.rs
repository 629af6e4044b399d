//! Sealing: encrypting so that a change is noticed, and so is a move to another row or column.
//!
//! A sealed text is `1:<key id>:<Base64 of nonce, ciphertext and tag>`. The 1 is the version of
//! this form. A body is ciphertext and tag alone. It is sealed with its head: by the same key, and
//! with a nonce that follows from the head's. So a body fails to open beside another head.

use aws_lc_rs::aead::{self, Aad, CHACHA20_POLY1305, LessSafeKey, UnboundKey};
use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use chacha20::cipher::consts::U10;
use chacha20::hchacha;
use zeroize::Zeroizing;

use super::key::{KEY_LEN, Key, Keyring};
use crate::codec::Unreadable;
use crate::id::RequestId;

/// The version of the sealed form.
const FORM: &str = "1";
/// How much of a nonce is random. The last byte says what is sealed.
pub(crate) const NONCE_LEN: usize = 23;
pub(crate) const TAG_LEN: usize = 16;

/// What is sealed. Its number ends the nonce, so a head and its body have different ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    RequestHead = 1,
    RequestBody = 2,
    ResponseHead = 3,
    ResponseBody = 4,
    ErrorText = 5,
    HandlerError = 6,
    Digest = 7,
}

/// The random part of a nonce, which a head and its body have in common.
pub(crate) type Nonce = [u8; NONCE_LEN];
/// A nonce of XChaCha20-Poly1305.
pub(super) type XNonce = [u8; 24];
pub(super) type Tag = [u8; TAG_LEN];

/// A sealed text, taken apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SealedText<'a> {
    pub(crate) key_id: &'a str,
    sealed: &'a str,
}

impl<'a> SealedText<'a> {
    pub(crate) fn parse(text: &'a str) -> Result<Self, Unreadable> {
        let mut parts = text.splitn(3, ':');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(FORM), Some(key_id), Some(sealed)) => Ok(Self { key_id, sealed }),
            (Some(form), Some(_), _) if form.bytes().all(|byte| byte.is_ascii_digit()) => {
                let reason = "it is encrypted, in a form of a newer version";
                Err(Unreadable::new(reason))
            }
            _ => Err(Unreadable::new("its encrypted form is malformed")),
        }
    }
}

/// What sealing binds to a row and a column, so that it opens nowhere else.
fn associated_data(part: Part, id: RequestId, beside: &[&[u8]]) -> Vec<u8> {
    let len: usize = beside.iter().map(|bytes| bytes.len() + 8).sum();
    let mut data = Vec::with_capacity(32 + len);
    data.extend_from_slice(b"requeuest");
    data.extend_from_slice(FORM.as_bytes());
    data.push(part as u8);
    data.extend_from_slice(uuid::Uuid::from(id).as_bytes());
    for bytes in beside {
        data.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
        data.extend_from_slice(bytes);
    }
    data
}

fn full_nonce(nonce: &Nonce, part: Part) -> XNonce {
    let mut full = XNonce::default();
    full[..nonce.len()].copy_from_slice(nonce);
    full[nonce.len()] = part as u8;
    full
}

/// The key and the nonce of ChaCha20-Poly1305 that XChaCha20-Poly1305 with this key and nonce comes
/// down to (draft-irtf-cfrg-xchacha-03, sections 2.2 and 2.3).
fn chacha(key: &[u8; KEY_LEN], nonce: &XNonce) -> (LessSafeKey, aead::Nonce) {
    let (start, rest) = nonce.split_at(16);
    let subkey = hchacha::<U10>(key.into(), start.into());
    let subkey = Zeroizing::new(<[u8; KEY_LEN]>::from(subkey));
    let subkey = UnboundKey::new(&CHACHA20_POLY1305, &subkey[..]).expect("a key of 32 bytes");
    let mut short = [0; 12];
    short[4..].copy_from_slice(rest);
    let nonce = aead::Nonce::assume_unique_for_key(short);
    (LessSafeKey::new(subkey), nonce)
}

impl Key {
    /// Encrypts the bytes in place. Returns the tag.
    ///
    /// # Panics
    ///
    /// For more bytes than can be in memory. No plaintext is returned as if it were encrypted.
    pub(super) fn encrypt(&self, nonce: &XNonce, data: &[u8], bytes: &mut [u8]) -> Tag {
        let (key, nonce) = chacha(&self.sealing, nonce);
        let sealed = key.seal_in_place_separate_tag(nonce, Aad::from(data), bytes);
        let mut tag = Tag::default();
        tag.copy_from_slice(sealed.expect("less than 256 GiB").as_ref());
        tag
    }

    /// Decrypts ciphertext and tag in place. Returns the length of the plaintext.
    pub(super) fn decrypt(
        &self,
        nonce: &XNonce,
        data: &[u8],
        bytes: &mut [u8],
    ) -> Result<usize, Unreadable> {
        let (key, nonce) = chacha(&self.sealing, nonce);
        match key.open_in_place(nonce, Aad::from(data), bytes) {
            Ok(text) => Ok(text.len()),
            Err(_) => Err(Unreadable::new(format!(
                "it can't be decrypted with the key `{}`: it was changed, or moved from another \
                 row, or the key has other bytes",
                self.id()
            ))),
        }
    }
}

impl Keyring {
    pub(crate) fn nonce() -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).expect("random bytes of the system");
        nonce
    }

    /// Appends what [`seal_text`](Self::seal_text) returns after the id of the key.
    pub(crate) fn seal_into(
        &self,
        text: &mut String,
        part: Part,
        id: RequestId,
        beside: &[&[u8]],
        nonce: &Nonce,
        mut bytes: Vec<u8>,
    ) {
        let data = associated_data(part, id, beside);
        let (room, content) = bytes.split_at_mut(NONCE_LEN);
        room.copy_from_slice(nonce);
        let full = full_nonce(nonce, part);
        let tag = self.writer().encrypt(&full, &data, content);
        bytes.extend_from_slice(&tag);
        STANDARD_NO_PAD.encode_string(&bytes, text);
    }

    /// The beginning of a sealed text, up to the key's id.
    pub(crate) fn push_prefix(&self, text: &mut String) {
        text.push_str(FORM);
        text.push(':');
        text.push_str(self.writer().id());
        text.push(':');
    }

    /// Seals the bytes behind room for a nonce.
    pub(crate) fn seal_text(
        &self,
        part: Part,
        id: RequestId,
        beside: &[&[u8]],
        nonce: &Nonce,
        bytes: Vec<u8>,
    ) -> String {
        let len = (bytes.len() + TAG_LEN).div_ceil(3) * 4;
        let mut text = String::with_capacity(self.writer().id().len() + 3 + len);
        self.push_prefix(&mut text);
        self.seal_into(&mut text, part, id, beside, nonce, bytes);
        text
    }

    /// Opens a sealed text. Returns the bytes, and the nonce for the body.
    pub(crate) fn open_text(
        &self,
        text: SealedText<'_>,
        part: Part,
        id: RequestId,
        beside: &[&[u8]],
    ) -> Result<(Vec<u8>, Nonce), Unreadable> {
        let key = self.find(text.key_id)?;
        let malformed = || Unreadable::new("its encrypted form is malformed");
        let mut bytes = STANDARD_NO_PAD
            .decode(text.sealed)
            .map_err(|_| malformed())?;
        let (nonce, content) = bytes
            .split_first_chunk_mut::<NONCE_LEN>()
            .ok_or_else(malformed)?;
        let nonce = *nonce;
        let data = associated_data(part, id, beside);
        let len = key.decrypt(&full_nonce(&nonce, part), &data, content)?;
        bytes.truncate(NONCE_LEN + len);
        bytes.drain(..NONCE_LEN);
        Ok((bytes, nonce))
    }

    /// Seals a copy of a body with the nonce of its head.
    pub(crate) fn seal_body(
        &self,
        part: Part,
        id: RequestId,
        nonce: &Nonce,
        body: &[u8],
    ) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(body.len() + TAG_LEN);
        bytes.extend_from_slice(body);
        let data = associated_data(part, id, &[]);
        let tag = self
            .writer()
            .encrypt(&full_nonce(nonce, part), &data, &mut bytes);
        bytes.extend_from_slice(&tag);
        bytes
    }

    /// Opens a body in place, by the key and the nonce of its head.
    pub(crate) fn open_body(
        &self,
        key_id: &str,
        part: Part,
        id: RequestId,
        nonce: &Nonce,
        mut body: Vec<u8>,
    ) -> Result<Vec<u8>, Unreadable> {
        let data = associated_data(part, id, &[]);
        let len = self
            .find(key_id)?
            .decrypt(&full_nonce(nonce, part), &data, &mut body)?;
        body.truncate(len);
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use chacha20poly1305::aead::{Aead, Payload};
    use chacha20poly1305::{KeyInit, XChaCha20Poly1305};
    use proptest::prelude::*;

    use super::*;

    fn key(id: &str, seed: u8) -> Key {
        let bytes: Vec<u8> = (0..32).map(|byte| byte ^ seed).collect();
        Key::new(id, bytes).unwrap()
    }

    fn parts() -> impl Strategy<Value = Part> {
        prop_oneof![
            Just(Part::RequestHead),
            Just(Part::ResponseHead),
            Just(Part::ErrorText),
        ]
    }

    fn with_room(bytes: &[u8]) -> Vec<u8> {
        [&[0; NONCE_LEN], bytes].concat()
    }

    fn open(ring: &Keyring, text: &str, part: Part, id: RequestId, beside: &[u8]) -> Opened {
        let text = SealedText::parse(text)?;
        let (bytes, _) = ring.open_text(text, part, id, &[beside])?;
        Ok(bytes)
    }

    type Opened = Result<Vec<u8>, Unreadable>;

    proptest! {
        #[test]
        fn another_implementation_of_the_cipher_agrees(
            nonce: [u8; 24],
            data: Vec<u8>,
            bytes: Vec<u8>,
        ) {
            let key = key("a", 1);
            let other = XChaCha20Poly1305::new((&*key.sealing).into());
            let mut sealed = bytes.clone();
            let tag = key.encrypt(&nonce, &data, &mut sealed);
            sealed.extend_from_slice(&tag);
            let payload = Payload { msg: &bytes, aad: &data };
            prop_assert_eq!(&other.encrypt(&nonce.into(), payload).unwrap(), &sealed);
            prop_assert_eq!(key.decrypt(&nonce, &data, &mut sealed).unwrap(), bytes.len());
            prop_assert_eq!(&sealed[..bytes.len()], &bytes);
        }

        #[test]
        fn what_is_sealed_opens_where_it_was_sealed_and_nowhere_else(
            bytes: Vec<u8>,
            beside: Vec<u8>,
            part in parts(),
            other in parts(),
            flipped: prop::sample::Index,
        ) {
            let id = RequestId::generate();
            let ring = Keyring::new(key("a", 1)).and_read(key("b", 2));
            let sealed =
                ring.seal_text(part, id, &[&beside], &Keyring::nonce(), with_room(&bytes));
            prop_assert_eq!(open(&ring, &sealed, part, id, &beside).unwrap(), bytes.clone());
            let rotated = Keyring::new(key("b", 2)).and_read(key("a", 1));
            prop_assert_eq!(open(&rotated, &sealed, part, id, &beside).unwrap(), bytes.clone());

            if other != part {
                prop_assert!(open(&ring, &sealed, other, id, &beside).is_err());
            }
            prop_assert!(open(&ring, &sealed, part, RequestId::generate(), &beside).is_err());
            let more = [&beside[..], b"x"].concat();
            prop_assert!(open(&ring, &sealed, part, id, &more).is_err());
            let impostor = Keyring::new(key("a", 3));
            prop_assert!(open(&impostor, &sealed, part, id, &beside).is_err());
            let renamed = sealed.replacen(":a:", ":b:", 1);
            prop_assert!(open(&ring, &renamed, part, id, &beside).is_err());
            let mut changed = sealed.into_bytes();
            let start = "1:a:".len();
            let at = start + flipped.index(changed.len() - start);
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            prop_assert!(open(&ring, &changed, part, id, &beside).is_err());
        }

        #[test]
        fn a_body_opens_beside_its_head_alone(body: Vec<u8>, flipped: prop::sample::Index) {
            let id = RequestId::generate();
            let ring = Keyring::new(key("a", 1));
            let nonce = Keyring::nonce();
            let sealed = ring.seal_body(Part::RequestBody, id, &nonce, &body);
            let open = |part, id, nonce: &Nonce, sealed: &[u8]| {
                ring.open_body("a", part, id, nonce, sealed.to_vec())
            };
            prop_assert_eq!(&open(Part::RequestBody, id, &nonce, &sealed).unwrap(), &body);
            prop_assert!(open(Part::ResponseBody, id, &nonce, &sealed).is_err());
            prop_assert!(open(Part::RequestBody, RequestId::generate(), &nonce, &sealed).is_err());
            prop_assert!(open(Part::RequestBody, id, &Keyring::nonce(), &sealed).is_err());
            prop_assert!(open(Part::RequestBody, id, &nonce, &sealed[1..]).is_err());
            let mut changed = sealed.clone();
            changed[flipped.index(sealed.len())] ^= 1;
            prop_assert!(open(Part::RequestBody, id, &nonce, &changed).is_err());
        }

        #[test]
        fn any_text_is_opened_or_refused(text: String) {
            let (ring, id) = (Keyring::new(key("a", 1)), RequestId::generate());
            for text in [text.clone(), format!("1:a:{text}"), format!("{text}:a:AAAA")] {
                prop_assert!(open(&ring, &text, Part::ErrorText, id, b"").is_err());
            }
        }
    }

    #[test]
    fn a_reason_names_the_key() {
        let id = RequestId::generate();
        let ring = Keyring::new(key("a", 1));
        let sealed = ring.seal_text(Part::ErrorText, id, &[], &Keyring::nonce(), with_room(b"x"));
        for (ring, reason) in [
            (
                Keyring::new(key("b", 1)),
                "it is encrypted with a key that this process does not have: `a`",
            ),
            (
                Keyring::new(key("a", 2)),
                "it can't be decrypted with the key `a`: it was changed, or moved from another \
                 row, or the key has other bytes",
            ),
        ] {
            let text = SealedText::parse(&sealed).unwrap();
            let error = ring.open_text(text, Part::ErrorText, id, &[]).unwrap_err();
            assert_eq!(error.as_str(), reason);
        }
        let newer = SealedText::parse("2:a:AAAA").unwrap_err();
        assert_eq!(
            newer.as_str(),
            "it is encrypted, in a form of a newer version"
        );
    }
}
