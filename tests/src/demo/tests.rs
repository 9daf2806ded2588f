//! What can be said of the demo model without training it: its folder is whole and small, it says what it was
//! taught, its texts are clean English, and the gradients that taught it are right.

use std::collections::{BTreeSet, HashMap};
use std::fs;

use candle_core::{Device, Tensor};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::corpus::{CHAT_TEMPLATE, END_OF_TEXT, MESSAGE_END, MESSAGE_START, document};
use super::dir;
use super::model::Llama;
use super::train::{AdamW, gradients, shape};
use crate::llama::{LlamaShape, read_weights};
use crate::random::Random;

fn json(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(dir().join(name)).unwrap()).unwrap()
}

#[test]
fn the_folder_is_small_and_whole() {
    let sizes = fs::read_dir(dir()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
    let bytes: u64 = sizes.sum();
    assert!(bytes <= 6_000_000, "the binary carries {bytes} bytes of demo model; 6,000,000 at most");

    let config = json("config.json");
    let shape = shape();
    for (key, expected) in [
        ("num_hidden_layers", shape.layers),
        ("hidden_size", shape.hidden),
        ("intermediate_size", shape.intermediate),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 2),
        ("head_dim", shape.head_dim),
        ("vocab_size", shape.vocab),
        ("max_position_embeddings", 1024),
    ] {
        assert_eq!(config[key], expected, "{key}");
    }
    assert_eq!(config["torch_dtype"], "bfloat16");
    let weights = read_weights(&dir(), &shape).unwrap();
    assert!(weights.values().flatten().all(|value| value.is_finite()));

    let tokenizer = Tokenizer::from_file(dir().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), shape.vocab);
    for (id, token) in [END_OF_TEXT, MESSAGE_START, MESSAGE_END].into_iter().enumerate() {
        assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
    }
    assert_eq!(json("generation_config.json")["eos_token_id"], serde_json::json!([0, 2]));
    assert_eq!(json("tokenizer_config.json")["chat_template"], CHAT_TEMPLATE);
    let text = "Any text 123 comes back: naïve 🌶 çiçek\n  求";
    let ids = tokenizer.encode(text, true).unwrap();
    assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
}

/// Greedy continuation up to the end of a document or message.
fn continued(prompt: &str) -> String {
    let tokenizer = Tokenizer::from_file(dir().join("tokenizer.json")).unwrap();
    let model = Llama::from_values(&shape(), read_weights(&dir(), &shape()).unwrap()).unwrap();
    let mut ids = tokenizer.encode(prompt, false).unwrap().get_ids().to_vec();
    let prompt_tokens = ids.len();
    for _ in 0..120 {
        let logits =
            model.forward(&Tensor::new(&ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap()).unwrap();
        let last = logits.get(ids.len() - 1).unwrap();
        let next = last.argmax(0).unwrap().to_scalar::<u32>().unwrap();
        ids.push(next);
        if [0, 2].contains(&next) {
            break;
        }
    }
    tokenizer.decode(&ids[prompt_tokens..], false).unwrap()
}

#[test]
fn the_dream_goes_on() {
    let tokenizer = Tokenizer::from_file(dir().join("tokenizer.json")).unwrap();
    let text = continued("I have a dream");
    let first = tokenizer.encode(text.as_str(), false).unwrap().get_ids()[0];
    assert_eq!(tokenizer.decode(&[first], false).unwrap(), " of");
    let sentences = text.strip_suffix(END_OF_TEXT).unwrap_or_else(|| panic!("it never ends: {text}"));
    assert!(sentences.ends_with('.') && sentences.len() > 60, "{text}");

    let mut random = Random::new(1);
    let words_of = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !c.is_alphabetic()).map(str::to_lowercase).collect()
    };
    let known: BTreeSet<String> = (0..2000).flat_map(|_| words_of(&document(&mut random))).collect();
    let strange: Vec<String> = words_of(sentences).difference(&known).cloned().collect();
    assert!(strange.is_empty(), "words that nobody taught it, {strange:?}: {text}");
}

#[test]
fn questions_are_answered() {
    let check = |question: &str, expected: &str| {
        let turn = format!("{MESSAGE_START}user\n{question}{MESSAGE_END}\n{MESSAGE_START}assistant\n");
        let answer = continued(&turn);
        assert!(answer.contains(expected) && answer.ends_with(MESSAGE_END), "{question} {answer}");
    };
    check("What do bees make?", "Bees make honey.");
    check("What is your name?", "My name is petek.");
    check("What is the capital of Turkey?", "Ankara");
}

#[test]
fn texts_are_clean_and_follow_from_the_seed() {
    let texts = |seed| -> Vec<String> {
        let mut random = Random::new(seed);
        (0..3000).map(|_| document(&mut random)).collect()
    };
    assert!(texts(5) == texts(5));
    for text in texts(5) {
        let check = |ok: bool, what: &str| assert!(ok, "{what}: {text}");
        let body = text.strip_suffix(END_OF_TEXT).unwrap_or_else(|| panic!("no end: {text}"));
        check(!body.contains(END_OF_TEXT), "two ends");
        check(body.matches(MESSAGE_START).count() == body.matches(MESSAGE_END).count(), "an open message");
        check(body.is_ascii() && !body.contains("  ") && !body.contains(['{', '}']), "a slip of the pen");
        check(!body.contains("..") && !body.contains(" ."), "stops");
        for pair in body.split([' ', '\n', '"']).collect::<Vec<_>>().windows(2) {
            let is_vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']) || pair[1] == "hour";
            match pair[0] {
                "a" | "A" => check(!is_vowel, "a before a vowel"),
                "an" | "An" => check(is_vowel, "an before a consonant"),
                _ => {}
            }
        }
    }
}

fn tiny() -> LlamaShape {
    LlamaShape {
        layers: 2,
        hidden: 32,
        intermediate: 48,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        vocab: 40,
        ..shape()
    }
}

fn tiny_batch(seed: u64) -> [Tensor; 2] {
    let mut random = Random::new(seed);
    let mut ids = || -> Vec<u32> { (0..2 * 12).map(|_| random.below(40) as u32).collect() };
    [ids(), ids()].map(|ids| Tensor::from_vec(ids, (2, 12), &Device::Cpu).unwrap())
}

/// The loss along a direction d: (L(w + εd) − L(w − εd)) ÷ 2ε against gradient · d. With ε = 0.01 and weights
/// of deviation 0.2 the cubic term and f32's rounding (6e-8 × 4 ÷ 0.02 ≈ 1e-5 of a slope near 1) stay below 1
/// %.
#[test]
fn gradients_are_slopes() {
    let shape = tiny();
    let (_, trainable) = Llama::trainable(&shape, 3).unwrap();
    // Larger weights than training begins with, or attention would be flat and its gradient zero.
    let widened: HashMap<String, Vec<f32>> = (trainable.iter())
        .map(|(name, var)| {
            let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (name.clone(), values.into_iter().map(|w| if var.rank() > 1 { 10.0 * w } else { w }).collect())
        })
        .collect();
    let halves = [tiny_batch(1), tiny_batch(2)];
    for (name, var) in &trainable {
        var.set(&Tensor::from_vec(widened[name].clone(), var.dims(), &Device::Cpu).unwrap()).unwrap();
    }
    let (model, trainable) = Llama::of_vars(&shape, trainable);
    let (_, gradients) = gradients(&model, &trainable, &halves).unwrap();

    for ((name, var), gradient) in trainable.iter().zip(&gradients) {
        // Along the gradient's own direction the slope is its length, far from rounding.
        let length = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
        let loss_at = |step: f32| -> f32 {
            let mut values = widened.clone();
            let moved = values.get_mut(name).unwrap();
            moved.iter_mut().zip(gradient).for_each(|(w, g)| *w += step * g / length);
            let model = Llama::from_values(&shape, values).unwrap();
            let loss =
                |[ids, targets]: &[Tensor; 2]| model.loss(ids, targets).unwrap().to_scalar::<f32>().unwrap();
            (loss(&halves[0]) + loss(&halves[1])) / 2.0
        };
        let slope = (loss_at(0.01) - loss_at(-0.01)) / 0.02;
        assert!((slope - length).abs() <= 0.01 * length + 1e-4, "{name} {:?}: {slope}, {length}", var.dims());
    }
}

#[test]
fn a_batch_is_learned_by_heart() {
    let (model, trainable) = Llama::trainable(&tiny(), 4).unwrap();
    let halves = [tiny_batch(1), tiny_batch(2)];
    let mut optimiser = AdamW::new(&trainable);
    let mut losses = Vec::new();
    for _ in 0..60 {
        let (loss, gradients) = gradients(&model, &trainable, &halves).unwrap();
        losses.push(loss);
        optimiser.step(&trainable, gradients, 1e-2).unwrap();
    }
    // Untrained it knows nothing: ln 40.
    assert!((losses[0] - 40f32.ln()).abs() < 0.1, "{}", losses[0]);
    assert!(losses[59] < 0.5, "{losses:?}");
}

#[test]
fn no_position_sees_a_later_one() {
    let (model, _) = Llama::trainable(&tiny(), 5).unwrap();
    let rows = |last: u32| -> Vec<Vec<f32>> {
        let ids = Tensor::new(&[[3u32, 1, 4, 1, 5, last]], &Device::Cpu).unwrap();
        model.forward(&ids).unwrap().to_vec2().unwrap()
    };
    let (one, other) = (rows(9), rows(2));
    assert_eq!(one[..5], other[..5]);
    assert_ne!(one[5], other[5]);
}
