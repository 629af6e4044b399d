//! The header by which a receiver can tell a repetition from a new request.

use http::header::InvalidHeaderName;
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use crate::id::RequestId;

const DEFAULT_NAME: HeaderName = HeaderName::from_static("idempotency-key");

/// How requests are marked, so that a receiver can recognise those that it has seen: with a header that has the same value, the
/// request's id, on every attempt.
///
/// Only methods that are not idempotent by themselves (RFC 9110 section 9.2.2) get it: `POST`, `PATCH` and those that no standard
/// knows. A header of that name which the request has already is left as it is.
///
/// The default is `Idempotency-Key: "…"`: a string as in RFC 9651 section 3.3.3, which is what the IETF's draft for the header asks for.
///
/// # Examples
///
/// ```
/// use requeuest::{IdempotencyHeader, Options};
///
/// // For a receiver that takes the quotes for a part of the key.
/// let options = Options::default().idempotency_header(IdempotencyHeader::bare());
/// // For one that has a header of its own.
/// let options = Options::default().idempotency_header(IdempotencyHeader::bare().name("x-request-id")?);
/// # Ok::<(), requeuest::http::header::InvalidHeaderName>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyHeader {
    name: HeaderName,
    form: Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Quoted,
    Bare,
    None,
}

impl IdempotencyHeader {
    /// The id in quotes: a structured field.
    pub fn quoted() -> Self {
        Self {
            name: DEFAULT_NAME,
            form: Form::Quoted,
        }
    }

    /// The id as it is.
    pub fn bare() -> Self {
        Self {
            form: Form::Bare,
            ..Self::quoted()
        }
    }

    /// No header.
    pub fn none() -> Self {
        Self {
            form: Form::None,
            ..Self::quoted()
        }
    }

    /// Another name for the header. Defaults to `Idempotency-Key`.
    ///
    /// # Errors
    ///
    /// If it is not a valid header name.
    pub fn name<N>(mut self, name: N) -> Result<Self, InvalidHeaderName>
    where
        N: TryInto<HeaderName, Error = InvalidHeaderName>,
    {
        self.name = name.try_into()?;
        Ok(self)
    }

    /// Adds the header, where it belongs and is missing.
    pub(crate) fn apply(&self, method: &Method, id: RequestId, headers: &mut HeaderMap) {
        if method.is_idempotent() || headers.contains_key(&self.name) {
            return;
        }
        let value = match self.form {
            Form::Quoted => format!("\"{id}\""),
            Form::Bare => id.to_string(),
            Form::None => return,
        };
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(self.name.clone(), value);
        }
    }
}

impl Default for IdempotencyHeader {
    fn default() -> Self {
        Self::quoted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(key: &IdempotencyHeader, method: &Method) -> (RequestId, HeaderMap) {
        let (id, mut headers) = (RequestId::generate(), HeaderMap::new());
        key.apply(method, id, &mut headers);
        (id, headers)
    }

    #[test]
    fn only_methods_that_are_not_idempotent_get_the_header() {
        for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            assert!(applied(&IdempotencyHeader::default(), &method).1.is_empty());
        }
        for method in ["POST", "PATCH", "PURGE"] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let (id, headers) = applied(&IdempotencyHeader::default(), &method);
            assert_eq!(headers["idempotency-key"], format!("\"{id}\""));
        }
    }

    #[test]
    fn the_form_and_the_name_can_be_chosen() {
        let key = IdempotencyHeader::bare().name("x-request-id").unwrap();
        let (id, headers) = applied(&key, &Method::POST);
        assert_eq!(headers["x-request-id"], id.to_string());
        assert!(
            applied(&IdempotencyHeader::none(), &Method::POST)
                .1
                .is_empty()
        );
        assert!(IdempotencyHeader::bare().name("not a name").is_err());
    }

    #[test]
    fn the_callers_own_header_wins() {
        let mut headers = HeaderMap::new();
        headers.insert("idempotency-key", HeaderValue::from_static("mine"));
        IdempotencyHeader::default().apply(&Method::POST, RequestId::generate(), &mut headers);
        assert_eq!(headers["idempotency-key"], "mine");
    }
}
