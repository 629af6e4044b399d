//! The form of a `tracestate`, and what is kept of a long one: section 3.3 of W3C Trace Context.

use std::collections::HashSet;

const MAX_ENTRIES: usize = 32;
/// What every participant must be able to pass on (section 3.3.1.5).
const MAX_LEN: usize = 512;
/// The first entries to go if there are more characters.
const LONG_ENTRY: usize = 128;

/// The list without empty entries and within its limit, or why it is not valid.
pub(super) fn shortened(text: &str) -> Result<String, &'static str> {
    // Empty entries are allowed, and mean nothing (section 3.3.1.1).
    let entries = text.split(',').map(|entry| entry.trim_matches([' ', '\t']));
    let mut entries: Vec<&str> = entries.filter(|entry| !entry.is_empty()).collect();
    if entries.len() > MAX_ENTRIES {
        return Err("must have at most 32 entries");
    }
    let mut keys = HashSet::new();
    for entry in &entries {
        let (key, value) = entry
            .split_once('=')
            .ok_or("must have entries `key=value`")?;
        if !is_key(key) {
            return Err("has a key that is not valid");
        }
        if !is_value(value) {
            return Err("has a value that is not valid");
        }
        if !keys.insert(key) {
            return Err("must not have a key twice");
        }
    }
    let len = |entries: &[&str]| -> usize {
        let commas = entries.len().saturating_sub(1);
        entries.iter().map(|entry| entry.len()).sum::<usize>() + commas
    };
    if len(&entries) > MAX_LEN {
        entries.retain(|entry| entry.len() <= LONG_ENTRY);
    }
    while len(&entries) > MAX_LEN {
        entries.pop();
    }
    Ok(entries.join(","))
}

/// A simple key, or `tenant@system` (section 3.3.1.3.1).
fn is_key(key: &str) -> bool {
    let of = |part: &str, len, may_begin_with_digit| {
        let first = part.bytes().next();
        (1..=len).contains(&part.len())
            && first.is_some_and(|byte| {
                byte.is_ascii_lowercase() || (may_begin_with_digit && byte.is_ascii_digit())
            })
            && part
                .bytes()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'*' | b'/'))
    };
    match key.split_once('@') {
        Some((tenant, system)) => of(tenant, 241, true) && of(system, 14, false),
        None => of(key, 256, false),
    }
}

/// Printable characters without a comma or an equals sign (section 3.3.1.3.2). Spaces at the end
/// are trimmed before.
fn is_value(value: &str) -> bool {
    (1..=256).contains(&value.len())
        && value
            .bytes()
            .all(|byte| matches!(byte, b' '..=b'~') && byte != b',' && byte != b'=')
}
