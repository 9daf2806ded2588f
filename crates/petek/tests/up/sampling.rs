//! Filters of the sampler, and what the prefix cache may and may not share, by the ids that come out.

use std::collections::{BTreeMap, BTreeSet};

use petek_proto::admin::v1::DrainWorkerRequest;
use petek_proto::admin::v1::admin_service_client::AdminServiceClient;
use petek_proto::inference::v1::{RequestOptions, SamplingParams};
use petek_tests::chain::Chain;
use tonic::transport::Channel;

use super::api::{Client, greedy, spec, text_spec, with};
use super::process::Up;

/// [sgl-project/sglang-jax#1563, vllm#41598] Filters are measured after temperature and over what top_k left.
#[tokio::test]
async fn filters_keep_the_tokens_that_the_contract_names() {
    const SEEDS: u64 = 2_000;
    const AT_ONCE: u64 = 50;
    let dir = tempfile::tempdir().expect("a folder");
    let (slope, tie) = (20, 21);
    let chain = Chain::bytes(&["a", "b", "c"])
        .logits_after(slope, &[(0, 2.0), (1, 1.0), (2, 0.0), (3, -1.0)], -30.0)
        .logits_after(tie, &[(7, 0.0), (9, 0.0)], -30.0);
    chain.write(dir.path()).expect("write the model");
    let model = dir.path().to_str().expect("a plain path");
    let up = Up::start(&["--model", model, "--threads", "1"]);
    let client = Client::of(&up).await;
    // How often each id is drawn over so many seeds.
    let drawn = async |from: u32, temperature: f32, filter: SamplingParams| {
        let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
        for seed in 0..SEEDS / AT_ONCE {
            let asked = SamplingParams {
                temperature: Some(temperature),
                seed: Some(seed),
                n: Some(AT_ONCE as u32),
                max_tokens: Some(1),
                ..filter.clone()
            };
            let answer = client.stream(spec(&[from], asked)).await;
            answer.finished();
            answer.sequences.iter().for_each(|one| *counts.entry(one.ids[0]).or_default() += 1);
        }
        assert_eq!(counts.values().sum::<u64>(), SEEDS);
        counts
    };
    let seen = |counts: &BTreeMap<u32, u64>| counts.keys().copied().collect::<Vec<_>>();
    let none = SamplingParams::default;

    // Weights 1, e⁻², e⁻⁴, e⁻⁶: shares 0.865, 0.117, 0.016, 0.002.
    let top_p = drawn(slope, 0.5, SamplingParams { top_p: Some(0.9), ..none() }).await;
    assert_eq!(seen(&top_p), [0, 1]);
    // Of the two that are left 0.119, within four standard deviations over 2,000 draws: 0.029.
    let share = top_p[&1] as f64 / SEEDS as f64;
    assert!((share - 0.119).abs() < 0.029, "{share}");
    assert_eq!(seen(&drawn(slope, 0.5, SamplingParams { min_p: Some(0.2), ..none() }).await), [0]);
    let both = SamplingParams { top_k: Some(2), top_p: Some(0.87), ..none() };
    assert_eq!(seen(&drawn(slope, 0.5, both).await), [0]);
    // Without a filter all four come, so that the ones above have something to keep out.
    assert_eq!(seen(&drawn(slope, 0.5, none()).await), [0, 1, 2, 3]);

    assert_eq!(seen(&drawn(tie, 1.0, SamplingParams { top_k: Some(1), ..none() }).await), [7]);
    assert_eq!(seen(&drawn(tie, 1.0, SamplingParams { top_p: Some(0.5), ..none() }).await), [7]);
    assert_eq!(seen(&drawn(tie, 1.0, none()).await), [7, 9]);
}

/// [sglang#5525] A request's own sequences are no hit, and salt, bypass and length decide what is one.
#[tokio::test]
async fn cached_tokens_are_those_that_were_not_computed() {
    let up = Up::start(&["--block-size", "16", "--workers", "1", "--threads", "1"]);
    let client = Client::of(&up).await;
    let computed = || {
        up.metric("petek_worker_prompt_tokens_total", &[])
            - up.metric("petek_worker_cached_tokens_total", &[])
    };
    let prompt: Vec<u32> = (0..64).map(|at| 300 + at * 7 % 64).collect();
    let ask = async |options: RequestOptions, prompt: &[u32]| {
        let asked =
            SamplingParams { n: Some(3), seed: Some(3), max_tokens: Some(9), ..SamplingParams::default() };
        let before = computed();
        let answer = client.stream(with(options, spec(prompt, asked))).await;
        let (prompt_tokens, cached_tokens, completion_tokens) = answer.usage();
        assert_eq!(prompt_tokens as usize, prompt.len());
        let sum: usize = answer.sequences.iter().map(|one| one.ids.len()).sum();
        assert_eq!(completion_tokens as usize, sum, "the prompt once, the output of all three");
        assert_eq!(answer.started.as_ref().expect("started").cached_tokens, cached_tokens);
        let ids: Vec<Vec<u32>> = answer.sequences.into_iter().map(|one| one.ids).collect();
        (cached_tokens, computed() - before, ids)
    };
    let options = RequestOptions::default;
    let (cold, cold_computed, ids) = ask(options(), &prompt).await;
    assert_eq!((cold, cold_computed), (0, 64.0));
    // An exact multiple of the block: the last block is computed again, and the same comes out.
    let (warm, warm_computed, warm_ids) = ask(options(), &prompt).await;
    assert_eq!((warm, warm_computed), (48, 16.0));
    assert_eq!(warm_ids, ids);
    // Another salt shares nothing with the first, and does with itself.
    let salted = || RequestOptions { cache_salt: "another tenant".into(), ..options() };
    let (first, _, salted_ids) = ask(salted(), &prompt).await;
    let (second, ..) = ask(salted(), &prompt).await;
    assert_eq!((first, second, salted_ids), (0, 48, ids.clone()));
    // One that bypasses the cache does not read it, and leaves nothing behind.
    let bypassing = || RequestOptions { bypass_prefix_cache: true, ..options() };
    let (bypassed, bypassed_computed, bypassed_ids) = ask(bypassing(), &prompt).await;
    assert_eq!((bypassed, bypassed_computed, bypassed_ids), (0, 64.0, ids));
    let unseen: Vec<u32> = prompt.iter().rev().copied().collect();
    ask(bypassing(), &unseen).await;
    assert_eq!(ask(options(), &unseen).await.0, 0);
    // A prompt that goes on where a cached one ends shares all of it.
    let longer: Vec<u32> = prompt.iter().copied().chain([9, 8, 7]).collect();
    assert_eq!(ask(options(), &longer).await.0, 64);
}

/// A pool for one and a half sequences: what is preempted is computed again, and nobody can tell from what comes out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preempted_requests_give_the_same_text() {
    let roomy = Up::start(&["--block-size", "16", "--workers", "1", "--threads", "1"]);
    let narrow = Up::start(&[
        "--block-size",
        "16",
        "--workers",
        "1",
        "--threads",
        "1",
        "--context",
        "256",
        "--kv-memory",
        NARROW,
    ]);
    let prompts = ["I have a dream", "The bee", "Once upon a time", "What is a honeycomb?"];
    let all = async |up: &Up| {
        let client = Client::of(up).await;
        let asked = prompts.iter().enumerate().map(|(number, prompt)| {
            let asked = SamplingParams {
                seed: Some(number as u64),
                max_tokens: Some(200),
                ignore_eos: true,
                logprobs: Some(2),
                ..SamplingParams::default()
            };
            client.stream(text_spec(prompt, asked))
        });
        let answers = futures::future::join_all(asked).await;
        answers
            .into_iter()
            .map(|answer| {
                assert_eq!(answer.ids().len(), 200);
                let usage = answer.usage();
                let one = answer.sequences.into_iter().next().expect("one");
                let bits: Vec<u32> =
                    one.logprobs.iter().filter_map(|entry| entry.logprob).map(f32::to_bits).collect();
                (one.text, one.ids, bits, usage)
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(all(&narrow).await, all(&roomy).await);
    let preemptions = |up: &Up| up.metric("petek_worker_preemptions_total", &[]);
    assert!(preemptions(&narrow) > 0.0, "the narrow pool was not narrow");
    assert_eq!(preemptions(&roomy), 0.0);
}

/// A cache of about 24 blocks of 16 tokens: four sequences of up to 14 blocks do not fit together.
const NARROW: &str = "384KiB";

/// BEHAVIOUR 1: whichever worker answers. The first one to answer is drained, so that the other has to.
#[tokio::test]
async fn either_worker_gives_the_same_bits() {
    let up = Up::start(&[]);
    let client = Client::of(&up).await;
    let asked = SamplingParams {
        seed: Some(5),
        temperature: Some(1.5),
        max_tokens: Some(60),
        ignore_eos: true,
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let first = client.stream(text_spec("I have a dream", asked.clone())).await;
    let worker = first.started.as_ref().expect("started").worker.clone();
    let admin = Channel::from_shared(format!("http://{}", up.admin)).expect("an address");
    let mut admin = AdminServiceClient::new(admin.connect().await.expect("it listens"));
    let drain = DrainWorkerRequest { worker: worker.clone(), ..DrainWorkerRequest::default() };
    admin.drain_worker(drain).await.expect("it drains");
    let second = client.stream(text_spec("I have a dream", asked)).await;
    assert_ne!(second.started.as_ref().expect("started").worker, worker);
    assert_eq!(second.started.as_ref().expect("started").cached_tokens, 0);
    let (first, second) = (&first.sequences[0], &second.sequences[0]);
    assert_eq!((&first.text, &first.ids, &first.logprobs), (&second.text, &second.ids, &second.logprobs));
    assert_eq!(first.ids.len(), 60);
}

/// n sequences are the n requests of the seeds that it reports.
#[tokio::test]
async fn several_sequences_are_those_of_their_seeds_asked_one_by_one() {
    let up = Up::start(&[]);
    let client = Client::of(&up).await;
    let asked = |seed: u64, n: u32| SamplingParams {
        seed: Some(seed),
        n: Some(n),
        temperature: Some(1.5),
        max_tokens: Some(20),
        logprobs: Some(1),
        ..SamplingParams::default()
    };
    let several = client.both(text_spec("I have a dream", asked(77, 8))).await;
    let texts: BTreeSet<&str> = several.sequences.iter().map(|one| &*one.text).collect();
    assert!(texts.len() > 4, "{texts:?}");
    for (sequence, end) in several.sequences.iter().zip(&several.finished().sequences) {
        let alone = client.stream(text_spec("I have a dream", asked(end.seed, 1))).await;
        let alone = &alone.sequences[0];
        assert_eq!((&sequence.ids, &sequence.text), (&alone.ids, &alone.text));
        assert_eq!(sequence.logprobs, alone.logprobs);
    }
    // With greedy all texts are equal.
    let equal = client.both(text_spec("I have a dream", SamplingParams { n: Some(5), ..greedy(12) })).await;
    assert!(equal.sequences.iter().all(|one| one.ids == equal.sequences[0].ids));
}
