//! Text of others on a terminal. A receiver's error must not move the cursor, change colors or hide
//! a part of the line.

use std::fmt::Write as _;

/// Text of one line, in which control characters are shown as `\u{1b}`.
pub(crate) fn line(text: &str) -> String {
    clean(text, |_| false)
}

/// The same of several lines, such as a body.
pub(crate) fn lines(text: &str) -> String {
    clean(text, |char| matches!(char, '\n' | '\t'))
}

fn clean(text: &str, keeps: impl Fn(char) -> bool) -> String {
    let mut clean = String::with_capacity(text.len());
    for char in text.chars() {
        if is_unsafe(char) && !keeps(char) {
            clean.extend(char.escape_default());
        } else {
            clean.push(char);
        }
    }
    clean
}

/// JSON with every control character escaped: serde_json leaves those above U+007E as they are.
pub(crate) fn json(json: &str) -> String {
    if !json.contains(|char| is_unsafe(char) && char != '\n') {
        return json.to_owned();
    }
    let mut clean = String::with_capacity(json.len());
    for char in json.chars() {
        if is_unsafe(char) && char != '\n' {
            let _ = write!(clean, "\\u{:04x}", u32::from(char));
        } else {
            clean.push(char);
        }
    }
    clean
}

/// Control characters, line separators, and marks that reorder or hide text.
fn is_unsafe(char: char) -> bool {
    let hides = ['\u{feff}'];
    let ranges = [
        '\u{200b}'..='\u{200f}',
        '\u{2028}'..='\u{202e}',
        '\u{2066}'..='\u{2069}',
    ];
    char.is_control() || hides.contains(&char) || ranges.iter().any(|range| range.contains(&char))
}

/// The beginning of a text that is too long for a cell.
pub(crate) fn shortened(text: &str, longest: usize) -> String {
    if text.chars().count() <= longest {
        return text.to_owned();
    }
    let kept: String = text.chars().take(longest - 1).collect();
    format!("{}…", kept.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_not_obeyed() {
        assert_eq!(line("a\u{1b}[31mb\r\n"), "a\\u{1b}[31mb\\r\\n");
        assert_eq!(line("\u{9b}2J \u{202e}x"), "\\u{9b}2J \\u{202e}x");
        assert_eq!(line("grüße – 你好"), "grüße – 你好");
        assert_eq!(lines("a\n\tb\u{7}"), "a\n\tb\\u{7}");
        let escaped = json("\"\u{9b}\u{7f}\"");
        assert_eq!(escaped, "\"\\u009b\\u007f\"");
        let back: String = serde_json::from_str(&escaped).unwrap();
        assert_eq!(back, "\u{9b}\u{7f}");
    }

    #[test]
    fn a_long_text_says_that_there_is_more() {
        assert_eq!(shortened("12345", 5), "12345");
        assert_eq!(shortened("123456", 5), "1234…");
    }
}
