//! A Hugging Face model folder, opened: its text files, its config, its weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use petek_core::hash::Revision;
use petek_device::file::MappedFile;
use serde::Deserialize;

use crate::LoadError;
use crate::config::DecoderConfig;
use crate::revision::revision;
use crate::weights::{Warning, Weights};

/// Text files are read whole, so they have a bound.
const TEXT_FILE_BYTES_MAX: u64 = 64 << 20;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What a folder holds. Weights are mapped, not read.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    /// The folder, symlinks resolved.
    pub root: PathBuf,
    /// `config.json`, checked.
    pub config: DecoderConfig,
    /// The text files as they are.
    pub texts: Texts,
    /// The weights.
    pub weights: Weights,
    /// Identity of the files.
    pub revision: Revision,
    /// What is served all the same and should be known.
    pub warnings: Vec<Warning>,
}

/// The text files of a folder; an absent one is `None`.
#[derive(Clone, Debug, Default)]
pub struct Texts {
    /// `config.json`.
    pub config: Vec<u8>,
    /// `generation_config.json`.
    pub generation: Option<Vec<u8>>,
    /// `tokenizer.json`.
    pub tokenizer: Option<Vec<u8>>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Vec<u8>>,
    /// `chat_template.jinja`.
    pub chat_template: Option<Vec<u8>>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl ModelFolder {
    /// Opens a folder and checks everything that can be checked without computing.
    ///
    /// Weights are `model.safetensors` where it stands (as transformers chooses), else the shards that
    /// `model.safetensors.index.json` assigns tensors to; no other file is looked at.
    ///
    /// *Errors*: [`LoadError`], one line, naming file and key or tensor.
    pub fn open(root: &Path) -> Result<Self, LoadError> {
        let root = root
            .canonicalize()
            .map_err(|source| LoadError::Read { file: root.display().to_string(), source })?;
        let texts = Texts {
            config: required_text(&root, "config.json")?,
            generation: text(&root, "generation_config.json")?,
            tokenizer: text(&root, "tokenizer.json")?,
            tokenizer_config: text(&root, "tokenizer_config.json")?,
            chat_template: text(&root, "chat_template.jinja")?,
        };
        Self::of(root.clone(), texts, |config| open_weights(&root, config))
    }

    /// A model that the binary carries in itself: `name` stands for its folder, `weights` is its one safetensors file.
    ///
    /// *Errors*: as [`ModelFolder::open`].
    pub fn embedded(name: &str, texts: Texts, weights: &'static [u8]) -> Result<Self, LoadError> {
        let file = MappedFile::embedded(SINGLE, weights);
        Self::of(PathBuf::from(name), texts, |config| Weights::new(vec![file], None, config))
    }

    fn of(
        root: PathBuf,
        texts: Texts,
        open: impl FnOnce(&DecoderConfig) -> Result<(Weights, Vec<Warning>), LoadError>,
    ) -> Result<Self, LoadError> {
        let config = DecoderConfig::parse(&texts.config)?;
        let (weights, warnings) = open(&config)?;
        let revision = revision(&texts, &weights);
        Ok(Self { root, config, texts, weights, revision, warnings })
    }
}

fn open_weights(root: &Path, config: &DecoderConfig) -> Result<(Weights, Vec<Warning>), LoadError> {
    if root.join(SINGLE).exists() {
        return Weights::new(vec![map(root, SINGLE)?], None, config);
    }
    let Some(json) = text(root, INDEX)? else {
        let problem = format!("neither {SINGLE} nor {INDEX} is there; petek reads safetensors only");
        return Err(LoadError::File { file: root.display().to_string(), problem });
    };
    let problem = |problem: String| LoadError::File { file: INDEX.to_owned(), problem };
    let index: Index = serde_json::from_slice(&json).map_err(|e| problem(e.to_string()))?;
    let mut names: Vec<&String> = index.weight_map.values().collect();
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(problem("weight_map assigns no tensor".to_owned()));
    }
    let files = names.iter().map(|name| map(root, name)).collect::<Result<Vec<_>, _>>()?;
    let number: BTreeMap<&String, usize> = names.iter().copied().zip(0..).collect();
    let assigned = index.weight_map.iter().map(|(tensor, file)| (tensor.clone(), number[file])).collect();
    Weights::new(files, Some(&assigned), config)
}

/// A file's path, proven to lie under the folder once symlinks are resolved.
fn inside(root: &Path, name: &str) -> Result<PathBuf, LoadError> {
    let path = root.join(name);
    let resolved =
        path.canonicalize().map_err(|source| LoadError::Read { file: path.display().to_string(), source })?;
    if resolved.starts_with(root) || links_of_a_cache(root, &resolved) {
        return Ok(resolved);
    }
    let problem = format!("it leads outside the model folder, to {}", resolved.display());
    Err(LoadError::File { file: path.display().to_string(), problem })
}

/// Hugging Face's cache keeps `snapshots/<commit>/file` as a link to `blobs/<hash>`, two folders up: the one layout in which a
/// file of the folder lies beside it.
fn links_of_a_cache(root: &Path, resolved: &Path) -> bool {
    let cache = root.parent().filter(|parent| parent.ends_with("snapshots")).and_then(Path::parent);
    cache.is_some_and(|cache| resolved.starts_with(cache.join("blobs")))
}

fn map(root: &Path, name: &str) -> Result<MappedFile, LoadError> {
    let path = inside(root, name)?;
    MappedFile::open(path).map_err(|source| LoadError::Read { file: name.to_owned(), source })
}

fn required_text(root: &Path, name: &str) -> Result<Vec<u8>, LoadError> {
    text(root, name)?.ok_or_else(|| LoadError::File {
        file: root.join(name).display().to_string(),
        problem: "it is not there: this is no Hugging Face model folder".to_owned(),
    })
}

fn text(root: &Path, name: &str) -> Result<Option<Vec<u8>>, LoadError> {
    if !root.join(name).exists() {
        return Ok(None);
    }
    let path = inside(root, name)?;
    let read = |source| LoadError::Read { file: name.to_owned(), source };
    let bytes = std::fs::metadata(&path).map_err(read)?.len();
    if bytes > TEXT_FILE_BYTES_MAX {
        let problem = format!("{bytes} bytes; at most {TEXT_FILE_BYTES_MAX} are read");
        return Err(LoadError::File { file: name.to_owned(), problem });
    }
    std::fs::read(&path).map(Some).map_err(read)
}
