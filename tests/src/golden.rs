//! The golden files of `tests/golden`: what they hold, where they lie, and the trial of a decoder's logits against
//! them. `tests/golden/README.md` says how they are made and where each bound comes from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Who made a file, and what else decides its bytes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// The command, from the repository's root.
    pub script: String,
    /// Version of each program and package that took part.
    pub versions: BTreeMap<String, String>,
    /// Seed of the random numbers, where there are any.
    pub seed: Option<u64>,
    /// Format that transformers computed in.
    pub dtype: Option<String>,
    /// Threads of torch.
    pub threads: Option<u32>,
    /// Instruction set that torch chose.
    pub cpu: Option<String>,
}

/// Numbers of one model folder: `model-<name>.json` and `text-<name>.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelGolden {
    /// Who made it.
    pub provenance: Provenance,
    /// Name of the model.
    pub model: String,
    /// The folder's files that went in, each with its sha256 in hex.
    pub sha256: BTreeMap<String, String>,
    /// Logits per position.
    pub vocab_size: usize,
    /// Format of the weights in the folder.
    pub weights_dtype: String,
    /// The prompts, each run whole.
    pub prompts: Vec<Prompt>,
    /// For each mistake that this model can show, the largest change of any logit that it makes.
    pub sensitivity: BTreeMap<String, f32>,
}

/// Teacher-forced float32 numbers of one prompt.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// What it is.
    pub name: String,
    /// Its token ids.
    pub ids: Vec<u32>,
    /// Mean over positions of −ln p(next id).
    pub mean_nll: f32,
    /// How far transformers' own runs are apart on this prompt.
    pub distance: Distances,
    /// The id of the largest logit, the lowest among equals: one per position.
    pub argmax: Vec<u32>,
    /// Largest logit less the second: one per position.
    pub top2_gap: Vec<f32>,
    /// Ids whose logits [`Position::probe_logits`] holds.
    pub probe_ids: Vec<u32>,
    /// The positions looked at closely, ascending.
    pub positions: Vec<Position>,
    /// All logits, position by position; empty where they would be too many.
    #[serde(default)]
    pub logits: Vec<Vec<f32>>,
}

/// One position of a prompt.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Index into the prompt's ids; the numbers are those of the token after it.
    pub position: usize,
    /// ln of the sum of e^logit.
    pub logsumexp: f32,
    /// The 20 most likely ids, most likely first.
    pub top_ids: Vec<u32>,
    /// Their log-probabilities.
    pub top_logprobs: Vec<f32>,
    /// Logits of the prompt's probe ids.
    pub probe_logits: Vec<f32>,
}

/// Distances of transformers' float32 from other runs of the same weights.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distances {
    /// From float64 throughout.
    pub float64: Distance,
    /// From transformers' float64 as it is: RMSNorm and rotary tables stay float32 in it. No bound uses it.
    pub float64_with_float32_parts: Distance,
    /// From its bfloat16.
    pub bfloat16: Distance,
}

/// How far two runs of a prompt are apart.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Distance {
    /// Largest difference of a logit, over all positions and all ids.
    pub logits: f32,
    /// Largest difference of a log-probability, over all positions and all ids.
    pub logprobs: f32,
    /// Mean over positions of the absolute difference of ln p(next id).
    pub nll: f32,
}

/// The arithmetic on trial (CPU.md, Numerics 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// float32 throughout; float16 weights, widened, are this too.
    F32,
    /// bfloat16 weights, matmul inputs and KV.
    Bf16,
}

impl Prompt {
    /// How far right numbers may be from these: 4 times float32's distance from float64, 2 times bfloat16's from
    /// float32.
    pub fn bounds(&self, arithmetic: Arithmetic) -> Distance {
        let (times, of) = match arithmetic {
            Arithmetic::F32 => (4.0, self.distance.float64),
            Arithmetic::Bf16 => (2.0, self.distance.bfloat16),
        };
        Distance { logits: times * of.logits, logprobs: times * of.logprobs, nll: times * of.nll }
    }
}

/// A decoder's logits held against a prompt's golden numbers, row by row, so that a large model's need not all be in
/// memory.
pub struct Trial<'a> {
    prompt: &'a Prompt,
    bounds: Distance,
    vocab_size: usize,
    rows: usize,
    nll_sum: f64,
    verdict: Verdict,
}

/// What a passed trial found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Largest share of the logits' bound that was used, 0 to 1.
    pub logits_share: f64,
    /// The same of log-probabilities.
    pub logprobs_share: f64,
    /// The same of the mean NLL.
    pub nll_share: f64,
    /// Rows whose argmax the bound decides, and so was compared.
    pub argmax_decided: usize,
}

impl<'a> Trial<'a> {
    /// A trial of one prompt of `golden`.
    pub fn new(golden: &ModelGolden, prompt: &'a Prompt, arithmetic: Arithmetic) -> Self {
        let (bounds, vocab_size) = (prompt.bounds(arithmetic), golden.vocab_size);
        Self { prompt, bounds, vocab_size, rows: 0, nll_sum: 0.0, verdict: Verdict::default() }
    }

    /// Takes the next position's logits: `[vocabulary]`.
    ///
    /// # Errors
    /// The first number outside its bound, with its position; a row too many or of another width.
    pub fn row(&mut self, logits: &[f32]) -> Result<()> {
        let (prompt, row) = (self.prompt, self.rows);
        let at = || format!("prompt `{}`, position {row}", prompt.name);
        ensure!(row < prompt.ids.len(), "{}: the prompt has {} tokens", at(), prompt.ids.len());
        ensure!(
            logits.len() == self.vocab_size,
            "{}: {} logits, not {}",
            at(),
            logits.len(),
            self.vocab_size
        );
        self.rows += 1;

        let logsumexp = logsumexp(logits);
        let logprob = |id: u32| f64::from(logits[id as usize]) - logsumexp;
        if let Some(&next) = prompt.ids.get(row + 1) {
            self.nll_sum -= logprob(next);
        }
        let argmax = argmax(logits);
        if prompt.top2_gap[row] > 2.0 * self.bounds.logits {
            let wanted = prompt.argmax[row];
            ensure!(argmax == wanted, "{}: the largest logit is of id {argmax}, not {wanted}", at());
            self.verdict.argmax_decided += 1;
        }

        let bounds = self.bounds;
        let share = &mut self.verdict.logits_share;
        if let Some(golden) = prompt.logits.get(row) {
            for (id, (&found, &wanted)) in logits.iter().zip(golden).enumerate() {
                *share =
                    share.max(used(found.into(), wanted, bounds.logits).with_context(|| logit_of(at, id))?);
            }
        }
        let Ok(index) = prompt.positions.binary_search_by_key(&row, |position| position.position) else {
            return Ok(());
        };
        let golden = &prompt.positions[index];
        let about = || format!("{}, logsumexp", at());
        *share = share.max(used(logsumexp, golden.logsumexp, bounds.logits).with_context(about)?);
        for (&id, &wanted) in prompt.probe_ids.iter().zip(&golden.probe_logits) {
            let found = logits[id as usize].into();
            *share =
                share.max(used(found, wanted, bounds.logits).with_context(|| logit_of(at, id as usize))?);
        }
        let share = &mut self.verdict.logprobs_share;
        for (&id, &wanted) in golden.top_ids.iter().zip(&golden.top_logprobs) {
            let about = || format!("{}, log-probability of id {id}", at());
            *share = share.max(used(logprob(id), wanted, bounds.logprobs).with_context(about)?);
        }
        Ok(())
    }

    /// Ends the trial.
    ///
    /// # Errors
    /// Rows are missing, or the mean NLL is outside its bound.
    pub fn finish(mut self) -> Result<Verdict> {
        let (prompt, rows) = (self.prompt, self.rows);
        ensure!(rows == prompt.ids.len(), "prompt `{}`: {rows} rows of {}", prompt.name, prompt.ids.len());
        let mean = self.nll_sum / (rows - 1) as f64;
        let about = || format!("prompt `{}`, mean NLL", prompt.name);
        self.verdict.nll_share = used(mean, prompt.mean_nll, self.bounds.nll).with_context(about)?;
        Ok(self.verdict)
    }
}

/// The share of `bound` that lies between two numbers; an error past 1, or where either is not a number.
fn used(found: f64, wanted: f32, bound: f32) -> Result<f64> {
    let share = (found - f64::from(wanted)).abs() / f64::from(bound);
    if share <= 1.0 {
        Ok(share)
    } else {
        bail!("found {found}, not {wanted} ± {bound:e}: {share:.1} times the bound")
    }
}

fn logit_of(at: impl Fn() -> String, id: usize) -> String {
    format!("{}, logit of id {id}", at())
}

fn logsumexp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    logits.iter().map(|&z| (f64::from(z) - max).exp()).sum::<f64>().ln() + max
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).reduce(|best, id| if logits[id] > logits[best] { id } else { best });
    best.unwrap_or_default() as u32
}

/// What a tokeniser says: `tokenizer-<name>.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerGolden {
    /// Who made it.
    pub provenance: Provenance,
    /// Name of the tokeniser.
    pub tokenizer: String,
    /// Sha256 of its tokenizer.json, in hex.
    pub sha256: BTreeMap<String, String>,
    /// Ids in all, added tokens included.
    pub vocab_size: usize,
    /// Texts and their ids.
    pub strings: Vec<TokenizedString>,
    /// Random ids and their text.
    pub id_lists: Vec<IdList>,
}

/// A text, its ids, and what those read back as.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizedString {
    /// The text.
    pub text: String,
    /// Its ids alone.
    pub ids: Vec<u32>,
    /// With what the post-processor adds.
    pub ids_with_added: Vec<u32>,
    /// As `ids`, but control tokens within the text are plain text.
    pub ids_control_as_text: Vec<u32>,
    /// Text of `ids_with_added`.
    pub decoded: String,
    /// The same, special tokens left out.
    pub decoded_without_special: String,
}

/// A list of ids, and its text by `tokenizers`; bytes that are no UTF-8 may read otherwise in petek (BEHAVIOUR 3.1).
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdList {
    /// The ids.
    pub ids: Vec<u32>,
    /// Their text.
    pub decoded: String,
    /// The same, special tokens left out.
    pub decoded_without_special: String,
}

/// Chat templates rendered: `chat.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatGolden {
    /// Who made it.
    pub provenance: Provenance,
    /// Conversations.
    pub chats: Vec<Chat>,
    /// Small templates, each of one thing, over one user message " Hi ".
    pub snippets: Vec<Snippet>,
}

/// One conversation in one template.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chat {
    /// What it shows.
    pub name: String,
    /// Template: [`template`] reads it.
    pub template: String,
    /// Tokeniser: [`tokenizer_folder`] finds it.
    pub tokenizer: String,
    /// Messages as a client sends them.
    pub messages: Vec<Value>,
    /// Tools as a client sends them; `None` is the template's `none`.
    pub tools: Option<Vec<Value>>,
    /// Whether the template is asked to open the answer.
    pub add_generation_prompt: bool,
    /// Variables besides.
    pub variables: Map<String, Value>,
    /// The text, unless the template refuses.
    pub text: Option<String>,
    /// The message with which the template refuses.
    pub error: Option<String>,
    /// Ids of the text, control tokens within contents being plain text.
    #[serde(default)]
    pub ids: Vec<u32>,
    /// What transformers gives by default: control tokens within contents act.
    #[serde(default)]
    pub ids_if_content_acted: Vec<u32>,
}

/// One small template.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snippet {
    /// Its source.
    pub template: String,
    /// Variables besides.
    pub variables: Map<String, Value>,
    /// The text, unless the template refuses.
    pub text: Option<String>,
    /// The message with which the template refuses.
    pub error: Option<String>,
}

/// The folder of all goldens.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// A micro model's Hugging Face folder; it has no tokeniser.
pub fn model_folder(name: &str) -> PathBuf {
    folder().join("models").join(name)
}

/// A tokeniser's folder: tokenizer.json, tokenizer_config.json, and a template inline or beside.
pub fn tokenizer_folder(name: &str) -> PathBuf {
    folder().join("tokenizers").join(name)
}

/// A chat template's source.
pub fn template(name: &str) -> Result<String> {
    let path = folder().join("templates").join(name).with_extension("jinja");
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// Names of the goldens of a kind, `model`, `text` or `tokenizer`, sorted.
pub fn names(kind: &str) -> Result<Vec<String>> {
    let prefix = format!("{kind}-");
    let mut names = Vec::new();
    for entry in fs::read_dir(folder()).context("list the goldens")? {
        let file = entry?.file_name();
        let name = file.to_str().and_then(|file| file.strip_prefix(&prefix)?.strip_suffix(".json"));
        names.extend(name.map(String::from));
    }
    names.sort();
    Ok(names)
}

/// The numbers of a micro model, whose folder is [`model_folder`].
pub fn model(name: &str) -> Result<ModelGolden> {
    read(&format!("model-{name}.json"))
}

/// The numbers of a model whose folder is made elsewhere, on our texts.
pub fn text(name: &str) -> Result<ModelGolden> {
    read(&format!("text-{name}.json"))
}

/// What a tokeniser says.
pub fn tokenizer(name: &str) -> Result<TokenizerGolden> {
    read(&format!("tokenizer-{name}.json"))
}

/// The chat templates' golden.
pub fn chat() -> Result<ChatGolden> {
    read("chat.json")
}

fn read<T: DeserializeOwned>(file: &str) -> Result<T> {
    let path = folder().join(file);
    let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes)
        .with_context(|| format!("{file} is not what its loader knows; make it again"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use sha2::{Digest, Sha256};

    use super::*;
    use crate::demo;

    const FILE_BYTES_MAX: u64 = 1_000_000;

    fn all_models() -> Vec<ModelGolden> {
        let models = names("model").unwrap().into_iter().map(|name| model(&name).unwrap());
        models.chain(names("text").unwrap().into_iter().map(|name| text(&name).unwrap())).collect()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn check_sha256(golden: &str, sums: &BTreeMap<String, String>, folder: &Path) {
        assert!(!sums.is_empty(), "{golden} names its files");
        for (file, sum) in sums {
            let bytes =
                fs::read(folder.join(file)).unwrap_or_else(|error| panic!("{golden}: {file}: {error}"));
            assert_eq!(&hex(&Sha256::digest(bytes)), sum, "{golden}: {file} is not the one it was made from");
        }
    }

    fn check_provenance(file: &str, provenance: &Provenance, packages: &[&str]) {
        assert!(
            provenance.script.starts_with("tests/golden/make_goldens.py "),
            "{file}: {}",
            provenance.script
        );
        for package in packages {
            let version = provenance.versions.get(*package);
            assert!(
                version.is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit())),
                "{file}: {package}"
            );
        }
    }

    #[test]
    fn every_file_loads_is_small_and_names_who_made_it() {
        let mut open = vec![folder()];
        let mut goldens = 0;
        while let Some(path) = open.pop() {
            if path.is_dir() {
                open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                continue;
            }
            let bytes = path.metadata().unwrap().len();
            assert!(bytes <= FILE_BYTES_MAX, "{} has {bytes} bytes", path.display());
            if path.parent() != Some(&folder()) || path.extension().is_none_or(|end| end != "json") {
                continue;
            }
            goldens += 1;
            let file = path.file_stem().unwrap().to_str().unwrap();
            match file.split_once('-').unwrap_or((file, "")) {
                (kind @ ("model" | "text"), name) => {
                    let golden = if kind == "model" { model(name) } else { text(name) }.unwrap();
                    assert_eq!(golden.model, name);
                    check_provenance(
                        file,
                        &golden.provenance,
                        &["torch", "transformers", "tokenizers", "numpy"],
                    );
                    assert_eq!(golden.provenance.dtype.as_deref(), Some("float32"));
                    assert_eq!(golden.provenance.seed.is_some(), kind == "model");
                }
                ("tokenizer", name) => {
                    let golden = tokenizer(name).unwrap();
                    assert_eq!(golden.tokenizer, name);
                    check_provenance(file, &golden.provenance, &["tokenizers"]);
                }
                ("chat", "") => {
                    check_provenance(file, &chat().unwrap().provenance, &["transformers", "jinja2"]);
                }
                other => panic!("nothing loads {other:?}"),
            }
        }
        assert!(goldens >= 12, "{goldens} goldens");
    }

    #[test]
    fn goldens_belong_to_the_folders_beside_them() {
        let folders = fs::read_dir(folder().join("models")).unwrap();
        let folders: BTreeSet<_> =
            folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(folders, names("model").unwrap().into_iter().collect());
        for name in folders {
            check_sha256(&name, &model(&name).unwrap().sha256, &model_folder(&name));
        }
        for name in ["bytelevel", "bytefallback"] {
            check_sha256(name, &tokenizer(name).unwrap().sha256, &tokenizer_folder(name));
        }
        check_sha256("demo", &text("demo").unwrap().sha256, &demo::dir());
        check_sha256("demo", &tokenizer("demo").unwrap().sha256, &demo::dir());
        for chat in chat().unwrap().chats {
            assert!(
                template(&chat.template).is_ok() && tokenizer_folder(&chat.tokenizer).is_dir(),
                "{}",
                chat.name
            );
            assert_ne!(chat.text.is_some(), chat.error.is_some(), "{}", chat.name);
            assert_eq!(chat.text.is_some(), !chat.ids.is_empty(), "{}", chat.name);
        }
    }

    #[test]
    fn numbers_fit_together() {
        for golden in all_models() {
            for prompt in &golden.prompts {
                let at = format!("{}, {}", golden.model, prompt.name);
                let tokens = prompt.ids.len();
                assert!(prompt.ids.iter().all(|&id| (id as usize) < golden.vocab_size), "{at}");
                assert_eq!((prompt.argmax.len(), prompt.top2_gap.len()), (tokens, tokens), "{at}");
                assert!(prompt.positions.is_sorted_by(|a, b| a.position < b.position), "{at}");
                assert_eq!(prompt.positions.last().unwrap().position, tokens - 1, "{at}");
                for position in &prompt.positions {
                    let row = position.position;
                    assert_eq!(
                        (position.top_ids.len(), position.top_logprobs.len()),
                        (20, 20),
                        "{at}: {row}"
                    );
                    assert_eq!(position.probe_logits.len(), prompt.probe_ids.len(), "{at}: {row}");
                    assert_eq!(position.top_ids[0], prompt.argmax[row], "{at}: {row}");
                    assert!(position.top_logprobs.is_sorted_by(|a, b| a >= b), "{at}: {row}");
                    assert!(position.top_logprobs[0] < 0.0 && position.logsumexp.is_finite(), "{at}: {row}");
                }
                for row in &prompt.logits {
                    assert_eq!(row.len(), golden.vocab_size, "{at}");
                }
            }
            // Attention is cut at 256: each model has a prompt that crosses it.
            assert!(golden.prompts.iter().any(|prompt| prompt.ids.len() >= 300), "{}", golden.model);
        }
    }

    /// A bound under which a real mistake would pass is worthless.
    #[test]
    fn mistakes_stand_far_above_the_bounds() {
        let mut seen = BTreeSet::new();
        for golden in all_models() {
            let long = golden.prompts.last().unwrap();
            for (mistake, &change) in &golden.sensitivity {
                let times = change / long.bounds(Arithmetic::F32).logits;
                // Epsilon: 1e-6 for 1e-5, beside a mean square of about 0.03 where the embedding goes in.
                let least = if mistake == "norm_eps_default" { 10.0 } else { 1000.0 };
                assert!(times > least, "{}: {mistake} is {times} times the bound", golden.model);
                seen.insert(mistake.clone());
                if mistake == "rotary_pairs_interleaved" {
                    let times = change / long.bounds(Arithmetic::Bf16).logits;
                    assert!(times > 5.0, "{}: {mistake} is {times} times bfloat16's bound", golden.model);
                }
            }
        }
        let all = [
            "attention_biases_dropped",
            "attention_scale_from_width",
            "gelu_for_silu",
            "key_256_hidden",
            "mlp_biases_dropped",
            "norm_eps_default",
            "query_heads_on_wrong_kv_head",
            "rope_scaling_dropped",
            "rotary_pairs_interleaved",
        ];
        assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), all);
    }

    /// Runs a trial over the prompt's own logits after `change` has been at them.
    fn try_changed(
        golden: &ModelGolden,
        arithmetic: Arithmetic,
        change: impl Fn(&mut Vec<Vec<f32>>),
    ) -> Result<Verdict> {
        let prompt = &golden.prompts[0];
        let mut rows = prompt.logits.clone();
        change(&mut rows);
        let mut trial = Trial::new(golden, prompt, arithmetic);
        for row in &rows {
            trial.row(row)?;
        }
        trial.finish()
    }

    #[test]
    fn a_trial_passes_what_it_should() {
        for name in names("model").unwrap() {
            let golden = model(&name).unwrap();
            let verdict = try_changed(&golden, Arithmetic::F32, |_| ()).unwrap();
            assert_eq!(verdict.argmax_decided, golden.prompts[0].ids.len(), "{name}");
            // The file's numbers are rounded: nothing else may part them from its own logits.
            let worst = verdict.logits_share.max(verdict.logprobs_share).max(verdict.nll_share);
            assert!(worst < 0.2, "{name}: {verdict:?}");
        }
    }

    #[test]
    fn a_trial_finds_what_it_should() {
        let golden = model("gqa").unwrap();
        let prompt = &golden.prompts[0];
        let bounds = prompt.bounds(Arithmetic::F32);
        let check = |words: &str, change: &dyn Fn(&mut Vec<Vec<f32>>)| {
            let error = try_changed(&golden, Arithmetic::F32, change).expect_err(words);
            assert!(format!("{error:#}").contains(words), "`{words}` is not in `{error:#}`");
        };
        check("position 3, logit of id 7", &|rows| rows[3][7] += 1.1 * bounds.logits);
        check("position 3, logit of id 7", &|rows| rows[3][7] = f32::NAN);
        check("position 0, logit of id 0", &|rows| {
            rows[0].iter_mut().for_each(|z| *z += 1.1 * bounds.logits)
        });
        check("11 rows of 12", &|rows| rows.truncate(11));
        check("the prompt has 12 tokens", &|rows| rows.push(rows[0].clone()));
        check("127 logits, not 128", &|rows| rows[5].truncate(127));
        check("the largest logit is of id", &|rows| {
            let best = prompt.argmax[5] as usize;
            rows[5][best] -= prompt.top2_gap[5] + bounds.logits;
        });

        // Where a prompt has no full logits, what is left must find the same.
        let mut golden = golden.clone();
        golden.prompts[0].logits.clear();
        let prompt = &golden.prompts[0];
        let rows = &model("gqa").unwrap().prompts[0].logits;
        let sum_only = |change: f32, ids: &[u32]| {
            let mut trial = Trial::new(&golden, prompt, Arithmetic::F32);
            let mut row = rows[0].clone();
            ids.iter().for_each(|&id| row[id as usize] += change);
            format!("{:#}", trial.row(&row).unwrap_err())
        };
        let probe = prompt.probe_ids[2];
        assert!(sum_only(1.1 * bounds.logits, &[probe]).contains(&format!("logit of id {probe}")));
        let best = prompt.positions[0].top_ids[1];
        assert!(sum_only(2.0 * bounds.logprobs, &[best]).contains(&format!("log-probability of id {best}")));
        let every: Vec<u32> = (0..golden.vocab_size as u32).collect();
        assert!(sum_only(1.1 * bounds.logits, &every).contains("logsumexp"));

        // All probabilities of the next ids a little lower: each within its bound, the mean NLL not.
        let small = 0.5 * bounds.logits.min(bounds.logprobs);
        let mut trial = Trial::new(&golden, prompt, Arithmetic::F32);
        for (row, logits) in rows.iter().enumerate() {
            let mut logits = logits.clone();
            if let Some(&next) = prompt.ids.get(row + 1) {
                logits[next as usize] -= small;
            }
            trial.row(&logits).unwrap();
        }
        assert!(small > bounds.nll, "the case needs room: {bounds:?}");
        assert!(format!("{:#}", trial.finish().unwrap_err()).contains("mean NLL"));
    }
}
