//! This crate knows how text becomes token ids and back, piece by piece. It must never know of requests
//! in flight, workers or networks.
//!
//! ```text
//! messages ─ template ─▶ text ─ tokenizer ─▶ ids   …   ids ─ token table ─▶ bytes ─ detokenizer ─▶ text ─ stops ─▶ deltas
//!            (guard: client text stays text)               └──────────────────── output ────────────────────┘
//! ```
//! Values in, values out; a clock and the time of day are arguments. The one thread is a template's, for its stack.

pub mod limits;

mod card;
mod config;
mod detokenize;
mod error;
mod generation;
mod guard;
mod output;
mod patterns;
mod python;
mod stop;
mod template;
mod template_source;
mod token_table;
mod tokenizer;

#[cfg(test)]
mod testing;

pub use card::{CardFile, ModelCard, ModelText};
pub use config::{TokenizerConfig, eos_ids};
pub use detokenize::Detokenizer;
pub use error::{FileError, TextError};
pub use generation::GenerationDefaults;
pub use guard::Rendered;
pub use output::{Delta, Ending, Output, OutputOptions, Pushed};
pub use stop::{StopMatch, StopMatcher, StopStrings};
pub use template::{Chat, ChatTemplate, TemplateSource};
pub use token_table::{SpecialText, TokenTable};
pub use tokenizer::{AddedSpecials, ControlText, Tokenizer};
