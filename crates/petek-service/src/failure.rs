//! How a process ends when it cannot do its work: a code that says whose turn it is, one line, a hint.

use std::fmt;
use std::process::ExitCode;

use crate::escape::one_line;

/// Whose turn it is, as the code of the process says it. 1 is left to bugs and to a command that ran and found
/// something wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The command line is not understood.
    Usage = 2,
    /// A setting, or a file of the model, is wrong.
    Configuration = 3,
    /// This machine or what it should reach is not as needed: a port, a device, etcd.
    Environment = 4,
    /// The other side answered with an error.
    Remote = 5,
    /// A part of the process broke while it worked: a device, or a bug of ours. Whoever supervises it starts it again.
    Fault = 70,
}

/// The end of a process that a person can mend. Shown as one line, never with a backtrace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    exit: Exit,
    what: String,
    hint: String,
}

impl Failure {
    /// A failure of the given kind: `what` went wrong, and what to do about it in the imperative (`hint`).
    pub fn new(exit: Exit, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { exit, what: what.into(), hint: hint.into() }
    }

    /// Whose turn it is.
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// The code to leave `main` with.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, hint, .. } = self;
        let text = if hint.is_empty() { what.clone() } else { format!("{what}; {hint}") };
        f.write_str(&one_line(&text))
    }
}

impl std::error::Error for Failure {}

/// Forbids core dumps of this process: they would hold prompts and keys.
///
/// # Errors
/// [`Exit::Environment`] where the system refuses.
pub fn limit_core_dumps() -> Result<(), Failure> {
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(rustix::process::Resource::Core, none)
        .map_err(|error| Failure::new(Exit::Environment, format!("forbid core dumps: {error}"), ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_and_a_code() {
        let failure = Failure::new(Exit::Environment, "listen on :80:\nin use", "choose another port");
        assert_eq!(failure.to_string(), "listen on :80:\\nin use; choose another port");
        assert_eq!(Failure::new(Exit::Remote, "gone", "").to_string(), "gone");
        let codes = [Exit::Usage, Exit::Configuration, Exit::Environment, Exit::Remote, Exit::Fault]
            .map(|exit| exit as u8);
        assert_eq!(codes, [2, 3, 4, 5, 70]);
        assert_eq!(format!("{:?}", failure.exit_code()), format!("{:?}", ExitCode::from(4)));
    }

    #[test]
    fn core_dumps_are_off() {
        limit_core_dumps().unwrap();
        assert_eq!(rustix::process::getrlimit(rustix::process::Resource::Core).current, Some(0));
    }
}
