//! What a client command writes: text and lines to standard output, remarks to standard error.

use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind, IsTerminal, Write};

use petek_service::{Exit, Failure};

/// Why a command ends before its work is done.
#[derive(Debug)]
pub(crate) enum End {
    /// Whoever read our output has gone (`petek … | head -1`): nothing is left to do, and nothing is wrong.
    Unread,
    /// Something a person can mend.
    Failed(Failure),
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        End::Failed(failure)
    }
}

impl End {
    /// How the process ends.
    pub(crate) fn outcome(self) -> Result<(), Failure> {
        match self {
            End::Unread => Ok(()),
            End::Failed(failure) => Err(failure),
        }
    }

    fn of_write(error: io::Error) -> Self {
        if error.kind() == ErrorKind::BrokenPipe {
            return End::Unread;
        }
        Failure::new(Exit::Environment, format!("write to standard output: {error}"), "").into()
    }
}

/// A model's text as it comes, on a terminal without control characters but line breaks and tabs: no model moves
/// the cursor or renames the window. Into a pipe or a file goes every byte.
pub(crate) fn print_text(text: &str) -> Result<(), End> {
    let mut out = io::stdout().lock();
    let written = if out.is_terminal() {
        write!(out, "{}", Shown { text, kept: &['\n', '\t'] })
    } else {
        out.write_all(text.as_bytes())
    };
    written.and_then(|()| out.flush()).map_err(End::of_write)
}

/// One line, or several that belong together, at once.
pub(crate) fn print_line(line: &str) -> Result<(), End> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(End::of_write)
}

/// A remark beside the output: one line to standard error. Where that cannot be written, nobody misses it.
pub(crate) fn remark(text: &str) {
    let _ = writeln!(io::stderr(), "{}", Shown { text, kept: &[] });
}

/// An enum value of the wire as a word: `FINISH_REASON_STOP_EOS` → `stop_eos`.
pub(crate) fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

/// Others' text as a terminal may get it: control characters appear as escapes.
pub(crate) struct Shown<'a> {
    /// As it came.
    pub(crate) text: &'a str,
    /// Control characters that may stay.
    pub(crate) kept: &'a [char],
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.chars().try_for_each(|char| {
            if char.is_control() && !self.kept.contains(&char) {
                write!(f, "{}", char.escape_default())
            } else {
                f.write_char(char)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_no_commands() {
        let text = "a\x1b]0;owned\x07b\r\n\tç 蜂";
        let shown = |kept: &[char]| Shown { text, kept }.to_string();
        assert_eq!(shown(&['\n', '\t']), "a\\u{1b}]0;owned\\u{7}b\\r\n\tç 蜂");
        assert_eq!(shown(&[]), "a\\u{1b}]0;owned\\u{7}b\\r\\n\\tç 蜂");
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let end = |kind: ErrorKind| End::of_write(kind.into()).outcome();
        assert_eq!(end(ErrorKind::BrokenPipe), Ok(()));
        assert_eq!(end(ErrorKind::StorageFull).unwrap_err().exit(), Exit::Environment);
    }
}
