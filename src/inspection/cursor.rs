//! Where a list continues, as a text that fits into a URL or a command line.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::filter::RequestFilter;
use crate::error::Error;
use crate::id::RequestId;

/// The form of the text. Another form gets another number.
const FORM: u8 = 1;
const ID: usize = 16;
const HASH: usize = 8;

/// Where a list continues: the [`next`](super::RequestPage::next) of a page. Its text, of
/// `Display` and `FromStr`, is opaque. It belongs to the filter of its page.
///
/// # Examples
///
/// ```
/// use requeuest::admin::Cursor;
///
/// let error = "page 2".parse::<Cursor>().unwrap_err();
/// assert_eq!(error.field(), Some("cursor"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    id: RequestId,
    /// Of the filter.
    hash: [u8; HASH],
}

impl Cursor {
    /// Behind this request, in the list of this filter.
    pub(crate) fn behind(id: RequestId, filter: &RequestFilter) -> Self {
        Self {
            id,
            hash: hash_of(filter),
        }
    }

    /// The request behind which the list of this filter continues.
    pub(crate) fn of(&self, filter: &RequestFilter) -> Result<RequestId, Error> {
        if self.hash == hash_of(filter) {
            Ok(self.id)
        } else {
            Err(Error::request(
                "cursor",
                "belongs to a list with another filter; begin with the first page",
            ))
        }
    }
}

/// The same for filters that select the same, as far as it is known without reading them.
fn hash_of(filter: &RequestFilter) -> [u8; HASH] {
    let filter = filter.checked().unwrap_or_else(|_| filter.clone());
    // A filter has no map and nothing else that JSON can't express.
    let json = serde_json::to_vec(&filter).unwrap_or_default();
    first_of(&Sha256::digest(json))
}

fn first_of(hash: &[u8]) -> [u8; HASH] {
    let mut first = [0; HASH];
    first.copy_from_slice(&hash[..HASH]);
    first
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = vec![FORM];
        bytes.extend_from_slice(Uuid::from(self.id).as_bytes());
        bytes.extend_from_slice(&self.hash);
        // Tells a damaged text from one of another filter.
        let check = first_of(&Sha256::digest(&bytes));
        bytes.extend_from_slice(&check);
        f.write_str(&URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for Cursor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = || {
            let reason = "is not what a page returned as `next`; begin with the first page";
            Error::request("cursor", reason)
        };
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| refused())?;
        if bytes.len() != 1 + ID + HASH + HASH || bytes[0] != FORM {
            return Err(refused());
        }
        let (content, check) = bytes.split_at(1 + ID + HASH);
        if first_of(&Sha256::digest(content)) != check {
            return Err(refused());
        }
        let id = Uuid::from_slice(&content[1..=ID]).map_err(|_| refused())?;
        Ok(Self {
            id: id.into(),
            hash: first_of(&content[1 + ID..]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_survives_its_text_and_belongs_to_its_filter() {
        let filter = RequestFilter::new().destination("https://a.example");
        let id = RequestId::generate();
        let text = Cursor::behind(id, &filter).to_string();
        let cursor: Cursor = text.parse().unwrap();
        assert_eq!(cursor.of(&filter).unwrap(), id);
        let same = RequestFilter::new().destination("https://A.example:443/");
        assert_eq!(cursor.of(&same).unwrap(), id);
        let error = cursor.of(&RequestFilter::new()).unwrap_err();
        assert_eq!(error.field(), Some("cursor"));
        assert!(error.is_request());
    }

    #[test]
    fn a_damaged_cursor_is_refused() {
        let text = Cursor::behind(RequestId::generate(), &RequestFilter::new()).to_string();
        for at in 0..text.len() {
            let mut damaged = text.clone().into_bytes();
            damaged[at] = if damaged[at] == b'A' { b'B' } else { b'A' };
            let damaged = String::from_utf8(damaged).unwrap();
            let error = damaged.parse::<Cursor>().unwrap_err();
            assert_eq!(error.field(), Some("cursor"), "{damaged}");
        }
        for damaged in ["", "hunter2", &text[1..], &format!("{text}A")] {
            let error = damaged.parse::<Cursor>().unwrap_err();
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }
}
