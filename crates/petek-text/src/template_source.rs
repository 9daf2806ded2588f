//! What is checked and rewritten in a chat template's source before minijinja sees it.

use crate::error::FileError;
use crate::limits::{TEMPLATE_BYTES_MAX, TEMPLATE_TAG_BYTES_MAX};

/// Checks the size of the source and of each tag, and turns transformers' `{% generation %}` blocks, which mark
/// the assistant's text and change nothing in it, into `{% with %}` blocks, which scope alike.
pub(crate) fn prepare(file: &'static str, at: &str, source: &str) -> Result<String, FileError> {
    let too_large = |what: String, limit: usize, actual: usize| FileError::TooLarge {
        file,
        what,
        limit: limit as u64,
        actual: actual as u64,
    };
    if source.len() > TEMPLATE_BYTES_MAX {
        return Err(too_large(format!("{at}, its size in bytes,"), TEMPLATE_BYTES_MAX, source.len()));
    }
    let mut prepared = String::with_capacity(source.len());
    let mut copied = 0;
    for tag in Tags::of(source) {
        let text = &source[tag.start..tag.end];
        if text.len() > TEMPLATE_TAG_BYTES_MAX {
            let line = source[..tag.start].matches('\n').count() + 1;
            return Err(too_large(
                format!("{at}, the tag at line {line}, in bytes,"),
                TEMPLATE_TAG_BYTES_MAX,
                text.len(),
            ));
        }
        let Some(inner) = text.strip_prefix("{%").and_then(|text| text.strip_suffix("%}")) else { continue };
        let word = inner.trim_matches(|c: char| c.is_ascii_whitespace() || c == '-' || c == '+');
        if let Some(end) = word.strip_suffix("generation").filter(|end| matches!(*end, "" | "end")) {
            prepared.push_str(&source[copied..tag.start]);
            prepared.push_str(&text.replace(word, &format!("{end}with")));
            copied = tag.end;
        }
    }
    prepared.push_str(&source[copied..]);
    Ok(prepared)
}

struct Tag {
    start: usize,
    end: usize,
}

/// The `{{ … }}` and `{% … %}` tags of a source, as minijinja's lexer finds them: raw blocks and comments have
/// none, a bracket or a string hides what would end a tag. One that never ends goes to the end.
struct Tags<'a> {
    source: &'a str,
    at: usize,
    /// Open brackets. Not reset between tags: minijinja does not either.
    balance: isize,
}

impl Iterator for Tags<'_> {
    type Item = Tag;

    fn next(&mut self) -> Option<Tag> {
        loop {
            let rest = &self.source[self.at..];
            let start = self.at + ["{{", "{%", "{#"].iter().filter_map(|open| rest.find(open)).min()?;
            let inside = &self.source[start + 2..];
            match self.source.as_bytes()[start + 1] {
                b'#' => self.at = start + 2 + inside.find("#}")? + 2,
                b'%' => match basic_tag(inside, "raw") {
                    Some(raw) => self.at = start + 2 + raw + end_of_raw(&inside[raw..])?,
                    None => return Some(self.tag(start, b"%}")),
                },
                _ => return Some(self.tag(start, b"}}")),
            }
        }
    }
}

impl<'a> Tags<'a> {
    fn of(source: &'a str) -> Self {
        Tags { source, at: 0, balance: 0 }
    }

    fn tag(&mut self, start: usize, close: &[u8]) -> Tag {
        let bytes = self.source.as_bytes();
        let mut at = start + 2;
        while at < bytes.len() {
            if self.balance == 0 && bytes[at..].starts_with(close) {
                at += close.len();
                self.at = at;
                return Tag { start, end: at };
            }
            match bytes[at] {
                quote @ (b'"' | b'\'') => {
                    at += 1;
                    while at < bytes.len() && bytes[at] != quote {
                        at += if bytes[at] == b'\\' { 2 } else { 1 };
                    }
                }
                b'(' | b'[' | b'{' => self.balance += 1,
                b')' | b']' | b'}' => self.balance -= 1,
                _ => {}
            }
            at += 1;
        }
        self.at = bytes.len();
        Tag { start, end: bytes.len() }
    }
}

/// Bytes of `name %}` with white space and signs around the name.
fn basic_tag(inside: &str, name: &str) -> Option<usize> {
    let sign = ['-', '+'];
    let rest =
        inside.strip_prefix(sign).unwrap_or(inside).trim_ascii_start().strip_prefix(name)?.trim_ascii_start();
    let rest = rest.strip_prefix(sign).unwrap_or(rest).strip_prefix("%}")?;
    Some(inside.len() - rest.len())
}

fn end_of_raw(inside: &str) -> Option<usize> {
    inside.match_indices("{%").find_map(|(at, _)| Some(at + 2 + basic_tag(&inside[at + 2..], "endraw")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(source: &str) -> Vec<&str> {
        Tags::of(source).map(|tag| &source[tag.start..tag.end]).collect()
    }

    #[test]
    fn tags_end_where_the_lexer_ends_them() {
        assert_eq!(tags("a {{ x }} b {%- if y -%} c"), ["{{ x }}", "{%- if y -%}"]);
        assert_eq!(tags("{{ {'a': {'b': 1}} }} {{ '}}' }}"), ["{{ {'a': {'b': 1}} }}", "{{ '}}' }}"]);
        assert_eq!(tags(r#"{{ "\"}}" }} é {{ 'it' }}"#), [r#"{{ "\"}}" }}"#, "{{ 'it' }}"]);
        assert_eq!(tags("{# {{ no }} #}{% raw %}{{ don't }}{%- endraw %}{{ yes }}"), ["{{ yes }}"]);
        assert_eq!(tags("{{ never"), ["{{ never"]);
        assert_eq!(tags("{{ 'never }} \\"), ["{{ 'never }} \\"]);
    }

    #[test]
    fn sizes_are_checked_and_generation_blocks_rewritten() {
        let prepare = |source: &str| prepare("chat_template.jinja", "the template", source);
        let text = "{% generation %}a{%- endgeneration -%}{{ generation }}";
        assert_eq!(prepare(text).unwrap(), "{% with %}a{%- endwith -%}{{ generation }}");
        let tag = |bytes: usize| format!("\n{{{{{}1}}}}", "-".repeat(bytes - 5));
        assert!(prepare(&tag(TEMPLATE_TAG_BYTES_MAX)).is_ok());
        let error = prepare(&tag(TEMPLATE_TAG_BYTES_MAX + 1)).unwrap_err().to_string();
        assert_eq!(
            error,
            "chat_template.jinja: the template, the tag at line 2, in bytes, is 8193; the limit is 8192"
        );
        assert!(prepare(&"-".repeat(TEMPLATE_BYTES_MAX)).is_ok());
        assert!(prepare(&"-".repeat(TEMPLATE_BYTES_MAX + 1)).is_err());
    }
}
