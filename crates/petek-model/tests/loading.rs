//! Model folders as they come, and as they should not come: each refused in one line that names the place.

use std::collections::BTreeMap;
use std::path::Path;

use petek_device::collective::Solo;
use petek_device::cpu::reference::Reference;
use petek_device::ops::{Format, SpanRows, StepCapacity, StepInputs};
use petek_model::decoder::{Decoder, DecoderOptions};
use petek_model::folder::ModelFolder;
use petek_model::safetensors_file::parse_header;
use petek_model::shard::Shard;
use serde_json::{Value, json};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn base_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "eos_token_id": 2, "bos_token_id": 1,
        "tie_word_embeddings": false, "torch_dtype": "float32"
    })
}

fn with(key: &str, value: Value) -> Value {
    let mut config = base_config();
    config[key] = value;
    config
}

fn random(shape: &[usize], seed: &mut u64) -> (Vec<usize>, Vec<f32>) {
    let values = (0..shape.iter().product()).map(|_| {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((*seed >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.4
    });
    (shape.to_vec(), values.collect())
}

/// The tensors that a config implies.
fn tensors(hidden: usize, query: usize, kv: usize, dim: usize, mlp: usize, vocabulary: usize) -> Tensors {
    let mut seed = 7;
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        ("lm_head.weight".to_owned(), vec![vocabulary, hidden]),
        (layer("input_layernorm"), vec![hidden]),
        (layer("post_attention_layernorm"), vec![hidden]),
        (layer("self_attn.q_proj"), vec![query * dim, hidden]),
        (layer("self_attn.k_proj"), vec![kv * dim, hidden]),
        (layer("self_attn.v_proj"), vec![kv * dim, hidden]),
        (layer("self_attn.o_proj"), vec![hidden, query * dim]),
        (layer("mlp.gate_proj"), vec![mlp, hidden]),
        (layer("mlp.up_proj"), vec![mlp, hidden]),
        (layer("mlp.down_proj"), vec![hidden, mlp]),
    ];
    shapes.into_iter().map(|(name, shape)| (name, random(&shape, &mut seed))).collect()
}

fn base_tensors() -> Tensors {
    tensors(64, 4, 2, 16, 96, 40)
}

fn safetensors_bytes(tensors: &Tensors) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (shape, values)) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    file_of(&Value::Object(header).to_string(), &data)
}

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn write_folder(root: &Path, config: &Value, tensors: &Tensors) {
    std::fs::write(root.join("config.json"), config.to_string()).expect("written");
    std::fs::write(root.join("model.safetensors"), safetensors_bytes(tensors)).expect("written");
}

fn opened(config: &Value, tensors: &Tensors) -> Result<ModelFolder, String> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    write_folder(dir.path(), config, tensors);
    ModelFolder::open(dir.path()).map_err(|error| error.to_string())
}

/// The logits after three tokens, by the reference executor.
fn logits(folder: &ModelFolder) -> Vec<f32> {
    let shard = Shard::plan(&folder.config, 1).expect("one rank").remove(0);
    let ops = Box::new(Reference::new(Format::F32, Solo::new_group()));
    let options =
        DecoderOptions { format: Format::F32, context: 64, vocabulary_drawn: folder.config.vocabulary };
    let mut decoder = Decoder::load(ops, &folder.config, shard, &folder.weights, options).expect("loaded");
    let capacity = StepCapacity { rows: 4, spans: 1, picks: 1, blocks_per_span: 4 };
    decoder.allocate(16, 4, capacity).expect("allocated");
    let spans = [SpanRows { row0: 0, rows: 3, start: 0, table0: 0 }];
    let inputs = StepInputs {
        ids: &[3, 17, 5],
        positions: &[0, 1, 2],
        spans: &spans,
        tables: &[0],
        zeroes: &[],
        copies: &[],
        picks: &[2],
        draws: &[],
    };
    decoder.step(&inputs).expect("stepped");
    decoder.logits(1).remove(0)
}

fn check_refused(what: &str, result: Result<ModelFolder, String>, parts: &[&str]) {
    match result {
        Ok(_) => panic!("{what}: was opened"),
        Err(error) => {
            for part in parts {
                assert!(error.contains(part), "{what}: {error:?} does not say {part:?}");
            }
            assert!(!error.contains('\n'), "{what}: one line: {error}");
        }
    }
}

#[test]
fn bad_configs_are_refused_by_key_and_number() {
    let cases = [
        (with("num_attention_heads", json!(0)), vec!["num_attention_heads is 0", "1 to 1024"]),
        (with("num_hidden_layers", json!(2_147_483_648_u64)), vec!["num_hidden_layers is 2147483648", "512"]),
        (with("num_hidden_layers", json!(-1)), vec!["config.json"]),
        (with("num_key_value_heads", json!(3)), vec!["num_key_value_heads is 3", "divide", "4"]),
        (with("hidden_size", json!(65_537)), vec!["hidden_size", "65536"]),
        (with("vocab_size", json!(4_000_001)), vec!["vocab_size", "4000000"]),
        (with("rms_norm_eps", json!("nan")), vec!["config.json"]),
        (with("rope_theta", json!(0.0)), vec!["rope_theta is 0"]),
        (
            with("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})),
            vec!["rope_type", "yarn", "llama3"],
        ),
        (with("rope_scaling", json!({"rope_type": "llama3"})), vec!["low_freq_factor is missing"]),
        (with("hidden_act", json!("gelu")), vec!["hidden_act", "gelu", "silu"]),
        (with("architectures", json!(["BertModel"])), vec!["architectures", "BertModel", "LlamaForCausalLM"]),
        (with("architectures", json!([])), vec!["architectures"]),
        (with("quantization_config", json!({"bits": 4})), vec!["quantization_config"]),
        (with("sliding_window", json!(4096)), vec!["sliding_window", "4096"]),
        (with("torch_dtype", json!("int8")), vec!["dtype", "int8"]),
        (with("eos_token_id", json!([2, 40])), vec!["eos_token_id is 40", "vocabulary of 40"]),
        (with("head_dim", json!(15)), vec!["head_dim is 15", "even"]),
        (with("hidden_size", json!(62)), vec!["hidden_size is 62", "num_attention_heads 4"]),
    ];
    for (config, parts) in cases {
        check_refused(&config.to_string(), opened(&config, &base_tensors()), &parts);
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join("config.json"), "{\"architectures\": [").expect("written");
    check_refused(
        "cut off",
        ModelFolder::open(dir.path()).map_err(|e| e.to_string()),
        &["config.json", "EOF"],
    );
}

/// Both spellings mean the same, and the newer one wins where both stand.
#[test]
fn both_spellings_mean_the_same() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32});
    let mut newer = base_config();
    newer.as_object_mut().expect("an object").remove("rope_theta");
    newer.as_object_mut().expect("an object").remove("torch_dtype");
    newer["dtype"] = json!("float32");
    newer["rope_parameters"] = llama3.clone();
    newer["rope_parameters"]["rope_theta"] = json!(500.0);
    let mut older = base_config();
    older["rope_theta"] = json!(500.0);
    older["rope_scaling"] = llama3;
    let mut both = newer.clone();
    both["rope_scaling"] = json!({"rope_type": "linear", "factor": 2.0});
    both["rope_theta"] = json!(7.0);
    let config = |value: &Value| opened(value, &base_tensors()).expect("opened").config;
    assert_eq!(config(&newer), config(&older));
    assert_eq!(config(&newer), config(&both));
}

#[test]
fn head_dim_may_be_given_null_or_derived() {
    let mut config = with("head_dim", json!(32));
    (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) =
        (json!(56), json!(3), json!(1));
    let own = opened(&config, &tensors(56, 3, 1, 32, 96, 40)).expect("hidden 56, heads 3, head_dim 32");
    assert_eq!(own.config.heads.dim, 32);
    assert!(logits(&own).iter().all(|logit| logit.is_finite()));

    config["hidden_size"] = json!(96);
    config["head_dim"] = Value::Null;
    assert_eq!(opened(&config, &tensors(96, 3, 1, 32, 96, 40)).expect("null").config.heads.dim, 32);

    config["hidden_size"] = json!(56);
    check_refused("56 / 3", opened(&config, &tensors(56, 3, 1, 32, 96, 40)), &["56", "3"]);
}

#[test]
fn tensors_that_do_not_fit_the_config_end_the_load_by_name() {
    let mut missing = base_tensors();
    missing.remove("model.layers.0.mlp.up_proj.weight");
    check_refused(
        "missing",
        opened(&base_config(), &missing),
        &["model.layers.0.mlp.up_proj.weight", "no file holds"],
    );

    let mut shaped = base_tensors();
    shaped.insert("model.norm.weight".into(), random(&[63], &mut 1));
    check_refused("shape", opened(&base_config(), &shaped), &["model.norm.weight", "[63]", "[64]"]);

    let mut stray = base_tensors();
    stray.insert("model.layers.0.mlp.gate_proj.bias".into(), random(&[96], &mut 1));
    check_refused(
        "bias",
        opened(&base_config(), &stray),
        &["model.layers.0.mlp.gate_proj.bias", "does not use"],
    );

    let mut tables = base_tensors();
    tables.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), random(&[8], &mut 1));
    opened(&base_config(), &tables).expect("rotary tables are passed over");

    let mut headless = base_tensors();
    headless.remove("lm_head.weight");
    check_refused(
        "headless",
        opened(&base_config(), &headless),
        &["lm_head.weight", "tie_word_embeddings is false"],
    );
}

#[test]
fn a_head_in_the_file_beats_the_tie_flag_aloud() {
    let tied = with("tie_word_embeddings", json!(true));
    let own = opened(&tied, &base_tensors()).expect("opened");
    assert!(own.warnings.iter().any(|warning| warning.0.contains("lm_head.weight")), "{:?}", own.warnings);
    let untied = opened(&base_config(), &base_tensors()).expect("opened");
    assert_eq!(logits(&own), logits(&untied));

    let mut same = base_tensors();
    let embedding = same["model.embed_tokens.weight"].clone();
    same.insert("lm_head.weight".into(), embedding);
    let quiet = opened(&tied, &same).expect("opened");
    assert!(quiet.warnings.is_empty(), "{:?}", quiet.warnings);
    let mut headless = same.clone();
    headless.remove("lm_head.weight");
    assert_eq!(logits(&quiet), logits(&opened(&tied, &headless).expect("opened")));
    assert_ne!(logits(&quiet), logits(&own));
}

/// The index assigns each tensor to one file; what else lies about changes neither logits nor revision.
#[test]
fn the_index_alone_says_which_tensor_is_meant() {
    let all = base_tensors();
    let norm = "model.norm.weight";
    let scaled = |factor: f32| {
        let (shape, values) = &all[norm];
        (shape.clone(), values.iter().map(|value| value * factor).collect::<Vec<_>>())
    };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = dir.path();
    std::fs::write(root.join("config.json"), base_config().to_string()).expect("written");
    let (first, second): (Tensors, Tensors) =
        all.clone().into_iter().partition(|(name, _)| name == norm || name.contains("layers"));
    let mut second_stale = second.clone();
    second_stale.insert(norm.into(), scaled(2.0));
    let write = |name: &str, tensors: &Tensors| {
        std::fs::write(root.join(name), safetensors_bytes(tensors)).expect("written")
    };
    write("model-00001-of-00002.safetensors", &first);
    write("model-00002-of-00002.safetensors", &second_stale);
    let map = |tensors: &Tensors, file: &str| -> Vec<(String, Value)> {
        tensors.keys().map(|name| (name.clone(), json!(file))).collect()
    };
    let mut weight_map: serde_json::Map<String, Value> =
        map(&first, "model-00001-of-00002.safetensors").into_iter().collect();
    weight_map.extend(map(&second, "model-00002-of-00002.safetensors"));
    let index = root.join("model.safetensors.index.json");
    std::fs::write(&index, json!({"metadata": {}, "weight_map": weight_map}).to_string()).expect("written");

    let sharded = ModelFolder::open(root).expect("opened");
    assert_eq!(logits(&sharded), logits(&opened(&base_config(), &all).expect("opened")));
    write("consolidated.safetensors", &BTreeMap::from([(norm.to_owned(), scaled(3.0))]));
    let with_stray = ModelFolder::open(root).expect("opened");
    assert_eq!(with_stray.revision, sharded.revision);
    assert_eq!(logits(&with_stray), logits(&sharded));

    let refused = |weight_map: &serde_json::Map<String, Value>, parts: &[&str]| {
        std::fs::write(&index, json!({"weight_map": weight_map}).to_string()).expect("written");
        check_refused("index", ModelFolder::open(root).map_err(|e| e.to_string()), parts);
    };
    let mut elsewhere = weight_map.clone();
    elsewhere.insert("model.embed_tokens.weight".into(), json!("model-00001-of-00002.safetensors"));
    refused(&elsewhere, &["model.embed_tokens.weight", "00001", "lacks"]);
    let mut shard_gone = weight_map.clone();
    shard_gone.insert(norm.into(), json!("model-00003-of-00002.safetensors"));
    refused(&shard_gone, &["read ", "model-00003-of-00002.safetensors: No such file"]);
    refused(&serde_json::Map::new(), &["model.safetensors.index.json: weight_map assigns no tensor"]);
    let outside = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(outside.path().join("x.safetensors"), safetensors_bytes(&all)).expect("written");
    let mut leading_out = weight_map.clone();
    let name =
        format!("../{}/x.safetensors", outside.path().file_name().and_then(|n| n.to_str()).expect("named"));
    leading_out.insert(norm.into(), json!(name));
    refused(&leading_out, &["outside the model folder"]);

    // A bias that the index names and the config does not use.
    let bias = "model.layers.0.mlp.gate_proj.bias";
    let mut first_biased = first.clone();
    first_biased.insert(bias.into(), random(&[96], &mut 1));
    write("model-00001-of-00002.safetensors", &first_biased);
    weight_map.insert(bias.into(), json!("model-00001-of-00002.safetensors"));
    refused(&weight_map, &[bias, "does not use"]);

    // One shard of two that is cut off.
    let whole = safetensors_bytes(&second_stale);
    std::fs::write(root.join("model-00002-of-00002.safetensors"), &whole[..whole.len() - 1])
        .expect("written");
    weight_map.remove(bias);
    refused(&weight_map, &["model-00002-of-00002.safetensors: safetensors header", "incomplete"]);
}

/// Truncated and lying files, and what is no model folder at all.
#[test]
fn broken_folders_are_refused_by_file() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = dir.path();
    let refused = |what: &str, parts: &[&str]| {
        check_refused(what, ModelFolder::open(root).map_err(|error| error.to_string()), parts);
    };
    refused("an empty folder", &["config.json: it is not there", "no Hugging Face model folder"]);
    std::fs::write(root.join("config.json"), base_config().to_string()).expect("written");
    refused("no weights", &["neither model.safetensors nor model.safetensors.index.json is there"]);
    std::fs::write(root.join("model.safetensors.index.json"), "{\"weight_map\": {").expect("written");
    refused("an index cut off", &["model.safetensors.index.json: EOF"]);

    let weights = root.join("model.safetensors");
    let whole = safetensors_bytes(&base_tensors());
    let header = "model.safetensors: safetensors header: ";
    for (what, kept, part) in [
        ("nothing", 0, "model.safetensors: the file is empty"),
        ("half a header", 300, header),
        ("all but a byte", whole.len() - 1, header),
    ] {
        std::fs::write(&weights, &whole[..kept]).expect("written");
        refused(what, &[part]);
    }
    // Two headers that lie: a shape that is not its bytes, and one that is and is not the config's.
    let norm = |shape: &str| {
        format!("\"model.norm.weight\":{{\"data_offsets\":[0,256],\"dtype\":\"F32\",\"shape\":{shape}}}")
    };
    let lying = file_of(&format!("{{{}}}", norm("[65]")), &[0; 256]);
    std::fs::write(&weights, lying).expect("written");
    refused("a shape that is not its bytes", &[header, "invalid shape"]);
    let mut reshaped = base_tensors();
    reshaped.get_mut("model.norm.weight").expect("there").0 = vec![8, 8];
    std::fs::write(&weights, safetensors_bytes(&reshaped)).expect("written");
    refused("a shape that is not the config's", &["tensor model.norm.weight", "[8, 8]", "[64]"]);
    let mut integers = whole.clone();
    let at = integers.windows(3).position(|bytes| bytes == b"F32").expect("a dtype");
    integers[at..at + 3].copy_from_slice(b"I32");
    std::fs::write(&weights, integers).expect("written");
    refused("whole numbers", &["dtype is none of F32, BF16, F16"]);

    std::fs::File::create(root.join("tokenizer.json")).and_then(|f| f.set_len((64 << 20) + 1)).expect("made");
    refused("a text file without end", &["tokenizer.json: 67108865 bytes; at most 67108864"]);
    let nowhere = ModelFolder::open(&root.join("nowhere")).map_err(|error| error.to_string());
    check_refused("no folder", nowhere, &["read ", "nowhere: No such file"]);
}

#[test]
fn a_changed_byte_changes_the_revision() {
    let base = opened(&base_config(), &base_tensors()).expect("opened");
    let mut changed = base_tensors();
    changed.get_mut("model.norm.weight").expect("there").1[3] += 1.0;
    assert_ne!(opened(&base_config(), &changed).expect("opened").revision, base.revision);
    assert_ne!(
        opened(&with("bos_token_id", json!(3)), &base_tensors()).expect("opened").revision,
        base.revision
    );
    // Pinned: a change of the layout breaks every block hash in a running cluster.
    assert_eq!(base.revision.to_string(), REVISION);
}

const REVISION: &str = "98883535ea364bc06f1149243ab72d7bd808641269650eb8b4e670930f664b22";

/// The header cases: a name, the bytes after the length, the data, and what a refusal must say.
#[test]
fn headers_are_checked_by_the_rules_of_the_format() {
    let tensor = |from: usize, to: usize| json!({"dtype": "F32", "shape": [(to - from) / 4], "data_offsets": [from, to]});
    let two = |a: Value, b: Value| json!({"a": a, "b": b}).to_string();
    let data = [0_u8; 16];
    let good = [
        ("empty metadata", format!("{{\"__metadata__\":{{}},{}", &two(tensor(0, 8), tensor(8, 16))[1..])),
        ("spaces after the header", two(tensor(0, 8), tensor(8, 16)) + "     "),
        ("names not in offset order", two(tensor(8, 16), tensor(0, 8))),
    ];
    for (what, header) in good {
        let parsed = parse_header(&file_of(&header, &data)).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(parsed.len(), 2, "{what}");
    }
    let ordinary = two(tensor(0, 8), tensor(8, 16));
    let huge = json!({"a": {"dtype": "F32", "shape": [8_589_934_592_u64, 8_589_934_592_u64], "data_offsets": [0, 0]}});
    let bad = [
        ("a byte after the last tensor", file_of(&ordinary, &[0; 17]), "header"),
        ("a hole", file_of(&two(tensor(0, 8), tensor(12, 20)), &[0; 20]), "invalid offset for tensor"),
        (
            "two tensors on one range",
            file_of(&two(tensor(0, 8), tensor(0, 8)), &data[..8]),
            "invalid offset for tensor",
        ),
        (
            "a name twice",
            file_of(&format!("{{\"a\":{0},\"a\":{0}}}", tensor(0, 8)), &data[..8]),
            "a stands twice",
        ),
        (
            "metadata value 1",
            file_of(&format!("{{\"__metadata__\":{{\"k\":1}},{}", &ordinary[1..]), &data),
            "header",
        ),
        ("a header length of 2^63", [&(1_u64 << 63).to_le_bytes()[..], b"{}"].concat(), "header"),
        ("a shape whose product overflows", file_of(&huge.to_string(), &[]), "a"),
        (
            "a shape that is not its bytes",
            file_of(
                &json!({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}).to_string(),
                &data,
            ),
            "a",
        ),
        ("cut off in the header", file_of(&ordinary, &data)[..40].to_vec(), "header"),
        ("cut off in the data", file_of(&ordinary, &data[..12]), "header"),
        ("nothing", Vec::new(), "header"),
    ];
    for (what, file, part) in bad {
        let error = parse_header(&file).err().unwrap_or_else(|| panic!("{what}: was read"));
        assert!(error.contains(part), "{what}: {error:?} does not say {part:?}");
    }
}
