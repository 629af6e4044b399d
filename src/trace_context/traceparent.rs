//! The form of a `traceparent`: section 3.2 of W3C Trace Context.

/// The length of version 00: two digits of the version, 32 of the trace id, 16 of the parent id and
/// two of the flags.
const LEN: usize = 55;

/// Why a text is not a `traceparent` of version 00.
pub(super) fn validate(text: &str) -> Result<(), &'static str> {
    if text.len() != LEN || !text.starts_with("00-") {
        return Err("must have version 00 and 55 characters");
    }
    fields(text)
}

/// A `traceparent` of any version, as one of version 00.
pub(super) fn read(text: &str) -> Option<String> {
    let text = text.trim_matches([' ', '\t']);
    if text.starts_with("00") {
        return validate(text).is_ok().then(|| text.to_owned());
    }
    let (version, known) = (text.get(..2)?, text.get(..LEN)?);
    let continues = text
        .get(LEN..)
        .is_none_or(|rest| rest.is_empty() || rest.starts_with('-'));
    let is_valid = is_hex(version) && version != "ff" && continues && fields(known).is_ok();
    // Of the flags of a later version, only `sampled` is known.
    let sampled = u8::from_str_radix(known.get(53..)?, 16).ok()? & 1;
    is_valid.then(|| format!("00{}{sampled:02x}", &known[2..53]))
}

fn fields(text: &str) -> Result<(), &'static str> {
    let mut fields = text.split('-');
    let [_, Some(trace), Some(parent), Some(flags), None] = [(); 5].map(|()| fields.next()) else {
        return Err("must have four fields, joined by `-`");
    };
    if ![(trace, 32), (parent, 16), (flags, 2)]
        .iter()
        .all(|(field, len)| field.len() == *len && is_hex(field))
    {
        return Err("must have fields of 32, 16 and 2 lower-case hexadecimal digits");
    }
    if [trace, parent]
        .iter()
        .any(|id| id.bytes().all(|digit| digit == b'0'))
    {
        return Err("must have ids that are not all zeros");
    }
    Ok(())
}

fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
