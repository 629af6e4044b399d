//! The stored form of requests and responses, encrypted if the handle has keys.
//!
//! An encrypted head of a request is JSON too:
//! `{"method":…,"url":<origin>,"sealed":…,"delivery":…}`. The statements that read a head find there
//! what they read in any other. What is readable is
//! bound to the encrypted rest, except for the mark of a waiting caller, which a replay takes off.
//! An encrypted head of a response is `{"sealed":…}`, and an encrypted text begins with `sealed:`.
//!
//! Rows that are not encrypted are read whether or not there are keys.

use std::borrow::Cow;
#[cfg(feature = "encryption")]
use std::sync::Arc;

use bytes::Bytes;
use http::Uri;

use crate::codec::{self, Delivery, Unreadable};
#[cfg(feature = "encryption")]
use crate::destination::Destination;
#[cfg(feature = "encryption")]
use crate::encryption::{KeyOf, Keyring, NONCE_LEN, Nonce, Part, SealedText, TAG_LEN};
use crate::error::Error;
use crate::id::RequestId;
use crate::request::Request;
use crate::response::Response;

/// What an encrypted text begins with. No other stored text does.
const SEALED_TEXT: &str = "sealed:";
const SEALED_RESPONSE: &str = "{\"sealed\":\"";
const SEALED_IN_REQUEST: &str = ",\"sealed\":\"";
const DELIVERY: &str = "\",\"delivery\":";
/// How a head ends whose caller waits for the response.
#[cfg(feature = "encryption")]
const AWAITED: &str = ",\"awaited\":true}}";

/// Makes stored forms and reads them. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sealer {
    #[cfg(feature = "encryption")]
    keys: Option<Arc<Keyring>>,
}

/// A head of a request, read. Its body is read with it.
#[derive(Debug)]
pub(crate) struct ReadHead {
    pub(crate) request: Request,
    pub(crate) uri: Uri,
    pub(crate) delivery: Delivery,
    pub(crate) body: BodySeal,
}

/// A response on its way into a row.
#[derive(Debug)]
pub(crate) struct StoredResponse {
    pub(crate) head: String,
    /// The encrypted body. `None` if the response's own body is stored.
    pub(crate) sealed_body: Option<Vec<u8>>,
}

/// How the body beside a head is read.
#[derive(Debug, Default)]
pub(crate) struct BodySeal {
    #[cfg(feature = "encryption")]
    sealed: Option<SealedBody>,
}

#[cfg(feature = "encryption")]
#[derive(Debug)]
struct SealedBody {
    keys: Arc<Keyring>,
    key_id: Box<str>,
    nonce: Nonce,
    id: RequestId,
    /// Whether the request has a body.
    present: bool,
}

impl BodySeal {
    pub(crate) fn open(self, body: Option<Vec<u8>>) -> Result<Option<Bytes>, Unreadable> {
        #[cfg(feature = "encryption")]
        if let Some(sealed) = self.sealed {
            return match (body, sealed.present) {
                (None, false) => Ok(None),
                (Some(body), true) => {
                    let (key, nonce) = (&sealed.key_id, &sealed.nonce);
                    let opened =
                        sealed
                            .keys
                            .open_body(key, Part::RequestBody, sealed.id, nonce, body);
                    opened.map(|body| Some(Bytes::from(body)))
                }
                (None, true) => Err(Unreadable::new("its body is missing")),
                (Some(_), false) => Err(Unreadable::new("it has a body that is not its own")),
            };
        }
        Ok(body.map(Bytes::from))
    }
}

/// Where the parts of an encrypted head of a request are.
#[cfg_attr(
    not(feature = "encryption"),
    expect(dead_code, reason = "no key can open it")
)]
struct SealedHead<'a> {
    method: &'a str,
    /// All that stands before the encrypted part.
    before: &'a str,
    sealed: &'a str,
    /// All that stands after it.
    after: &'a str,
}

impl<'a> SealedHead<'a> {
    fn find(head: &'a str) -> Option<Self> {
        let (method, rest) = head.strip_prefix("{\"method\":\"")?.split_once('"')?;
        let (_, rest) = rest.strip_prefix(",\"url\":\"")?.split_once('"')?;
        let rest = rest.strip_prefix(SEALED_IN_REQUEST)?;
        let (before, _) = head.split_at(head.len() - rest.len());
        let (sealed, _) = rest.split_once('"')?;
        let after = &rest[sealed.len()..];
        after.starts_with(DELIVERY).then_some(Self {
            method,
            before,
            sealed,
            after,
        })
    }
}

/// Without the mark of a waiting caller, which a replay takes off.
#[cfg(feature = "encryption")]
fn without_caller(after: &str) -> &str {
    after
        .strip_suffix(AWAITED)
        .or_else(|| after.strip_suffix("}}"))
        .unwrap_or(after)
}

/// Why a form is unreadable for a process without keys.
fn no_keys() -> Unreadable {
    Unreadable::new(if cfg!(feature = "encryption") {
        "it is encrypted, and this process has no keys"
    } else {
        "it is encrypted, and this program is built without the feature `encryption`"
    })
}

impl Sealer {
    #[cfg(feature = "encryption")]
    pub(crate) fn new(keys: Keyring) -> Self {
        Self {
            keys: Some(Arc::new(keys)),
        }
    }

    #[cfg(feature = "encryption")]
    pub(crate) fn keys(&self) -> Option<&Keyring> {
        self.keys.as_deref()
    }

    /// Checks the keys, for the builder.
    #[cfg_attr(
        not(feature = "encryption"),
        expect(clippy::unused_self, reason = "no keys")
    )]
    pub(crate) fn validate(&self) -> Result<(), Error> {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            return keys.validate();
        }
        Ok(())
    }

    /// Head and body of a request as they are stored.
    pub(crate) fn request(
        &self,
        id: RequestId,
        request: &Request,
        uri: &Uri,
        delivery: &Delivery,
    ) -> (String, Option<Bytes>) {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            let hidden = codec::encode_hidden(request, uri, &[0; NONCE_LEN], TAG_LEN);
            let nonce = Keyring::nonce();
            let (method, origin) = (&request.method, Destination::of(uri));
            let before = format!(r#"{{"method":"{method}","url":"{origin}"{SEALED_IN_REQUEST}"#);
            let after = [DELIVERY, &codec::encode_delivery(delivery), "}"].concat();
            let head = seal_head(keys, id, &before, &after, &nonce, hidden);
            let body = request.body.as_deref();
            let body = body.map(|body| keys.seal_body(Part::RequestBody, id, &nonce, body));
            return (head, body.map(Bytes::from));
        }
        let _ = id;
        let head = codec::encode_request(request, uri, delivery);
        (head, request.body.clone())
    }

    /// Reads the head of a request.
    pub(crate) fn read_request(&self, id: RequestId, head: &str) -> Result<ReadHead, Unreadable> {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            if let Some(sealed) = SealedHead::find(head) {
                return open_request(keys, id, &sealed);
            }
        }
        let _ = id;
        let (request, uri, delivery) =
            codec::decode_request(head).map_err(|reason| match SealedHead::find(head) {
                Some(_) => no_keys(),
                None => reason,
            })?;
        Ok(ReadHead {
            request,
            uri,
            delivery,
            body: BodySeal::default(),
        })
    }

    /// A stored request, encrypted by the first key and for another id or the same one.
    pub(crate) fn reseal_request(
        &self,
        from: RequestId,
        to: RequestId,
        head: &str,
        body: Option<Vec<u8>>,
    ) -> Result<(String, Option<Bytes>), Unreadable> {
        #[cfg(feature = "encryption")]
        if let (Some(keys), Some(sealed)) = (&self.keys, SealedHead::find(head)) {
            let body = open_request(keys, from, &sealed)?.body.open(body)?;
            let (mut hidden, _) = open_head(keys, from, &sealed)?;
            hidden.splice(..0, [0; NONCE_LEN]);
            let nonce = Keyring::nonce();
            let head = seal_head(keys, to, sealed.before, sealed.after, &nonce, hidden);
            let body = body.map(|body| keys.seal_body(Part::RequestBody, to, &nonce, &body));
            return Ok((head, body.map(Bytes::from)));
        }
        let mut read = self.read_request(from, head)?;
        read.request.body = read.body.open(body)?;
        Ok(self.request(to, &read.request, &read.uri, &read.delivery))
    }

    /// A stored response, encrypted by the first key.
    #[cfg(feature = "encryption")]
    pub(crate) fn reseal_response(
        &self,
        id: RequestId,
        status: u16,
        head: &str,
        body: Option<Vec<u8>>,
    ) -> Result<StoredResponse, Unreadable> {
        if let (Some(keys), true) = (&self.keys, head.starts_with(SEALED_RESPONSE)) {
            let (mut hidden, body) = open_response(keys, id, status, head, body)?;
            hidden.splice(..0, [0; NONCE_LEN]);
            return Ok(seal_response(keys, id, status, hidden, &body));
        }
        self.read_response(id, status, head, body)
            .map(|response| self.response(&response))
    }

    /// A stored error, encrypted by the first key.
    #[cfg(feature = "encryption")]
    pub(crate) fn reseal_error_text(
        &self,
        id: RequestId,
        text: String,
    ) -> Result<String, Unreadable> {
        let text = self.read_error_text(id, text)?;
        Ok(self.error_text(id, &text).into_owned())
    }

    /// A stored error of a handler, encrypted by the first key.
    #[cfg(feature = "encryption")]
    pub(crate) fn reseal_handler_error(
        &self,
        id: RequestId,
        text: String,
    ) -> Result<String, Unreadable> {
        let text = match &self.keys {
            Some(keys) => open_error(keys, Part::HandlerError, id, text)?,
            None => text,
        };
        Ok(self.handler_error(id, &text).into_owned())
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
            (Ok(plain), _) => plain,
            (Err(_), Some(keys)) => keys.open_digest(KeyOf { channel, key }, stored)?,
            (Err(_), None) => return Err(no_keys()),
        };
        let sealed = self.fingerprint(channel, key, &fingerprint);
        Ok(sealed.unwrap_or_else(|| stored.into()))
    }

    /// A response as it is stored.
    pub(crate) fn response(&self, response: &Response) -> StoredResponse {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            let hidden = codec::encode_response_between(response, &[0; NONCE_LEN], TAG_LEN);
            let status = response.status.as_u16();
            return seal_response(keys, response.id, status, hidden, &response.body);
        }
        StoredResponse {
            head: codec::encode_response(response),
            sealed_body: None,
        }
    }

    pub(crate) fn read_response(
        &self,
        id: RequestId,
        status: u16,
        head: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Response, Unreadable> {
        if head.starts_with(SEALED_RESPONSE) {
            #[cfg(feature = "encryption")]
            if let Some(keys) = &self.keys {
                let (hidden, body) = open_response(keys, id, status, head, body)?;
                let head = String::from_utf8(hidden)
                    .map_err(|_| Unreadable::new("the decrypted head is not text"))?;
                return codec::decode_response(id, status, &head, body.into());
            }
            return Err(no_keys());
        }
        codec::decode_response(id, status, head, Bytes::from(body.unwrap_or_default()))
    }

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

    /// The text of an error as it is stored.
    pub(crate) fn error_text<'a>(&self, id: RequestId, text: &'a str) -> Cow<'a, str> {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            return Cow::Owned(seal_error(keys, Part::ErrorText, id, text));
        }
        let _ = id;
        as_plain(text)
    }

    pub(crate) fn read_error_text(
        &self,
        id: RequestId,
        text: String,
    ) -> Result<String, Unreadable> {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            return open_error(keys, Part::ErrorText, id, text);
        }
        let _ = id;
        if text.starts_with(SEALED_TEXT) {
            return Err(no_keys());
        }
        Ok(text)
    }

    /// The text of an error for a list: if it can't be read, why.
    pub(crate) fn shown_error_text(&self, id: RequestId, text: String) -> String {
        let read = self.read_error_text(id, text);
        read.unwrap_or_else(|reason| reason.as_str().to_owned())
    }

    /// The text of a handler's error as it is stored.
    pub(crate) fn handler_error<'a>(&self, id: RequestId, text: &'a str) -> Cow<'a, str> {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            return Cow::Owned(seal_error(keys, Part::HandlerError, id, text));
        }
        let _ = id;
        as_plain(text)
    }

    /// The text of a handler's error for a list: if it can't be read, why.
    pub(crate) fn shown_handler_error(&self, id: RequestId, text: String) -> String {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            let read = open_error(keys, Part::HandlerError, id, text);
            return read.unwrap_or_else(|reason| reason.as_str().to_owned());
        }
        let _ = id;
        if text.starts_with(SEALED_TEXT) {
            return no_keys().as_str().to_owned();
        }
        text
    }
}

/// A text that can't be taken for an encrypted one.
fn as_plain(text: &str) -> Cow<'_, str> {
    if text.starts_with(SEALED_TEXT) {
        Cow::Owned(format!(" {text}"))
    } else {
        Cow::Borrowed(text)
    }
}

/// `before` and `after` stand readable around the encrypted part, and are bound to it.
#[cfg(feature = "encryption")]
fn seal_head(
    keys: &Keyring,
    id: RequestId,
    before: &str,
    after: &str,
    nonce: &Nonce,
    hidden: Vec<u8>,
) -> String {
    let len = (hidden.len() + TAG_LEN).div_ceil(3) * 4;
    let mut head = String::with_capacity(before.len() + len + after.len() + 80);
    head.push_str(before);
    keys.push_prefix(&mut head);
    let beside = [before.as_bytes(), without_caller(after).as_bytes()];
    keys.seal_into(&mut head, Part::RequestHead, id, &beside, nonce, hidden);
    head.push_str(after);
    head
}

#[cfg(feature = "encryption")]
fn open_head(
    keys: &Keyring,
    id: RequestId,
    head: &SealedHead<'_>,
) -> Result<(Vec<u8>, Nonce), Unreadable> {
    let beside = [
        head.before.as_bytes(),
        without_caller(head.after).as_bytes(),
    ];
    let text = SealedText::parse(head.sealed)?;
    keys.open_text(text, Part::RequestHead, id, &beside)
}

#[cfg(feature = "encryption")]
fn open_request(
    keys: &Arc<Keyring>,
    id: RequestId,
    head: &SealedHead<'_>,
) -> Result<ReadHead, Unreadable> {
    let (hidden, nonce) = open_head(keys, id, head)?;
    let delivery = &head.after[DELIVERY.len()..];
    let delivery = delivery.strip_suffix('}').unwrap_or(delivery);
    let (read, present) = codec::decode_hidden(head.method, &hidden, delivery)?;
    let (request, uri, delivery) = read;
    Ok(ReadHead {
        request,
        uri,
        delivery,
        body: BodySeal {
            sealed: Some(SealedBody {
                keys: Arc::clone(keys),
                key_id: SealedText::parse(head.sealed)?.key_id.into(),
                nonce,
                id,
                present,
            }),
        },
    })
}

#[cfg(feature = "encryption")]
fn seal_response(
    keys: &Keyring,
    id: RequestId,
    status: u16,
    hidden: Vec<u8>,
    body: &[u8],
) -> StoredResponse {
    let nonce = Keyring::nonce();
    let len = (hidden.len() + TAG_LEN).div_ceil(3) * 4;
    let mut head = String::with_capacity(len + 96);
    head.push_str(SEALED_RESPONSE);
    keys.push_prefix(&mut head);
    let beside = [&status.to_be_bytes()[..]];
    keys.seal_into(&mut head, Part::ResponseHead, id, &beside, &nonce, hidden);
    head.push_str("\"}");
    let body = keys.seal_body(Part::ResponseBody, id, &nonce, body);
    StoredResponse {
        head,
        sealed_body: Some(body),
    }
}

#[cfg(feature = "encryption")]
fn open_response(
    keys: &Keyring,
    id: RequestId,
    status: u16,
    head: &str,
    body: Option<Vec<u8>>,
) -> Result<(Vec<u8>, Vec<u8>), Unreadable> {
    let sealed = head
        .strip_prefix(SEALED_RESPONSE)
        .and_then(|rest| rest.strip_suffix("\"}"))
        .ok_or_else(|| Unreadable::new("its encrypted form is malformed"))?;
    let text = SealedText::parse(sealed)?;
    let beside = [&status.to_be_bytes()[..]];
    let (hidden, nonce) = keys.open_text(text, Part::ResponseHead, id, &beside)?;
    let body = body.ok_or_else(|| Unreadable::new("its body is missing"))?;
    let body = keys.open_body(text.key_id, Part::ResponseBody, id, &nonce, body)?;
    Ok((hidden, body))
}

#[cfg(feature = "encryption")]
fn seal_error(keys: &Keyring, part: Part, id: RequestId, text: &str) -> String {
    let mut bytes = Vec::with_capacity(NONCE_LEN + text.len() + TAG_LEN);
    bytes.extend_from_slice(&[0; NONCE_LEN]);
    bytes.extend_from_slice(text.as_bytes());
    let sealed = keys.seal_text(part, id, &[], &Keyring::nonce(), bytes);
    [SEALED_TEXT, &sealed].concat()
}

#[cfg(feature = "encryption")]
fn open_error(
    keys: &Keyring,
    part: Part,
    id: RequestId,
    text: String,
) -> Result<String, Unreadable> {
    let Some(sealed) = text.strip_prefix(SEALED_TEXT) else {
        return Ok(text);
    };
    let (bytes, _) = keys.open_text(SealedText::parse(sealed)?, part, id, &[])?;
    String::from_utf8(bytes).map_err(|_| Unreadable::new("the decrypted text is not text"))
}
