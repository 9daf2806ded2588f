//! Bytes to text, a piece at a time. The pieces joined equal the one-shot lossy decode of the bytes joined.

/// Reads a stream of bytes as UTF-8. Only an incomplete ending that can still become a character is held back;
/// bytes that can no longer form one are U+FFFD at once, one per maximal subpart (Unicode 16, section 3.9).
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    /// The beginning of one character: at most 3 bytes.
    unfinished: Vec<u8>,
}

impl Detokenizer {
    /// Appends to `text` all that the next bytes decide.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        if bytes.is_empty() {
            return;
        }
        let joined;
        let mut rest = bytes;
        if !self.unfinished.is_empty() {
            self.unfinished.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.unfinished);
            rest = &joined;
        }
        let mut chunks = rest.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let subpart = chunk.invalid();
            if chunks.peek().is_none() && str::from_utf8(subpart).is_err_and(|e| e.error_len().is_none()) {
                self.unfinished = subpart.to_vec();
            } else if !subpart.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }

    /// Ends the stream: an unfinished ending becomes one U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        if !std::mem::take(&mut self.unfinished).is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }

    /// Whether no bytes wait for the rest of their character.
    pub fn is_at_border(&self) -> bool {
        self.unfinished.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn pieces(pieces: &[&[u8]]) -> Vec<String> {
        let mut detokenizer = Detokenizer::default();
        let mut texts: Vec<String> = pieces
            .iter()
            .map(|piece| {
                let mut text = String::new();
                detokenizer.push(piece, &mut text);
                text
            })
            .collect();
        let mut last = String::new();
        detokenizer.finish(&mut last);
        texts.push(last);
        texts
    }

    #[test]
    fn only_an_ending_that_can_become_a_character_waits() {
        // "€" in three pieces; then its beginning alone; then a beginning that the next byte refutes.
        assert_eq!(pieces(&[b"\xE2", b"\x82", b"\xAC"]), ["", "", "€", ""]);
        assert_eq!(pieces(&[b"a\xE2\x82"]), ["a", "\u{FFFD}"]);
        assert_eq!(pieces(&[b"\xE2\x82", b"x"]), ["", "\u{FFFD}x", ""]);
        // E0 80 and F5 can begin nothing; nor can a lone continuation byte.
        assert_eq!(pieces(&[b"\xE0", b"\x80"]), ["", "\u{FFFD}\u{FFFD}", ""]);
        assert_eq!(pieces(&[b"\xF5", b"\x80"]), ["\u{FFFD}", "\u{FFFD}", ""]);
        // "€" was already out when FF came.
        assert_eq!(pieces(&[b"\xE2\x82\xAC", b"\xFF"]), ["€", "\u{FFFD}", ""]);
        // A surrogate is three bad bytes, none of which can be waited for.
        assert_eq!(pieces(&[b"\xED", b"\xA0", b"\x80"]), ["", "\u{FFFD}\u{FFFD}", "\u{FFFD}", ""]);
    }

    #[test]
    fn joined_pieces_equal_the_one_shot_decode() {
        for seed in 0..400 {
            let mut random = Random::new(seed);
            let bytes = random.textlike_bytes(40);
            let mut detokenizer = Detokenizer::default();
            let (mut text, mut fed) = (String::new(), 0);
            while fed < bytes.len() {
                let next = (fed + random.below(4)).min(bytes.len());
                detokenizer.push(&bytes[fed..next], &mut text);
                fed = next;
                // Never more held than a character's beginning, and never one that is decided already.
                let decided = String::from_utf8_lossy(&bytes[..fed]).into_owned();
                let held = if detokenizer.is_at_border() { "" } else { "\u{FFFD}" };
                assert_eq!(text.clone() + held, decided, "seed {seed}");
                let one_more = |byte: u8| {
                    let bytes = [&detokenizer.unfinished[..], &[byte]].concat();
                    str::from_utf8(&bytes).map_or_else(|error| error.error_len().is_none(), |_| true)
                };
                assert!(detokenizer.is_at_border() || (0..=255).any(one_more), "seed {seed}");
            }
            detokenizer.finish(&mut text);
            assert_eq!(text, String::from_utf8_lossy(&bytes), "seed {seed}");
        }
    }
}
