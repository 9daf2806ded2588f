//! `petek chat`: a conversation with the cluster's model, a line per turn.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use clap::Args;
use petek_core::limits::text::BYTES_MAX;
use petek_proto::inference::v1::{ChatMessage, StreamChatRequest};
use petek_service::{Exit, Failure};
use tokio_stream::StreamExt;
use tonic::Status;

use crate::answer::{Answer, GoingOn, Show, receive};
use crate::client::{Client, PublicEndpoint};
use crate::output::{End, remark};
use crate::request::{RequestArgs, message};

/// Talks with the cluster's model
///
/// Each line of standard input is a turn, and the answer is printed as it comes; the conversation so far goes along.
/// Lines of their own: /reset forgets the conversation, /resume goes on with an answer that broke off, /quit ends.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  petek chat --system \"Answer in one sentence.\"
  petek chat --once \"What is a honeycomb?\" --temperature 0
  printf '%s\\n' \"My name is Ada.\" \"What is my name?\" | petek chat")]
pub(crate) struct Chat {
    /// Say this first, as the system
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Say this, print the answer, and end
    #[arg(long, value_name = "TEXT")]
    once: Option<String>,
    /// Go on after an answer that fails, as a terminal does; otherwise it ends the conversation
    #[arg(long, conflicts_with = "once")]
    keep_going: bool,
    #[command(flatten)]
    to: PublicEndpoint,
    /// One JSON object per event instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    request: RequestArgs,
}

impl Chat {
    /// Talks.
    ///
    /// # Errors
    /// Where there is no router, a flag does not fit a conversation, or an answer is not whole.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.talk().or_else(End::outcome)
    }

    fn talk(&self) -> Result<(), End> {
        let usage = |what: &str| Failure::new(Exit::Usage, what, "add --once TEXT");
        if self.once.is_none() && self.request.sequences() != 1 {
            return Err(usage("a turn of a conversation has one answer: -n does not fit").into());
        }
        if self.once.is_none() && !self.request.resumed_ids().is_empty() {
            return Err(usage("--resume-ids goes on with one answer").into());
        }
        let client = Client::connect(&self.to.endpoint)?;
        let mut conversation = Conversation::new(self.system.as_deref());
        if let Some(text) = &self.once {
            let answer = self.ask(&client, conversation.with(text), &self.request)?;
            return answer.failure(GoingOn::Flags).map_or(Ok(()), |failure| Err(failure.into()));
        }
        let keeps_going = self.keep_going || io::stdin().is_terminal();
        let going_on = if keeps_going { GoingOn::Command } else { GoingOn::Never };
        while let Some(line) = next_line()? {
            let (question, request) = match Line::of(&line) {
                Line::Quit => break,
                Line::Blank => continue,
                Line::Reset => {
                    conversation = Conversation::new(self.system.as_deref());
                    continue;
                }
                Line::Resume => match conversation.broken.clone() {
                    Some(broken) => (broken.question, self.request.going_on(broken.seed, broken.ids)),
                    None => {
                        remark("petek: no answer broke off");
                        continue;
                    }
                },
                Line::Turn(text) => {
                    conversation.broken = None;
                    (text.to_owned(), self.request.clone())
                }
            };
            let answer = self.ask(&client, conversation.with(&question), &request)?;
            conversation.take(question, &answer);
            match answer.failure(going_on) {
                Some(failure) if keeps_going => remark(&format!("petek: {failure}")),
                Some(failure) => return Err(failure.into()),
                None => {}
            }
        }
        Ok(())
    }

    fn ask(&self, client: &Client, messages: Vec<ChatMessage>, request: &RequestArgs) -> Result<Answer, End> {
        let mut inference = client.inference();
        let spec = Some(request.chat(messages));
        let call = async {
            let stream = inference.stream_chat(StreamChatRequest { spec }).await?.into_inner();
            Ok::<_, Status>(stream.map(|message| message.map(|message| message.event)))
        };
        receive(client, request, Show::of(self.json), call)
    }
}

/// The turns so far: whole ones, and perhaps one whose answer broke off.
#[derive(Debug)]
struct Conversation {
    messages: Vec<ChatMessage>,
    broken: Option<Broken>,
}

/// A turn whose answer broke off, with all that the rest of it needs.
#[derive(Clone, Debug)]
struct Broken {
    question: String,
    text: String,
    seed: u64,
    ids: Vec<u32>,
}

impl Conversation {
    fn new(system: Option<&str>) -> Self {
        let messages = system.map(|text| message("system", text.to_owned())).into_iter().collect();
        Self { messages, broken: None }
    }

    /// The messages with one more turn of the user's.
    fn with(&self, question: &str) -> Vec<ChatMessage> {
        let turn = message("user", question.to_owned());
        self.messages.iter().cloned().chain([turn]).collect()
    }

    /// Remembers how a turn went. One that was refused leaves nothing behind.
    fn take(&mut self, question: String, answer: &Answer) {
        let before = self.broken.take().map(|broken| broken.text).unwrap_or_default();
        let text = before + answer.text();
        if answer.is_whole() {
            self.messages.push(message("user", question));
            self.messages.push(message("assistant", text));
        } else if let Some((seed, ids)) = answer.rest() {
            self.broken = Some(Broken { question, text, seed, ids: ids.to_vec() });
        }
    }
}

/// What a line of the user's means.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Turn(&'a str),
    Blank,
    Reset,
    Resume,
    Quit,
}

impl<'a> Line<'a> {
    fn of(line: &'a str) -> Self {
        match line.trim() {
            "" => Line::Blank,
            "/reset" => Line::Reset,
            "/resume" => Line::Resume,
            "/quit" => Line::Quit,
            _ => Line::Turn(line),
        }
    }
}

/// The next line of standard input without its end; none at its end.
fn next_line() -> Result<Option<String>, Failure> {
    let failed = |what: String| Failure::new(Exit::Usage, what, "");
    if io::stdin().is_terminal() {
        let _ = write!(io::stderr(), "> ");
    }
    let mut line = String::new();
    // A line that no server would take is not read to its end.
    let mut input = io::stdin().lock().take(BYTES_MAX as u64 + 1);
    let bytes = input.read_line(&mut line).map_err(|error| failed(format!("read a turn: {error}")))?;
    if bytes > BYTES_MAX {
        return Err(failed(format!("a turn of more than {BYTES_MAX} bytes")));
    }
    let line = line.strip_suffix('\n').unwrap_or(&line);
    Ok((bytes > 0).then(|| line.strip_suffix('\r').unwrap_or(line).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        assert_eq!(Line::of(" /quit "), Line::Quit);
        assert_eq!(Line::of("/reset"), Line::Reset);
        assert_eq!(Line::of("/resume"), Line::Resume);
        assert_eq!(Line::of("  "), Line::Blank);
        assert_eq!(Line::of(" /quit it"), Line::Turn(" /quit it"));
    }
}
