//! The public service: each call is read, handed to the gateway, and answered.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt, stream};
use petek_core::limits::listener::MESSAGE_OUT_BYTES_MAX;
use petek_core::params::check_ids;
use petek_core::refusal::Refusal;
use petek_proto::inference::v1::generation_event::Kind;
use petek_proto::inference::v1::inference_service_server::InferenceService;
use petek_proto::inference::v1::{
    ChatRequest, ChatResponse, ChatSpec, Delta, DetokenizeRequest, DetokenizeResponse, GenerateRequest,
    GenerateResponse, Generation, GenerationEvent, GenerationSpec, GetModelRequest, GetModelResponse,
    ListModelsRequest, ListModelsResponse, Model, SamplingParams, StreamChatRequest, StreamChatResponse,
    StreamGenerateRequest, StreamGenerateResponse, TokenPiece, TokenizeRequest, TokenizeResponse,
};
use petek_proto::refusal::{WireRefusal, status};
use petek_proto::request::{ChatInput, GenerationInput, TokenizeInput};
use petek_text::{SpecialText, TokenTable};
use prost::Message;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::{Span, info_span};
use uuid::Uuid;

use super::intake::{Arrival, REQUEST_ID_HEADER};
use crate::gateway::{Call, Gateway, Input, Reader, Reading, unix_s};
use crate::prepare;
use crate::relay::Outgoing;
use crate::workers::Served;

/// See the head of this file.
pub(super) struct Inference {
    pub(super) gateway: Arc<Gateway>,
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl InferenceService for Inference {
    type StreamGenerateStream = Events<StreamGenerateResponse>;
    type StreamChatStream = Events<StreamChatResponse>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        let (metadata, arrival, request) = taken_in(request)?;
        let begun = self.begin(generation(request.spec), Reading::Whole, &metadata, arrival).await?;
        whole(begun, |generation| GenerateResponse { generation: Some(generation) }).await
    }

    async fn stream_generate(
        &self,
        request: Request<StreamGenerateRequest>,
    ) -> Result<Response<Self::StreamGenerateStream>, Status> {
        let (metadata, arrival, request) = taken_in(request)?;
        let begun = self.begin(generation(request.spec), Reading::Streamed, &metadata, arrival).await?;
        Ok(streamed(begun, |event| StreamGenerateResponse { event: Some(event) }))
    }

    async fn chat(&self, request: Request<ChatRequest>) -> Result<Response<ChatResponse>, Status> {
        let (metadata, arrival, request) = taken_in(request)?;
        let begun = self.begin(chat(request.spec), Reading::Whole, &metadata, arrival).await?;
        whole(begun, |generation| ChatResponse { generation: Some(generation) }).await
    }

    async fn stream_chat(
        &self,
        request: Request<StreamChatRequest>,
    ) -> Result<Response<Self::StreamChatStream>, Status> {
        let (metadata, arrival, request) = taken_in(request)?;
        let begun = self.begin(chat(request.spec), Reading::Streamed, &metadata, arrival).await?;
        Ok(streamed(begun, |event| StreamChatResponse { event: Some(event) }))
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        let (_, arrival, request) = taken_in(request)?;
        let (model, include_pieces) = (request.model.clone(), request.include_pieces);
        let input = TokenizeInput::try_from(request).map_err(|refusal| status(&refusal))?;
        let served = self.gateway.workers.resolve(&model).map_err(|refusal| status(&refusal))?;
        let context_tokens = served.limits.context_tokens;
        let answer = move || {
            let text = &served.model.text;
            let (rendered, token_ids) = match input {
                TokenizeInput::Text(prompt, special) => {
                    let prompt = petek_proto::request::Prompt::Text(prompt, special);
                    (String::new(), prepare::prompt_ids(text, prompt)?)
                }
                TokenizeInput::Chat(chat) => {
                    let rendered = prepare::chat_ids(text, &chat, unix_s());
                    rendered.map_err(|refusal| refusal.within("chat"))?
                }
            };
            let pieced = token_ids.iter().filter(|_| include_pieces);
            let pieces = pieced.map(|id| piece(text.tokenizer.tokens(), *id)).collect();
            Ok(TokenizeResponse { token_ids, pieces, rendered, context_tokens })
        };
        let answer = self.gateway.text.run(arrival.deadline, answer).await;
        small_enough(answer.map_err(|refusal| status(&refusal))?)
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        let (_, arrival, request) = taken_in(request)?;
        let DetokenizeRequest { model, token_ids, skip_special_tokens, continuation } = request;
        let served = self.gateway.workers.resolve(&model).map_err(|refusal| status(&refusal))?;
        check_ids("token_ids", &token_ids, &served.limits).map_err(|refusal| status(&refusal))?;
        let special = match skip_special_tokens {
            None | Some(true) => SpecialText::Skipped,
            Some(false) => SpecialText::Kept,
        };
        let answer = move || {
            let tokenizer = &served.model.text.tokenizer;
            let text = if continuation {
                tokenizer.tokens().decode(&token_ids, special)
            } else {
                tokenizer.decode_whole(&token_ids, special)
            };
            Ok(DetokenizeResponse { text })
        };
        let answer = self.gateway.text.run(arrival.deadline, answer).await;
        small_enough(answer.map_err(|refusal| status(&refusal))?)
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let models = self.gateway.workers.served().iter().map(model).collect();
        small_enough(ListModelsResponse { models })
    }

    async fn get_model(
        &self,
        request: Request<GetModelRequest>,
    ) -> Result<Response<GetModelResponse>, Status> {
        let asked = request.into_inner().model;
        let served = self.gateway.workers.resolve(&asked).map_err(|refusal| status(&refusal))?;
        small_enough(GetModelResponse { model: Some(model(&served)) })
    }
}

impl Inference {
    async fn begin(
        &self,
        input: Result<Input, Refusal>,
        reading: Reading,
        metadata: &MetadataMap,
        arrival: Arrival,
    ) -> Result<Begun, Status> {
        let id = RequestId(Uuid::now_v7());
        let span = request_span(id.0, metadata);
        let Arrival { at: arrived, deadline, client_request_id } = arrival;
        let call = Call { request_id: id.0, arrived, deadline, client_request_id, reading, span };
        match self.gateway.begin(input, call).await {
            Ok(reader) => Ok(Begun { id, reader }),
            Err(refusal) => Err(id.failed(WireRefusal::from(&refusal))),
        }
    }
}

/// A request that runs.
struct Begun {
    id: RequestId,
    reader: Reader,
}

/// petek's own id of a request, which every answer carries: with it the log knows the request.
#[derive(Clone, Copy)]
struct RequestId(Uuid);

impl RequestId {
    fn on<T>(self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        self.put(response.metadata_mut());
        response
    }

    /// What ends the call. Fields get their paths in the message here, also those that a worker named.
    fn failed(self, refusal: WireRefusal) -> Status {
        let mut status = Status::from(refusal.placed("spec"));
        self.put(status.metadata_mut());
        status
    }

    fn put(self, metadata: &mut MetadataMap) {
        if let Ok(value) = self.0.to_string().parse() {
            metadata.insert(REQUEST_ID_HEADER, value);
        }
    }
}

/// One span per request, a child of the client's where it names one.
fn request_span(request_id: Uuid, metadata: &MetadataMap) -> Span {
    use tracing::field::Empty;
    let span = info_span!("request", %request_id, client_request_id = Empty, model = Empty);
    petek_service::extract(metadata.as_ref(), &span);
    span
}

/// What the intake found out, and the message.
pub(super) fn taken_in<T>(request: Request<T>) -> Result<(MetadataMap, Arrival, T), Status> {
    let (metadata, mut extensions, message) = request.into_parts();
    // Every service stands behind the intake.
    let arrival = extensions.remove::<Arrival>().ok_or_else(|| status(&Refusal::Internal))?;
    Ok((metadata, arrival, message))
}

pub(super) fn generation(spec: Option<GenerationSpec>) -> Result<Input, Refusal> {
    GenerationInput::try_from(spec.unwrap_or_default()).map(|input| Input::Generation(Box::new(input)))
}

pub(super) fn chat(spec: Option<ChatSpec>) -> Result<Input, Refusal> {
    ChatInput::try_from(spec.unwrap_or_default()).map(|input| Input::Chat(Box::new(input)))
}

/// A request's events as a stream, which ends with the last of them.
fn streamed<T: 'static>(begun: Begun, wrap: fn(GenerationEvent) -> T) -> Response<Events<T>> {
    let Begun { id, reader } = begun;
    let events = stream::unfold(Some(reader), move |reader| async move {
        let reader = reader?;
        let event = |kind| Ok(wrap(GenerationEvent { kind: Some(kind) }));
        Some(match reader.next().await {
            Outgoing::Started(started) => (event(Kind::Started(started)), Some(reader)),
            Outgoing::Delta(delta) => (event(Kind::Delta(delta)), Some(reader)),
            Outgoing::Finished(finished) => (event(Kind::Finished(finished)), None),
            Outgoing::Failed(refusal) => (Err(id.failed(refusal)), None),
        })
    });
    id.on(events.boxed())
}

/// A request's events joined.
async fn whole<T: Message>(begun: Begun, wrap: fn(Generation) -> T) -> Result<Response<T>, Status> {
    let Begun { id, reader } = begun;
    let mut generation = Generation::default();
    let mut bytes = 0;
    let finished = loop {
        match reader.next().await {
            Outgoing::Started(started) => generation.started = Some(started),
            Outgoing::Delta(delta) => {
                bytes += delta.encoded_len();
                if bytes > MESSAGE_OUT_BYTES_MAX {
                    // Without waiting for the rest, which could only make it larger.
                    return Err(id.failed(too_large(bytes)));
                }
                join(&mut generation.sequences, delta);
            }
            Outgoing::Failed(refusal) => return Err(id.failed(refusal)),
            Outgoing::Finished(finished) => break finished,
        }
    };
    generation.sequences.sort_by_key(|sequence| sequence.index);
    for ended in &finished.sequences {
        // One that never had a token is there too.
        if let Err(at) = generation.sequences.binary_search_by_key(&ended.index, |s| s.index) {
            generation.sequences.insert(at, Delta { index: ended.index, ..Delta::default() });
        }
    }
    generation.finished = Some(finished);
    let answer = wrap(generation);
    match answer.encoded_len() {
        bytes if bytes > MESSAGE_OUT_BYTES_MAX => Err(id.failed(too_large(bytes))),
        _ => Ok(id.on(answer)),
    }
}

fn join(sequences: &mut Vec<Delta>, delta: Delta) {
    let Some(joined) = sequences.iter_mut().find(|joined| joined.index == delta.index) else {
        return sequences.push(delta);
    };
    joined.text.push_str(&delta.text);
    joined.token_ids.extend(delta.token_ids);
    joined.logprobs.extend(delta.logprobs);
}

/// The transport refuses to send more, and says less about it.
pub(super) fn small_enough<T: Message>(message: T) -> Result<Response<T>, Status> {
    match message.encoded_len() {
        bytes if bytes > MESSAGE_OUT_BYTES_MAX => Err(too_large(bytes).into()),
        _ => Ok(Response::new(message)),
    }
}

fn too_large(bytes: usize) -> WireRefusal {
    let limit_bytes = MESSAGE_OUT_BYTES_MAX as u64;
    WireRefusal::from(&Refusal::MessageTooLarge { bytes: bytes as u64, limit_bytes })
}

fn piece(tokens: &TokenTable, id: u32) -> TokenPiece {
    TokenPiece { token_id: id, raw: tokens.bytes(id).to_vec().into(), text: tokens.text(id) }
}

fn model(served: &Served) -> Model {
    let Served { pool, model, aliases, limits } = served;
    Model {
        name: pool.name.clone(),
        aliases: aliases.clone(),
        revision: pool.revision.to_string(),
        text_hash: pool.text_hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        context_tokens: limits.context_tokens,
        vocabulary_tokens: limits.vocabulary,
        eos_token_ids: limits.eos_ids.to_vec(),
        has_chat_template: model.text.template.is_some(),
        defaults: Some(SamplingParams::from(&model.defaults)),
        adapters: Vec::new(),
        workers_serving: pool.serving(),
        block_size_tokens: pool.block_size,
    }
}
