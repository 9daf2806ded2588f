//! Decoders against Hugging Face transformers in float32: teacher-forced logits of random-weight variants, of the demo model
//! and of a real one, each within the bound that its golden derives. And their tokenisers against `tokenizers` and llama.cpp.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use petek_device::collective::{Solo, Threads};
use petek_device::ops::Format;
use petek_model::folder::ModelFolder;
use petek_tests::decode::{MakeOps, Solitary, reference, simd};
use petek_tests::golden::{self, Arithmetic, ModelGolden, Trial};
use petek_tests::{demo, need};
use petek_text::{AddedSpecials, ControlText, Detokenizer, SpecialText, Tokenizer};
use serde::Deserialize;

/// Runs every prompt of a golden in each of the given chunks and says what share of the bounds was used.
fn check(
    name: &str,
    golden: &ModelGolden,
    folder: &ModelFolder,
    format: Format,
    make: &MakeOps<'_>,
    chunks: &[usize],
) -> Result<()> {
    let arithmetic = if format == Format::Bf16 { Arithmetic::Bf16 } else { Arithmetic::F32 };
    let longest = golden.prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(1);
    let mut used = 0.0_f64;
    for chunk in chunks {
        let mut decoder = Solitary::load(folder, make, Solo::new_group(), format, longest, *chunk)?;
        for prompt in golden.prompts.iter().filter(|prompt| *chunk > 1 || prompt.ids.len() < 100) {
            let mut trial = Trial::new(golden, prompt, arithmetic);
            decoder
                .run(&prompt.ids, *chunk, |row| trial.row(row))
                .and_then(|()| trial.finish())
                .map(|verdict| used = used.max(verdict.logits_share).max(verdict.logprobs_share))
                .with_context(|| format!("{name}, chunks of {chunk}"))?;
        }
    }
    eprintln!("{name}: {used:.2} of the bounds used");
    Ok(())
}

fn check_variants(what: &str, make: &MakeOps<'_>) -> Result<()> {
    let names = golden::names("model")?;
    anyhow::ensure!(names.len() >= 9, "every variant has its golden: {names:?}");
    for name in names {
        let folder = ModelFolder::open(&golden::model_folder(&name))?;
        check(
            &format!("{what} {name}"),
            &golden::model(&name)?,
            &folder,
            folder.weights.format(),
            make,
            &[600, 100, 1],
        )?;
    }
    Ok(())
}

#[test]
fn the_reference_matches_transformers() -> Result<()> {
    check_variants("reference", &reference)
}

#[test]
fn the_serving_executor_matches_transformers() -> Result<()> {
    check_variants("simd", &simd(1))
}

/// `--dtype`: float32 weights converted to bf16 at load are within bf16's bound.
#[test]
fn weights_are_converted_at_load() -> Result<()> {
    let folder = ModelFolder::open(&golden::model_folder("gqa"))?;
    check("simd gqa as bf16", &golden::model("gqa")?, &folder, Format::Bf16, &simd(2), &[600])
}

#[test]
fn the_demo_model_matches_transformers() -> Result<()> {
    let folder = ModelFolder::open(&demo::dir())?;
    let golden = golden::text("demo")?;
    check("simd demo as f32", &golden, &folder, Format::F32, &simd(2), &[256, 33])?;
    check("simd demo", &golden, &folder, Format::Bf16, &simd(2), &[256])
}

#[test]
fn the_real_model_matches_transformers() -> Result<()> {
    let Some(dir) = need::real_model("the_real_model_matches_transformers") else { return Ok(()) };
    let folder = ModelFolder::open(&dir)?;
    let golden = golden::text("real-model")?;
    check("simd real model", &golden, &folder, Format::F32, &simd(2), &[256])?;
    check("simd real model as bf16", &golden, &folder, Format::Bf16, &simd(2), &[256])
}

/// 9 query heads and 3 kv heads: three ranks are another numerics id, and right all the same.
#[test]
fn three_ranks_of_the_real_model_match_transformers() -> Result<()> {
    let Some(dir) = need::real_model("three_ranks_of_the_real_model_match_transformers") else {
        return Ok(());
    };
    let folder = ModelFolder::open(&dir)?;
    let golden = golden::text("real-model")?;
    let shortest = golden.prompts.iter().min_by_key(|prompt| prompt.ids.len()).context("a prompt")?;
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = Threads::group(3, 1)
            .into_iter()
            .map(|collective| {
                let (folder, golden) = (&folder, &golden);
                scope.spawn(move || {
                    let mut trial = Trial::new(golden, shortest, Arithmetic::F32);
                    let length = shortest.ids.len();
                    let mut decoder = Solitary::load(folder, &simd(1), collective, Format::F32, length, 64)?;
                    decoder.run(&shortest.ids, 64, |row| trial.row(row))?;
                    trial.finish().map(|_| ())
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    });
    results.into_iter().collect()
}

#[test]
fn two_ranks_of_nine_heads_are_refused_in_one_line() -> Result<()> {
    let Some(dir) = need::real_model("two_ranks_of_nine_heads_are_refused_in_one_line") else {
        return Ok(());
    };
    let folder = ModelFolder::open(&dir)?;
    let error =
        petek_model::shard::Shard::plan(&folder.config, 2).expect_err("9 heads over 2 ranks").to_string();
    assert!(error.contains("attention heads 9") && !error.contains('\n'), "{error}");
    Ok(())
}

// Tokenisers.

fn tokenizer(folder: &Path) -> Result<Tokenizer> {
    let file = std::fs::read(folder.join("tokenizer.json"))?;
    Ok(Tokenizer::load(&file, &|| Duration::ZERO)?)
}

/// Every string and id list of a golden, there and back, by petek's own tokeniser and detokeniser. All added tokens of the
/// model are special, and its kind strips no space: where `tokenizers` decodes without loss the texts are equal.
fn check_tokenizer(name: &str, folder: &Path) -> Result<()> {
    let (tokenizer, golden) = (tokenizer(folder)?, golden::tokenizer(name)?);
    let tokens = tokenizer.tokens();
    assert_eq!(tokens.len(), golden.vocab_size, "{name}");
    let mut whole = 0;
    let mut decode = |ids: &[u32], theirs: &str, special| {
        let mut text = String::new();
        let mut stream = Detokenizer::default();
        ids.iter().for_each(|id| stream.push(tokens.text_bytes(*id, special), &mut text));
        stream.finish(&mut text);
        assert_eq!(text, tokens.decode(ids, special), "{name}: a stream of {ids:?}");
        if !theirs.contains(char::REPLACEMENT_CHARACTER) {
            whole += 1;
            assert_eq!(text, theirs, "{name}: {ids:?}");
        }
    };
    for case in &golden.strings {
        let encode = |specials, control| tokenizer.encode("prompt", &case.text, specials, control);
        let at = format!("{name}: {:?}", case.text);
        assert_eq!(encode(AddedSpecials::None, ControlText::Parsed)?, case.ids, "{at}");
        assert_eq!(encode(AddedSpecials::Added, ControlText::Parsed)?, case.ids_with_added, "{at}");
        assert_eq!(encode(AddedSpecials::None, ControlText::Plain)?, case.ids_control_as_text, "{at}");
        decode(&case.ids_with_added, &case.decoded, SpecialText::Kept);
        decode(&case.ids_with_added, &case.decoded_without_special, SpecialText::Skipped);
    }
    for list in &golden.id_lists {
        decode(&list.ids, &list.decoded, SpecialText::Kept);
        decode(&list.ids, &list.decoded_without_special, SpecialText::Skipped);
    }
    assert!(golden.strings.len() > 80 && whole > 160, "{name}: {whole} texts were compared");
    Ok(())
}

#[test]
fn the_demo_tokeniser_equals_pythons() -> Result<()> {
    check_tokenizer("demo", &demo::dir())
}

#[test]
fn the_real_tokeniser_equals_pythons() -> Result<()> {
    let Some(dir) = need::real_model("the_real_tokeniser_equals_pythons") else { return Ok(()) };
    check_tokenizer("real-model", &dir)
}

/// What llama.cpp's own tokeniser makes of 20 texts: the real model's tokenizer.json is ours, so `tokenizers` on it proves
/// nothing alone.
#[derive(Deserialize)]
struct LlamaCpp {
    cases: Vec<LlamaCppCase>,
}

#[derive(Deserialize)]
struct LlamaCppCase {
    text: String,
    parse_special: bool,
    ids: Vec<u32>,
}

#[test]
fn the_real_tokeniser_equals_llama_cpps() -> Result<()> {
    let Some(dir) = need::real_model("the_real_tokeniser_equals_llama_cpps") else { return Ok(()) };
    let tokenizer = tokenizer(&dir)?;
    let golden: LlamaCpp = serde_json::from_str(include_str!("../data/real_model_tokens.json"))?;
    assert_eq!(golden.cases.len(), 20);
    for case in golden.cases {
        let control = if case.parse_special { ControlText::Parsed } else { ControlText::Plain };
        let ids = tokenizer.encode("prompt", &case.text, AddedSpecials::Added, control)?;
        assert_eq!(ids, case.ids, "{:?}", case.text);
        assert_eq!(tokenizer.tokens().decode(&ids, SpecialText::Kept), case.text);
    }
    Ok(())
}
