//! Heads and bodies of requests.

#[cfg(feature = "encryption")]
use std::sync::Arc;

use bytes::Bytes;
use http::Uri;

use super::{Sealer, no_keys};
use crate::codec::{self, Delivery, Unreadable};
#[cfg(feature = "encryption")]
use crate::destination::Destination;
#[cfg(feature = "encryption")]
use crate::encryption::{Keyring, NONCE_LEN, Nonce, Part, SealedText, TAG_LEN};
use crate::id::RequestId;
use crate::request::Request;

const SEALED_IN_REQUEST: &str = ",\"sealed\":\"";
const DELIVERY: &str = "\",\"delivery\":";
/// How a head ends whose caller waits for the response.
#[cfg(feature = "encryption")]
const AWAITED: &str = ",\"awaited\":true}}";

/// A head of a request, read. Its body is read with it.
#[derive(Debug)]
pub(crate) struct ReadHead {
    pub(crate) request: Request,
    pub(crate) uri: Uri,
    pub(crate) delivery: Delivery,
    pub(crate) body: BodySeal,
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

impl Sealer {
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
        self.admit_plain()?;
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

#[cfg(all(test, feature = "encryption"))]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::encryption::Key;
    use crate::options::{Guarantee, Priority};
    use crate::retry::RetryPolicy;

    fn sealer(id: &str) -> Sealer {
        let bytes: Vec<u8> = (0..32).collect();
        Sealer::new(Keyring::new(Key::new(id, bytes).unwrap()))
    }

    fn request(path: &str, header: &[u8], body: Option<Vec<u8>>) -> (Request, Uri) {
        let uri: Uri = format!("http://u:p@example.com:81/{path}").parse().unwrap();
        let request = http::Request::post(uri.clone()).header("x-a", header);
        let mut request = Request::try_from(request.body("").unwrap()).unwrap();
        request.body = body.map(Bytes::from);
        (request, uri)
    }

    fn delivery(awaited: bool) -> Delivery {
        Delivery {
            attempt_timeout: Duration::from_secs(30),
            retry: RetryPolicy::awaited(),
            accept: None,
            guarantee: Guarantee::default(),
            priority: Priority::High,
            limit_key: Some("tenant".into()),
            awaited,
        }
    }

    proptest! {
        #[test]
        fn an_encrypted_request_reads_back_as_it_was_and_not_once_it_is_changed(
            path in "[a-z0-9/]{0,20}",
            header in proptest::collection::vec(0x21u8..0x7f, 0..30),
            body: Option<Vec<u8>>,
            awaited: bool,
            at: prop::sample::Index,
            by in "[ -~]",
        ) {
            let id = RequestId::generate();
            let (request, uri) = request(&path, &header, body.clone());
            let sealer = sealer("a");
            let (head, sealed) = sealer.request(id, &request, &uri, &delivery(awaited));
            let sealed = sealed.map(Vec::from);

            let read = sealer.read_request(id, &head).unwrap();
            prop_assert_eq!(read.uri.to_string(), uri.to_string());
            prop_assert_eq!(&read.request.headers, &request.headers);
            prop_assert_eq!(read.delivery, delivery(awaited));
            prop_assert_eq!(read.body.open(sealed.clone()).unwrap(), body.map(Bytes::from));

            // As a replay does.
            let replayed = head.replace(",\"awaited\":true}}", "}}");
            let read = sealer.read_request(id, &replayed).unwrap();
            prop_assert_eq!(read.delivery, delivery(false));
            let new = RequestId::generate();
            prop_assert!(sealer.read_request(new, &replayed).is_err());
            let (moved, body) = sealer.reseal_request(id, new, &replayed, sealed).unwrap();
            let read = sealer.read_request(new, &moved).unwrap();
            prop_assert_eq!(&read.request.headers, &request.headers);
            prop_assert!(read.body.open(body.map(Vec::from)).is_ok());

            let at = at.index(head.len());
            let changed = [&head[..at], &by, &head[at + 1..]].concat();
            // What stands for a waiting caller is not protected.
            prop_assume!(changed != head && at < head.len() - ",\"awaited\":true}}".len());
            prop_assert!(sealer.read_request(id, &changed).is_err(), "{changed}");
        }
    }

    #[test]
    fn a_process_without_keys_says_that_it_has_none() {
        let id = RequestId::generate();
        let (request, uri) = request("", b"x", None);
        let (head, _) = sealer("a").request(id, &request, &uri, &delivery(true));
        let error = Sealer::default().read_request(id, &head).unwrap_err();
        assert_eq!(
            error.as_str(),
            "it is encrypted, and this process has no keys"
        );
    }
}
