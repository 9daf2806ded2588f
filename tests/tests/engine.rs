//! The scheduler over the real decoder: whatever it does around a request, the request's bits are those that it has alone;
//! a shared prefix is not computed; a step reads each weight once, whatever its rows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use petek_core::ids::{BlockId, SlotId, StepNumber, TokenId};
use petek_core::params::{CacheUse, ModelLimits, RawParams, SamplingDefaults};
use petek_core::plan::{SlotFill, SlotSampling, Span, SpanInput, SpanSample, StepPlan};
use petek_core::scheduler::{FinishReason, NewRequest, Scheduler, SchedulerConfig};
use petek_device::collective::Threads;
use petek_device::ops::Format;
use petek_model::folder::ModelFolder;
use petek_model::rank::LogitsHash;
use petek_model::replica::{CpuModel, CpuOptions, ReplicaOptions};
use petek_tests::chain::Chain;
use petek_tests::engine::{Continuation, Engine, new_request};
use petek_tests::llama::{EosPlaces, LlamaShape};
use petek_tests::machine::{Machine, Room};
use petek_tests::mixes::{self, Batch, DrawnBits, Mix, MixRequest, Prefix};
use petek_tests::random::Random;
use petek_tests::random_model::RandomModel;
use petek_text::{CardFile, ModelCard, ModelText, SpecialText};
use petek_worker::ranks::RankRunner;
use safetensors::tensor::Dtype;

// Invariance.

const CONTEXT: usize = 320;
const SLOTS: usize = 6;
const POOL_TOKENS: usize = 4096;
const DEGREES: [usize; 4] = [1, 2, 4, 8];
const MIXES: u64 = 100;
const EACH_VALUE: usize = 20;

/// How a mix serves its requests.
#[derive(Clone, Copy, Debug)]
struct Ways {
    seed: u64,
    dtype: Dtype,
    ranks: usize,
    /// Of each rank.
    threads: usize,
    crowd: Crowd,
    cache: Cache,
    step_rows: usize,
    steps_in_flight: usize,
    block_tokens: usize,
}

/// Who is there beside a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Crowd {
    /// Nobody.
    Alone,
    /// The others, as they come.
    Together,
    /// The others, in a pool that cannot hold them all.
    Squeezed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    /// Empty at first.
    Cold,
    /// All requests come twice.
    Warm,
    Off,
}

fn shape() -> LlamaShape {
    LlamaShape::eight_slices(CONTEXT)
}

fn random_folder(shape: LlamaShape, dtype: Dtype) -> Arc<ModelFolder> {
    RandomModel { shape, dtype, seed: 21 }.open()
}

fn limits() -> ModelLimits {
    ModelLimits {
        vocabulary: 304,
        context_tokens: CONTEXT as u32,
        eos_ids: [256].into(),
        defaults: SamplingDefaults::BUILT_IN,
    }
}

/// Six requests of nine sequences at temperature 1.5. Prompts end a little before a block's border of every size, so that
/// all want one block more soon; three begin alike. The second is asked for four times over: blocks that would hold the
/// largest prompt, the third, do not hold four such outputs.
fn requests() -> Vec<NewRequest> {
    let mut random = Random::new(9);
    let mut ids = |count: usize| -> Vec<TokenId> { (0..count).map(|_| random.below(256) as u32).collect() };
    let common = ids(80);
    let mut prompts = vec![ids(61), [common.clone(), ids(45)].concat(), ids(254), ids(1)];
    prompts.push([common.clone(), ids(110)].concat());
    prompts.push(common);
    let request = |(index, prompt): (usize, Vec<TokenId>)| {
        let raw = RawParams {
            temperature: Some(1.5),
            top_k: (index % 3 == 1).then_some(40),
            top_p: (index % 3 == 2).then_some(0.9),
            min_p: (index == 4).then_some(0.02),
            seed: Some(100 + index as u64),
            n: (index == 1).then_some(4),
            // A quarter of the vocabulary ends the fifth: its length is left to chance.
            stop_token_ids: if index == 4 { (0..64).collect() } else { Vec::new() },
            min_tokens: Some(3),
            max_tokens: Some(if index == 1 { 24 } else { 6 + 2 * index as i64 }),
            logprobs: Some(3),
            ..RawParams::default()
        };
        new_request(&prompt, &raw, &limits()).expect("a good request")
    };
    prompts.into_iter().enumerate().map(request).collect()
}

/// The tokens of each sequence of each request, each computed by itself, in one go, by hand, without the scheduler.
fn alone(folder: &Arc<ModelFolder>, requests: &[NewRequest]) -> Result<Vec<Vec<Vec<DrawnBits>>>> {
    let plain = Mix {
        seed: 0,
        batch: Batch::Alone,
        chunk_max: usize::MAX,
        prefix: Prefix::Cold,
        preempt_percent: 0,
        block_tokens: 32,
    };
    let blocks = CONTEXT.div_ceil(32);
    let room = Room {
        context: CONTEXT,
        block_tokens: 32,
        blocks,
        slots: mixes::SLOTS,
        rows: CONTEXT,
        vocabulary_drawn: 257,
    };
    let mut group = Machine::plain().group(folder, room)?;
    let mut of_request = |request: &NewRequest| -> Result<Vec<Vec<DrawnBits>>> {
        let sequence = |seed| MixRequest {
            prompt: request.prompt.to_vec(),
            tokens: request.max_tokens as usize,
            sampling: Arc::new(request.params.slot_sampling_seeded(seed)),
        };
        let sequences: Vec<_> = request.sequences.iter().map(|s| sequence(s.seed)).collect();
        let mut drawn = mixes::run(&mut group, blocks, &sequences, plain)?;
        drawn.iter_mut().for_each(|drawn| drawn.truncate(length(request, drawn)));
        Ok(drawn)
    };
    requests.iter().map(&mut of_request).collect()
}

/// How many of the drawn tokens the request has: up to its first EOS or stop id.
fn length(request: &NewRequest, drawn: &[DrawnBits]) -> usize {
    let ends = |token: &DrawnBits| {
        [&request.params.eos_ids, &request.params.stop_ids].iter().any(|ids| ids.contains(&token.id))
    };
    drawn.iter().position(ends).map_or(drawn.len(), |at| at + 1)
}

/// The model as a process holds it: replicas of one degree share its packed weights.
fn model(folder: &ModelFolder, ranks: usize) -> Arc<CpuModel> {
    let options = CpuOptions { format: None, tp: ranks, context: CONTEXT, vocabulary_drawn: 257 };
    Arc::new(CpuModel::new(folder.clone(), options).expect("a degree that fits"))
}

/// A worker's engine: a new replica under a scheduler. `largest` are the positions of the largest request.
fn engine(model: &Arc<CpuModel>, ways: &Ways, largest: usize) -> Result<Engine<RankRunner>> {
    let Ways { block_tokens, step_rows, .. } = *ways;
    let blocks = match ways.crowd {
        Crowd::Squeezed => largest.div_ceil(block_tokens),
        _ => POOL_TOKENS / block_tokens,
    };
    let replica = model.start(ReplicaOptions {
        threads: ways.ranks * ways.threads,
        threads_beside: 0,
        block_tokens,
        blocks,
        slots: SLOTS,
        step_rows,
        logits_hash: LogitsHash::On,
    })?;
    let config = SchedulerConfig {
        revision: model.folder().revision,
        blocks: blocks as u32,
        block_size: block_tokens as u32,
        slots: SLOTS as u32,
        step_rows: step_rows as u32,
        queue: 64,
        prefix_cache: if ways.cache == Cache::Off { CacheUse::Bypassed } else { CacheUse::Shared },
    };
    config.check_served()?;
    Ok(Engine::new(Scheduler::new(config)?, RankRunner::new(replica), ways.steps_in_flight))
}

/// Serves all requests once; gives what came of each, in the order of `requests`.
fn serve(
    engine: &mut Engine<RankRunner>,
    requests: &[NewRequest],
    ways: &Ways,
    random: &mut Random,
) -> Result<Vec<Vec<Continuation>>> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    (1..order.len()).rev().for_each(|i| order.swap(i, random.below(i + 1)));
    let mut numbers = vec![None; requests.len()];
    for index in order {
        numbers[index] = Some(engine.submit(requests[index].clone()));
        match ways.crowd {
            Crowd::Alone => engine.run()?,
            Crowd::Together if random.percent(50) => drop(engine.step()?),
            Crowd::Together | Crowd::Squeezed => {}
        }
    }
    engine.run()?;
    numbers.into_iter().map(|number| Ok(engine.take(number.context("submitted")?))).collect()
}

/// One round's tokens and ends are those of each request alone; its plans spent on prompts what the cache did not hold.
fn check_round(
    requests: &[NewRequest],
    expected: &[Vec<Vec<DrawnBits>>],
    got: &[Vec<Continuation>],
    ways: &Ways,
    round: usize,
) -> Result<()> {
    for (index, ((request, expected), got)) in requests.iter().zip(expected).zip(got).enumerate() {
        ensure!(got.len() == expected.len(), "request {index}: {} sequences", got.len());
        let prompt = request.prompt.len();
        let mut cached = 0;
        for (sequence, (expected, got)) in expected.iter().zip(got).enumerate() {
            let at = format!("request {index}, sequence {sequence}");
            if let Some(at_token) = (0..expected.len()).find(|i| got.drawn.get(*i) != Some(&expected[*i])) {
                let (got, alone) = (got.drawn.get(at_token), &expected[at_token]);
                anyhow::bail!("{at} differs at token {at_token}: {got:?}, alone {alone:?}");
            }
            let (reason, usage) = got.end.context("it ended")?;
            let last = expected.last().context("a token")?.id;
            let reason_expected = match last {
                256 => FinishReason::StopEos,
                id if request.params.stop_ids.contains(&id) => FinishReason::StopToken(id),
                _ => FinishReason::Length,
            };
            ensure!(reason == reason_expected, "{at}: {reason:?}, not {reason_expected:?}");
            ensure!(got.drawn.len() == expected.len(), "{at}: {} tokens", got.drawn.len());
            ensure!(
                usage.output_tokens as usize == expected.len() && usage.prompt_tokens as usize == prompt,
                "{at}: {usage:?}"
            );
            cached = usage.cached_tokens as usize;
        }
        // A hit on all of a prompt still computes its last block.
        let all = (prompt - 1) / ways.block_tokens * ways.block_tokens;
        let holds = match (ways.cache, round) {
            (Cache::Off, _) => cached == 0,
            (Cache::Warm, 1) if ways.crowd != Crowd::Squeezed => cached == all,
            _ => cached <= all,
        };
        ensure!(holds, "request {index}, round {round}: {cached} of {prompt} tokens cached");
        if ways.crowd != Crowd::Squeezed {
            // Each sibling begins with the prompt's last token.
            let planned: usize = got.iter().map(|sequence| sequence.prompt_rows).sum();
            let wanted = prompt - cached + (got.len() - 1);
            ensure!(
                planned == wanted,
                "request {index}: {planned} rows for a prompt of {prompt}, {cached} cached"
            );
        }
    }
    Ok(())
}

fn check_mix(
    model: &Arc<CpuModel>,
    requests: &[NewRequest],
    expected: &[Vec<Vec<DrawnBits>>],
    ways: &Ways,
) -> Result<()> {
    let positions = |request: &NewRequest| request.prompt.len() + request.max_tokens as usize - 1;
    let largest = requests.iter().map(positions).max().context("a request")?;
    let mut engine = engine(model, ways, largest)?;
    let mut random = Random::new(ways.seed);
    let mut tokens = 0;
    let rounds = if ways.cache == Cache::Warm { 2 } else { 1 };
    let mut prompt_rows = 0;
    for round in 0..rounds {
        let got = serve(&mut engine, requests, ways, &mut random)?;
        check_round(requests, expected, &got, ways, round)?;
        tokens += got.iter().flatten().map(|sequence| sequence.drawn.len()).sum::<usize>();
        prompt_rows += got.iter().flatten().map(|sequence| sequence.prompt_rows).sum::<usize>();
    }
    let counters = engine.scheduler().counters();
    ensure!(counters.tokens_drawn as usize == tokens, "{counters:?}: {tokens} tokens came");
    if ways.crowd == Crowd::Squeezed {
        ensure!(counters.preemptions > 0, "the pool was to be too small: {counters:?}");
    } else {
        let sequences = expected.iter().flatten().count() * rounds;
        // The first token of a sequence costs no row of its own.
        let rows = prompt_rows + tokens - sequences + counters.tokens_dropped as usize;
        ensure!(counters.rows as usize == rows && counters.preemptions == 0, "{counters:?}: {rows} rows");
        let known = counters.prompt_tokens_computed + counters.prompt_tokens_cached;
        let prompts = requests.iter().map(|request| request.prompt.len()).sum::<usize>() * rounds;
        ensure!(known as usize == prompts, "{counters:?}: {prompts} prompt tokens");
    }
    Ok(())
}

#[test]
fn whatever_the_scheduler_does_a_requests_bits_stay() {
    let requests = requests();
    let formats = [Dtype::F32, Dtype::BF16];
    let folders = formats.map(|dtype| random_folder(shape(), dtype));
    let models = [0, 1].map(|which| DEGREES.map(|ranks| model(&folders[which], ranks)));
    let expected = [0, 1].map(|which| alone(&folders[which], &requests).expect("ran"));
    let rows: BTreeSet<_> = expected.iter().flatten().flatten().flatten().map(|token| token.logits).collect();
    assert!(
        rows.len() > 100,
        "rows of logits differ from each other, so equality says something: {}",
        rows.len()
    );
    let early = expected.iter().any(|of| of[4][0].len() < requests[4].max_tokens as usize);
    assert!(early, "one ends before its time");

    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for seed in 0..MIXES {
        let mut random = Random::new(0xe6_0000 + seed);
        let which = random.below(2);
        let degree = random.below(DEGREES.len());
        let ways = Ways {
            seed,
            dtype: formats[which],
            ranks: DEGREES[degree],
            threads: *random.pick(&[1, 2]),
            crowd: *random.pick(&[Crowd::Alone, Crowd::Together, Crowd::Squeezed]),
            cache: *random.pick(&[Cache::Cold, Cache::Warm, Cache::Off]),
            step_rows: *random.pick(&[16, 100, 1024]),
            steps_in_flight: *random.pick(&[1, 2]),
            block_tokens: *random.pick(&[16, 32, 64]),
        };
        let mut count =
            |axis: &str, value: &dyn Debug| *seen.entry(format!("{axis} {value:?}")).or_default() += 1;
        count("format", &ways.dtype);
        count("ranks", &ways.ranks);
        count("threads", &ways.threads);
        count("crowd", &ways.crowd);
        count("cache", &ways.cache);
        count("rows of a step", &ways.step_rows);
        count("steps in flight", &ways.steps_in_flight);
        count("tokens of a block", &ways.block_tokens);
        eprintln!("{ways:?}");
        if let Err(error) = check_mix(&models[which][degree], &requests, &expected[which], &ways) {
            panic!("{ways:?}: {error:#}");
        }
    }
    for (value, times) in &seen {
        assert!(*times >= EACH_VALUE, "{value} stood in {times} mixes only");
    }
    assert_eq!(seen.len(), 2 + 4 + 2 + 3 + 3 + 3 + 2 + 3, "every value of every axis: {seen:?}");
}

// Batching.

const MOST_SEQUENCES: usize = 33;

/// Bytes of a matrix in panels of 32 outputs.
fn packed_bytes(outputs: usize, inputs: usize, format: Format) -> u64 {
    (outputs.next_multiple_of(32) * inputs * format.bytes()) as u64
}

/// Bytes that a step of a rank must read: (all layers, the head).
fn bytes_of_a_step(shape: &LlamaShape, format: Format, ranks: usize) -> (u64, u64) {
    let (hidden, dim) = (shape.hidden, shape.head_dim);
    let (query, kv) = (shape.heads / ranks * dim, shape.kv_heads.div_ceil(ranks) * dim);
    let mlp = shape.intermediate / ranks;
    let layer = packed_bytes(query + 2 * kv, hidden, format)
        + packed_bytes(hidden, query, format)
        + 2 * packed_bytes(mlp, hidden, format)
        + packed_bytes(hidden, mlp, format);
    (shape.layers as u64 * layer, packed_bytes(shape.vocab / ranks, hidden, format))
}

/// A step of `sequences` spans of `rows` rows each; the first step fills all slots.
fn plan(step: u64, sequences: usize, rows: usize, sample: SpanSample) -> StepPlan {
    let sampling = Arc::new(SlotSampling {
        temperature: 0.0,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        seed: 0,
        logprobs: None,
        min_tokens: 0,
        masked_ids: Arc::default(),
    });
    let slots = 0..MOST_SEQUENCES as u32;
    let fill = |slot| SlotFill {
        slot: SlotId(slot),
        ids: vec![slot + 1; MOST_SEQUENCES].into(),
        prompt_tokens: MOST_SEQUENCES as u32,
        sampling: sampling.clone(),
    };
    let span = |slot: u32| Span {
        slot: SlotId(slot),
        start: 0,
        len: rows as u32,
        input: SpanInput::Ids,
        drafts: Vec::new(),
        new_blocks: vec![BlockId(2 * slot), BlockId(2 * slot + 1)],
        sample,
    };
    StepPlan {
        step: StepNumber(step),
        releases: if step > 0 { slots.clone().map(SlotId).collect() } else { Vec::new() },
        fills: slots.clone().map(fill).collect(),
        spans: (0..sequences as u32).map(span).collect(),
        ..StepPlan::default()
    }
}

/// (sequences, rows of each): 1, 8 and 33 rows of as many sequences, and of one.
const STEPS: [(usize, usize); 5] = [(1, 1), (8, 1), (33, 1), (1, 8), (1, 33)];

/// Each weight once a step, whatever its rows: the counter stands where a kernel fetches a panel.
#[test]
fn a_step_reads_each_weight_once() {
    for (dtype, tied) in [(Dtype::F32, false), (Dtype::F32, true), (Dtype::BF16, false), (Dtype::BF16, true)]
    {
        let shape = LlamaShape { tied, ..shape() };
        let folder = random_folder(shape.clone(), dtype);
        let format = folder.weights.format();
        for (ranks, threads) in [(1, 1), (1, 2), (2, 1)] {
            let machine = Machine { ranks, threads, ..Machine::plain() };
            let room = Room {
                context: 64,
                block_tokens: 32,
                blocks: 2 * MOST_SEQUENCES,
                slots: MOST_SEQUENCES,
                rows: MOST_SEQUENCES,
                vocabulary_drawn: 257,
            };
            let (layers, head) = bytes_of_a_step(&shape, format, ranks);
            let at = format!("{dtype:?}, tied {tied}, {ranks} ranks, {threads} threads");
            std::thread::scope(|scope| {
                for collective in Threads::group(ranks, threads) {
                    let (folder, at) = (&folder, &at);
                    scope.spawn(move || {
                        let mut rank = machine.rank(folder, room, collective).expect("loaded");
                        let vectors = ((2 * folder.config.layers + 1) * folder.config.hidden * 4) as u64;
                        let embedding = if tied { 0 } else { head };
                        let held = rank.decoder().ops().weight_bytes() as u64;
                        assert_eq!(held, layers + head + embedding + vectors, "{at}: what the rank holds");
                        let samples = [SpanSample::Draw, SpanSample::No];
                        let steps = STEPS.iter().flat_map(|step| samples.map(|sample| (*step, sample)));
                        for (number, ((sequences, rows), sample)) in steps.enumerate() {
                            let before = rank.decoder().ops().weight_bytes_read();
                            rank.step(&plan(number as u64, sequences, rows, sample)).expect("computed");
                            let read = rank.decoder().ops().weight_bytes_read() - before;
                            let wanted = if sample == SpanSample::Draw { layers + head } else { layers };
                            assert_eq!(
                                read, wanted,
                                "{at}: {sequences} sequences of {rows} rows, {sample:?}"
                            );
                        }
                    });
                }
            });
        }
    }
}

// Ends of a sequence, in the chain model.

/// `ok|2|no|0`, where generation_config names 0 and tokenizer_config the token "2": the union ends a sequence, ignore_eos
/// covers all of it, stop ids still stop, min_tokens masks all of it.
#[test]
fn eos_is_what_any_file_says_and_ignored_or_masked_as_a_whole() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let chain = Chain::bytes(&["ok", "2", "no", ">"]).then(&[4, 1, 2, 3, Chain::END]).special(&[2]);
    let eos =
        EosPlaces { config: None, generation_config: vec![0], tokenizer_config: Some(chain.text_of(2)) };
    chain.eos(eos).write(dir.path())?;
    let folder = ModelFolder::open(dir.path())?;
    let mut card = ModelCard::default();
    for file in CardFile::ALL {
        if let Ok(bytes) = std::fs::read(dir.path().join(file.name())) {
            card.insert(file, bytes);
        }
    }
    let text = ModelText::load(&card, &Default::default)?;
    assert_eq!(text.eos_ids, [0, 2]);
    let limits = ModelLimits {
        vocabulary: folder.config.vocabulary as u32,
        context_tokens: 64,
        eos_ids: text.eos_ids.into(),
        defaults: SamplingDefaults { temperature: 0.0, ..SamplingDefaults::BUILT_IN },
    };
    let ways = Ways {
        seed: 0,
        dtype: Dtype::F32,
        ranks: 1,
        threads: 1,
        crowd: Crowd::Alone,
        cache: Cache::Cold,
        step_rows: 16,
        steps_in_flight: 1,
        block_tokens: 16,
    };
    let mut engine = engine(&model(&folder, 1), &ways, 64)?;
    let four = || RawParams { max_tokens: Some(4), ..RawParams::default() };
    let ignoring = || RawParams { ignore_eos: Some(true), ..four() };
    let cases: [(RawParams, &[TokenId], FinishReason); 4] = [
        (four(), &[1, 2], FinishReason::StopEos),
        (ignoring(), &[1, 2, 3, 0], FinishReason::Length),
        (RawParams { stop_token_ids: vec![2], ..ignoring() }, &[1, 2], FinishReason::StopToken(2)),
        // With 0 and 2 masked all others are equal after "ok", and the lowest is "ok" again.
        (RawParams { min_tokens: Some(3), ..four() }, &[1, 1, 1, 2], FinishReason::StopEos),
    ];
    for (raw, ids, reason) in cases {
        let number = engine.submit(new_request(&[4], &raw, &limits)?);
        engine.run()?;
        let got = engine.take(number).remove(0);
        assert_eq!((got.ids(), got.end.map(|end| end.0)), (ids.to_vec(), Some(reason)), "{raw:?}");
    }
    // Special tokens are no text: what a client sees of the first.
    assert_eq!(text.tokenizer.tokens().decode(&[1, 2], SpecialText::Skipped), "ok");
    Ok(())
}
