//! `petek complete`: one text continued in this process, with no server: to look at a model, and at petek's numbers for it.
//!
//! The way of a request in small: text → ids → plans → ranks → ids → text.

use std::io::Write;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use petek_core::ids::{BlockId, SlotId, StepNumber};
use petek_core::plan::{Draw, SlotFill, SlotSampling, Span, SpanInput, SpanSample, StepPlan};
use petek_device::ops::Format;
use petek_model::folder::ModelFolder;
use petek_model::group::{GroupError, RankGroup};
use petek_model::rank::LogitsHash;
use petek_model::replica::{CpuModel, CpuOptions, ReplicaOptions};
use petek_service::{Exit, Failure};
use petek_text::{AddedSpecials, ControlText, Output, OutputOptions, SpecialText, StopStrings};

use crate::card::{card_of, text_of};

/// Continues a text on this machine's CPU and prints it as it comes.
#[derive(Args, Debug)]
pub(crate) struct Complete {
    /// The text to continue.
    prompt: String,
    /// The model: a Hugging Face folder of the Llama family; by default the little demo model inside this binary.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Most tokens to add.
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// 0 takes the likeliest token each time; up to 2.
    #[arg(long, default_value_t = 0.0, value_parser = temperature_of)]
    temperature: f32,
    /// Keep at most so many of the likeliest tokens.
    #[arg(long)]
    top_k: Option<NonZeroU32>,
    /// Decides the draws at a temperature above 0.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The format to compute in: f32, bf16 or f16; by default the one that the weights are stored in.
    #[arg(long, value_parser = crate::format_of)]
    dtype: Option<Format>,
    /// Compute threads of all ranks together; by default one for each core.
    #[arg(long)]
    threads: Option<usize>,
    /// Tensor-parallel ranks, as threads of this process.
    #[arg(long, default_value_t = 1)]
    tp: usize,
}

fn temperature_of(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(temperature) if (0.0..=2.0).contains(&temperature) => {
            Ok(if temperature < 1e-5 { 0.0 } else { temperature })
        }
        _ => Err("a number from 0 to 2 is needed".to_owned()),
    }
}

const BLOCK_TOKENS: usize = 32;
/// Prompt rows of a step.
const CHUNK: usize = 256;

impl Complete {
    /// Loads, continues, prints.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let configuration = |what: String| Failure::new(Exit::Configuration, what, "");
        let folder = match &self.model {
            Some(dir) => ModelFolder::open(dir),
            None => crate::demo::folder(),
        };
        let folder = folder.map_err(|e| configuration(e.to_string()))?;
        for warning in &folder.warnings {
            crate::print_warning(&warning.0);
        }
        let text = text_of(&card_of(&folder.texts), folder.config.vocabulary)?;
        let prompt = text
            .tokenizer
            .encode("prompt", &self.prompt, AddedSpecials::Added, ControlText::Parsed)
            .map_err(|e| Failure::new(Exit::Usage, e.to_string(), ""))?;
        let room = folder.config.context.saturating_sub(prompt.len());
        if prompt.is_empty() || room == 0 {
            let what = format!(
                "the prompt has {} tokens; from 1 to {} fit the context",
                prompt.len(),
                folder.config.context - 1
            );
            return Err(Failure::new(Exit::Usage, what, "give another text"));
        }
        let max_tokens = (self.max_tokens as usize).min(room);
        let drawn = text.tokenizer.tokens().len();
        let mut group = self.group(folder, prompt.len() + max_tokens, drawn).map_err(configuration)?;

        let options = OutputOptions {
            special: SpecialText::Skipped,
            include_stop: false,
            stops: StopStrings::default(),
            min_tokens: 0,
            eos_ids: text.eos_ids.clone().into(),
            stop_ids: Arc::default(),
        };
        let mut output = Output::new(text.tokenizer.tokens().clone(), options);
        crate::print_part(&self.prompt);
        let began = Instant::now();
        let mut first = None;
        let mut count = 0;
        self.generate(&mut group, &prompt, max_tokens, |id| {
            first.get_or_insert_with(|| began.elapsed());
            count += 1;
            let pushed = output.push([(id, ())]);
            pushed.delta.iter().for_each(|delta| crate::print_part(&delta.text));
            pushed.ending.is_none()
        })
        .map_err(|e| Failure::new(Exit::Environment, e.to_string(), ""))?;
        output.finish().delta.iter().for_each(|delta| crate::print_part(&delta.text));
        let (total, first) = (began.elapsed().as_secs_f64(), first.unwrap_or_default().as_secs_f64());
        let rate = if count > 1 { f64::from(count - 1) / (total - first) } else { 0.0 };
        let footer = format!(
            "\n[{} prompt tokens, {count} new, first after {:.0} ms, {rate:.1} tokens/s]",
            prompt.len(),
            first * 1e3
        );
        crate::print_line(&footer);
        let _ = std::io::stdout().flush();
        Ok(())
    }

    /// The ranks, with a cache for `tokens` tokens.
    fn group(&self, folder: ModelFolder, tokens: usize, drawn: usize) -> Result<RankGroup, String> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let options =
            CpuOptions { format: self.dtype, tp: self.tp.max(1), context: tokens, vocabulary_drawn: drawn };
        let model = Arc::new(CpuModel::new(folder, options).map_err(|error| error.to_string())?);
        let replica = ReplicaOptions {
            threads: self.threads.unwrap_or(cores),
            threads_beside: 0,
            block_tokens: BLOCK_TOKENS,
            blocks: tokens.div_ceil(BLOCK_TOKENS),
            slots: 1,
            step_rows: CHUNK,
            logits_hash: LogitsHash::Off,
        };
        model.start(replica).map_err(|error| error.to_string())
    }

    /// Prefill in chunks, then one token a step, until `take` says no.
    fn generate(
        &self,
        group: &mut RankGroup,
        prompt: &[u32],
        max_tokens: usize,
        mut take: impl FnMut(u32) -> bool,
    ) -> Result<(), GroupError> {
        let sampling = SlotSampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: 1.0,
            min_p: 0.0,
            seed: self.seed,
            logprobs: None,
            min_tokens: 0,
            masked_ids: Arc::default(),
        };
        let blocks = (prompt.len() + max_tokens).div_ceil(BLOCK_TOKENS);
        let fill = SlotFill {
            slot: SlotId(0),
            ids: prompt.into(),
            prompt_tokens: prompt.len() as u32,
            sampling: Arc::new(sampling),
        };
        let mut plan = StepPlan { fills: vec![fill], ..StepPlan::default() };
        let mut new_blocks = (0..blocks as u32).map(BlockId).collect();
        let (mut start, mut known, mut token) = (0, prompt.len(), None);
        while known < prompt.len() + max_tokens {
            let len = (known - start).min(CHUNK);
            let whole = start + len == known;
            plan.step = StepNumber(plan.step.0 + 1);
            plan.spans = vec![Span {
                slot: SlotId(0),
                start: start as u32,
                len: len as u32,
                input: token.map_or(SpanInput::Ids, SpanInput::Known),
                drafts: Vec::new(),
                new_blocks: std::mem::take(&mut new_blocks),
                sample: if whole { SpanSample::Draw } else { SpanSample::No },
            }];
            let outcome = group.step(&plan)?;
            plan.fills.clear();
            start += len;
            if let Some(drawn) = outcome.tokens.first() {
                let Draw::Token(id) = drawn.draw else {
                    let problem = "the model's logits are not finite".to_owned();
                    return Err(GroupError::Rank { rank: 0, problem });
                };
                known += 1;
                token = Some(id);
                if !take(id) {
                    break;
                }
            }
        }
        Ok(())
    }
}
