//! A client of a router: what it asks, and all that it gets.

use std::sync::{Arc, Mutex};

use petek_proto::inference::v1::generation_event::Kind;
use petek_proto::inference::v1::generation_spec::Prompt;
use petek_proto::inference::v1::inference_service_client::InferenceServiceClient;
use petek_proto::inference::v1::{
    Finished, GenerationSpec, RequestOptions, SamplingParams, Started, StreamGenerateRequest,
    StreamGenerateResponse, TokenLogprob,
};
use petek_proto::refusal::WireRefusal;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use crate::stage::{Process, soon, until};

/// Cheap to clone; one connection.
pub(crate) type Client = InferenceServiceClient<Channel>;

pub(crate) async fn client(router: &Process) -> Client {
    InferenceServiceClient::new(router.channel("public").await)
}

/// A prompt whose answer is a matter of chance, and so of the seed: every bit of the model shows in it.
pub(crate) fn spec(prompt: &str, seed: u64, max_tokens: u32) -> GenerationSpec {
    GenerationSpec {
        prompt: Some(Prompt::Text(prompt.into())),
        params: Some(SamplingParams {
            temperature: Some(1.5),
            seed: Some(seed),
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            logprobs: Some(2),
            ..SamplingParams::default()
        }),
        ..GenerationSpec::default()
    }
}

/// The same request, going on after these tokens.
pub(crate) fn resumed(spec: &GenerationSpec, resumed_ids: &[u32]) -> GenerationSpec {
    let options = spec.options.clone().unwrap_or_default();
    let options = RequestOptions { resumed_ids: resumed_ids.into(), ..options };
    GenerationSpec { options: Some(options), ..spec.clone() }
}

/// What a client has of an answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    pub(crate) started: Option<Started>,
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    /// How it ended.
    pub(crate) end: Option<Result<Finished, Status>>,
}

/// What must not depend on anything but the request.
pub(crate) type Bytes = (String, Vec<u32>, Vec<TokenLogprob>);

impl Answer {
    pub(crate) fn worker(&self) -> &str {
        self.started.as_ref().map_or("", |started| &started.worker)
    }

    /// Of an answer that is whole.
    #[track_caller]
    pub(crate) fn bytes(self) -> Bytes {
        match self.end {
            Some(Ok(_)) => (self.text, self.ids, self.logprobs),
            end => panic!("the answer of {:?} ends with {end:?}", self.started),
        }
    }

    /// Of an answer that was broken off by petek.
    #[track_caller]
    pub(crate) fn refusal(&self) -> WireRefusal {
        match &self.end {
            Some(Err(status)) => {
                WireRefusal::read(status).unwrap_or_else(|| panic!("no refusal of petek's: {status:?}"))
            }
            end => panic!("the answer of {:?} ends with {end:?}", self.started),
        }
    }

    fn take(&mut self, message: Result<Option<StreamGenerateResponse>, Status>) {
        let kind = match message {
            Err(status) => return self.end = Some(Err(status)),
            Ok(None) => panic!("a stream ended without its end: {self:?}"),
            Ok(Some(message)) => message.event.and_then(|event| event.kind).expect("an event of a kind"),
        };
        match kind {
            Kind::Started(started) => self.started = Some(started),
            Kind::Delta(delta) => {
                self.text += &delta.text;
                self.ids.extend(delta.token_ids);
                self.logprobs.extend(delta.logprobs);
            }
            Kind::Finished(finished) => self.end = Some(Ok(finished)),
        }
    }
}

/// An answer that comes while the test does something else.
pub(crate) struct Running {
    pub(crate) spec: GenerationSpec,
    answer: Arc<Mutex<Answer>>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    /// Asks, and reads whatever comes.
    pub(crate) fn start(client: &Client, spec: GenerationSpec) -> Self {
        let answer = Arc::new(Mutex::new(Answer::default()));
        let (mut client, into, asked) = (client.clone(), answer.clone(), spec.clone());
        let task = tokio::spawn(async move {
            let take = |message| {
                let mut answer = into.lock().expect("nobody panics with it in hand");
                answer.take(message);
                answer.end.is_some()
            };
            let request = Request::new(StreamGenerateRequest { spec: Some(asked) });
            let mut stream = match client.stream_generate(request).await {
                Ok(stream) => stream.into_inner(),
                Err(status) => {
                    take(Err(status));
                    return;
                }
            };
            while !take(stream.message().await) {}
        });
        Running { spec, answer, task }
    }

    /// What there is by now.
    pub(crate) fn so_far(&self) -> Answer {
        self.answer.lock().expect("nobody panics with it in hand").clone()
    }

    /// Waits until it has begun to come.
    pub(crate) async fn begun(&self) -> Answer {
        until("the first tokens of an answer", async || {
            let answer = self.so_far();
            !answer.ids.is_empty() || answer.end.is_some()
        })
        .await;
        self.so_far()
    }

    /// Waits for its end, whichever.
    pub(crate) async fn ended(self) -> Answer {
        soon("the end of an answer", self.task).await.expect("its task does not panic");
        Arc::into_inner(self.answer).and_then(|answer| answer.into_inner().ok()).expect("nobody else has it")
    }
}

/// Asks and waits for the whole answer.
pub(crate) async fn ask(client: &Client, spec: GenerationSpec) -> Answer {
    Running::start(client, spec).ended().await
}

/// Reads a stream from where it is to its end.
pub(crate) async fn read(stream: &mut Streaming<StreamGenerateResponse>) -> Answer {
    let mut answer = Answer::default();
    while answer.end.is_none() {
        answer.take(soon("the next event of a stream", stream.message()).await);
    }
    answer
}

/// Long answers in the making, at least so many on each of these workers. They come in bursts, each larger than the one
/// before, and their prompts take time: a worker that is asked for one thing after the other, and is the faster one by
/// a hair, would get them all.
pub(crate) async fn load(client: &Client, workers: &[&str], each: usize, max_tokens: u32) -> Vec<Running> {
    let tale = "the old king of the bees lost his golden crown in the forest. ".repeat(12);
    let mut running: Vec<Running> = Vec::new();
    let mut on = Vec::<String>::new();
    let mut burst = 2 * each * workers.len();
    while workers.iter().any(|id| on.iter().filter(|worker| worker == id).count() < each) {
        assert!(running.len() < 200, "the load does not spread: {on:?}");
        let from = running.len();
        let numbers = from as u64..(from + burst) as u64;
        let asked = numbers.map(|n| spec(&format!("{n}. Once {tale}"), 1_000 + n, max_tokens));
        running.extend(asked.map(|asked| Running::start(client, asked)));
        for one in &running[from..] {
            on.push(one.begun().await.worker().into());
        }
        burst *= 2;
    }
    running
}
