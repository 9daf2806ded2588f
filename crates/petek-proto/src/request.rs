//! What a client asks, from the wire to core's raw parameters: unset stays unset, what this version does not
//! have is refused by name, and every field is taken apart by name, so that a new one cannot be forgotten.
//!
//! Refusals made here and by core's checks name a field as a client of any protocol knows it (`stop[3]`);
//! [`WireRefusal::placed`] turns that into the path inside a gRPC request (`spec.params.stop[3]`).

use std::collections::BTreeMap;

use petek_core::ids::TokenId;
use petek_core::limits::{call, text};
use petek_core::params::{RawParams, SamplingDefaults};
use petek_core::refusal::{Refusal, quoted};

use crate::inference::v1::{
    ChatMessage, ChatSpec, GenerationSpec, RequestOptions, SamplingParams, TemplateValue, TokenizeRequest,
    ToolChoice, ToolMode, generation_spec, template_value, tokenize_request, tool_choice,
};
use crate::refusal::WireRefusal;

/// Who may speak. No other word: a template may write a role between the marks of a special token.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationInput {
    /// A name or alias; empty is the one model that is served.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// Still to be checked against the model.
    pub params: RawParams,
    /// How the request is served.
    pub head: RequestHead,
}

/// What to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// To be tokenised.
    Text(String, SpecialStrings),
    /// Taken as they are.
    Ids(Vec<TokenId>),
}

/// What strings of special tokens in a text become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialStrings {
    /// Those tokens.
    Parsed,
    /// Text like any other.
    Plain,
}

/// A conversation to answer.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatInput {
    /// A name or alias; empty is the one model that is served.
    pub model: String,
    /// At least one, each with a known role. All their fields are the template's.
    pub messages: Vec<ChatMessage>,
    /// For the template: few, each with a value, numbers finite. Names that the template's own input has are
    /// for the renderer to refuse.
    pub template_kwargs: BTreeMap<String, template_value::Value>,
    /// Whether the template opens the assistant's turn.
    pub turn: AssistantTurn,
    /// Still to be checked against the model.
    pub params: RawParams,
    /// How the request is served.
    pub head: RequestHead,
}

/// Whether a template opens the assistant's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AssistantTurn {
    /// It does.
    Opened,
    /// It ends with the last message.
    LeftOut,
}

/// What to tokenise.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizeInput {
    /// A plain text.
    Text(String, SpecialStrings),
    /// A conversation; its model is the request's.
    Chat(Box<ChatInput>),
}

/// How a request is served, as far as that is not in its parameters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestHead {
    /// The client's own name of it: of `[A-Za-z0-9._-]`, short.
    pub client_request_id: Option<String>,
    /// What the client will wait, at most; the transport's own deadline may be earlier.
    pub deadline_ms: Option<u64>,
}

impl TryFrom<GenerationSpec> for GenerationInput {
    type Error = Refusal;

    /// # Errors
    /// A refusal of a missing or too long prompt, and as [`ChatInput`]'s.
    fn try_from(spec: GenerationSpec) -> Result<Self, Refusal> {
        let GenerationSpec { model, parse_special, echo, params, options, prompt } = spec;
        let (mut params, head) = raw(params, options)?;
        params.echo = Some(echo);
        let prompt = match prompt {
            None => return Err(Refusal::invalid("prompt", "must be set: text or token_ids")),
            Some(generation_spec::Prompt::Text(text)) => {
                check_text(&text)?;
                Prompt::Text(text, special_strings(parse_special))
            }
            Some(generation_spec::Prompt::TokenIds(_)) if parse_special.is_some() => {
                return Err(Refusal::invalid("parse_special", "says nothing of token_ids; leave it out"));
            }
            Some(generation_spec::Prompt::TokenIds(list)) => Prompt::Ids(list.ids),
        };
        Ok(GenerationInput { model, prompt, params, head })
    }
}

impl TryFrom<ChatSpec> for ChatInput {
    type Error = Refusal;

    /// # Errors
    /// A refusal that names the first field that is wrong or not had by this version. The sampling
    /// parameters' values are checked later, against the model.
    fn try_from(spec: ChatSpec) -> Result<Self, Refusal> {
        let ChatSpec {
            model,
            messages,
            tools,
            tool_choice,
            parallel_tool_calls,
            template_kwargs,
            add_generation_prompt,
            continue_final_message,
            separate_reasoning,
            params,
            options,
        } = spec;
        check_tool_choice(tool_choice)?;
        let not_built = [
            ("tools", !tools.is_empty()),
            ("parallel_tool_calls", parallel_tool_calls == Some(false)),
            ("continue_final_message", continue_final_message),
            ("separate_reasoning", separate_reasoning),
        ];
        if let Some((field, _)) = not_built.into_iter().find(|(_, asked)| *asked) {
            return Err(Refusal::unsupported(field));
        }
        if messages.is_empty() {
            return Err(Refusal::invalid("messages", "must have at least one message"));
        }
        let unknown = |message: &ChatMessage| !ROLES.contains(&&*message.role);
        if let Some(at) = messages.iter().position(unknown) {
            let role = quoted(&messages[at].role);
            let problem = format!("must be one of {}, not {role}", ROLES.join(", "));
            return Err(Refusal::invalid(format!("messages[{at}].role"), problem));
        }
        let (params, head) = raw(params, options)?;
        let turn = match add_generation_prompt {
            None | Some(true) => AssistantTurn::Opened,
            Some(false) => AssistantTurn::LeftOut,
        };
        let template_kwargs = checked_kwargs(template_kwargs)?;
        Ok(ChatInput { model, messages, template_kwargs, turn, params, head })
    }
}

impl TryFrom<TokenizeRequest> for TokenizeInput {
    type Error = Refusal;

    /// # Errors
    /// A refusal whose path is that inside a TokenizeRequest.
    fn try_from(request: TokenizeRequest) -> Result<Self, Refusal> {
        let TokenizeRequest { model, parse_special, include_pieces: _, input } = request;
        match input {
            None => Err(Refusal::invalid("input", "must be set: text or chat")),
            Some(tokenize_request::Input::Text(text)) => {
                check_text(&text)?;
                Ok(TokenizeInput::Text(text, special_strings(parse_special)))
            }
            Some(tokenize_request::Input::Chat(_)) if parse_special.is_some() => {
                Err(Refusal::invalid("parse_special", "says nothing of a chat; leave it out"))
            }
            Some(tokenize_request::Input::Chat(chat)) => {
                let set = [
                    ("model", !chat.model.is_empty()),
                    ("params", chat.params.is_some()),
                    ("options", chat.options.is_some()),
                ];
                if let Some((field, _)) = set.into_iter().find(|(_, set)| *set) {
                    let problem = "has no effect on token ids here; leave it out";
                    return Err(Refusal::invalid(field, problem).within("chat"));
                }
                let chat = ChatInput::try_from(chat).map_err(|refusal| refusal.within("chat"))?;
                Ok(TokenizeInput::Chat(Box::new(ChatInput { model, ..chat })))
            }
        }
    }
}

/// What a model's requests get where they say nothing: for GetModel.
impl From<&SamplingDefaults> for SamplingParams {
    fn from(defaults: &SamplingDefaults) -> Self {
        SamplingParams {
            temperature: Some(defaults.temperature),
            top_p: Some(defaults.top_p),
            // More than i32 can say keeps every token of any vocabulary, as i32's largest does.
            top_k: Some(defaults.top_k.map_or(0, |k| i32::try_from(k.get()).unwrap_or(i32::MAX))),
            min_p: Some(defaults.min_p),
            typical_p: Some(1.0),
            repetition_penalty: Some(1.0),
            frequency_penalty: Some(0.0),
            presence_penalty: Some(0.0),
            n: Some(1),
            min_tokens: Some(0),
            skip_special_tokens: Some(true),
            ..SamplingParams::default()
        }
    }
}

/// The request's fields of [`RequestOptions`].
const OPTIONS: &[&str] = &[
    "client_request_id",
    "priority",
    "deadline_ms",
    "cache_salt",
    "bypass_prefix_cache",
    "adapter",
    "resumed_ids",
];

/// The request's fields that stand beside params and options.
const BESIDE: &[&str] = &[
    "model",
    "prompt",
    "text",
    "parse_special",
    "echo",
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "separate_reasoning",
];

impl WireRefusal {
    /// The refusal with its field's path inside a gRPC request whose GenerationSpec or ChatSpec is the field
    /// `spec`.
    pub fn placed(mut self, spec: &str) -> Self {
        if let Some(field) = &mut self.field {
            field.path = spec_path(spec, &field.path);
        }
        self
    }
}

fn spec_path(spec: &str, field: &str) -> String {
    let head = field.split(['.', '[']).next().unwrap_or_default();
    if let Some(rest) = field.strip_prefix("prompt_ids") {
        return format!("{spec}.token_ids.ids{rest}");
    }
    if OPTIONS.contains(&head) {
        format!("{spec}.options.{field}")
    } else if BESIDE.contains(&head) {
        format!("{spec}.{field}")
    } else {
        format!("{spec}.params.{field}")
    }
}

fn raw(
    params: Option<SamplingParams>,
    options: Option<RequestOptions>,
) -> Result<(RawParams, RequestHead), Refusal> {
    let SamplingParams {
        temperature,
        top_p,
        top_k,
        min_p,
        typical_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        logit_bias,
        allowed_token_ids,
        banned_token_ids,
        bad_words,
        seed,
        n,
        stop,
        include_stop,
        stop_token_ids,
        ignore_eos,
        min_tokens,
        max_tokens,
        logprobs,
        prompt_logprobs,
        skip_special_tokens,
        grammar,
    } = params.unwrap_or_default();
    let RequestOptions {
        client_request_id,
        priority,
        deadline_ms,
        cache_salt,
        bypass_prefix_cache,
        adapter,
        resumed_ids,
    } = options.unwrap_or_default();

    let unsupported = [("grammar", grammar.is_some()), ("adapter", !adapter.is_empty())];
    let raw = RawParams {
        temperature,
        top_p,
        top_k: top_k.map(i64::from),
        min_p,
        typical_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        logit_bias: logit_bias.into_iter().collect(),
        allowed_token_ids,
        banned_token_ids,
        bad_words,
        seed,
        n: n.map(i64::from),
        best_of: None,
        stop,
        include_stop: Some(include_stop),
        stop_token_ids,
        ignore_eos: Some(ignore_eos),
        min_tokens: min_tokens.map(i64::from),
        max_tokens: max_tokens.map(i64::from),
        logprobs: logprobs.map(i64::from),
        prompt_logprobs: prompt_logprobs.map(i64::from),
        echo: None,
        skip_special_tokens,
        cache_salt: cache_salt.into_bytes(),
        bypass_prefix_cache: Some(bypass_prefix_cache),
        resumed_ids,
        priority: Some(priority.into()),
        unsupported: unsupported.into_iter().filter(|(_, set)| *set).map(|(name, _)| name).collect(),
    };
    Ok((raw, RequestHead { client_request_id: checked_id(client_request_id)?, deadline_ms }))
}

fn check_text(text: &str) -> Result<(), Refusal> {
    if text.len() <= text::BYTES_MAX {
        return Ok(());
    }
    let problem = format!("has {} bytes, at most {} are allowed", text.len(), text::BYTES_MAX);
    Err(Refusal::invalid("text", problem))
}

fn special_strings(parse_special: Option<bool>) -> SpecialStrings {
    match parse_special {
        None | Some(true) => SpecialStrings::Parsed,
        Some(false) => SpecialStrings::Plain,
    }
}

/// The id goes into logs and headers, so its alphabet is small.
fn checked_id(id: String) -> Result<Option<String>, Refusal> {
    let plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if !plain || id.len() > call::CLIENT_REQUEST_ID_BYTES_MAX {
        let most = call::CLIENT_REQUEST_ID_BYTES_MAX;
        let problem = format!("must be at most {most} of [A-Za-z0-9._-], not {}", quoted(&id));
        return Err(Refusal::invalid("client_request_id", problem));
    }
    Ok((!id.is_empty()).then_some(id))
}

/// Without tools every known mode but REQUIRED is what happens anyway.
fn check_tool_choice(choice: Option<ToolChoice>) -> Result<(), Refusal> {
    let mode = match choice {
        None => return Ok(()),
        Some(ToolChoice { choice: Some(tool_choice::Choice::Mode(mode)) }) => mode,
        Some(ToolChoice { choice: Some(tool_choice::Choice::Name(_)) }) => {
            return Err(Refusal::unsupported("tool_choice.name"));
        }
        Some(ToolChoice { choice: None }) => {
            return Err(Refusal::invalid("tool_choice", "must be set: mode or name"));
        }
    };
    match ToolMode::try_from(mode) {
        Ok(ToolMode::None | ToolMode::Auto) => Ok(()),
        Ok(ToolMode::Required) => Err(Refusal::unsupported("tool_choice.mode")),
        Ok(ToolMode::Unspecified) | Err(_) => {
            Err(Refusal::invalid("tool_choice.mode", format!("has no value {mode}")))
        }
    }
}

fn checked_kwargs(
    kwargs: BTreeMap<String, TemplateValue>,
) -> Result<BTreeMap<String, template_value::Value>, Refusal> {
    let most = text::TEMPLATE_KWARGS_MAX;
    if kwargs.len() > most {
        let problem = format!("has {} values, at most {most} are allowed", kwargs.len());
        return Err(Refusal::invalid("template_kwargs", problem));
    }
    let checked = kwargs.into_iter().map(|(name, value)| {
        let refused = |problem| Err(Refusal::invalid(format!("template_kwargs[{}]", quoted(&name)), problem));
        match value.value {
            None => refused("must have a value"),
            Some(template_value::Value::FloatValue(number)) if !number.is_finite() => {
                refused("must be finite")
            }
            Some(value) => Ok((name, value)),
        }
    });
    checked.collect()
}

#[cfg(test)]
mod tests;
