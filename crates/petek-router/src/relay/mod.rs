//! One request between its worker and its client, decided by pure data: messages and times in, events and
//! commands out.
//!
//! ```text
//!  worker ──▶ Journal ──────────────▶ Outbox ──▶ client
//!             per sequence: ids,      merged,
//!             text machine, end       bounded
//!                └──▶ Effects: sequences to cancel, what the metrics should know, the end
//! ```

mod journal;
mod outbox;

mod live;

pub(crate) use journal::{Asked, Cause, Journal, Placement, RETRY_MS, Standing};
pub(crate) use live::Live;
pub(crate) use outbox::{Outgoing, Patience};
