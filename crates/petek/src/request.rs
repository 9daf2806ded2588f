//! The flags of a request: each has the name of the API's field, and what is left out is left to the server. Values
//! are checked there, so that one place says what is allowed; only what cannot be sent or shown is refused here.

use std::str::FromStr;

use clap::Args;
use petek_proto::inference::v1::{
    ChatMessage, ChatSpec, GenerationSpec, RequestOptions, SamplingParams, TokenIds, generation_spec,
};

/// A prompt to continue.
#[derive(Args, Clone, Debug)]
pub(crate) struct PromptArgs {
    /// The text to continue
    #[arg(required_unless_present = "ids", conflicts_with = "ids")]
    prompt: Option<String>,
    /// Token ids to continue instead of a text, taken as they are
    #[arg(long, value_name = "ID,…")]
    ids: Option<Ids>,
}

/// How to answer, and how to serve the request.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Request")]
pub(crate) struct RequestArgs {
    /// The model's name or alias; needed where several models are served
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Add at most so many tokens [default: what the context leaves]
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Before so many tokens nothing ends the output
    #[arg(long, value_name = "N")]
    min_tokens: Option<u32>,
    /// 0 takes the likeliest token each time; up to 2 [default: the model's own]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the likeliest tokens that together have this probability; 1 is off
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Keep so many of the likeliest tokens; 0 is off
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    top_k: Option<i32>,
    /// Keep tokens at least this share as likely as the likeliest; 0 is off
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// The same seed gives the same output [default: random, and reported]
    #[arg(long, overrides_with = "seed")]
    seed: Option<u64>,
    /// So many answers to one prompt
    #[arg(short, value_name = "N")]
    n: Option<u32>,
    /// End where this text is complete; may be given 16 times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Keep the text that ended the output
    #[arg(long)]
    include_stop: bool,
    /// End at any of these ids
    #[arg(long, value_name = "ID,…")]
    stop_token_ids: Option<Ids>,
    /// Go on past the model's end-of-sequence tokens
    #[arg(long)]
    ignore_eos: bool,
    /// Report each token's logprob and so many of the likeliest beside it: 0 to 20
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<u32>,
    /// Show special tokens in the text
    #[arg(long)]
    no_skip_special_tokens: bool,
    /// Neither read nor write the prefix cache
    #[arg(long)]
    bypass_prefix_cache: bool,
    /// Share cached blocks only with requests of the same salt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cache_salt: Option<String>,
    /// Wait at most so many milliseconds for the whole answer [default: 10 min]
    #[arg(long, value_name = "MS")]
    deadline_ms: Option<u64>,
    /// Go on with an answer that broke off: its ids so far, all of them, and its --seed
    #[arg(long, value_name = "ID,…", overrides_with = "resume_ids")]
    resume_ids: Option<Ids>,
}

/// Token ids as a user types them: `1,2,3`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ids(pub(crate) Vec<u32>);

impl FromStr for Ids {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // An empty list is a list: the server says what is wrong with it.
        let items = text.split(',').map(str::trim).filter(|_| !text.trim().is_empty());
        let ids: Result<Vec<u32>, _> = items.map(str::parse).collect();
        ids.map(Ids).map_err(|_| "token ids are whole numbers with commas between them: 1,2,3".to_owned())
    }
}

impl PromptArgs {
    /// A text.
    pub(crate) fn text(text: String) -> Self {
        Self { prompt: Some(text), ids: None }
    }

    /// The prompt with everything around it.
    pub(crate) fn generation(&self, request: &RequestArgs) -> GenerationSpec {
        let prompt = match (&self.ids, &self.prompt) {
            (Some(ids), _) => generation_spec::Prompt::TokenIds(TokenIds { ids: ids.0.clone() }),
            (None, text) => generation_spec::Prompt::Text(text.clone().unwrap_or_default()),
        };
        GenerationSpec {
            model: request.model.clone().unwrap_or_default(),
            prompt: Some(prompt),
            params: Some(request.params()),
            options: Some(request.options()),
            ..GenerationSpec::default()
        }
    }

    /// The prompt as the one message of a conversation.
    pub(crate) fn chat(&self, request: &RequestArgs) -> ChatSpec {
        request.chat(vec![message("user", self.prompt.clone().unwrap_or_default())])
    }
}

impl RequestArgs {
    /// A conversation with everything around it.
    pub(crate) fn chat(&self, messages: Vec<ChatMessage>) -> ChatSpec {
        ChatSpec {
            model: self.model.clone().unwrap_or_default(),
            messages,
            params: Some(self.params()),
            options: Some(self.options()),
            ..ChatSpec::default()
        }
    }

    /// The ids that the client has already: none, unless it goes on.
    pub(crate) fn resumed_ids(&self) -> &[u32] {
        self.resume_ids.as_ref().map_or(&[], |ids| &ids.0)
    }

    /// How many answers are asked for.
    pub(crate) fn sequences(&self) -> u32 {
        self.n.unwrap_or(1)
    }

    /// The same request, going on with an answer that broke off.
    pub(crate) fn going_on(&self, seed: u64, resumed_ids: Vec<u32>) -> Self {
        Self { seed: Some(seed), resume_ids: Some(Ids(resumed_ids)), ..self.clone() }
    }

    fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            seed: self.seed,
            n: self.n,
            stop: self.stop.clone(),
            include_stop: self.include_stop,
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default().0,
            ignore_eos: self.ignore_eos,
            min_tokens: self.min_tokens,
            max_tokens: self.max_tokens,
            logprobs: self.logprobs,
            skip_special_tokens: self.no_skip_special_tokens.then_some(false),
            ..SamplingParams::default()
        }
    }

    fn options(&self) -> RequestOptions {
        RequestOptions {
            deadline_ms: self.deadline_ms,
            cache_salt: self.cache_salt.clone().unwrap_or_default(),
            bypass_prefix_cache: self.bypass_prefix_cache,
            resumed_ids: self.resumed_ids().to_vec(),
            ..RequestOptions::default()
        }
    }
}

/// One message of a conversation.
pub(crate) fn message(role: &str, content: String) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: Some(content), ..ChatMessage::default() }
}

/// The flag of an API's field, where it has one: `spec.params.stop[3]` → `--stop`.
pub(crate) fn flag_of_field(path: &str) -> Option<String> {
    let name = path.rsplit('.').next()?.split('[').next()?;
    let name = match name {
        "skip_special_tokens" => "no_skip_special_tokens",
        "resumed_ids" => "resume_ids",
        name => name,
    };
    let command = RequestArgs::augment_args(PromptArgs::augment_args(clap::Command::new("request")));
    let flag = command.get_arguments().find(|argument| argument.get_id() == name)?;
    match flag.get_long() {
        Some(long) => Some(format!("--{long}")),
        None => flag.get_short().map(|short| format!("-{short}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_ids() {
        for (text, expected) in [("1,2,3", vec![1, 2, 3]), (" 7 , 8", vec![7, 8]), ("", vec![])] {
            assert_eq!(text.parse(), Ok(Ids(expected)), "{text}");
        }
        for bad in ["1,,2", "a", "-1", "1;2", "4294967296", ","] {
            assert!(bad.parse::<Ids>().is_err(), "{bad}");
        }
    }

    #[test]
    fn fields_have_flags() {
        for (path, flag) in [
            ("spec.params.stop[3]", "--stop"),
            ("spec.params.n", "-n"),
            ("spec.model", "--model"),
            ("spec.token_ids.ids[2]", "--ids"),
            ("spec.options.resumed_ids[0]", "--resume-ids"),
            ("spec.params.skip_special_tokens", "--no-skip-special-tokens"),
        ] {
            assert_eq!(flag_of_field(path).as_deref(), Some(flag), "{path}");
        }
        assert_eq!(flag_of_field("spec.params.logit_bias"), None);
        assert_eq!(flag_of_field("spec.prompt"), None);
        assert_eq!(flag_of_field(""), None);
    }
}
