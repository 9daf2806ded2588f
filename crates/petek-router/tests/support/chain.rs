//! The text side of the chain model: a byte-level vocabulary of chosen byte strings without merges, so that a test
//! says exactly which bytes each token has.

use serde_json::{Value, json};

/// tokenizer.json of these tokens, ids from 0. Each must be unlike the others; tokens like `<x>` are special.
pub(crate) fn tokenizer_json(tokens: &[&[u8]]) -> Vec<u8> {
    let mut vocabulary = serde_json::Map::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let special = token.len() > 2 && token.starts_with(b"<") && token.ends_with(b">");
        let text: String = if special {
            String::from_utf8_lossy(token).into()
        } else {
            token.iter().map(|b| letter(*b)).collect()
        };
        if special {
            added.push(json!({
                "id": id, "content": text, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false,
            }));
        }
        let before: Option<Value> = vocabulary.insert(text, json!(id));
        assert!(before.is_none(), "token {id} stands twice");
    }
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary,
                  "merges": []},
    });
    serde_json::to_vec(&file).expect("a value is JSON")
}

/// GPT-2's letter of a byte.
fn letter(byte: u8) -> char {
    let code = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => byte.into(),
        0..=0x20 => 0x100 + u32::from(byte),
        0x7F..=0xA0 => 0x121 + u32::from(byte) - 0x7F,
        0xAD => 0x143,
    };
    char::from_u32(code).expect("all of them are letters")
}
