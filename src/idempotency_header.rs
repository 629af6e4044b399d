//! The header by which a receiver tells a repeated request from a new one.

use http::header::InvalidHeaderName;
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use crate::id::RequestId;

const DEFAULT_NAME: HeaderName = HeaderName::from_static("idempotency-key");

/// How requests are marked, so that a receiver can recognise a repetition: with a header whose
/// value, the request's id, is the same on every attempt.
///
/// Only methods that are not idempotent (RFC 9110 section 9.2.2) get the header: `POST`, `PATCH`
/// and non-standard methods. If the request already has a header with this name, it is left
/// unchanged.
///
/// The default is `Idempotency-Key: "…"`, a string as in RFC 9651 section 3.3.3. The IETF draft for
/// the header asks for this form.
///
/// # Examples
///
/// ```
/// use requeuest::{IdempotencyHeader, Options};
///
/// // For a receiver that treats the quotes as part of the key.
/// let options = Options::default().idempotency_header(IdempotencyHeader::bare());
/// // For a receiver that expects another header name.
/// let header = IdempotencyHeader::bare().name("x-request-id")?;
/// let options = Options::default().idempotency_header(header);
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
    /// The id in quotes, as a structured field.
    pub fn quoted() -> Self {
        Self {
            name: DEFAULT_NAME,
            form: Form::Quoted,
        }
    }

    /// The id without quotes.
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

    /// Sets the name of the header. Defaults to `Idempotency-Key`.
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

    /// Whether requests get a header of this name.
    pub(crate) fn is_named(&self, name: &HeaderName) -> bool {
        self.form != Form::None && self.name == *name
    }

    /// Adds the header, unless the method is idempotent or the request already has it.
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

/// Whether a request carries an idempotency key: in the usual header, or the request's id in any
/// other one.
pub(crate) fn is_in(headers: &HeaderMap, id: RequestId) -> bool {
    headers.contains_key(DEFAULT_NAME) || {
        let id = id.to_string();
        headers.values().any(|value| {
            let value = value.as_bytes();
            let bare = value
                .strip_prefix(b"\"")
                .and_then(|value| value.strip_suffix(b"\""));
            bare.unwrap_or(value) == id.as_bytes()
        })
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

    fn applied(header: &IdempotencyHeader, method: &Method) -> (RequestId, HeaderMap) {
        let (id, mut headers) = (RequestId::generate(), HeaderMap::new());
        header.apply(method, id, &mut headers);
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
        let header = IdempotencyHeader::bare().name("x-request-id").unwrap();
        let (id, headers) = applied(&header, &Method::POST);
        assert_eq!(headers["x-request-id"], id.to_string());
        assert!(
            applied(&IdempotencyHeader::none(), &Method::POST)
                .1
                .is_empty()
        );
        assert!(IdempotencyHeader::bare().name("not a name").is_err());
    }

    #[test]
    fn an_existing_header_is_left_unchanged() {
        let mut headers = HeaderMap::new();
        headers.insert("idempotency-key", HeaderValue::from_static("mine"));
        IdempotencyHeader::default().apply(&Method::POST, RequestId::generate(), &mut headers);
        assert_eq!(headers["idempotency-key"], "mine");
    }
}
