//! Chat templates: messages to the text that a model was trained on, as transformers renders it.
//!
//! Templates are the model's or the operator's, never a request's; a request brings messages, tools and scalars.
//! Both are bounded: source and tag sizes before compiling, stack, fuel and output while rendering.

use std::collections::HashSet;
use std::error::Error as _;
use std::fmt;
use std::io;
use std::panic::resume_unwind;
use std::thread;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde_json::{Map, Value as Json};

use crate::error::{FileError, TextError};
use crate::guard::{Author, Guard, Marks, Rendered, each_string};
use crate::limits::{
    TEMPLATE_BYTES_PER_FUEL, TEMPLATE_FUEL, TEMPLATE_FUEL_PER_MESSAGE, TEMPLATE_KWARGS_MAX,
    TEMPLATE_OUTPUT_BYTES_MAX, TEMPLATE_STACK_BYTES,
};
use crate::python::{self, strftime, tojson};
use crate::template_source::prepare;
use crate::tokenizer::Tokenizer;

/// A conversation to be rendered.
#[derive(Debug, Clone, Copy)]
pub struct Chat<'a> {
    /// Objects as OpenAI's API has them.
    pub messages: &'a [Json],
    /// Tool definitions as OpenAI's API has them; none is not the same as an empty list to a template.
    pub tools: Option<&'a [Json]>,
    /// Whether the text ends with the beginning of an assistant's message.
    pub add_generation_prompt: bool,
    /// Further variables of the template: at most 32 scalars that it reads.
    pub kwargs: &'a Map<String, Json>,
    /// What `strftime_now` takes for now. Units: seconds since 1970, UTC.
    pub now_unix_s: i64,
}

/// Where a template's source was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateSource {
    /// The file's name inside the model folder.
    pub file: &'static str,
    /// "default", "tool_use", or another name that its model gives it.
    pub name: String,
    /// Jinja.
    pub source: String,
}

/// The compiled chat templates of a model.
pub struct ChatTemplate {
    env: Environment<'static>,
    special_tokens: Map<String, Json>,
    default: Variant,
    /// Used instead where tools are given.
    tool_use: Option<Variant>,
}

/// One compiled template.
struct Variant {
    name: &'static str,
    /// Variables that it takes from outside.
    reads: HashSet<String>,
}

impl ChatTemplate {
    /// Compiles a model's templates; none, where it has none. Of named ones, "default" and "tool_use" are used, as
    /// transformers does. `special_tokens` (bos_token, …) are variables of every rendering.
    ///
    /// *Errors*: sizes, syntax with its line, or named templates without a default.
    pub fn compile(
        sources: &[TemplateSource],
        special_tokens: Map<String, Json>,
    ) -> Result<Option<ChatTemplate>, FileError> {
        let Some(first) = sources.first() else { return Ok(None) };
        let mut env = environment();
        let mut compile = |name: &'static str| -> Result<Option<Variant>, FileError> {
            let Some(found) = sources.iter().find(|source| source.name == name) else { return Ok(None) };
            let at = format!("chat template {name:?}");
            let source = prepare(found.file, &at, &found.source)?;
            let reads = on_deep_stack(|| {
                env.add_template_owned(name, source)?;
                Ok(env.get_template(name)?.undeclared_variables(false))
            });
            let reads = reads.map_err(|error| FileError::invalid(found.file, &at, error))?;
            let reads =
                reads.map_err(|error: minijinja::Error| FileError::invalid(found.file, &at, Why(&error)))?;
            Ok(Some(Variant { name, reads }))
        };
        let default = compile("default")?.ok_or_else(|| {
            FileError::invalid(first.file, "chat_template", "none of its named templates is \"default\"")
        })?;
        let tool_use = compile("tool_use")?;
        Ok(Some(ChatTemplate { env, special_tokens, default, tool_use }))
    }

    /// Renders a chat for this tokenizer, whose control tokens in the client's strings stay text.
    ///
    /// *Errors*: a kwarg that is refused, a template that refuses or fails, or a limit.
    pub fn render(&self, tokenizer: &Tokenizer, chat: &Chat) -> Result<Rendered, TextError> {
        let variant = self.tool_use.as_ref().filter(|_| chat.tools.is_some()).unwrap_or(&self.default);
        self.check_kwargs(variant, chat.kwargs)?;
        let mut strings = Vec::new();
        let lists = [("messages", chat.messages), ("tools", chat.tools.unwrap_or_default())];
        for (field, list) in lists {
            for (i, item) in list.iter().enumerate() {
                let field = format!("{field}[{i}]");
                if !item.is_object() {
                    return Err(TextError::invalid(field, "it must be an object"));
                }
                each_string(&field, item, &mut |text| strings.push(text))?;
            }
        }
        strings.extend(chat.kwargs.values().filter_map(Json::as_str));
        let client_bytes: usize = strings.iter().map(|text| text.len()).sum();
        let guard = tokenizer.guard();

        let rendered = on_deep_stack(|| {
            let mut env = self.env.clone();
            let template = env.get_template(variant.name).map_err(failed)?;
            let marks = guard.marks(strings.iter().copied().chain([template.source()]))?;
            let context = self.context(guard, &marks, chat);
            let fuel = TEMPLATE_FUEL
                + TEMPLATE_FUEL_PER_MESSAGE * chat.messages.len() as u64
                + client_bytes.div_ceil(TEMPLATE_BYTES_PER_FUEL) as u64;
            env.set_fuel(Some(fuel));
            let now = chat.now_unix_s;
            env.add_function("strftime_now", move |format: String| strftime(now, &format));

            let mut output = Output { bytes: Vec::new(), is_full: false };
            let template = env.get_template(variant.name).map_err(failed)?;
            let result = template.render_captured_to(context, &mut output).map(drop);
            if output.is_full {
                let limit = TEMPLATE_OUTPUT_BYTES_MAX as u64;
                return Err(TextError::TemplateLimit { unit: "bytes of output", limit });
            }
            result.map_err(|error| match find(&error) {
                Found::Raised(message) => TextError::TemplateRaised { message },
                Found::OutOfFuel => TextError::TemplateLimit { unit: "units of work", limit: fuel },
                Found::Other => failed(error),
            })?;
            let text = String::from_utf8(output.bytes)
                .map_err(|error| TextError::Fault { what: "the chat template", why: error.to_string() })?;
            Ok(Rendered::new(text, marks))
        });
        rendered.map_err(|error| TextError::Fault {
            what: "rendering the chat template",
            why: error.to_string(),
        })?
    }

    fn check_kwargs(&self, variant: &Variant, kwargs: &Map<String, Json>) -> Result<(), TextError> {
        TextError::check("chat_template_kwargs", "values", kwargs.len(), TEMPLATE_KWARGS_MAX)?;
        for (name, value) in kwargs {
            let short: String = name.chars().take(64).collect();
            let refuse =
                |why: &str| Err(TextError::invalid(format_args!("chat_template_kwargs.{short}"), why));
            let reserved = RESERVED.contains(&name.as_str())
                || self.special_tokens.contains_key(name)
                || name.ends_with("_token")
                || self.env.globals().any(|(global, _)| global == name);
            if reserved {
                return refuse("this name is reserved");
            }
            if value.is_array() || value.is_object() {
                return refuse("only strings, numbers, booleans and null are taken");
            }
            if !variant.reads.contains(name) {
                return refuse("this model's chat template does not read it");
            }
        }
        Ok(())
    }

    fn context(&self, guard: &Guard, marks: &Marks, chat: &Chat) -> Value {
        let value = |json: &Json, author| Value::from(Serde(guard.value(json, author, marks)));
        let client = |json: &Json| value(json, Author::Client);
        let tools = chat.tools.map_or(Value::from(()), |tools| tools.iter().map(client).collect());
        let messages = chat.messages.iter().map(|message| {
            let author = if message["role"] == "assistant" { Author::Assistant } else { Author::Client };
            value(&as_transformers_reads(message), author)
        });
        let messages: Value = messages.collect();
        let special =
            self.special_tokens.iter().map(|(name, token)| (name.clone(), Value::from(Serde(token))));
        let kwargs = chat.kwargs.iter().map(|(name, json)| (name.clone(), client(json)));
        let own = [
            ("messages".to_owned(), messages),
            ("tools".to_owned(), tools),
            ("documents".to_owned(), Value::from(())),
            ("add_generation_prompt".to_owned(), Value::from(chat.add_generation_prompt)),
        ];
        Value::from_pairs(special.chain(kwargs).chain(own))
    }
}

/// Names that a template has from elsewhere.
const RESERVED: &[&str] = &[
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
    "additional_special_tokens",
    "raise_exception",
    "strftime_now",
    "loop",
    "self",
    "caller",
    "varargs",
    "kwargs",
];

/// transformers drops a message's null fields and knows reasoning by three names.
fn as_transformers_reads(message: &Json) -> Json {
    let Some(fields) = message.as_object() else { return message.clone() };
    let mut fields: Map<String, Json> = fields
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let reasoning =
        ["reasoning_content", "thinking", "reasoning"].iter().find_map(|name| fields.get(*name)).cloned();
    if let Some(reasoning) = reasoning {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".to_owned(), reasoning);
    }
    Json::Object(fields)
}

/// transformers' Jinja environment.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    env.set_syntax(
        syntax.trim_blocks(true).lstrip_blocks(true).build().expect("the default delimiters are valid"),
    );
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(python::method);
    env.set_formatter(python::write);
    env.set_debug(false);
    env.add_filter("tojson", tojson);
    env.add_function("raise_exception", |message: Value| -> Result<Value, minijinja::Error> {
        Err(python::invalid("raise_exception").with_source(Raised(message.to_string())))
    });
    // To Python a string is a sequence and iterable, a mapping is both too, and None neither.
    let is_sequence = |v: &Value| {
        v.is_undefined() || matches!(v.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    };
    env.add_test("sequence", move |v: &Value| is_sequence(v));
    env.add_test("iterable", move |v: &Value| is_sequence(v) || (!v.is_none() && v.try_iter().is_ok()));
    env
}

/// Runs a computation on a thread whose stack is deep enough for any template that passes the size checks.
///
/// *Errors*: no thread could be started. A panic goes on in the caller.
fn on_deep_stack<R: Send>(compute: impl FnOnce() -> R + Send) -> io::Result<R> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("template".to_owned()).stack_size(TEMPLATE_STACK_BYTES);
        Ok(thread.spawn_scoped(scope, compute)?.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// Takes what a template may write, then fails.
struct Output {
    bytes: Vec<u8>,
    is_full: bool,
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > TEMPLATE_OUTPUT_BYTES_MAX {
            self.is_full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What `raise_exception` was given.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

enum Found {
    Raised(String),
    OutOfFuel,
    Other,
}

/// Looks through an error's causes: inside a macro call the first is only the call's.
fn find(error: &minijinja::Error) -> Found {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Found::Raised(message.clone());
        }
        if error.downcast_ref().is_some_and(|error: &minijinja::Error| error.kind() == ErrorKind::OutOfFuel) {
            return Found::OutOfFuel;
        }
        cause = error.source();
    }
    Found::Other
}

fn failed(error: minijinja::Error) -> TextError {
    TextError::TemplateFailed { why: Why(&error).to_string() }
}

/// minijinja's reason: what, the innermost cause, and the line.
struct Why<'a>(&'a minijinja::Error);

impl fmt::Display for Why<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut inner = self.0;
        while let Some(cause) = inner.source().and_then(|cause| cause.downcast_ref()) {
            inner = cause;
        }
        write!(f, "{}", inner.kind())?;
        if let Some(detail) = inner.detail() {
            write!(f, ": {detail}")?;
        }
        if let Some(line) = inner.line().or(self.0.line()) {
            write!(f, " (line {line})")?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
