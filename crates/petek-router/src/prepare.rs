//! From what a client sent to token ids: prompts and conversations, as the model's own files have it. All of this
//! runs on the text threads.

use petek_core::ids::TokenId;
use petek_core::refusal::Refusal;
use petek_proto::inference::v1::{ChatMessage, ToolCall, template_value};
use petek_proto::request::{AssistantTurn, ChatInput, Prompt, SpecialStrings};
use petek_text::{AddedSpecials, Chat, ControlText, ModelText, TextError};
use serde_json::{Map, Value, json};

/// The ids of a prompt.
///
/// # Errors
/// A refusal that names the field.
pub(crate) fn prompt_ids(text: &ModelText, prompt: Prompt) -> Result<Vec<TokenId>, Refusal> {
    match prompt {
        Prompt::Ids(ids) => Ok(ids),
        Prompt::Text(prompt, special) => {
            let control = match special {
                SpecialStrings::Parsed => ControlText::Parsed,
                SpecialStrings::Plain => ControlText::Plain,
            };
            text.tokenizer.encode("text", &prompt, AddedSpecials::Added, control).map_err(refusal)
        }
    }
}

/// A conversation as its template rendered it, and its ids. `now_unix_s` is what templates take for now.
///
/// # Errors
/// A refusal that names the field.
pub(crate) fn chat_ids(
    text: &ModelText,
    chat: &ChatInput,
    now_unix_s: i64,
) -> Result<(String, Vec<TokenId>), Refusal> {
    let template = text.template.as_ref().ok_or_else(|| refusal(TextError::NoTemplate))?;
    let messages = chat.messages.iter().enumerate().map(|(at, message)| message_json(at, message));
    let messages = messages.collect::<Result<Vec<Value>, _>>()?;
    let kwargs: Map<String, Value> =
        chat.template_kwargs.iter().map(|(name, value)| (name.clone(), scalar(value))).collect();
    let chat = Chat {
        messages: &messages,
        tools: None,
        add_generation_prompt: chat.turn == AssistantTurn::Opened,
        kwargs: &kwargs,
        now_unix_s,
    };
    let rendered = template.render(&text.tokenizer, &chat).map_err(refusal)?;
    let ids = text.tokenizer.encode_rendered(&rendered).map_err(refusal)?;
    Ok((rendered.text(), ids))
}

/// What a client did, in terms of the request's fields.
pub(crate) fn refusal(error: TextError) -> Refusal {
    let Some(field) = error.field() else {
        tracing::error!(%error, "text");
        return Refusal::Internal;
    };
    // Templates know these by the name that HTTP clients use.
    let field = match field.strip_prefix("chat_template_kwargs") {
        Some(rest) => format!("template_kwargs{rest}"),
        None => field.to_owned(),
    };
    let problem = match &error {
        TextError::TooLarge { unit, limit, actual, .. } => {
            format!("has {actual} {unit}, at most {limit} are allowed")
        }
        TextError::Invalid { why, .. } => why.clone(),
        TextError::NoTemplate => "this model has no chat template; use Generate with a prompt".into(),
        TextError::TemplateRaised { message } => format!("the model's chat template refuses them: {message}"),
        other => other.to_string(),
    };
    Refusal::invalid(field, problem)
}

/// A message as templates know it: OpenAI's object.
fn message_json(at: usize, message: &ChatMessage) -> Result<Value, Refusal> {
    let ChatMessage { role, content, name, reasoning, tool_calls, tool_call_id } = message;
    let mut object = Map::new();
    object.insert("role".into(), json!(role));
    if let Some(content) = content {
        object.insert("content".into(), json!(content));
    }
    for (key, value) in [("name", name), ("reasoning_content", reasoning), ("tool_call_id", tool_call_id)] {
        if !value.is_empty() {
            object.insert(key.into(), json!(value));
        }
    }
    if !tool_calls.is_empty() {
        let calls = tool_calls.iter().enumerate().map(|(call_at, call)| {
            call_json(call).ok_or_else(|| {
                let field = format!("messages[{at}].tool_calls[{call_at}].arguments_json");
                Refusal::invalid(field, "must be a JSON object")
            })
        });
        object.insert("tool_calls".into(), calls.collect::<Result<_, _>>()?);
    }
    Ok(Value::Object(object))
}

/// Templates expect the arguments as an object, not as the text that the API carries.
fn call_json(call: &ToolCall) -> Option<Value> {
    let arguments: Map<String, Value> = match &*call.arguments_json {
        "" => Map::new(),
        text => serde_json::from_str(text).ok()?,
    };
    Some(json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}))
}

fn scalar(value: &template_value::Value) -> Value {
    match value {
        template_value::Value::BoolValue(value) => json!(value),
        template_value::Value::IntValue(value) => json!(value),
        template_value::Value::FloatValue(value) => json!(value),
        template_value::Value::StringValue(value) => json!(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_what_was_set_and_no_more() {
        let message =
            ChatMessage { role: "user".into(), content: Some(String::new()), ..ChatMessage::default() };
        assert_eq!(message_json(0, &message).unwrap(), json!({"role": "user", "content": ""}));
        let call =
            ToolCall { id: "1".into(), name: "add".into(), arguments_json: r#"{"b": 1, "a": [2]}"#.into() };
        let message =
            ChatMessage { role: "assistant".into(), tool_calls: vec![call], ..ChatMessage::default() };
        let expected = r#"{"role":"assistant","tool_calls":[{"id":"1","type":"function","function":{"name":"add","arguments":{"b":1,"a":[2]}}}]}"#;
        assert_eq!(message_json(0, &message).unwrap().to_string(), expected);
    }

    #[test]
    fn arguments_that_are_no_object_are_refused_by_name() {
        for text in ["[1]", "{", "1", "nul"] {
            let call = ToolCall { arguments_json: text.into(), ..ToolCall::default() };
            let message =
                ChatMessage { tool_calls: vec![ToolCall::default(), call], ..ChatMessage::default() };
            let refusal = message_json(3, &message).unwrap_err();
            assert_eq!(refusal.field(), Some("messages[3].tool_calls[1].arguments_json"), "{text}");
        }
    }
}
