//! A rank carries plans out: what the slots hold, how drafts are verified, and which plans it refuses; ranks in a group
//! compute what one rank computes.

use std::path::Path;
use std::sync::Arc;

use petek_core::ids::{BlockId, SlotId, StepNumber};
use petek_core::plan::{Draw, SlotFill, SlotSampling, Span, SpanInput, SpanSample, StepOutcome, StepPlan};
use petek_device::collective::{Collective, Solo, Threads};
use petek_device::cpu::reference::Reference;
use petek_device::ops::{Format, StepCapacity};
use petek_model::LoadError;
use petek_model::decoder::{Decoder, DecoderOptions};
use petek_model::folder::ModelFolder;
use petek_model::group::{GroupError, RankGroup};
use petek_model::rank::{LogitsHash, Rank, Sampler};
use petek_model::shard::Shard;

const BLOCK: usize = 16;

fn folder() -> ModelFolder {
    ModelFolder::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/tp8"))
        .expect("opened")
}

fn rank_of(folder: &ModelFolder, collective: Arc<dyn Collective>) -> Result<Rank, LoadError> {
    let shard = Shard::plan(&folder.config, collective.ranks())?.remove(collective.rank());
    let sampler = if collective.rank() == 0 { Sampler::Here } else { Sampler::Elsewhere };
    let options =
        DecoderOptions { format: Format::F32, context: 64, vocabulary_drawn: folder.config.vocabulary };
    let ops = Box::new(Reference::new(Format::F32, collective));
    let decoder = Decoder::load(ops, &folder.config, shard, &folder.weights, options)?;
    let capacity = StepCapacity { rows: 64, spans: 4, picks: 16, blocks_per_span: 4 };
    Ok(Rank::new(decoder, 4, BLOCK, 12, capacity, sampler, LogitsHash::Off)?)
}

fn sampling(temperature: f32) -> Arc<SlotSampling> {
    Arc::new(SlotSampling {
        temperature,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        seed: 42,
        logprobs: None,
        min_tokens: 0,
        masked_ids: Arc::default(),
    })
}

fn fill(slot: u32, ids: &[u32], prompt_tokens: usize, temperature: f32) -> SlotFill {
    let sampling = sampling(temperature);
    SlotFill { slot: SlotId(slot), ids: ids.into(), prompt_tokens: prompt_tokens as u32, sampling }
}

fn span(slot: u32, start: usize, len: usize, input: SpanInput, blocks: &[u32]) -> Span {
    Span {
        slot: SlotId(slot),
        start: start as u32,
        len: len as u32,
        input,
        drafts: Vec::new(),
        new_blocks: blocks.iter().copied().map(BlockId).collect(),
        sample: SpanSample::Draw,
    }
}

fn plan(step: u64, fills: Vec<SlotFill>, spans: Vec<Span>) -> StepPlan {
    StepPlan { step: StepNumber(step), fills, spans, ..StepPlan::default() }
}

fn ids(outcome: &StepOutcome) -> Vec<u32> {
    let id = |draw| match draw {
        Draw::Token(id) => id,
        other => panic!("{other:?}"),
    };
    outcome.tokens.iter().map(|token| id(token.draw)).collect()
}

const PROMPT: [u32; 5] = [7, 1, 30, 12, 5];

/// The first tokens after the prompt, one a step.
fn plainly(rank: &mut Rank, count: usize, temperature: f32) -> Vec<u32> {
    let fills = vec![fill(0, &PROMPT, PROMPT.len(), temperature)];
    let mut drawn =
        ids(&rank.step(&plan(0, fills, vec![span(0, 0, 5, SpanInput::Ids, &[3, 7])])).expect("prefill"));
    for step in 1..count {
        let next = span(0, 4 + step, 1, SpanInput::LastSampled, &[]);
        drawn.extend(ids(&rank.step(&plan(step as u64, Vec::new(), vec![next])).expect("decode")));
    }
    drawn
}

/// Right, wrong and half-right drafts all give the tokens that no drafts give, and the count says what was accepted.
#[test]
fn a_draft_is_accepted_if_and_only_if_it_is_what_is_drawn() {
    let folder = folder();
    for temperature in [0.0, 1.5] {
        let expected = plainly(&mut rank_of(&folder, Solo::new_group()).expect("loaded"), 8, temperature);
        let other = |id: u32| (id + 1) % folder.config.vocabulary as u32;
        for accepted in 0..=3 {
            let mut rank = rank_of(&folder, Solo::new_group()).expect("loaded");
            let fills = vec![fill(0, &PROMPT, PROMPT.len(), temperature)];
            let mut first = span(0, 0, 5, SpanInput::Ids, &[2, 9]);
            first.drafts = expected[..3].to_vec();
            if accepted < 3 {
                first.drafts[accepted] = other(first.drafts[accepted]);
            }
            let drawn = ids(&rank.step(&plan(0, fills, vec![first])).expect("stepped"));
            assert_eq!(drawn, expected[..=accepted], "temperature {temperature}");
            // The next step goes on from the last token drawn, over what the rejected drafts left in the cache.
            let next = span(0, 5 + accepted, 1, SpanInput::LastSampled, &[]);
            let after = ids(&rank.step(&plan(1, Vec::new(), vec![next])).expect("stepped"));
            assert_eq!(after, [expected[accepted + 1]], "after {accepted} accepted");
        }
    }
}

#[test]
fn a_plan_that_contradicts_the_slots_is_refused_before_anything_is_computed() {
    let folder = folder();
    let vocabulary = folder.config.vocabulary as u32;
    let mut rank = rank_of(&folder, Solo::new_group()).expect("loaded");
    let mut refused = |plan: StepPlan, part: &str| {
        let error = rank.step(&plan).expect_err(part).to_string();
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    };
    refused(
        plan(0, Vec::new(), vec![span(0, 0, 1, SpanInput::Ids, &[0])]),
        "slot 0: a span of a slot that is not filled",
    );
    refused(plan(0, vec![fill(9, &PROMPT, 5, 0.0)], Vec::new()), "there are 4 slots");
    refused(plan(0, vec![fill(0, &[vocabulary], 1, 0.0)], Vec::new()), "outside the vocabulary");
    refused(plan(0, vec![fill(0, &[1; 65], 65, 0.0)], Vec::new()), "a context of 64");
    let good = || fill(0, &PROMPT, 5, 0.0);
    refused(plan(0, vec![good(), good()], Vec::new()), "was not released");
    refused(plan(1, Vec::new(), vec![span(0, 0, 5, SpanInput::Ids, &[])]), "in 0 blocks of 16");
    refused(plan(2, Vec::new(), vec![span(0, 4, 2, SpanInput::Ids, &[1])]), "but 5 ids");
    refused(
        plan(3, Vec::new(), vec![span(0, 9, 1, SpanInput::LastSampled, &[])]),
        "the last sampled is not at",
    );
    refused(plan(4, vec![fill(1, &PROMPT, 5, 0.0)], vec![span(1, 0, 5, SpanInput::Ids, &[99])]), "below 12");
}

#[test]
fn a_group_computes_what_one_rank_computes() {
    let folder = Arc::new(folder());
    let mut solo = rank_of(&folder, Solo::new_group()).expect("loaded");
    let expected = plainly(&mut solo, 10, 1.5);
    let whole = solo.decoder().ops().weight_bytes();
    for ranks in [2, 4, 8] {
        let of_folder = folder.clone();
        let build = Arc::new(move |_, collective| rank_of(&of_folder, collective));
        let mut group = RankGroup::start::<LoadError>(Threads::group(ranks, 1), build).expect("started");
        let mut drawn = Vec::new();
        for step in 0..10 {
            let next = match step {
                0 => plan(0, vec![fill(1, &PROMPT, 5, 1.5)], vec![span(1, 0, 5, SpanInput::Ids, &[3])]),
                _ => plan(step, Vec::new(), vec![span(1, 4 + step as usize, 1, SpanInput::LastSampled, &[])]),
            };
            let outcome = group.step(&next).expect("stepped");
            drawn.extend(ids(&outcome));
        }
        assert_eq!(drawn, expected, "{ranks} ranks");
        // Nobody holds more than its shard: norms stand on every rank, the rest is divided (keys and values by two at most).
        let shards = Shard::plan(&folder.config, ranks).expect("planned");
        let held = shards.into_iter().map(|shard| {
            let ops = Box::new(Reference::new(Format::F32, Solo::new_group()));
            let options = DecoderOptions { format: Format::F32, context: 64, vocabulary_drawn: 1 };
            let decoder =
                Decoder::load(ops, &folder.config, shard, &folder.weights, options).expect("loaded");
            decoder.ops().weight_bytes()
        });
        let norms = (2 * folder.config.layers + 1) * folder.config.hidden * 4;
        let kv_copies = (ranks / folder.config.heads.kv).max(1) - 1;
        let kv = folder.config.layers
            * 2
            * folder.config.heads.kv
            * folder.config.heads.dim
            * folder.config.hidden
            * 4;
        assert_eq!(held.sum::<usize>(), whole + (ranks - 1) * norms + kv_copies * kv, "{ranks} ranks");
    }
}

#[test]
fn one_rank_that_fails_ends_the_group_and_nobody_hangs() {
    let folder = Arc::new(folder());
    let of_folder = folder.clone();
    let build = Arc::new(move |_, collective| rank_of(&of_folder, collective));
    let mut group = RankGroup::start::<LoadError>(Threads::group(4, 1), build).expect("started");
    let bad = plan(0, Vec::new(), vec![span(0, 0, 1, SpanInput::Ids, &[0])]);
    let error = group.step(&bad).expect_err("no slot is filled");
    assert!(matches!(&error, GroupError::Rank { problem, .. } if problem.contains("not filled")), "{error}");
    assert!(matches!(group.step(&bad), Err(GroupError::Ended(_))));

    let of_folder = folder.clone();
    let build = Arc::new(move |rank, collective| {
        assert!(rank != 2, "rank 2 breaks while loading");
        rank_of(&of_folder, collective)
    });
    let error = RankGroup::start::<LoadError>(Threads::group(4, 1), build).err().expect("rank 2 broke");
    assert!(
        matches!(&error, GroupError::Rank { rank: 2, problem } if problem.contains("panicked")),
        "{error}"
    );
}
