//! Mistakes of whoever starts it: one line that names the place, a hint, and an exit code; never a backtrace.

use std::fs;
use std::path::Path;

use petek_tests::chain::Chain;
use serde_json::{Value, json};

use super::process::run;

const CONFIGURATION: i32 = 3;
const ENVIRONMENT: i32 = 4;

/// A folder as it should be, one file of it changed.
fn spoilt(spoil: impl FnOnce(&Path)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    Chain::bytes(&["a", "b"]).then(&[1, 2, Chain::END]).write(dir.path()).expect("write the model");
    spoil(dir.path());
    dir
}

fn config(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    json_of("config.json", change)
}

fn json_of(name: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    spoilt(|dir| {
        let path = dir.join(name);
        let mut value: Value = serde_json::from_slice(&fs::read(&path).expect("there")).expect("JSON");
        change(&mut value);
        fs::write(&path, value.to_string()).expect("write it");
    })
}

#[track_caller]
fn check_ended(words: &[&str], code: i32, parts: &[&str]) {
    let ran = run(words, &[]);
    assert_eq!(ran.code, Some(code), "{words:?}: {}", ran.err);
    let lines: Vec<&str> = ran.err.lines().filter(|line| !line.contains(" WARN ")).collect();
    let [line] = lines[..] else { panic!("{words:?}: one line is needed: {}", ran.err) };
    assert!(line.starts_with("petek: "), "{line}");
    for part in parts {
        assert!(line.contains(part), "{words:?}: {line} does not say {part}");
    }
    assert!(!line.contains("panicked") && !line.contains("backtrace"), "{line}");
    assert!(line.len() < 1_000, "{line}");
}

/// A start on it ends so.
#[track_caller]
fn check_folder(dir: &Path, parts: &[&str]) {
    let path = dir.to_str().expect("a plain path");
    check_ended(&["up", "--once", "x", "--model", path], CONFIGURATION, parts);
}

#[test]
fn bad_model_folders_are_refused_by_file_and_place() {
    let nowhere = tempfile::tempdir().expect("a folder");
    check_folder(&nowhere.path().join("nowhere"), &["nowhere"]);
    check_folder(nowhere.path(), &["config.json"]);

    check_folder(
        config(|c| c["num_attention_heads"] = json!(0)).path(),
        &["config.json", "num_attention_heads is 0"],
    );
    let layers = config(|c| c["num_hidden_layers"] = json!(2_147_483_648_u64));
    check_folder(layers.path(), &["config.json", "num_hidden_layers is 2147483648", "512"]);
    check_folder(config(|c| c["vocab_size"] = json!(65)).path(), &["embed_tokens", "65"]);
    check_folder(config(|c| c["architectures"] = json!(["GPT2LMHeadModel"])).path(), &["GPT2LMHeadModel"]);
    check_folder(
        spoilt(|dir| fs::write(dir.join("config.json"), "{\"a\": ").expect("written")).path(),
        &["config.json"],
    );

    let truncated = |bytes: usize| {
        spoilt(|dir| {
            let file =
                fs::OpenOptions::new().write(true).open(dir.join("model.safetensors")).expect("open it");
            let whole = file.metadata().expect("its size").len();
            file.set_len(whole.min(bytes as u64).min(whole - 1)).expect("cut it");
        })
    };
    for bytes in [0, 7, 100, usize::MAX] {
        check_folder(truncated(bytes).path(), &["model.safetensors"]);
    }
    let lying = |change: fn(&mut Vec<u8>)| {
        spoilt(|dir| {
            let path = dir.join("model.safetensors");
            let mut bytes = fs::read(&path).expect("there");
            change(&mut bytes);
            fs::write(&path, bytes).expect("write it");
        })
    };
    // A header longer than any memory, and one whose shapes are not its bytes.
    let long = lying(|bytes| bytes[..8].copy_from_slice(&(1_u64 << 63).to_le_bytes()));
    check_folder(long.path(), &["model.safetensors", "header"]);
    let shapes = lying(|bytes| {
        let at = bytes.windows(7).position(|window| window == b"[64,64]").expect("a shape");
        bytes[at..at + 7].copy_from_slice(b"[99,99]");
    });
    check_folder(shapes.path(), &["model.safetensors", "header"]);

    let index =
        json!({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}});
    let missing = spoilt(|dir| {
        fs::remove_file(dir.join("model.safetensors")).expect("removed");
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).expect("written");
    });
    check_folder(missing.path(), &["model-00001-of-00001.safetensors"]);
}

#[test]
fn bad_text_files_are_refused_by_file_and_place() {
    let without = |name: &'static str| spoilt(move |dir| fs::remove_file(dir.join(name)).expect("removed"));
    check_folder(without("tokenizer.json").path(), &["tokenizer.json"]);
    let cut = spoilt(|dir| {
        let path = dir.join("tokenizer.json");
        let text = fs::read_to_string(&path).expect("there");
        fs::write(&path, &text[..text.len() / 2]).expect("cut");
    });
    check_folder(cut.path(), &["tokenizer.json"]);
    check_folder(
        json_of("tokenizer.json", |t| t["model"] = json!({"type": "Magic"})).path(),
        &["tokenizer.json"],
    );
    check_folder(
        json_of("tokenizer_config.json", |t| t["eos_token"] = json!("<nobody>")).path(),
        &["tokenizer_config.json", "eos_token", "<nobody>"],
    );
    check_folder(
        json_of("generation_config.json", |g| g["temperature"] = json!(2.5)).path(),
        &["generation_config.json", "temperature: a number from 0 to 2 is needed, not 2.5"],
    );
    // A tag that would overflow the compiler's stack, and one just within the limit: neither ends in an abort.
    let dashes = |count: usize| {
        spoilt(move |dir| {
            let template = format!("{{{{ {}1 }}}}", "-".repeat(count));
            fs::write(dir.join("chat_template.jinja"), template).expect("written");
        })
    };
    check_folder(dashes(8 << 10).path(), &["chat_template.jinja", "8192"]);
    let within = dashes(8_000);
    let ran = run(&["up", "--once", "a", "--model", within.path().to_str().expect("a plain path")], &[]);
    assert_eq!((ran.code, &*ran.out), (Some(0), "b\n"), "{}", ran.err);
}

#[test]
fn bad_settings_are_refused_by_key() {
    let dir = spoilt(|_| {});
    let path = dir.path().to_str().expect("a plain path");
    let check = |words: &[&str], code: i32, parts: &[&str]| {
        check_ended(&[&["up", "--once", "x", "--model", path], words].concat(), code, parts);
    };
    check(&["--tp", "3"], CONFIGURATION, &["3", "2"]);
    check(&["--kv-memory", "lots"], CONFIGURATION, &["kv_memory", "8GiB"]);
    check(&["--kv-memory", "5"], CONFIGURATION, &["5 bytes", "--kv-memory"]);
    check(&["--block-size", "17"], CONFIGURATION, &["block_size", "17", "power of two"]);
    check(&["--dtype", "int3"], CONFIGURATION, &["dtype", "bf16"]);
    check(&["--workers", "65"], CONFIGURATION, &["workers", "64"]);
    check(&["--context", "5000"], CONFIGURATION, &["engine.context", "5000", "4096"]);
    check(&["--log-filter", "loud"], CONFIGURATION, &["loud"]);
    check(&["--config", "/nowhere/petek.toml"], CONFIGURATION, &["/nowhere/petek.toml"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("its address").to_string();
    for listener in ["--listen", "--admin", "--ops"] {
        check(&[listener, &taken], ENVIRONMENT, &[&taken]);
    }
    check(&["--listen", "nobody.invalid:1"], ENVIRONMENT, &["nobody.invalid:1"]);
    check(&["--listen", "0.0.0.0:0"], CONFIGURATION, &["--insecure"]);
}
