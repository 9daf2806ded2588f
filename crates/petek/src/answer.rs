//! An answer as it comes: events in, text or JSON out, and what is needed to go on where it breaks off.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::future::Future;
use std::pin::pin;

use petek_proto::inference::v1::generation_event::Kind;
use petek_proto::inference::v1::sequence_finish::Matched;
use petek_proto::inference::v1::{Finished, GenerationEvent, SequenceFinish, Started};
use petek_service::Failure;
use serde_json::{Value, json};
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Status};

use crate::client::{Client, Refused};
use crate::json::json_line;
use crate::output::{End, print_line, print_text, remark, word};
use crate::request::RequestArgs;

/// How an answer is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Show {
    /// The text alone, and a footer beside it.
    Text,
    /// One JSON object per event and line.
    Json,
}

impl Show {
    /// What `--json` asks for.
    pub(crate) fn of(json: bool) -> Self {
        if json { Show::Json } else { Show::Text }
    }
}

/// How a person can go on with an answer that broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GoingOn {
    /// By the same command with more flags.
    Flags,
    /// By `/resume`, in the conversation that goes on.
    Command,
    /// Not at all: the conversation ends here.
    Never,
}

/// What has come of an answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    started: Option<Started>,
    /// Of sequence 0, with those that the client had before: what the rest of the answer can be asked for with.
    ids: Vec<u32>,
    resumed_tokens: usize,
    sequences: u32,
    texts: BTreeMap<u32, String>,
    finished: Option<Finished>,
    refused: Option<Refused>,
}

/// Receives an answer and shows it while it comes.
///
/// # Errors
/// Where it cannot be shown. An answer that was refused or broke off is an [`Answer`] that says so.
pub(crate) fn receive<Events>(
    client: &Client,
    request: &RequestArgs,
    show: Show,
    call: impl Future<Output = Result<Events, Status>>,
) -> Result<Answer, End>
where
    Events: Stream<Item = Result<Option<GenerationEvent>, Status>>,
{
    let resumed = request.resumed_ids();
    let mut answer = Answer {
        ids: resumed.to_vec(),
        resumed_tokens: resumed.len(),
        sequences: request.sequences(),
        ..Answer::default()
    };
    match client.wait(call) {
        Err(status) => answer.refused = Some(status.into()),
        Ok(events) => {
            let mut events = pin!(events);
            while answer.refused.is_none() {
                match client.wait(events.next()) {
                    Some(Ok(Some(event))) => answer.take(event, show)?,
                    // An event of a newer server.
                    Some(Ok(None)) => {}
                    Some(Err(status)) => answer.refused = Some(status.into()),
                    None if answer.finished.is_some() => break,
                    None => answer.refused = Some(Refused::cut()),
                }
            }
        }
    }
    answer.close(show)?;
    Ok(answer)
}

impl Answer {
    /// The text of sequence 0 that has come.
    pub(crate) fn text(&self) -> &str {
        self.texts.get(&0).map_or("", |text| &text[..])
    }

    /// Whether it came to its end.
    pub(crate) fn is_whole(&self) -> bool {
        self.refused.is_none()
    }

    /// The seed and the ids so far, with which the server gives the rest: where the connection or the worker was
    /// lost, not the request refused. Without any id yet, the seed alone gives all of it.
    pub(crate) fn rest(&self) -> Option<(u64, &[u32])> {
        let refused = self.refused.as_ref()?;
        let is_lost = refused.code == Code::Unavailable || refused.refusal.is_none();
        let started = self.started.as_ref().filter(|_| is_lost && self.sequences == 1)?;
        Some((started.seed, &self.ids))
    }

    /// Why the answer is not whole, if it is not, with how to go on.
    pub(crate) fn failure(&self, going_on: GoingOn) -> Option<Failure> {
        let hint = self.rest().and_then(|(seed, ids)| match going_on {
            GoingOn::Never => None,
            GoingOn::Command => Some("/resume goes on where it stopped".to_owned()),
            GoingOn::Flags if ids.is_empty() => {
                Some(format!("the same command with --seed {seed} gives the same answer"))
            }
            GoingOn::Flags => {
                let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
                let ids = ids.join(",");
                Some(format!("to go on, the same command with --seed {seed} --resume-ids {ids}"))
            }
        });
        self.refused.as_ref().map(|refused| refused.failure(hint))
    }

    fn take(&mut self, event: GenerationEvent, show: Show) -> Result<(), End> {
        if show == Show::Json {
            print_line(&json_line("petek.inference.v1.GenerationEvent", &event))?;
        }
        match event.kind {
            Some(Kind::Started(started)) => {
                self.started = Some(started);
                if show == Show::Text && self.sequences > 1 {
                    print_line(&heading(0))?;
                }
            }
            Some(Kind::Delta(delta)) => {
                if delta.index == 0 {
                    self.ids.extend(&delta.token_ids);
                    if show == Show::Text {
                        print_text(&delta.text)?;
                    }
                }
                self.texts.entry(delta.index).or_default().push_str(&delta.text);
            }
            Some(Kind::Finished(finished)) => self.finished = Some(finished),
            None => {}
        }
        Ok(())
    }

    /// Shows what is left to show when no event comes any more.
    fn close(&self, show: Show) -> Result<(), End> {
        match show {
            Show::Json => self.refused.as_ref().map_or(Ok(()), |refused| print_line(&self.error(refused))),
            Show::Text => {
                if self.started.is_some() {
                    print_line("")?;
                }
                for (index, text) in self.texts.iter().filter(|(index, _)| **index > 0) {
                    print_line(&heading(*index))?;
                    print_text(text)?;
                    print_line("")?;
                }
                if let Some(finished) = &self.finished {
                    remark(&self.footer(finished));
                }
                Ok(())
            }
        }
    }

    /// The last line of an answer in JSON that is not whole.
    fn error(&self, refused: &Refused) -> String {
        let refusal = refused.refusal.as_ref();
        let resume = self.rest().map(|(seed, ids)| json!({ "seed": seed.to_string(), "resumed_ids": ids }));
        let error: Value = json!({ "error": {
            "code": refused.code_name(),
            "reason": refusal.map(|refusal| &refusal.reason),
            "message": refused.message(),
            "field": refusal.and_then(|refusal| refusal.field.as_ref()).map(|field| &field.path),
            "metadata": refusal.map(|refusal| &refusal.metadata),
            "retry_ms": refusal.and_then(|refusal| refusal.retry_ms).map(|ms| ms.to_string()),
            "resume": resume,
        }});
        error.to_string()
    }

    fn footer(&self, finished: &Finished) -> String {
        let usage = finished.usage.unwrap_or_default();
        let timings = finished.timings.unwrap_or_default();
        let new_tokens = (usage.completion_tokens as usize).saturating_sub(self.resumed_tokens);
        let mut footer = format!(
            "[{} prompt tokens, {} of them cached; {new_tokens} new",
            usage.prompt_tokens, usage.cached_tokens
        );
        if let Some(ttft_ms) = timings.ttft_ms {
            let _ = write!(footer, ", TTFT {ttft_ms:.0} ms");
            let decode_s = (timings.total_ms - ttft_ms) / 1e3;
            if new_tokens > 1 && decode_s > 0.0 {
                let _ = write!(footer, ", {:.1} tokens/s", (new_tokens - 1) as f64 / decode_s);
            }
        }
        let mut reasons: Vec<String> = finished.sequences.iter().map(reason).collect();
        reasons.dedup();
        let _ = write!(footer, "; {}", reasons.join(", "));
        if let Some(started) = &self.started {
            let _ = write!(footer, "; worker {}, seed {}", started.worker, started.seed);
        }
        if finished.moves > 0 {
            let _ = write!(footer, ", moved {} times", finished.moves);
        }
        if finished.sequences.iter().any(|sequence| sequence.numerics_changed) {
            footer.push_str(", numerics changed");
        }
        footer + "]"
    }
}

fn heading(index: u32) -> String {
    format!("--- {index} ---")
}

fn reason(sequence: &SequenceFinish) -> String {
    let reason = word(sequence.reason().as_str_name(), "FINISH_REASON_");
    match &sequence.matched {
        Some(Matched::StopString(stop)) => format!("{reason} {stop:?}"),
        Some(Matched::StopTokenId(id)) => format!("{reason} {id}"),
        None => reason,
    }
}
