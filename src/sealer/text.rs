//! Texts of errors.

use std::borrow::Cow;

use super::{Sealer, no_keys};
use crate::codec::Unreadable;
#[cfg(feature = "encryption")]
use crate::encryption::{Keyring, NONCE_LEN, Part, SealedText, TAG_LEN};
use crate::id::RequestId;

/// What an encrypted text begins with. No other stored text does.
const SEALED_TEXT: &str = "sealed:";

/// The classes of errors whose texts the migrations write, which have no keys. These texts say
/// nothing of a request or a response.
#[cfg(feature = "encryption")]
const CLASSES_OF_THE_DATABASE: [&str; 5] = [
    "deadline",
    "deferred",
    "no_runner",
    "response_unknown",
    "superseded",
];

impl Sealer {
    /// The text of an error as it is stored.
    pub(crate) fn error_text<'a>(&self, id: RequestId, text: &'a str) -> Cow<'a, str> {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            return Cow::Owned(seal_error(keys, Part::ErrorText, id, text));
        }
        let _ = id;
        as_plain(text)
    }

    /// The text of an error of this class.
    pub(crate) fn read_error_text(
        &self,
        id: RequestId,
        class: &str,
        text: String,
    ) -> Result<String, Unreadable> {
        #[cfg(feature = "encryption")]
        if let Some(keys) = &self.keys {
            if !text.starts_with(SEALED_TEXT) && !CLASSES_OF_THE_DATABASE.contains(&class) {
                self.admit_plain()?;
            }
            return open_error(keys, Part::ErrorText, id, text);
        }
        let _ = (id, class);
        if text.starts_with(SEALED_TEXT) {
            return Err(no_keys());
        }
        Ok(text)
    }

    /// The text of an error for a list: if it can't be read, why.
    pub(crate) fn shown_error_text(&self, id: RequestId, class: &str, text: String) -> String {
        let read = self.read_error_text(id, class, text);
        read.unwrap_or_else(|reason| reason.as_str().to_owned())
    }

    /// A stored error, encrypted by the first key.
    #[cfg(feature = "encryption")]
    pub(crate) fn reseal_error_text(
        &self,
        id: RequestId,
        class: &str,
        text: String,
    ) -> Result<String, Unreadable> {
        let text = self.read_error_text(id, class, text)?;
        Ok(self.error_text(id, &text).into_owned())
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
            let read = self.open_handler_error(keys, id, text);
            return read.unwrap_or_else(|reason| reason.as_str().to_owned());
        }
        let _ = id;
        if text.starts_with(SEALED_TEXT) {
            return no_keys().as_str().to_owned();
        }
        text
    }

    /// A stored error of a handler, encrypted by the first key.
    #[cfg(feature = "encryption")]
    pub(crate) fn reseal_handler_error(
        &self,
        id: RequestId,
        text: String,
    ) -> Result<String, Unreadable> {
        let text = match &self.keys {
            Some(keys) => self.open_handler_error(keys, id, text)?,
            None => text,
        };
        Ok(self.handler_error(id, &text).into_owned())
    }

    #[cfg(feature = "encryption")]
    fn open_handler_error(
        &self,
        keys: &Keyring,
        id: RequestId,
        text: String,
    ) -> Result<String, Unreadable> {
        if !text.starts_with(SEALED_TEXT) {
            self.admit_plain()?;
        }
        open_error(keys, Part::HandlerError, id, text)
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
