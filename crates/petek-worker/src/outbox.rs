//! What one router has not read yet: written by the engine, which never waits, and read by the router's stream.
//!
//! ```text
//!  engine ──news of one step──▶ [ whole messages | sequences with unread tokens ] ──▶ one Step, then who ended
//! ```
//! While the router keeps up, each engine step is one message. While it does not, the tokens of a sequence merge: a
//! token costs its four bytes and its logprobs, not a message. Each sequence has room for all its tokens; all that is
//! unread together has the bound of `outbox_bytes_max`, and a router that passes it is cut off: it was to read always.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use futures::task::AtomicWaker;
use petek_core::refusal::Refusal;
use petek_core::scheduler::Drawn;
use petek_proto::refusal::status;
use petek_proto::worker::v1::execute_response::Message as Down;
use petek_proto::worker::v1::{
    Admitted, ExecuteResponse, Finished, Heartbeat, Logprobs, Refused, Step, StepEntry,
};
use prost::Message;
use tokio::sync::Notify;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tonic::Status;

/// Unread bytes of one message: a step of a router that keeps up is far below it.
const STEP_BYTES_MAX: usize = 1 << 20;
/// What a message or an entry counts beside its tokens.
const MESSAGE_BYTES: usize = 64;

const _: () = assert!(2 * STEP_BYTES_MAX <= petek_core::limits::listener::MESSAGE_OUT_BYTES_MAX);

/// What became of a router's requests.
#[derive(Debug)]
pub(crate) enum News {
    Admitted(Admitted),
    Token { dispatch: u64, index: u32, position: u32, token: Drawn, logprobs: AskedLogprobs },
    Finished(Finished),
    Refused(Refused),
}

/// Whether a request asked for logprobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AskedLogprobs {
    No,
    Yes,
}

/// How a stream stands after news for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It goes on.
    Open,
    /// Nobody reads it any more.
    Closed,
    /// More is unread than may be: it ends with SLOW_CONSUMER.
    CutOff,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<Unread>,
    reader: AtomicWaker,
    closed: Notify,
}

#[derive(Debug)]
struct Unread {
    bytes_max: usize,
    bytes: usize,
    /// They go first, in order, each with its bytes.
    messages: VecDeque<(Down, usize)>,
    /// Sequences with something unread, the one that waits the longest first.
    turns: VecDeque<SequenceKey>,
    sequences: HashMap<SequenceKey, UnreadSequence>,
    /// The last engine step with a token among the unread.
    step: u64,
    /// Set once; nothing is taken in after it.
    end: Option<Result<(), Status>>,
    reading: Reading,
    /// When the oldest of the unread came.
    since: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    Goes,
    Over,
}

/// Dispatch and index.
type SequenceKey = (u64, u32);

#[derive(Debug)]
struct UnreadSequence {
    entry: StepEntry,
    /// Of the entry with its tokens.
    bytes: usize,
    finished: Option<(Finished, usize)>,
}

impl Outbox {
    /// An empty one, for at most so many unread bytes.
    pub(crate) fn new(bytes_max: usize) -> Arc<Self> {
        let state = Unread {
            bytes_max,
            bytes: 0,
            messages: VecDeque::new(),
            turns: VecDeque::new(),
            sequences: HashMap::new(),
            step: 0,
            end: None,
            reading: Reading::Goes,
            since: Duration::ZERO,
        };
        Arc::new(Outbox { state: Mutex::new(state), reader: AtomicWaker::new(), closed: Notify::new() })
    }

    /// Takes all news of one engine step in, at once, so that it is one message. After the stream's end they go
    /// nowhere.
    pub(crate) fn push(&self, step: u64, now: Duration, news: impl Iterator<Item = News>) -> Standing {
        let mut unread = self.lock();
        if unread.bytes == 0 {
            unread.since = now;
        }
        for news in news {
            if unread.end.is_none() {
                unread.take_in(step, news);
            }
        }
        let standing = if unread.reading == Reading::Over {
            Standing::Closed
        } else if unread.bytes > unread.bytes_max {
            let waited_ms = now.saturating_sub(unread.since).as_millis() as u64;
            let slow = Refusal::SlowConsumer { waiting_bytes: unread.bytes as u64, waited_ms };
            unread.discard();
            unread.end = Some(Err(status(&slow)));
            Standing::CutOff
        } else {
            Standing::Open
        };
        drop(unread);
        self.reader.wake();
        standing
    }

    /// Ends the stream after what is unread. The first end counts.
    pub(crate) fn end(&self, end: Result<(), Status>) {
        self.lock().end.get_or_insert(end);
        self.reader.wake();
    }

    /// Waits until nobody reads any more.
    ///
    /// *Cancel safety*: may be dropped and called again at any point.
    pub(crate) async fn closed(&self) {
        while self.lock().reading == Reading::Goes {
            self.closed.notified().await;
        }
    }

    fn close(&self) {
        let mut unread = self.lock();
        unread.reading = Reading::Over;
        unread.discard();
        drop(unread);
        self.closed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Unread> {
        // Nothing half done is ever left behind: at worst a message is missing from a stream that ends anyway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Unread {
    fn take_in(&mut self, step: u64, news: News) {
        let bytes = match news {
            News::Admitted(admitted) => {
                self.messages.push_back((Down::Admitted(admitted), MESSAGE_BYTES));
                MESSAGE_BYTES
            }
            News::Refused(refused) => {
                let bytes = MESSAGE_BYTES + refused.encoded_len();
                self.messages.push_back((Down::Refused(refused), bytes));
                bytes
            }
            News::Token { dispatch, index, position, token, logprobs } => {
                self.step = step;
                let sequence = self.sequence((dispatch, index));
                let entry = &mut sequence.entry;
                if entry.ids.is_empty() {
                    entry.first_index = position;
                    sequence.bytes += MESSAGE_BYTES;
                }
                entry.ids.push(token.id);
                if logprobs == AskedLogprobs::Yes {
                    let rows = entry.logprobs.get_or_insert_default();
                    rows.push(token.logprob, token.rank, &token.top);
                }
                let bytes = token_bytes(entry);
                sequence.bytes += bytes;
                bytes + if sequence.entry.ids.len() == 1 { MESSAGE_BYTES } else { 0 }
            }
            News::Finished(finished) => {
                let bytes = MESSAGE_BYTES + finished.encoded_len();
                let sequence = self.sequence((finished.dispatch, finished.index));
                sequence.finished = Some((finished, bytes));
                bytes
            }
        };
        self.bytes += bytes;
    }

    fn sequence(&mut self, key: SequenceKey) -> &mut UnreadSequence {
        self.sequences.entry(key).or_insert_with(|| {
            self.turns.push_back(key);
            let entry = StepEntry { dispatch: key.0, index: key.1, ..StepEntry::default() };
            UnreadSequence { entry, bytes: 0, finished: None }
        })
    }

    /// The next message, if there is one.
    fn next(&mut self) -> Option<Down> {
        if self.messages.is_empty() {
            self.write_step();
        }
        let (message, bytes) = self.messages.pop_front()?;
        self.bytes -= bytes;
        debug_assert!(self.bytes == 0 || !self.messages.is_empty() || !self.turns.is_empty());
        Some(message)
    }

    /// Turns unread tokens into one step's message, as many as it may hold, and those who ended into messages after
    /// it: a sequence's end follows its last token.
    fn write_step(&mut self) {
        let mut entries = Vec::new();
        let mut ended = Vec::new();
        let mut bytes = 0;
        while let Some(key) = self.turns.front()
            && let Some(sequence) = self.sequences.get_mut(key)
        {
            if bytes + sequence.bytes > STEP_BYTES_MAX {
                if entries.is_empty() {
                    let each = token_bytes(&sequence.entry);
                    let tokens = (STEP_BYTES_MAX - MESSAGE_BYTES) / each;
                    entries.push(split_front(&mut sequence.entry, tokens));
                    // What is left is an entry too.
                    bytes += tokens * each;
                    sequence.bytes -= bytes;
                }
                break;
            }
            let Some(UnreadSequence { entry, bytes: of_entry, finished }) = self.sequences.remove(key) else {
                break;
            };
            self.turns.pop_front();
            bytes += of_entry;
            ended.extend(finished.map(|(finished, bytes)| (Down::Finished(finished), bytes)));
            if !entry.ids.is_empty() {
                entries.push(entry);
            }
        }
        if !entries.is_empty() {
            let step = Step { step: self.step, entries, prompts: Vec::new() };
            self.messages.push_back((Down::Step(step), bytes));
        }
        self.messages.extend(ended);
    }

    fn discard(&mut self) {
        self.messages.clear();
        self.turns.clear();
        self.sequences.clear();
        self.bytes = 0;
    }
}

/// Bytes of a token and its logprobs: all tokens of an entry have as many.
fn token_bytes(entry: &StepEntry) -> usize {
    let row = |logprobs: &Logprobs| 8 + 8 * logprobs.top_count as usize;
    4 + entry.logprobs.as_ref().map_or(0, row)
}

/// Takes the first `tokens` of an entry away as an entry of their own.
fn split_front(entry: &mut StepEntry, tokens: usize) -> StepEntry {
    fn take<T>(column: &mut Vec<T>, front: usize) -> Vec<T> {
        let rest = column.split_off(front);
        std::mem::replace(column, rest)
    }
    let logprobs = entry.logprobs.as_mut().map(|rows| {
        let top = tokens * rows.top_count as usize;
        Logprobs {
            chosen: take(&mut rows.chosen, tokens),
            ranks: take(&mut rows.ranks, tokens),
            top_count: rows.top_count,
            top_ids: take(&mut rows.top_ids, top),
            top_logprobs: take(&mut rows.top_logprobs, top),
        }
    });
    let ids = take(&mut entry.ids, tokens);
    let StepEntry { dispatch, index, first_index, .. } = *entry;
    let front = StepEntry { dispatch, index, first_index, ids, logprobs };
    entry.first_index += tokens as u32;
    front
}

/// What a router reads: the greeting, what its outbox holds, and a heartbeat now and then. Dropped, it closes the
/// outbox.
pub(crate) struct Answers {
    hello: Option<Down>,
    outbox: Arc<Outbox>,
    beat: Interval,
    is_over: bool,
}

impl Answers {
    /// `hello` goes first.
    pub(crate) fn new(hello: Down, outbox: Arc<Outbox>, heartbeat: Duration) -> Self {
        let mut beat = interval_at(Instant::now() + heartbeat, heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Answers { hello: Some(hello), outbox, beat, is_over: false }
    }
}

impl Stream for Answers {
    type Item = Result<ExecuteResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let say = |message| Poll::Ready(Some(Ok(ExecuteResponse { message: Some(message) })));
        if let Some(hello) = self.hello.take() {
            return say(hello);
        }
        if self.beat.poll_tick(context).is_ready() {
            return say(Down::Heartbeat(Heartbeat {}));
        }
        // Before the look: what comes after it wakes us.
        self.outbox.reader.register(context.waker());
        let mut unread = self.outbox.lock();
        if let Some(message) = unread.next() {
            return say(message);
        }
        let end = unread.end.clone();
        drop(unread);
        if let Some(end) = end {
            self.is_over = true;
            return Poll::Ready(end.err().map(Err));
        }
        Poll::Pending
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.outbox.close();
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use petek_proto::refusal::WireRefusal;
    use petek_proto::worker::v1::FinishReason;

    use super::*;

    fn token(dispatch: u64, position: u32, logprobs: AskedLogprobs) -> News {
        let top = match logprobs {
            AskedLogprobs::No => Vec::new(),
            AskedLogprobs::Yes => (0..20).map(|i| (i, -(i as f32))).collect(),
        };
        let token = Drawn { id: position + 7, logprob: -1.0, rank: 1 + position, top, logits_hash: None };
        News::Token { dispatch, index: 0, position, token, logprobs }
    }

    fn finished(dispatch: u64) -> News {
        let reason = FinishReason::Length.into();
        News::Finished(Finished { dispatch, reason, ..Finished::default() })
    }

    fn push(outbox: &Outbox, step: u64, news: Vec<News>) -> Standing {
        outbox.push(step, Duration::from_millis(step), news.into_iter())
    }

    fn unread(outbox: &Outbox) -> Vec<Down> {
        std::iter::from_fn(|| outbox.lock().next()).collect()
    }

    /// What a reader of messages knows in the end: tokens in order, ends after them.
    fn tokens(messages: &[Down], dispatch: u64) -> Vec<u32> {
        let mut ids = Vec::new();
        for message in messages {
            let Down::Step(step) = message else { continue };
            for entry in step.entries.iter().filter(|entry| entry.dispatch == dispatch) {
                entry.check().unwrap();
                assert_eq!(entry.first_index as usize, ids.len(), "a token is lost or doubled");
                ids.extend(&entry.ids);
            }
        }
        ids
    }

    #[test]
    fn a_step_is_one_message_and_ends_follow_their_tokens() {
        let outbox = Outbox::new(1 << 20);
        let admitted = News::Admitted(Admitted { dispatch: 1, ..Admitted::default() });
        let no = AskedLogprobs::No;
        push(&outbox, 5, vec![admitted, token(1, 0, no), token(2, 9, no), finished(2), finished(3)]);
        let messages = unread(&outbox);
        let [Down::Admitted(_), Down::Step(step), Down::Finished(second), Down::Finished(third)] =
            &messages[..]
        else {
            panic!("{messages:?}");
        };
        assert_eq!((step.step, step.entries.len(), second.dispatch, third.dispatch), (5, 2, 2, 3));
        assert_eq!((step.entries[1].first_index, &step.entries[1].ids), (9, &vec![16]));
        assert!(unread(&outbox).is_empty());
        assert_eq!(outbox.lock().bytes, 0);
    }

    #[test]
    fn what_is_unread_merges() {
        let outbox = Outbox::new(1 << 20);
        for step in 0..100 {
            push(
                &outbox,
                step,
                vec![token(1, step as u32, AskedLogprobs::No), token(2, step as u32, AskedLogprobs::Yes)],
            );
        }
        push(&outbox, 100, vec![finished(1)]);
        let messages = unread(&outbox);
        assert_eq!(messages.len(), 2, "one step and an end");
        assert_eq!(tokens(&messages, 1), (7..107).collect::<Vec<_>>());
        assert_eq!(tokens(&messages, 2).len(), 100);
    }

    #[test]
    fn a_message_has_a_bound_and_splits_nothing_wrongly() {
        let outbox = Outbox::new(1 << 30);
        let count = 3 * STEP_BYTES_MAX / 172;
        for position in 0..count as u32 {
            push(&outbox, 1, vec![token(1, position, AskedLogprobs::Yes)]);
        }
        push(&outbox, 2, vec![token(2, 0, AskedLogprobs::No), finished(1)]);
        let messages = unread(&outbox);
        let sizes: Vec<usize> = messages
            .iter()
            .map(|message| ExecuteResponse { message: Some(message.clone()) }.encoded_len())
            .collect();
        assert!(sizes.iter().all(|size| *size < 2 * STEP_BYTES_MAX), "{sizes:?}");
        assert!(messages.len() >= 4, "{}", messages.len());
        assert_eq!(tokens(&messages, 1).len(), count);
        assert!(matches!(messages.last(), Some(Down::Finished(_))), "the end is the last word");
        let ranks = messages.iter().flat_map(|message| match message {
            Down::Step(step) => step.entries.iter().filter(|e| e.dispatch == 1).cloned().collect(),
            _ => Vec::new(),
        });
        let ranks: Vec<u32> = ranks.flat_map(|entry| entry.logprobs.unwrap().ranks).collect();
        assert_eq!(ranks, (1..=count as u32).collect::<Vec<_>>());
        assert_eq!(outbox.lock().bytes, 0);
    }

    #[tokio::test]
    async fn a_router_that_never_reads_is_cut_off_and_told_why() {
        let outbox = Outbox::new(1_000);
        let mut standing = Standing::Open;
        let mut pushed = 0;
        while standing == Standing::Open {
            standing = push(&outbox, pushed, vec![token(1, pushed as u32, AskedLogprobs::No)]);
            pushed += 1;
        }
        assert_eq!((standing, pushed), (Standing::CutOff, (1_000 - MESSAGE_BYTES as u64) / 4 + 1));
        push(&outbox, 9, vec![token(1, 1, AskedLogprobs::No)]);
        assert_eq!(outbox.lock().bytes, 0, "nothing is kept for it");
        let hello = Down::Heartbeat(Heartbeat {});
        let mut answers = Answers::new(hello, outbox, Duration::from_secs(3_600));
        assert!(answers.next().await.unwrap().is_ok());
        let end = answers.next().await.unwrap().unwrap_err();
        assert_eq!(WireRefusal::read(&end).unwrap().reason, "SLOW_CONSUMER");
        assert!(answers.next().await.is_none());
    }

    #[tokio::test]
    async fn a_reader_hears_what_comes_later_and_the_writer_that_it_left() {
        let outbox = Outbox::new(1_000);
        let mut answers =
            Answers::new(Down::Heartbeat(Heartbeat {}), outbox.clone(), Duration::from_secs(3_600));
        answers.next().await.unwrap().unwrap();
        // It waits first, and is woken.
        assert!(futures::poll!(answers.next()).is_pending());
        let (step, _) = tokio::join!(answers.next(), async {
            push(&outbox, 1, vec![token(1, 0, AskedLogprobs::No)]);
        });
        let step = step.unwrap().unwrap();
        assert!(matches!(step.message, Some(Down::Step(_))));
        outbox.end(Ok(()));
        outbox.end(Err(Status::internal("late")));
        assert!(answers.next().await.is_none());
        drop(answers);
        outbox.closed().await;
        assert_eq!(push(&outbox, 2, vec![finished(1)]), Standing::Closed);
    }
}
