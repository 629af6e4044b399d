//! The stored form of requests and responses, encrypted if the handle has keys.
//!
//! An encrypted head of a request is JSON too:
//! `{"method":…,"url":<origin>,"sealed":…,"delivery":…}`. The statements that read a head find
//! there what they read in any other. What is readable is
//! bound to the encrypted rest, except for the mark of a waiting caller, which a replay takes off.
//! An encrypted head of a response is `{"sealed":…}`, and an encrypted text begins with `sealed:`.
//!
//! Rows that are not encrypted are read whether or not there are keys, unless the handle requires
//! encryption. A role that writes the tables could otherwise put a plain row in place of an
//! encrypted one.

#![cfg_attr(
    not(feature = "encryption"),
    allow(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "without keys, most forms are what they are made of"
    )
)]

mod fingerprint;
mod request;
mod response;
mod text;

#[cfg(feature = "encryption")]
use std::sync::Arc;

use crate::codec::Unreadable;
#[cfg(feature = "encryption")]
use crate::encryption::Keyring;
use crate::error::Error;

pub(crate) use self::request::ReadHead;
pub(crate) use self::response::StoredResponse;

/// Makes stored forms and reads them. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sealer {
    #[cfg(feature = "encryption")]
    keys: Option<Arc<Keyring>>,
    /// What is not encrypted is unreadable.
    #[cfg(feature = "encryption")]
    required: bool,
}

impl Sealer {
    #[cfg(feature = "encryption")]
    pub(crate) fn new(keys: Keyring) -> Self {
        let mut sealer = Self::default();
        sealer.set_keys(keys);
        sealer
    }

    #[cfg(feature = "encryption")]
    pub(crate) fn set_keys(&mut self, keys: Keyring) {
        self.keys = Some(Arc::new(keys));
    }

    #[cfg(feature = "encryption")]
    pub(crate) fn require(&mut self, required: bool) {
        self.required = required;
    }

    #[cfg(feature = "encryption")]
    pub(crate) fn keys(&self) -> Option<&Keyring> {
        self.keys.as_deref()
    }

    /// Whether anything that is encrypted can be read.
    pub(crate) fn has_keys(&self) -> bool {
        #[cfg(feature = "encryption")]
        return self.keys.is_some();
        #[cfg(not(feature = "encryption"))]
        false
    }

    /// Checks the keys, for the builder.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        #[cfg(feature = "encryption")]
        match &self.keys {
            Some(keys) => keys.validate()?,
            None if self.required => {
                let reason = "needs keys: set `encryption` too";
                return Err(Error::config("require_encryption", reason));
            }
            None => {}
        }
        Ok(())
    }

    /// Fails if what is not encrypted must not be read.
    fn admit_plain(&self) -> Result<(), Unreadable> {
        #[cfg(feature = "encryption")]
        if self.required {
            let reason = "it is not encrypted, and this process requires encryption";
            return Err(Unreadable::new(reason));
        }
        Ok(())
    }
}

/// Why a form is unreadable for a process without keys.
fn no_keys() -> Unreadable {
    Unreadable::new(if cfg!(feature = "encryption") {
        "it is encrypted, and this process has no keys"
    } else {
        "it is encrypted, and this program is built without the feature `encryption`"
    })
}
