//! The public API as a client of it sees it: requests in short, and answers read to their end.

use petek_proto::inference::v1::generation_event::Kind;
use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::inference::v1::sequence_finish::Matched;
use petek_proto::inference::v1::{
    FinishReason, Finished, GenerateRequest, GenerationSpec, RequestOptions, SamplingParams, Started,
    StreamGenerateRequest, StreamGenerateResponse, TokenIds, TokenLogprob, generation_spec,
};
use petek_proto::refusal::WireRefusal;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::process::Up;

/// A client; its clones share the connection.
#[derive(Clone)]
pub(crate) struct Client(pub(crate) InferenceServiceClient<Channel>);

/// An answer, streamed or not.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) started: Option<Started>,
    /// By index.
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) finished: Option<Finished>,
    /// How it ended, where it did not finish.
    pub(crate) refusal: Option<WireRefusal>,
}

/// What came of one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Sequence {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    /// The place of the first id in the output.
    pub(crate) first_index: Option<u32>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    /// The text and the number of ids of each delta; one of a unary answer.
    pub(crate) deltas: Vec<(String, usize)>,
}

/// Greedy, and of that many tokens at most.
pub(crate) fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: Some(0.0), max_tokens: Some(max_tokens), ..SamplingParams::default() }
}

/// A request that continues these ids.
pub(crate) fn spec(ids: &[u32], params: SamplingParams) -> GenerationSpec {
    GenerationSpec {
        prompt: Some(generation_spec::Prompt::TokenIds(TokenIds { ids: ids.into() })),
        params: Some(params),
        ..GenerationSpec::default()
    }
}

/// A request that continues a text.
pub(crate) fn text_spec(text: &str, params: SamplingParams) -> GenerationSpec {
    GenerationSpec { prompt: Some(generation_spec::Prompt::Text(text.into())), ..spec(&[], params) }
}

/// The request, served so.
pub(crate) fn with(options: RequestOptions, spec: GenerationSpec) -> GenerationSpec {
    GenerationSpec { options: Some(options), ..spec }
}

impl Client {
    pub(crate) async fn of(up: &Up) -> Client {
        let endpoint = Channel::from_shared(format!("http://{}", up.public)).expect("an address");
        Client(InferenceServiceClient::new(endpoint.connect().await.expect("it listens")))
    }

    /// Opens a stream.
    pub(crate) async fn open(
        &self,
        spec: GenerationSpec,
    ) -> Result<Streaming<StreamGenerateResponse>, Status> {
        let request = StreamGenerateRequest { spec: Some(spec) };
        Ok(self.0.clone().stream_generate(request).await?.into_inner())
    }

    /// Reads a stream to its end.
    pub(crate) async fn stream(&self, spec: GenerationSpec) -> Answer {
        let mut answer = Answer::default();
        match self.open(spec).await {
            Ok(mut events) => while answer.take(&mut events).await {},
            Err(status) => answer.refusal = Some(refusal(&status)),
        }
        answer
    }

    /// Asks for the whole answer at once.
    pub(crate) async fn unary(&self, spec: GenerationSpec) -> Answer {
        let mut answer = Answer::default();
        match self.0.clone().generate(GenerateRequest { spec: Some(spec) }).await {
            Ok(response) => {
                let generation = response.into_inner().generation.expect("a generation");
                answer.started = generation.started;
                answer.finished = generation.finished;
                answer.sequences = generation
                    .sequences
                    .into_iter()
                    .map(|whole| Sequence {
                        deltas: vec![(whole.text.clone(), whole.token_ids.len())],
                        text: whole.text,
                        ids: whole.token_ids,
                        first_index: Some(whole.first_index),
                        logprobs: whole.logprobs,
                    })
                    .collect();
            }
            Err(status) => answer.refusal = Some(refusal(&status)),
        }
        answer
    }

    /// Asks both ways and checks that the same comes of it; the streamed answer is returned.
    pub(crate) async fn both(&self, spec: GenerationSpec) -> Answer {
        let streamed = self.stream(spec.clone()).await;
        let whole = self.unary(spec).await;
        let said = |answer: &Answer| -> Vec<_> {
            let sequences = answer.sequences.iter();
            sequences.map(|one| (one.text.clone(), one.ids.clone(), one.logprobs.clone())).collect()
        };
        assert_eq!(said(&streamed), said(&whole));
        if streamed.finished.is_some() {
            assert_eq!(ends(&streamed), ends(&whole));
        } else {
            assert_eq!(streamed.refusal, whole.refusal);
        }
        streamed
    }
}

/// How each sequence ended.
pub(crate) fn ends(answer: &Answer) -> Vec<(FinishReason, Option<Matched>, u32)> {
    let ends = answer.finished().sequences.iter();
    ends.map(|end| (end.reason(), end.matched.clone(), end.usage.expect("usage").completion_tokens)).collect()
}

impl Answer {
    /// Takes the next event of a stream; false at its end.
    pub(crate) async fn take(&mut self, events: &mut Streaming<StreamGenerateResponse>) -> bool {
        let event = match events.message().await {
            Ok(Some(response)) => response.event.and_then(|event| event.kind).expect("an event is of a kind"),
            Ok(None) => {
                assert!(self.finished.is_some(), "a stream is never cut without a word");
                return false;
            }
            Err(status) => {
                self.refusal = Some(refusal(&status));
                return false;
            }
        };
        assert!(self.finished.is_none(), "nothing comes after the end");
        match event {
            Kind::Started(started) => {
                assert!(self.started.is_none() && self.sequences.is_empty(), "started comes first and once");
                self.started = Some(started);
            }
            Kind::Delta(delta) => {
                let started = self.started.as_ref().expect("started comes first");
                assert!(!started.worker.is_empty());
                let index = delta.index as usize;
                self.sequences.resize_with(self.sequences.len().max(index + 1), Default::default);
                let sequence = &mut self.sequences[index];
                let first_index =
                    sequence.ids.len() as u32 + *sequence.first_index.get_or_insert(delta.first_index);
                assert!(
                    delta.token_ids.is_empty() || delta.first_index == first_index,
                    "in order: {delta:?}"
                );
                sequence.text.push_str(&delta.text);
                sequence.deltas.push((delta.text, delta.token_ids.len()));
                sequence.ids.extend(delta.token_ids);
                sequence.logprobs.extend(delta.logprobs);
            }
            Kind::Finished(finished) => self.finished = Some(finished),
        }
        true
    }

    /// Reads on until there are so many tokens of the first sequence.
    pub(crate) async fn tokens(&mut self, events: &mut Streaming<StreamGenerateResponse>, count: usize) {
        while self.sequences.first().is_none_or(|first| first.ids.len() < count) {
            assert!(self.take(events).await, "it ended early: {self:?}");
        }
    }

    #[track_caller]
    pub(crate) fn finished(&self) -> &Finished {
        self.finished.as_ref().unwrap_or_else(|| panic!("it did not finish: {:?}", self.refusal))
    }

    /// The text of the first sequence.
    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        self.finished();
        self.sequences.first().map_or("", |first| &first.text)
    }

    /// Its ids.
    #[track_caller]
    pub(crate) fn ids(&self) -> &[u32] {
        self.finished();
        self.sequences.first().map_or(&[], |first| &first.ids)
    }

    /// Why it ended.
    #[track_caller]
    pub(crate) fn reason(&self) -> FinishReason {
        self.finished().sequences[0].reason()
    }

    #[track_caller]
    pub(crate) fn refusal(&self) -> &WireRefusal {
        self.refusal.as_ref().unwrap_or_else(|| panic!("it was not refused: {:?}", self.finished))
    }

    /// Prompt, cached and completion tokens.
    #[track_caller]
    pub(crate) fn usage(&self) -> (u32, u32, u32) {
        let usage = self.finished().usage.expect("usage");
        (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    }
}

/// What a status says; every one of ours has details.
pub(crate) fn refusal(status: &Status) -> WireRefusal {
    WireRefusal::read(status).unwrap_or_else(|| panic!("an error without details: {status:?}"))
}

/// Waits until it is so; the test's own limit ends what never becomes so.
pub(crate) async fn until(is_so: impl Fn() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    let patience = std::time::Duration::from_secs(60);
    tokio::time::timeout(patience, wait).await.expect("it becomes so within a minute");
}
