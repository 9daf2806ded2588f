//! From a model folder and the machine's memory to what a worker serves with.

use std::path::Path;
use std::sync::Arc;

use petek_core::ids::Epoch;
use petek_core::limits::engine as limit;
use petek_core::params::{CacheUse, ModelLimits, SamplingDefaults};
use petek_core::scheduler::SchedulerConfig;
use petek_model::folder::{ModelFolder, Texts};
use petek_model::rank::LogitsHash;
use petek_model::replica::{CpuModel, CpuOptions, ReplicaOptions};
use petek_proto::hello::{WIRE, WorkerIdentity};
use petek_service::{Exit, Failure};
use petek_text::{CardFile, GenerationDefaults, ModelCard};
use petek_worker::WorkerParts;
use petek_worker::ranks::RankRunner;
use serde_json::{Map, Value};
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use super::process::random;
use super::settings::{EngineSettings, GenerationConfig, OnOff, or_default};
use crate::card::text_of;

/// A model that was opened and checked: workers are made of it.
pub(crate) struct Served {
    pub(crate) name: String,
    aliases: Vec<String>,
    model: Arc<CpuModel>,
    card: ModelCard,
    text_hash: [u8; 32],
    limits: ModelLimits,
}

/// A worker's share of the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share {
    pub(crate) threads: usize,
    /// Busy threads of the process beside these.
    pub(crate) threads_beside: usize,
    pub(crate) kv_bytes: u64,
    /// A cache that holds more than this many whole contexts is of no use here.
    pub(crate) contexts_max: usize,
}

/// Opens what is to be served: the folder, or the demo model.
///
/// # Errors
/// [`Exit::Configuration`] with one line that names file and key.
pub(crate) fn open(dir: Option<&Path>, engine: &EngineSettings) -> Result<Served, Failure> {
    let folder = match dir {
        Some(dir) => ModelFolder::open(dir),
        None => crate::demo::folder(),
    };
    let folder = folder.map_err(|error| configuration(error.to_string()))?;
    folder
        .warnings
        .iter()
        .for_each(|warning| tracing::warn!(model = %folder.root.display(), "{}", warning.0));
    let name = match (&engine.name, dir) {
        (Some(name), _) => name.clone(),
        (None, None) => "demo".to_owned(),
        (None, Some(_)) => folder.root.file_name().map_or_else(
            || Err(configuration(format!("{}: the folder has no name: give --name", folder.root.display()))),
            |name| Ok(name.to_string_lossy().into_owned()),
        )?,
    };
    let card = card_of(&folder.texts, engine.generation_config)?;
    let text = text_of(&card, folder.config.vocabulary)?;
    if let Some(warning) = text.defaults.warning() {
        tracing::warn!(model = %folder.root.display(), "{warning}");
    }
    let GenerationDefaults { temperature, top_k, top_p, min_p, .. } = text.defaults;
    let defaults = SamplingDefaults::of_model(temperature, top_k, top_p, min_p)
        .map_err(|refusal| configuration(format!("generation_config.json: {refusal}")))?;
    let format = engine.dtype.as_deref().map(crate::format_of).transpose();
    let format = format.map_err(|why| configuration(format!("settings: engine.dtype: {why}")))?;
    let vocabulary = folder.config.vocabulary;
    if engine.context > folder.config.context {
        let what = format!(
            "settings: engine.context: {} is beyond the {} positions of the model",
            engine.context, folder.config.context
        );
        return Err(configuration(what));
    }
    let options = CpuOptions {
        format,
        tp: or_default(engine.tp, 1),
        context: or_default(engine.context, folder.config.context),
        vocabulary_drawn: text.tokenizer.tokens().len().min(vocabulary),
    };
    let model = CpuModel::new(folder, options).map_err(|error| configuration(error.to_string()))?;
    let limits = ModelLimits {
        vocabulary: vocabulary as u32,
        context_tokens: model.context() as u32,
        eos_ids: text.eos_ids.into(),
        defaults,
    };
    let text_hash = *card.text_hash().as_bytes();
    Ok(Served { name, aliases: engine.aliases.clone(), model: Arc::new(model), card, text_hash, limits })
}

impl Served {
    /// Loads a worker's ranks and says what it serves with. Blocks while weights are read.
    ///
    /// # Errors
    /// [`Exit::Configuration`] for settings or weights that cannot be, [`Exit::Environment`] for memory or threads that are
    /// not to be had.
    pub(crate) fn worker(
        &self,
        id: String,
        engine: &EngineSettings,
        share: Share,
    ) -> Result<WorkerParts, Failure> {
        let scheduler = self.scheduler(engine, share)?;
        let context_tokens = self.context_in(&scheduler);
        if context_tokens < self.limits.context_tokens {
            tracing::warn!(
                worker = id,
                asked = self.limits.context_tokens,
                served = context_tokens,
                blocks = scheduler.blocks,
                "the context is lowered to what the KV cache holds: give it more with --kv-memory"
            );
        }
        let options = ReplicaOptions {
            threads: share.threads,
            threads_beside: share.threads_beside,
            block_tokens: scheduler.block_size as usize,
            blocks: scheduler.blocks as usize,
            slots: scheduler.slots as usize,
            step_rows: scheduler.step_rows as usize,
            logits_hash: LogitsHash::Off,
        };
        let group = self.model.start(options).map_err(|error| configuration(error.to_string()))?;
        let numerics = self.model.numerics();
        tracing::info!(
            worker = id,
            model = self.name,
            revision = %scheduler.revision,
            numerics = numerics.text(),
            blocks = scheduler.blocks,
            block_size = scheduler.block_size,
            context_tokens,
            "model loaded"
        );
        let identity = WorkerIdentity {
            worker: id,
            epoch: Epoch(random()?),
            revision: scheduler.revision,
            text_hash: self.text_hash,
            block_size: scheduler.block_size,
            numerics_id: numerics.id(),
            wire: WIRE.max,
        };
        Ok(WorkerParts {
            identity,
            name: self.name.clone(),
            aliases: self.aliases.clone(),
            card: self.card.clone(),
            limits: ModelLimits { context_tokens, ..self.limits.clone() },
            tp: numerics.ranks as u32,
            scheduler,
            runner: Box::new(RankRunner::new(group)),
        })
    }

    /// Memory for the KV cache of each of `workers`, by the settings; `share_default` of the free memory for all of them
    /// together where they say nothing.
    ///
    /// # Errors
    /// [`Exit::Configuration`] for a size that is none.
    pub(crate) fn kv_bytes(
        &self,
        engine: &EngineSettings,
        share_default: f64,
        workers: usize,
    ) -> Result<u64, Failure> {
        let size = match &engine.kv_memory {
            None => Some(Size::Share(share_default)),
            Some(text) => parse_size(text),
        };
        match size {
            Some(Size::Bytes(bytes)) => Ok(bytes),
            Some(Size::Share(share)) => {
                let free = free_memory()?.saturating_sub(self.weight_bytes());
                Ok((free as f64 * share) as u64 / workers.max(1) as u64)
            }
            None => Err(configuration(
                "settings: engine.kv_memory: bytes (8589934592, 8GiB, 512MiB) or a share of the free memory (25%) are needed"
                    .into(),
            )),
        }
    }

    /// Bytes of a cache that holds one whole context.
    pub(crate) fn context_bytes(&self, engine: &EngineSettings) -> u64 {
        let block = engine.block_size().max(1) as usize;
        (self.model.context().div_ceil(block) * self.model.block_bytes(block)) as u64
    }

    fn scheduler(&self, engine: &EngineSettings, share: Share) -> Result<SchedulerConfig, Failure> {
        let block_size = engine.block_size();
        let is_legal = block_size.is_power_of_two()
            && (limit::BLOCK_TOKENS_MIN..=limit::BLOCK_TOKENS_MAX).contains(&block_size);
        if !is_legal {
            let what = format!(
                "settings: engine.block_size: a power of two from 16 to 256 is needed, not {block_size}"
            );
            return Err(configuration(what));
        }
        let block_bytes = self.model.block_bytes(block_size as usize) as u64;
        let most = self.model.context().div_ceil(block_size as usize).saturating_mul(share.contexts_max);
        let blocks = (share.kv_bytes / block_bytes).min(most as u64).min(u64::from(u32::MAX) - 1) as u32;
        let slots = or_default(engine.slots, limit::SLOTS_DEFAULT.min(blocks.max(1)));
        let step_rows = or_default(engine.step_rows, limit::STEP_ROWS_DEFAULT.max(slots));
        let config = SchedulerConfig {
            revision: self.model.folder().revision,
            blocks,
            block_size,
            slots,
            step_rows,
            queue: or_default(engine.queue, limit::QUEUE_DEFAULT),
            prefix_cache: match engine.prefix_cache {
                OnOff::On => CacheUse::Shared,
                OnOff::Off => CacheUse::Bypassed,
            },
        };
        if blocks == 0 {
            let what = format!("the KV cache gets {} bytes; one block takes {block_bytes}", share.kv_bytes);
            return Err(Failure::new(Exit::Configuration, what, "give it more with --kv-memory"));
        }
        config.check_served().map_err(|fault| configuration(format!("settings: engine: {fault}")))?;
        Ok(config)
    }

    /// The context that one sequence can have in the whole pool.
    fn context_in(&self, scheduler: &SchedulerConfig) -> u32 {
        let held = u64::from(scheduler.blocks) * u64::from(scheduler.block_size);
        self.limits.context_tokens.min(u32::try_from(held).unwrap_or(u32::MAX))
    }

    /// About what the packed weights take.
    fn weight_bytes(&self) -> u64 {
        let folder = self.model.folder();
        let stored: usize = folder.weights.iter().map(|(_, _, bytes)| bytes.len()).sum();
        (stored * self.model.format().bytes() / folder.weights.format().bytes().max(1)) as u64
    }
}

/// What a size setting says.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Size {
    Bytes(u64),
    Share(f64),
}

fn parse_size(text: &str) -> Option<Size> {
    let text = text.trim();
    if let Some(percent) = text.strip_suffix('%') {
        let percent: f64 = percent.trim().parse().ok()?;
        return (percent > 0.0 && percent <= 90.0).then_some(Size::Share(percent / 100.0));
    }
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1u64 << 40,
        _ => return None,
    };
    number.checked_mul(unit).filter(|bytes| *bytes > 0).map(Size::Bytes)
}

/// Memory that can be had now, within the limit of this container.
fn free_memory() -> Result<u64, Failure> {
    let kind = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(kind).map_err(|error| {
        let what = format!("read how much memory is free: {error}");
        Failure::new(Exit::Environment, what, "say --kv-memory in bytes")
    })?;
    let of_container = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    Ok(system.available_memory().min(of_container))
}

fn configuration(what: String) -> Failure {
    Failure::new(Exit::Configuration, what, "")
}

/// What routers get of the model. Where generation_config.json is not to say the defaults, what it says of them is left out
/// of it, so that every router does alike.
fn card_of(texts: &Texts, generation: GenerationConfig) -> Result<ModelCard, Failure> {
    let mut card = crate::card::card_of(texts);
    if let (GenerationConfig::None, Some(bytes)) = (generation, &texts.generation) {
        let file: Map<String, Value> = serde_json::from_slice(bytes)
            .map_err(|error| configuration(format!("generation_config.json: {error}")))?;
        let kept = ["eos_token_id", "bos_token_id", "pad_token_id"];
        let left: Map<String, Value> =
            file.into_iter().filter(|(key, _)| kept.contains(&key.as_str())).collect();
        card.insert(CardFile::GenerationConfig, Value::Object(left).to_string().into_bytes());
    }
    Ok(card)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_or_shares() {
        let check = |text: &str, expected: Option<Size>| assert_eq!(parse_size(text), expected, "{text}");
        check("1024", Some(Size::Bytes(1024)));
        check("8GiB", Some(Size::Bytes(8 << 30)));
        check("512 MiB", Some(Size::Bytes(512 << 20)));
        check("25%", Some(Size::Share(0.25)));
        for bad in ["", "0", "GiB", "-1GiB", "1.5GiB", "8GB", "0%", "91%", "nan%", "99999999999TiB"] {
            check(bad, None);
        }
    }

    fn engine(change: impl FnOnce(&mut EngineSettings)) -> EngineSettings {
        let mut engine = EngineSettings::default();
        change(&mut engine);
        engine
    }

    const SHARE: Share = Share { threads: 1, threads_beside: 0, kv_bytes: 64 << 20, contexts_max: 64 };

    #[test]
    fn the_context_is_what_the_pool_holds() {
        let settings = engine(|_| ());
        let demo = open(None, &settings).unwrap();
        let block = demo.model.block_bytes(32) as u64;
        let of = |kv_bytes| demo.scheduler(&settings, Share { kv_bytes, ..SHARE });
        let small = of(3 * block + 1).unwrap();
        assert_eq!((small.blocks, small.slots, demo.context_in(&small)), (3, 3, 96));
        let large = of(u64::MAX).unwrap();
        assert_eq!((large.blocks, demo.context_in(&large)), (64 * 1024 / 32, 1024));
        assert_eq!(of(block - 1).unwrap_err().exit(), Exit::Configuration);
        assert_eq!(demo.context_bytes(&settings), 32 * block);
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        let refuse = |change: fn(&mut EngineSettings), says: &str| {
            let settings = engine(change);
            let said = open(None, &settings)
                .and_then(|demo| {
                    demo.kv_bytes(&settings, 0.1, 1)?;
                    demo.scheduler(&settings, SHARE)
                })
                .expect_err(says);
            assert_eq!(said.exit(), Exit::Configuration, "{said}");
            assert!(said.to_string().contains(says), "{said}");
        };
        refuse(|e| e.dtype = Some("int3".into()), "engine.dtype");
        refuse(|e| e.tp = 3, "tensor parallelism of 3");
        refuse(|e| e.block_size = 24, "engine.block_size");
        refuse(|e| e.kv_memory = Some("much".into()), "engine.kv_memory");
        refuse(|e| e.slots = 1_000_000, "slots");
        refuse(|e| e.step_rows = 1, "rows of a step");
    }

    #[test]
    fn without_generation_config_the_card_says_no_defaults() {
        let texts = Texts {
            generation: Some(br#"{"temperature": 0.3, "eos_token_id": [0, 2]}"#.to_vec()),
            ..Texts::default()
        };
        let card = card_of(&texts, GenerationConfig::None).unwrap();
        assert_eq!(card.bytes(CardFile::GenerationConfig), Some(&br#"{"eos_token_id":[0,2]}"#[..]));
        let card = card_of(&texts, GenerationConfig::Model).unwrap();
        assert_eq!(card.bytes(CardFile::GenerationConfig), texts.generation.as_deref());
    }
}
