//! Text of clients in our own output: made harmless, and short.

use std::fmt::{self, Write};

/// How much of a client's text a log line may hold, in characters of the escaped form.
const LOGGED_CHARS_MAX: usize = 128;

/// A client's text as a log line may show it: [`escape`] makes it.
#[derive(Debug, Clone, Copy)]
pub struct Escaped<'a>(&'a str);

/// Makes a client's text fit for a log: control characters, quotes, invisible and combining characters appear as
/// escapes, and at most 128 characters are left, the last one `…` where something was cut.
///
/// For names and ids that a client chose. Prompts and keys are never logged, escaped or not.
pub fn escape(text: &str) -> Escaped<'_> {
    Escaped(text)
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An escape is written whole or not at all. The last place is kept for `…` until it is known that
        // everything fits; so one pass looks ahead by at most 128 characters, however long the text.
        let mut chars = self.0.chars();
        let mut used = 0;
        while let Some(char) = chars.next() {
            let escaped = char.escape_debug();
            let width = escaped.len();
            let is_last = chars.as_str().is_empty();
            if used + width > LOGGED_CHARS_MAX - usize::from(!is_last) {
                return f.write_char('…');
            }
            write!(f, "{escaped}")?;
            used += width;
        }
        Ok(())
    }
}

/// The request id that a client sent beside ours, where it is one that we echo: 1 to 64 of `A-Z a-z 0-9 . _ -`.
pub fn client_request_id(header: &str) -> Option<&str> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    ((1..=64).contains(&header.len()) && header.bytes().all(is_plain)).then_some(header)
}

/// Control characters as escapes, so that a message stays one line and commands no terminal.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_control() { line.extend(char.escape_default()) } else { line.push(char) }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        assert_eq!(escape(text).to_string(), expected);
    }

    #[test]
    fn client_text_is_harmless() {
        check("demo", "demo");
        check("Türkçe 蜂", "Türkçe 蜂");
        check("a\nINFO forged \"x\"\r\x1b[31m", "a\\nINFO forged \\\"x\\\"\\r\\u{1b}[31m");
        check("a\u{202e}b\u{200b}c\u{feff}", "a\\u{202e}b\\u{200b}c\\u{feff}");
        check("\u{301}x", "\\u{301}x");
    }

    #[test]
    fn client_text_is_short() {
        check(&"x".repeat(128), &"x".repeat(128));
        check(&"x".repeat(129), &format!("{}…", "x".repeat(127)));
        check(&"\n".repeat(64), &"\\n".repeat(64));
        // 63 × 2 + `…`: half an escape would say something else.
        check(&"\n".repeat(65), &format!("{}…", "\\n".repeat(63)));
        check(&format!("{}\u{202e}", "x".repeat(121)), &format!("{}…", "x".repeat(121)));
        assert_eq!(escape(&"蜂".repeat(1_000_000)).to_string().chars().count(), 128);
    }

    #[test]
    fn request_ids_of_clients() {
        for good in ["a", "A.b_c-9", &"x".repeat(64)] {
            assert_eq!(client_request_id(good), Some(good));
        }
        for bad in ["", " a", "a\n", "ü", "a/b", &"x".repeat(65)] {
            assert_eq!(client_request_id(bad), None);
        }
    }
}
