//! Encryption at rest: what is stored of requests and responses can be read only with a key that
//! the database doesn't have.
//!
//! Give a [`Keyring`] to [`DurableBuilder::encryption`](crate::DurableBuilder::encryption). The
//! first key encrypts, and all keys of the ring decrypt, so that keys can be rotated while
//! processes run.
//!
//! # What is encrypted
//!
//! XChaCha20-Poly1305 encrypts, and protects against changes:
//!
//! - the URL, the headers, the trailers and the body of each request, for as long as it is stored,
//!   also as a dead letter;
//! - the headers and the body of each response, the final one and one that asked for a retry;
//! - the texts of errors.
//!
//! What is stored to compare calls with the same [`key`](crate::Options::key) is a keyed hash, so
//! that a stolen backup can't be searched by guessing requests.
//!
//! # What stays readable
//!
//! What statements and operators select by: the id, the channel, the method, scheme, host and port
//! of the URL, the limit key, ordering keys and other keys, the
//! [metadata](crate::Options::metadata), times, numbers of attempts, status codes, the class of an
//! error, and the sizes of all that is encrypted. Put no secret into these. The settings of the
//! delivery are readable too, and can't be changed without a key.
//!
//! # What it protects against
//!
//! A stolen backup, a replica or a role that can read the tables show nothing of the above. A role
//! that can write to them can't change an encrypted request or response, nor move one to another
//! row or column: what doesn't belong there fails to decrypt. It can delete rows, return an earlier
//! state of a row, and change what is readable.
//!
//! Rows that are not encrypted stay readable, so that encryption can be switched on while requests
//! are under way. Until [`require_encryption`](crate::DurableBuilder::require_encryption) is set, a
//! role that can write may add such rows, or put one in place of an encrypted one.
//!
//! # Without the key
//!
//! A process without a key that a request needs [parks](crate::Status::Parked) it, and an outcome
//! is an error for its id alone ([`Error::is_unreadable`](crate::Error::is_unreadable)). Neither is
//! lost: processes that have the key continue with them.
//!
//! # Examples
//!
//! ```no_run
//! use requeuest::Durable;
//! use requeuest::encryption::{Key, Keyring};
//!
//! # fn example(
//! #     pool: sqlx::PgPool,
//! #     new: [u8; 32],
//! #     old: [u8; 32],
//! # ) -> Result<(), requeuest::Error> {
//! let keys = Keyring::new(Key::new("2026-07", new)?) // encrypts
//!     .and_read(Key::new("2026-01", old)?);
//! let durable = Durable::builder(pool).encryption(keys).build()?;
//! # Ok(()) }
//! ```

mod cipher;
mod digest;
mod key;
#[doc(hidden)]
#[allow(missing_docs, missing_debug_implementations)] // for the benches alone
pub mod measured;

pub use self::key::{KEY_LEN, Key, Keyring, MAX_KEY_ID_LEN};

pub(crate) use self::cipher::{NONCE_LEN, Nonce, Part, SealedText, TAG_LEN};
pub(crate) use self::digest::KeyOf;
