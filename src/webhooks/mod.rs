//! Signed webhooks, as [Standard Webhooks] 1.0 asks. Needs the feature `webhooks`.
//!
//! A [`Signer`] is a [hook](crate::hooks) that gives each attempt three headers:
//!
//! - `webhook-id` is the same on every attempt of a request, and on those of its replays.
//! - `webhook-timestamp` is the time of the attempt, in seconds since 1970.
//! - `webhook-signature` has a signature of each [`SigningKey`], over id, timestamp and body.
//!
//! [`DurableBuilder::webhooks`](crate::DurableBuilder::webhooks) sets the other half of what the
//! page asks of a sender: retries over days, 410, breakers. Receivers written with this crate check
//! the headers with a [`Verifier`].
//!
//! # Keys
//!
//! | text | | signatures |
//! |---|---|---|
//! | `whsec_…` | a secret of both sides, 24 to 64 bytes in Base64 | `v1`, HMAC with SHA-256 |
//! | `whsk_…` | a private key, 32 bytes, or 64 with the public key behind it | `v1a`, Ed25519 |
//! | `whpk_…` | its public key, 32 bytes | checked by a [`Verifier`] only |
//!
//! Keys are overwritten in memory when they are dropped, and `Debug` and errors don't show them.
//!
//! # Rotation
//!
//! To replace a key, sign with both for a while: give the old one an end with
//! [`SigningKey::valid_until`], and receivers the new one before that.
//!
//! # Examples
//!
//! A key for all receivers:
//!
//! ```
//! use requeuest::Durable;
//! use requeuest::webhooks::{Signer, SigningKey};
//!
//! # fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let key: SigningKey = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse()?;
//! let durable = Durable::builder(pool).webhooks().on_attempt(Signer::new([key])).build()?;
//! # Ok(()) }
//! ```
//!
//! A key for each customer, from a database: see [`Signer::lookup`].
//!
//! [Standard Webhooks]: https://www.standardwebhooks.com

#[cfg(test)]
mod fuzz;
mod key;
mod signer;
mod verifier;

pub use self::key::{KeyError, SigningKey};
pub use self::signer::{Endpoint, Signer};
pub use self::verifier::{DEFAULT_TOLERANCE, Verified, Verifier, VerifyError};

const ID: &str = "webhook-id";
const TIMESTAMP: &str = "webhook-timestamp";
const SIGNATURE: &str = "webhook-signature";

/// What is signed: id, timestamp and body, with dots between.
fn signed(id: &str, timestamp: &str, body: &[u8]) -> Vec<u8> {
    let mut signed = Vec::with_capacity(id.len() + timestamp.len() + body.len() + 2);
    for part in [id.as_bytes(), timestamp.as_bytes()] {
        signed.extend_from_slice(part);
        signed.push(b'.');
    }
    signed.extend_from_slice(body);
    signed
}
