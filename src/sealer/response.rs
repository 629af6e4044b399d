//! Heads and bodies of responses.

use bytes::Bytes;

use super::{Sealer, no_keys};
use crate::codec::{self, Unreadable};
#[cfg(feature = "encryption")]
use crate::encryption::{Keyring, NONCE_LEN, Part, SealedText, TAG_LEN};
use crate::id::RequestId;
use crate::response::Response;

const SEALED_RESPONSE: &str = "{\"sealed\":\"";

/// A response on its way into a row.
#[derive(Debug)]
pub(crate) struct StoredResponse {
    pub(crate) head: String,
    /// The encrypted body. `None` if the response's own body is stored.
    pub(crate) sealed_body: Option<Vec<u8>>,
}

impl Sealer {
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
        self.admit_plain()?;
        codec::decode_response(id, status, head, Bytes::from(body.unwrap_or_default()))
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
