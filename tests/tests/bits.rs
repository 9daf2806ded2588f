//! The invariance promise, bit for bit: every drawn token's id, logprob, rank, top list and the hash of its whole row of
//! logits are those of the request alone, whatever it was batched with, chunked, shared, preempted or split over.

use std::collections::BTreeMap;
use std::sync::Arc;

use petek_core::plan::SlotSampling;
use petek_device::cpu::isa::Isa;
use petek_device::ops::Format;
use petek_model::folder::ModelFolder;
use petek_model::group::RankGroup;
use petek_tests::llama::LlamaShape;
use petek_tests::machine::{Machine, Room};
use petek_tests::mixes::{Batch, DrawnBits, Mix, MixRequest, Prefix, SLOTS, run};
use petek_tests::random::Random;
use petek_tests::random_model::RandomModel;
use safetensors::tensor::Dtype;

const PLAIN: Mix = Mix {
    seed: 0,
    batch: Batch::Alone,
    chunk_max: usize::MAX,
    prefix: Prefix::Cold,
    preempt_percent: 0,
    block_tokens: 32,
};
const POOL_TOKENS: usize = 4096;
const CONTEXT: usize = 448;
const MIXES: u64 = 300;
const EACH_VALUE: usize = 30;

fn shape() -> LlamaShape {
    LlamaShape::eight_slices(CONTEXT)
}

fn folder(dtype: Dtype) -> Arc<ModelFolder> {
    folder_of(shape(), dtype)
}

fn folder_of(shape: LlamaShape, dtype: Dtype) -> Arc<ModelFolder> {
    RandomModel { shape, dtype, seed: 11 }.open()
}

fn group(folder: &Arc<ModelFolder>, machine: Machine, block_tokens: usize) -> RankGroup {
    let room = Room {
        context: CONTEXT,
        block_tokens,
        blocks: POOL_TOKENS / block_tokens,
        slots: SLOTS,
        rows: 1024,
        vocabulary_drawn: 257,
    };
    machine.group(folder, room).expect("started")
}

/// Seven requests at temperature 1.5, some with a common beginning, one beyond a segment of 256.
fn requests() -> Vec<MixRequest> {
    let mut random = Random::new(5);
    let mut ids = |count: usize| -> Vec<u32> { (0..count).map(|_| random.below(256) as u32).collect() };
    let common = ids(80);
    let mut prompts = vec![ids(1), ids(33), ids(264)];
    for own in [0, 7, 20, 64] {
        prompts.push([common.clone(), ids(own)].concat());
    }
    let sampling = |index: usize| SlotSampling {
        temperature: 1.5,
        top_k: if index % 3 == 1 { std::num::NonZeroU32::new(40) } else { None },
        top_p: if index % 3 == 2 { 0.9 } else { 1.0 },
        min_p: if index == 4 { 0.02 } else { 0.0 },
        seed: 1000 + index as u64,
        logprobs: Some(3),
        min_tokens: 3,
        masked_ids: [7, 256].into(),
    };
    let request =
        |(index, prompt)| MixRequest { prompt, tokens: 4 + index % 3, sampling: Arc::new(sampling(index)) };
    prompts.into_iter().enumerate().map(request).collect()
}

fn alone(folder: &Arc<ModelFolder>, isa: Isa) -> Vec<Vec<DrawnBits>> {
    let machine = Machine { ranks: 1, threads: 1, isa };
    run(&mut group(folder, machine, 32), POOL_TOKENS / 32, &requests(), PLAIN).expect("ran")
}

fn hash_of(drawn: &[Vec<DrawnBits>]) -> String {
    let mut hasher = blake3::Hasher::new();
    drawn.iter().flatten().for_each(|token| {
        hasher.update(&token.logits);
    });
    hasher.finalize().to_hex()[..32].to_owned()
}

/// The pinned hashes of all drawn rows of logits: a change of tuning must keep them, a change of numerics must not come
/// unnoticed.
#[test]
fn the_logits_are_the_pinned_ones() {
    let best = Isa::detect().expect("a processor that petek runs on");
    let have = [("f32", Dtype::F32), ("bf16", Dtype::BF16), ("f16", Dtype::F16)]
        .map(|(name, dtype)| (name, hash_of(&alone(&folder(dtype), best))));
    assert_eq!(have.map(|(name, hash)| format!("{name} {hash}")), PINNED);
}

const PINNED: [&str; 3] = [
    "f32 d28f72cca6cb99a27cc1a5ac535ad9f8",
    "bf16 53396c0144492bd0538b10388686e11d",
    "f16 74e4edb313395da02263102108efac7c",
];

/// At least 300 seeded mixes over the product of all axes, each value at least 30 times.
#[test]
fn whatever_happens_around_a_request_its_bits_stay() {
    let isas: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.available()).collect();
    let best = *isas.last().expect("a processor that petek runs on");
    let requests = requests();
    let folders = [folder(Dtype::F32), folder(Dtype::BF16)];
    let expected = [0, 1].map(|index| alone(&folders[index], best));
    let distinct: std::collections::BTreeSet<_> =
        expected.iter().flatten().flatten().map(|t| t.logits).collect();
    assert!(distinct.len() > 60, "rows of logits differ from each other, so equality says something");
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for seed in 0..MIXES {
        let mut random = Random::new(0x5eed + seed);
        let which = random.below(2);
        let machine = Machine {
            ranks: *random.pick(&[1, 2, 4, 8]),
            threads: *random.pick(&[1, 2]),
            isa: *random.pick(&isas),
        };
        let mix = Mix {
            seed,
            batch: *random.pick(&[Batch::Alone, Batch::Mixed, Batch::Mixed]),
            chunk_max: *random.pick(&[usize::MAX, 7, 33, 100]),
            prefix: *random.pick(&[Prefix::Cold, Prefix::Shared]),
            preempt_percent: *random.pick(&[0, 20]),
            block_tokens: *random.pick(&[16, 32, 64]),
        };
        for value in [
            format!("{:?}", folders[which].weights.format()),
            format!("{} ranks", machine.ranks),
            format!("{} threads", machine.threads),
            format!("{}", machine.isa),
            format!("{:?}", mix.batch),
            format!("chunks of {}", mix.chunk_max),
            format!("{:?}", mix.prefix),
            format!("preempting {}", mix.preempt_percent),
            format!("blocks of {}", mix.block_tokens),
        ] {
            *seen.entry(value).or_default() += 1;
        }
        eprintln!("seed {seed}: {machine:?}, {mix:?}");
        // A few requests of each mix, so that 300 mixes fit the test's time; all of them in turn.
        let chosen: Vec<usize> = (0..requests.len()).filter(|_| random.percent(60)).collect();
        let some: Vec<MixRequest> = chosen.iter().map(|index| requests[*index].clone()).collect();
        let mut group = group(&folders[which], machine, mix.block_tokens);
        let drawn = run(&mut group, POOL_TOKENS / mix.block_tokens, &some, mix).expect("ran");
        for (index, drawn) in chosen.iter().zip(&drawn) {
            let expected = &expected[which][*index];
            if let Some(at) = (0..expected.len()).find(|at| drawn.get(*at) != Some(&expected[*at])) {
                panic!(
                    "seed {seed}, {machine:?}, {mix:?}: request {index} differs at token {at}: {:?}, alone {:?}",
                    drawn.get(at),
                    expected[at]
                );
            }
        }
    }
    for (value, times) in &seen {
        assert!(*times >= EACH_VALUE, "{value} stood in {times} mixes only");
    }
    assert_eq!(seen.len(), 2 + 4 + 2 + isas.len() + 2 + 4 + 2 + 2 + 3, "every value of every axis: {seen:?}");
}

/// A vocabulary that the ranks do not divide: the last one's part is narrower, and the gathered rows are the same.
#[test]
fn a_vocabulary_that_ranks_do_not_divide_keeps_its_bits() {
    let isa = Isa::detect().expect("a processor that petek runs on");
    for dtype in [Dtype::F32, Dtype::BF16] {
        for tied in [false, true] {
            let folder = folder_of(LlamaShape { vocab: 1003, tied, ..shape() }, dtype);
            let expected = alone(&folder, isa);
            for ranks in [2, 4, 8] {
                let machine = Machine { ranks, threads: 1, isa };
                let drawn = run(&mut group(&folder, machine, 32), POOL_TOKENS / 32, &requests(), PLAIN);
                assert!(drawn.expect("ran") == expected, "{dtype:?}, tied {tied}, {ranks} ranks");
            }
        }
    }
}

/// The formats compute different numbers: the promise holds within one, and the test above would see a mix-up.
#[test]
fn formats_differ() {
    let best = Isa::detect().expect("a processor that petek runs on");
    let [a, b] = [Dtype::F32, Dtype::BF16].map(|dtype| folder(dtype).weights.format());
    assert_eq!((a, b), (Format::F32, Format::Bf16));
    assert_ne!(hash_of(&alone(&folder(Dtype::F32), best)), hash_of(&alone(&folder(Dtype::BF16), best)));
}
