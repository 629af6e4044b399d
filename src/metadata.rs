//! What the application attaches to a request: a small JSON value of its own.
//!
//! The value travels as text, which is stored as it is, and is parsed only if it is asked for. Logs
//! and Debug show its length, because it may hold anything.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, OnceLock};

use serde_json::{Number, Value};

/// The longest metadata of a request, in bytes of JSON without spaces: 4 KiB.
pub const MAX_METADATA_LEN: usize = 4096;
/// Deeper values could not be read again: `serde_json` stops at 128.
const MAX_DEPTH: usize = 100;
/// Exponents up to this size are in the range of Postgres' `numeric`, whatever digits go before.
/// Only values with `serde_json`'s feature `arbitrary_precision` can have larger ones.
const MAX_EXPONENT: u16 = 400;

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Metadata(Arc<Inner>);

struct Inner {
    json: Box<str>,
    /// `None` if the text can't be parsed.
    value: OnceLock<Option<Value>>,
}

impl Metadata {
    /// The metadata of a new request. `null` is none.
    pub(crate) fn new(value: Value) -> Option<Self> {
        (!value.is_null()).then(|| {
            Self(Arc::new(Inner {
                json: value.to_string().into(),
                value: OnceLock::from(Some(value)),
            }))
        })
    }

    /// The metadata of a stored request.
    pub(crate) fn stored(json: impl Into<Box<str>>) -> Self {
        Self(Arc::new(Inner {
            json: json.into(),
            value: OnceLock::new(),
        }))
    }

    /// The stored form.
    pub(crate) fn json(&self) -> &str {
        &self.0.json
    }

    pub(crate) fn value(&self) -> Option<&Value> {
        let parse = || serde_json::from_str(&self.0.json).ok();
        self.0.value.get_or_init(parse).as_ref()
    }

    /// Refuses what is too long, and what Postgres could not read as `jsonb`: a single such value
    /// would make an operator's query over all requests fail.
    pub(crate) fn check(&self) -> Result<(), Cow<'static, str>> {
        let len = self.json().len();
        if len > MAX_METADATA_LEN {
            let reason = format!("must be at most {MAX_METADATA_LEN} bytes of JSON, but has {len}");
            return Err(reason.into());
        }
        let problem = self.value().and_then(|value| problem(value, 0));
        problem.map_or(Ok(()), |problem| Err(problem.into()))
    }
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.json().len())
    }
}

fn problem(value: &Value, depth: usize) -> Option<&'static str> {
    match value {
        Value::Null | Value::Bool(_) => None,
        Value::Number(number) => number_problem(number),
        Value::String(text) => text_problem(text),
        Value::Array(_) | Value::Object(_) if depth == MAX_DEPTH => {
            Some("must not nest more than 100 levels deep")
        }
        Value::Array(values) => values.iter().find_map(|value| problem(value, depth + 1)),
        Value::Object(fields) => fields
            .iter()
            .find_map(|(name, value)| text_problem(name).or_else(|| problem(value, depth + 1))),
    }
}

fn text_problem(text: &str) -> Option<&'static str> {
    text.contains('\0')
        .then_some("must not contain a NUL character, which Postgres can't store")
}

fn number_problem(number: &Number) -> Option<&'static str> {
    // A number that fits an integer has no exponent.
    let exponent_fits = number.is_i64() || number.is_u64() || exponent_fits(&number.to_string());
    (!exponent_fits).then_some("has a number out of the range of Postgres' numeric type")
}

fn exponent_fits(number: &str) -> bool {
    number
        .split_once(['e', 'E'])
        .is_none_or(|(_, exponent)| match exponent.parse::<i16>() {
            Ok(exponent) => exponent.unsigned_abs() <= MAX_EXPONENT,
            Err(_) => false,
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(value: Value) -> String {
        let refused = Metadata::new(value).unwrap().check();
        refused.unwrap_err().into_owned()
    }

    #[test]
    fn null_is_no_metadata() {
        assert!(Metadata::new(Value::Null).is_none());
        assert!(Metadata::new(None::<&str>.into()).is_none());
    }

    #[test]
    fn a_stored_value_is_the_same() {
        let value = json!({"order": 42, "tags": ["a", null, 1.5, "é\u{1F600}"], "max": f64::MAX});
        let new = Metadata::new(value.clone()).unwrap();
        new.check().unwrap();
        assert_eq!(Metadata::stored(new.json()).value(), Some(&value));
        assert_eq!(Metadata::stored("{").value(), None);
    }

    #[test]
    fn what_postgres_could_not_read_is_refused() {
        assert!(refusal(json!("a\0b")).contains("NUL"));
        assert!(refusal(json!({"a": [{"b\0": 1}]})).contains("NUL"));
        for (number, fits) in [
            ("17", true),
            ("1e308", true),
            ("5E-324", true),
            ("1e+400", true),
            ("1e401", false),
            ("1e-999999", false),
        ] {
            assert_eq!(exponent_fits(number), fits, "{number}");
        }
    }

    #[test]
    fn length_and_depth_are_limited() {
        let longest = "x".repeat(MAX_METADATA_LEN - 2);
        Metadata::new(json!(longest)).unwrap().check().unwrap();
        assert!(refusal(json!(longest + "x")).contains("4096 bytes of JSON, but has 4097"));
        let nested = |depth| (0..depth).fold(json!(1), |value, _| json!([value]));
        let deepest = Metadata::new(nested(MAX_DEPTH)).unwrap();
        deepest.check().unwrap();
        assert!(Metadata::stored(deepest.json()).value().is_some());
        assert!(refusal(nested(MAX_DEPTH + 1)).contains("100 levels"));
    }

    #[test]
    fn debug_shows_only_the_length() {
        let metadata = Metadata::new(json!("hunter2")).unwrap();
        assert_eq!(format!("{metadata:?}"), "<9 bytes>");
    }
}
