//! `petek bench step`: what a step of a model costs on this machine, as a share of what the machine can do at all.
//!
//! Roofs and steps are measured in one run, on as many threads: machines are noisy and differ, ratios less so. Rates are by the
//! clock, medians of the samples; shares are of best samples, and `busy` ones are by the processor time that the threads got,
//! which a crowded machine disturbs less. Keys are those of the peer benchmarks that it is set beside.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use petek_device::collective::Solo;
use petek_device::cpu::memory::HugeBuffer;
use petek_device::cpu::pool::{Pool, PoolOptions};
use petek_device::cpu::roofs::{self, Rate};
use petek_device::cpu::simd::{Simd, SimdOptions};
use petek_device::ops::{Format, SpanRows, StepCapacity, StepInputs};
use petek_model::config::Mlp;
use petek_model::decoder::{Decoder, DecoderOptions};
use petek_model::folder::ModelFolder;
use petek_model::shard::Shard;
use petek_service::{Exit, Failure};
use serde_json::{Value, json};

/// Measures decode and prefill steps of a model, beside this machine's read rate and matrix peak.
#[derive(Args, Debug)]
pub(crate) struct BenchStep {
    /// The model's folder.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The format to compute in: f32, bf16 or f16; by default the one that the weights are stored in.
    #[arg(long, value_parser = crate::format_of)]
    dtype: Option<Format>,
    /// Compute threads; by default one for each core.
    #[arg(long)]
    threads: Option<usize>,
    /// Sequences of the batched decode.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens in the cache before a decode step.
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Tokens of the prefill.
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Tokens of a block of the cache.
    #[arg(long, default_value_t = 32)]
    block: usize,
    /// Samples of each measurement; the median is reported.
    #[arg(long, default_value_t = 7)]
    samples: usize,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// What the read rate is measured on, in words: far beyond any cache.
const ROOF_WORDS: usize = 256 << 20;

/// Medians and their spread, by key.
#[derive(Default)]
struct Figures {
    values: BTreeMap<String, f64>,
    spread: BTreeMap<String, Value>,
}

impl Figures {
    fn add(&mut self, key: String, mut samples: Vec<f64>) -> f64 {
        samples.sort_by(f64::total_cmp);
        let median = samples[samples.len() / 2];
        let spread = json!([samples[0], samples[samples.len() - 1], samples.len()]);
        self.spread.insert(key.clone(), spread);
        self.values.insert(key, median);
        median
    }
}

impl BenchStep {
    /// Measures and prints.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let figures = self.measure()?;
        let mut out: serde_json::Map<String, Value> =
            figures.values.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        if self.json {
            out.insert("_spread".to_owned(), json!(figures.spread));
            crate::print_line(&Value::Object(out).to_string());
        } else {
            figures
                .values
                .iter()
                .for_each(|(key, value)| crate::print_line(&format!("{key:<40} {value:>12.3}")));
        }
        Ok(())
    }

    fn measure(&self) -> Result<Figures, Failure> {
        let failed =
            |what: String| Failure::new(Exit::Configuration, what, "give --model a Hugging Face folder");
        let folder = ModelFolder::open(&self.model).map_err(|e| failed(e.to_string()))?;
        let format = self.dtype.unwrap_or_else(|| folder.weights.format());
        let threads =
            self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let pool = PoolOptions { threads, threads_beside: 0, cores: Vec::new() };
        let environment = |e: petek_device::DeviceError| Failure::new(Exit::Environment, e.to_string(), "");
        let options = SimdOptions { pool: pool.clone(), isa: None };
        let ops = Simd::new(options, format, Solo::new_group()).map_err(environment)?;
        let isa = ops.isa().isa;
        let context = self.context.max(self.prompt) + 64;
        let options = DecoderOptions { format, context, vocabulary_drawn: folder.config.vocabulary };
        let shard = Shard::plan(&folder.config, 1).map_err(|e| failed(e.to_string()))?.remove(0);
        let mut decoder = Decoder::load(Box::new(ops), &folder.config, shard, &folder.weights, options)
            .map_err(|e| failed(e.to_string()))?;
        let blocks_per_span = context.div_ceil(self.block);
        let capacity = StepCapacity {
            rows: self.prompt.max(self.batch),
            spans: self.batch,
            picks: self.batch,
            blocks_per_span,
        };
        decoder.allocate(self.block, blocks_per_span * self.batch, capacity).map_err(environment)?;
        let mut bench = Bench { decoder, blocks_per_span };

        let name = format.name();
        let mut figures = Figures::default();
        let mut pool = Pool::new(pool).map_err(|e| Failure::new(Exit::Environment, e.to_string(), ""))?;
        let mut memory = HugeBuffer::<u32>::zeroed("the read rate", ROOF_WORDS).map_err(environment)?;
        // Memory that was never written is one page of zeros, read from the cache.
        memory.as_mut_slice().iter_mut().zip(0..).for_each(|(word, i)| *word = i);
        let read = roofs::read_rate(&mut pool, isa, &[memory.as_slice()]).map_err(environment)?;
        let peak = roofs::flop_rate(&mut pool, isa, format.activation()).map_err(environment)?;
        drop((pool, memory));
        figures.add("roof.read_gbs".to_owned(), vec![read.wall / 1e9]);
        figures.add(format!("roof.{}_gflops", format.activation().name()), vec![peak.wall / 1e9]);
        let vocabulary = folder.config.vocabulary as u32;
        for sequence in 0..self.batch {
            bench.prefill(sequence, self.context, self.prompt, vocabulary).map_err(environment)?;
        }
        // By turns, so that a slow minute of the machine hits all of them.
        let [mut one, mut many, mut prefill] = [const { Vec::new() }; 3];
        let mut bytes = [0.0; 2];
        for _ in 0..self.samples {
            one.push(
                bench
                    .decode_rate(threads, 1, self.context, vocabulary, &mut bytes[0])
                    .map_err(environment)?,
            );
            many.push(
                bench
                    .decode_rate(threads, self.batch, self.context, vocabulary, &mut bytes[1])
                    .map_err(environment)?,
            );
            let prompt = self.prompt;
            let rate =
                roofs::best_rate(threads, 1, prompt as f64, || bench.prefill(0, prompt, prompt, vocabulary));
            prefill.push(rate.map_err(environment)?);
        }
        let (context, batch, prompt) = (self.context, self.batch, self.prompt);
        let walls = |rates: &[Rate]| rates.iter().map(|rate| rate.wall).collect::<Vec<f64>>();
        let best = |rates: &[Rate]| rates.iter().copied().fold(Rate::default(), Rate::max);
        let one_wall = figures.add(format!("decode.{name}.b1.ctx{context}"), walls(&one));
        let many_wall = figures.add(format!("decode.{name}.b{batch}.ctx{context}"), walls(&many));
        figures.add(format!("prefill.{name}.{prompt}"), walls(&prefill));
        figures.add(format!("ratio.{name}.b{batch}_b1"), vec![many_wall / one_wall]);
        figures.add(format!("ratio.busy.{name}.b{batch}_b1"), vec![best(&many).busy / best(&one).busy]);
        figures.add(format!("weight_bytes.{name}.b1"), vec![bytes[0]]);
        figures.add(format!("weight_bytes.{name}.b{batch}"), vec![bytes[1]]);
        let kv = bench.decoder.kv_spec(self.block, 1);
        let token_bytes = (kv.block_bytes() / self.block * context) as f64 + bytes[0];
        let read_share = |rate: f64, roof: f64| rate * token_bytes / roof;
        figures
            .add(format!("share.read.{name}.b1.ctx{context}"), vec![read_share(best(&one).wall, read.wall)]);
        figures.add(
            format!("share.busy.read.{name}.b1.ctx{context}"),
            vec![read_share(best(&one).busy, read.busy)],
        );
        let Mlp::SwiGlu { width, .. } = folder.config.mlp;
        let (hidden, heads) = (folder.config.hidden, folder.config.heads);
        let layer = hidden * (heads.qkv_width() + heads.query_width()) + 3 * hidden * width;
        let operations = 2.0 * (layer * folder.config.layers) as f64;
        let peak_share = |rate: f64, roof: f64| rate * operations / roof;
        figures.add(format!("share.peak.{name}.{prompt}"), vec![peak_share(best(&prefill).wall, peak.wall)]);
        figures.add(
            format!("share.busy.peak.{name}.{prompt}"),
            vec![peak_share(best(&prefill).busy, peak.busy)],
        );
        Ok(figures)
    }
}

/// A decoder with one block table per sequence.
struct Bench {
    decoder: Decoder,
    blocks_per_span: usize,
}

impl Bench {
    fn table(&self, sequence: usize) -> Vec<u32> {
        let first = sequence * self.blocks_per_span;
        (first..first + self.blocks_per_span).map(|block| block as u32).collect()
    }

    /// Fills a sequence's cache with `tokens` in chunks.
    fn prefill(
        &mut self,
        sequence: usize,
        tokens: usize,
        chunk: usize,
        vocabulary: u32,
    ) -> Result<(), petek_device::DeviceError> {
        let table = self.table(sequence);
        for start in (0..tokens).step_by(chunk) {
            let rows = chunk.min(tokens - start);
            let ids: Vec<u32> =
                (0..rows).map(|row| (start + row + 7 * sequence) as u32 * 1009 % vocabulary).collect();
            self.decoder.step(&StepInputs {
                ids: &ids,
                positions: &(start as u32..(start + rows) as u32).collect::<Vec<_>>(),
                spans: &[SpanRows { row0: 0, rows: rows as u32, start: start as u32, table0: 0 }],
                tables: &table,
                zeroes: &[],
                copies: &[],
                picks: &[rows as u32 - 1],
                draws: &[],
            })?;
        }
        Ok(())
    }

    /// Tokens a second of decode steps of so many sequences at position `context`; and the bytes of weights a step reads.
    fn decode_rate(
        &mut self,
        threads: usize,
        sequences: usize,
        context: usize,
        vocabulary: u32,
        bytes: &mut f64,
    ) -> Result<Rate, petek_device::DeviceError> {
        let tables: Vec<u32> = (0..sequences).flat_map(|sequence| self.table(sequence)).collect();
        let spans: Vec<SpanRows> = (0..sequences as u32)
            .map(|sequence| SpanRows {
                row0: sequence,
                rows: 1,
                start: context as u32,
                table0: sequence * self.blocks_per_span as u32,
            })
            .collect();
        let (rows, positions): (Vec<u32>, _) =
            ((0..sequences as u32).collect(), vec![context as u32; sequences]);
        let before = self.decoder.ops().weight_bytes_read();
        let mut steps = 0;
        let rate = roofs::best_rate(threads, 1, sequences as f64, || {
            steps += 1;
            let ids: Vec<u32> = rows.iter().map(|row| (row + steps) * 48_611 % vocabulary).collect();
            self.decoder.step(&StepInputs {
                ids: &ids,
                positions: &positions,
                spans: &spans,
                tables: &tables,
                zeroes: &[],
                copies: &[],
                picks: &rows,
                draws: &[],
            })
        })?;
        *bytes = (self.decoder.ops().weight_bytes_read() - before) as f64 / f64::from(steps);
        Ok(rate)
    }
}
