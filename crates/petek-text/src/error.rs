//! What can be wrong, in two kinds: a file of the model (the load ends), or what a client sent (a refusal).

use std::fmt;

/// A file of the model that cannot be used. Whoever loads the model ends with exit code 3 and this one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// The model has no such file.
    #[error("{file} is missing")]
    Missing {
        /// The file's name inside the model folder.
        file: &'static str,
    },
    /// The file, or one value in it, is larger than what is read. Units: bytes, except where `what` says.
    #[error("{file}: {what} is {actual}; the limit is {limit}")]
    TooLarge {
        /// The file's name inside the model folder.
        file: &'static str,
        /// What was measured.
        what: String,
        /// The most that is accepted.
        limit: u64,
        /// What was found.
        actual: u64,
    },
    /// The file says something that is no sense, or something that petek does not do.
    #[error("{file}: {at}: {why}")]
    Invalid {
        /// The file's name inside the model folder.
        file: &'static str,
        /// The key, or the line and column.
        at: String,
        /// What is wrong, and what to do where that is known.
        why: String,
    },
}

impl FileError {
    pub(crate) fn invalid(file: &'static str, at: impl fmt::Display, why: impl fmt::Display) -> Self {
        FileError::Invalid { file, at: at.to_string(), why: why.to_string() }
    }

    pub(crate) fn json(file: &'static str, error: &serde_json::Error) -> Self {
        // serde_json ends its message with the place, which stands before it here.
        let text = error.to_string();
        let why = text.rsplit_once(" at line ").map_or(text.as_str(), |(why, _)| why);
        FileError::invalid(file, format_args!("line {} column {}", error.line(), error.column()), why)
    }

    /// The file's name inside the model folder.
    pub fn file(&self) -> &'static str {
        match self {
            FileError::Missing { file }
            | FileError::TooLarge { file, .. }
            | FileError::Invalid { file, .. } => file,
        }
    }
}

/// Something that a client sent and that cannot be served. Each case names the field, and both numbers of a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// More than is taken. Units: `unit`.
    #[error("{field} has {actual} {unit}; at most {limit} are taken")]
    TooLarge {
        /// The request's field, with its index or key.
        field: String,
        /// What is counted: "bytes", "strings", …
        unit: &'static str,
        /// The most that is accepted.
        limit: u64,
        /// What was sent.
        actual: u64,
    },
    /// A value that means nothing here.
    #[error("{field}: {why}")]
    Invalid {
        /// The request's field, with its index or key.
        field: String,
        /// What is wrong, and what to do where that is known.
        why: String,
    },
    /// A chat for a model that has no chat template.
    #[error("messages: this model has no chat template; use Generate with a prompt")]
    NoTemplate,
    /// The template itself refused the conversation (`raise_exception`).
    #[error("messages: the model's chat template refuses them: {message}")]
    TemplateRaised {
        /// The template's own words.
        message: String,
    },
    /// The template could not be rendered with these messages.
    #[error("messages: the model's chat template fails on them: {why}")]
    TemplateFailed {
        /// minijinja's reason with the line.
        why: String,
    },
    /// Rendering would cost more than a request may. Units: `unit`.
    #[error("messages: rendering the chat template takes more than {limit} {unit}")]
    TemplateLimit {
        /// "units of work" or "bytes of output".
        unit: &'static str,
        /// The most that is spent.
        limit: u64,
    },
    /// A fault of ours or of a library, not of the request.
    #[error("{what} failed: {why}")]
    Fault {
        /// The part that failed.
        what: &'static str,
        /// Its reason.
        why: String,
    },
}

impl TextError {
    pub(crate) fn invalid(field: impl fmt::Display, why: impl fmt::Display) -> Self {
        TextError::Invalid { field: field.to_string(), why: why.to_string() }
    }

    /// Checks a count against a limit.
    pub(crate) fn check(
        field: &str,
        unit: &'static str,
        actual: usize,
        limit: usize,
    ) -> Result<(), TextError> {
        if actual <= limit {
            return Ok(());
        }
        Err(TextError::TooLarge { field: field.to_owned(), unit, limit: limit as u64, actual: actual as u64 })
    }

    /// The request's field that is at fault; none where the request is not.
    pub fn field(&self) -> Option<&str> {
        match self {
            TextError::TooLarge { field, .. } | TextError::Invalid { field, .. } => Some(field),
            TextError::Fault { .. } => None,
            TextError::NoTemplate
            | TextError::TemplateRaised { .. }
            | TextError::TemplateFailed { .. }
            | TextError::TemplateLimit { .. } => Some("messages"),
        }
    }
}
