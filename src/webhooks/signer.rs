//! The hook that signs.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::SystemTime;

use http::HeaderMap;
use http::header::HeaderName;

use super::key::SigningKey;
use super::{ID, SIGNATURE, TIMESTAMP, signed};
use crate::error::BoxError;
use crate::hooks::{AttemptHook, OutgoingAttempt, Refusal};
use crate::id::RequestId;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Receivers store the id, and log it.
const MAX_ID: usize = 255;

/// Signs each attempt, for
/// [`DurableBuilder::on_attempt`](crate::DurableBuilder::on_attempt). See the [module](super).
///
/// If the request has a header `webhook-id` already, that is the id; it must not have a dot in it.
/// Otherwise it is the id of the request, and for a [replay](crate::Durable::replay) that of the
/// original, if its `Idempotency-Key` tells.
///
/// Hooks that come later may still change the attempt. The signature covers the body, which no hook
/// can change.
pub struct Signer {
    keys: Keys,
}

type Found = Pin<Box<dyn Future<Output = Result<Vec<SigningKey>, Refusal>> + Send>>;

enum Keys {
    Same(Vec<SigningKey>),
    Lookup(Box<dyn Fn(Endpoint) -> Found + Send + Sync>),
}

/// The receiver of an attempt, for [`Signer::lookup`].
#[derive(Clone)]
#[non_exhaustive]
pub struct Endpoint {
    /// The request's id.
    pub id: RequestId,
    /// Its channel.
    pub channel: String,
    /// Scheme, host and port, always with the port.
    pub destination: String,
    /// Its [limit key](crate::Options::limit_key).
    pub limit_key: Option<String>,
    /// What the application attached to it with
    /// [`Options::metadata`](crate::Options::metadata).
    pub metadata: Option<serde_json::Value>,
}

impl Signer {
    /// Signs all attempts with each of these keys that is valid at that time. There must be one at
    /// least, which is checked when the handle is built.
    pub fn new(keys: impl IntoIterator<Item = SigningKey>) -> Self {
        Self {
            keys: Keys::Same(keys.into_iter().collect()),
        }
    }

    /// Signs each attempt with the keys that the function returns for its receiver. It is called
    /// for each attempt; keep a cache where that is too often.
    ///
    /// Without a valid key nothing is sent: an error, or a list without one, fails the attempt,
    /// which is made again later. Return [`Refusal::discard`] for a receiver that is gone.
    ///
    /// # Examples
    ///
    /// The key of the customer that the request's limit key names:
    ///
    /// ```
    /// use requeuest::Durable;
    /// use requeuest::hooks::Refusal;
    /// use requeuest::webhooks::{Endpoint, Signer, SigningKey};
    ///
    /// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
    /// let customers = pool.clone();
    /// let signer = Signer::lookup(move |endpoint: Endpoint| {
    ///     let customers = customers.clone();
    ///     async move {
    ///         let query = "SELECT key FROM webhook_keys WHERE customer = $1";
    ///         let keys: Vec<String> = sqlx::query_scalar(query)
    ///             .bind(endpoint.limit_key)
    ///             .fetch_all(&customers)
    ///             .await?;
    ///         if keys.is_empty() {
    ///             return Err(Refusal::discard("the customer has no key"));
    ///         }
    ///         let keys = keys.iter().map(|key| Ok(key.parse::<SigningKey>()?));
    ///         keys.collect()
    ///     }
    /// });
    /// let durable = Durable::builder(pool).webhooks().on_attempt(signer).build()?;
    /// # Ok(()) }
    /// ```
    pub fn lookup<F, Fut>(function: F) -> Self
    where
        F: Fn(Endpoint) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<SigningKey>, Refusal>> + Send + 'static,
    {
        let boxed = move |endpoint| -> Found { Box::pin(function(endpoint)) };
        Self {
            keys: Keys::Lookup(Box::new(boxed)),
        }
    }
}

impl AttemptHook for Signer {
    fn before<'a>(
        &'a self,
        attempt: &'a mut OutgoingAttempt,
    ) -> Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send + 'a>> {
        Box::pin(async move {
            let found;
            let keys = match &self.keys {
                Keys::Same(keys) => keys,
                Keys::Lookup(function) => {
                    found = function(Endpoint::of(attempt)).await?;
                    &found
                }
            };
            sign(attempt, keys, SystemTime::now())
        })
    }

    fn check(&self) -> Result<(), BoxError> {
        match &self.keys {
            Keys::Same(keys) if keys.is_empty() => Err("the signer has no key".into()),
            _ => Ok(()),
        }
    }
}

impl Endpoint {
    fn of(attempt: &OutgoingAttempt) -> Self {
        Self {
            id: attempt.id(),
            channel: attempt.channel().to_owned(),
            destination: attempt.destination(),
            limit_key: attempt.limit_key().map(str::to_owned),
            metadata: attempt.metadata().cloned(),
        }
    }
}

fn sign(
    attempt: &mut OutgoingAttempt,
    keys: &[SigningKey],
    now: SystemTime,
) -> Result<(), Refusal> {
    let id = webhook_id(attempt.headers(), attempt.id())?;
    let since = now.duration_since(SystemTime::UNIX_EPOCH)?;
    let timestamp = since.as_secs().to_string();
    let signed = signed(&id, &timestamp, attempt.body());
    let valid = keys.iter().filter(|key| key.is_valid(now));
    let signatures: Vec<_> = valid.map(|key| key.sign(&signed)).collect();
    if signatures.is_empty() {
        return Err(Refusal::failed(
            "no key is valid now, so the webhook can't be signed",
        ));
    }
    attempt.set_header(ID, id)?;
    attempt.set_header(TIMESTAMP, timestamp)?;
    attempt.set_header(SIGNATURE, signatures.join(" "))
}

/// The id that stays the same on all attempts.
fn webhook_id(headers: &HeaderMap, id: RequestId) -> Result<String, Refusal> {
    if let Some(own) = headers.get(ID) {
        let own = own.to_str().ok();
        let own = own.filter(|own| (1..=MAX_ID).contains(&own.len()) && !own.contains('.'));
        let own = own.ok_or_else(|| {
            Refusal::discard(
                "the request's `webhook-id` must be 1 to 255 characters of ASCII without a dot",
            )
        })?;
        return Ok(own.to_owned());
    }
    // A replay is a new request with the key of the original.
    let key = headers
        .get(IDEMPOTENCY_KEY)
        .and_then(|key| key.to_str().ok());
    let original = key.and_then(|key| key.trim_matches('"').parse::<RequestId>().ok());
    Ok(original.unwrap_or(id).to_string())
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.keys {
            Keys::Same(keys) => f.debug_tuple("Signer").field(keys).finish(),
            Keys::Lookup(_) => f.write_str("Signer"),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("id", &self.id)
            .field("channel", &self.channel)
            .field("destination", &self.destination)
            .field("limit_key", &self.limit_key)
            .finish_non_exhaustive()
    }
}
