//! The form of `baggage`: section 3.3 of W3C Baggage.

/// Limits that every participant must be able to pass on (section 3.3.2).
const MAX_ENTRIES: usize = 64;
pub(super) const MAX_LEN: usize = 8192;

/// Why a text is not `baggage`.
pub(super) fn validate(text: &str) -> Result<(), &'static str> {
    if text.is_empty() {
        return Ok(());
    }
    if text.len() > MAX_LEN {
        return Err("must have at most 8192 bytes");
    }
    if text.split(',').count() > MAX_ENTRIES {
        return Err("must have at most 64 entries");
    }
    for entry in text.split(',') {
        let mut parts = entry.split(';');
        let (key, value) = parts
            .next()
            .and_then(|pair| pair.split_once('='))
            .ok_or("must have entries `key=value`")?;
        // Properties are `key` or `key=value`.
        let properties = parts.map(|part| part.split_once('=').unwrap_or((part, "")));
        for (key, value) in [(key, value)].into_iter().chain(properties) {
            let (key, value) = (trim(key), trim(value));
            if key.is_empty() || !key.bytes().all(is_token) {
                return Err("has a key that is not valid");
            }
            if !value.bytes().all(is_octet) {
                return Err("has a value that is not valid");
            }
        }
    }
    Ok(())
}

fn trim(text: &str) -> &str {
    text.trim_matches([' ', '\t'])
}

/// A character of a token (RFC 9110 section 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn is_octet(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'"' | b',' | b';' | b'\\')
}
