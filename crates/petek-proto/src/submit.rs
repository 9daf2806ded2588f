//! A request between router and worker: parameters that were checked once go out with everything filled in,
//! and are checked again where they arrive, for a worker trusts nobody.

use std::sync::Arc;

use petek_core::ids::{Epoch, TokenId};
use petek_core::limits::request::{SEQUENCES_MAX, TENANT_BYTES_MAX};
use petek_core::params::{CacheUse, ModelLimits, Params, RawParams, check_ids};
use petek_core::refusal::Refusal;
use petek_core::seed::sequence_seed;

use crate::hello::{fixed, protocol};
use crate::worker::v1::{SamplingParams, Submit, SubmitSequence};

/// A request that a worker may take.
#[derive(Clone, Debug, PartialEq)]
pub struct Submission {
    /// The handle of everything after it.
    pub dispatch: u64,
    /// The router's id of the request.
    pub request_id: [u8; 16],
    /// Which dispatch of the request this is, from 1.
    pub attempt: u32,
    /// At least one, all in the vocabulary.
    pub prompt_ids: Vec<TokenId>,
    /// Empty where the cluster knows no tenants.
    pub tenant: String,
    /// What is left of the deadline.
    pub deadline_ms: Option<u64>,
    /// W3C trace context, as it came.
    pub traceparent: Option<String>,
    /// What the router thinks of this worker's queue.
    pub queue: QueueBelief,
    /// `n` is the number of `sequences`; the seed and `resumed_ids` are each sequence's own and unset here.
    pub params: Params,
    /// Tokens of output of each sequence, resumed ones included: what the context leaves, or less.
    pub max_tokens: u32,
    /// At least one, each index once.
    pub sequences: Vec<SubmittedSequence>,
}

/// One continuation of the prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubmittedSequence {
    /// Which of the request's.
    pub index: u32,
    /// Its own seed.
    pub seed: u64,
    /// Output tokens emitted before: fewer than or as many as max_tokens.
    pub resumed_ids: Arc<[TokenId]>,
}

/// What a router thinks of a worker's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueBelief {
    /// This many uncached tokens wait; a worker with far more may send the request elsewhere.
    Tokens(u64),
    /// Whatever waits, the request has been moved often enough.
    Forced,
}

impl Submission {
    /// Checks what a router sent.
    ///
    /// # Errors
    /// `StaleEpoch` for another engine start; `Protocol` for what no router of petek sends; what core's
    /// checks refuse.
    pub fn check(submit: Submit, epoch: Epoch, model: &ModelLimits) -> Result<Submission, Refusal> {
        let Submit {
            dispatch,
            request_id,
            attempt,
            epoch: named,
            prompt_ids,
            cache_salt,
            adapter,
            tenant,
            bypass_prefix_cache,
            priority,
            deadline_ms,
            traceparent,
            believed_queue_tokens,
            forced,
            params,
            sequences,
        } = submit;
        if named != epoch.0 {
            return Err(Refusal::StaleEpoch { named, current: epoch.0 });
        }
        if dispatch == 0 || attempt == 0 {
            return Err(protocol(format!(
                "submit.dispatch and submit.attempt count from 1, not {dispatch} and {attempt}"
            )));
        }
        if tenant.len() > TENANT_BYTES_MAX {
            return Err(protocol(format!(
                "submit.tenant has {} bytes, at most {TENANT_BYTES_MAX}",
                tenant.len()
            )));
        }
        check_indexes(&sequences)?;
        let mut raw = raw(params.ok_or_else(|| protocol("submit.params must be set".into()))?)?;
        raw.n = Some(sequences.len() as i64);
        raw.cache_salt = cache_salt.to_vec();
        raw.bypass_prefix_cache = Some(bypass_prefix_cache);
        raw.priority = Some(priority.into());
        if !adapter.is_empty() {
            raw.unsupported.push("adapter");
        }
        let params = raw.check(model, 0)?;
        let max_tokens = params.max_tokens_after(&prompt_ids, model)?;
        let sequences = sequences.into_iter().map(|sequence| {
            let SubmitSequence { index, seed, resumed_ids } = sequence;
            let field = format!("sequences[{index}].resumed_ids");
            check_ids(&field, &resumed_ids, model)?;
            if resumed_ids.len() > max_tokens as usize {
                let got = resumed_ids.len();
                return Err(Refusal::invalid(
                    field,
                    format!("are {got} tokens, but max_tokens is {max_tokens}"),
                ));
            }
            Ok(SubmittedSequence { index, seed, resumed_ids: resumed_ids.into() })
        });
        let sequences = sequences.collect::<Result<_, _>>()?;
        Ok(Submission {
            dispatch,
            request_id: fixed("submit.request_id", &request_id)?,
            attempt,
            prompt_ids,
            tenant,
            deadline_ms,
            traceparent: (!traceparent.is_empty()).then_some(traceparent),
            queue: if forced { QueueBelief::Forced } else { QueueBelief::Tokens(believed_queue_tokens) },
            params,
            max_tokens,
            sequences,
        })
    }
}

impl Submit {
    /// A request's first dispatch, from what was checked: the caller fills in the handle, ids, deadline,
    /// trace and what it believes of the queue. `max_tokens` is what [`Params::max_tokens_after`] gave.
    pub fn of(params: &Params, prompt_ids: Vec<TokenId>, max_tokens: u32) -> Submit {
        let sequences = (0..params.n).map(|index| SubmitSequence {
            index,
            seed: sequence_seed(params.seed, index),
            resumed_ids: params.resumed_ids.to_vec(),
        });
        Submit {
            prompt_ids,
            cache_salt: params.cache_salt.to_vec().into(),
            bypass_prefix_cache: params.cache_use == CacheUse::Bypassed,
            priority: params.priority.into(),
            params: Some(SamplingParams {
                temperature: Some(params.sampling.temperature),
                top_p: Some(params.sampling.top_p),
                top_k: params.sampling.top_k.map_or(0, |k| k.get()),
                min_p: params.sampling.min_p,
                stop_token_ids: params.stop_ids.to_vec(),
                // A model without EOS ids is the same either way.
                ignore_eos: params.eos_ids.is_empty(),
                // The context may have left less than either asked for.
                min_tokens: params.min_tokens.min(max_tokens),
                max_tokens,
                logprobs: params.logprobs.map(u32::from),
                ..SamplingParams::default()
            }),
            sequences: sequences.collect(),
            ..Submit::default()
        }
    }
}

fn check_indexes(sequences: &[SubmitSequence]) -> Result<(), Refusal> {
    if sequences.is_empty() || sequences.len() > SEQUENCES_MAX as usize {
        return Err(protocol(format!(
            "submit.sequences has {}, must be 1 to {SEQUENCES_MAX}",
            sequences.len()
        )));
    }
    let mut seen = [false; SEQUENCES_MAX as usize];
    for sequence in sequences {
        match seen.get_mut(sequence.index as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => {
                let index = sequence.index;
                return Err(protocol(format!("submit.sequences has index {index} twice or out of range")));
            }
        }
    }
    Ok(())
}

/// All defaults are filled in, so nothing is left to the model's own.
fn raw(params: SamplingParams) -> Result<RawParams, Refusal> {
    let SamplingParams {
        temperature,
        top_p,
        top_k,
        min_p,
        typical_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        logit_bias,
        allowed_token_ids,
        banned_token_ids,
        bad_words,
        stop_token_ids,
        ignore_eos,
        min_tokens,
        max_tokens,
        logprobs,
        prompt_logprobs,
        grammar,
    } = params;
    let unsupported = [("grammar", grammar.is_some()), ("bad_words", !bad_words.is_empty())];
    Ok(RawParams {
        temperature: Some(temperature.unwrap_or(1.0)),
        top_p: Some(top_p.unwrap_or(1.0)),
        top_k: Some(top_k.into()),
        min_p: Some(min_p),
        typical_p,
        repetition_penalty,
        frequency_penalty: Some(frequency_penalty),
        presence_penalty: Some(presence_penalty),
        logit_bias: logit_bias.into_iter().collect(),
        allowed_token_ids,
        banned_token_ids,
        stop_token_ids,
        ignore_eos: Some(ignore_eos),
        min_tokens: Some(min_tokens.into()),
        max_tokens: Some(max_tokens.into()),
        logprobs: logprobs.map(i64::from),
        prompt_logprobs: prompt_logprobs.map(i64::from),
        unsupported: unsupported.into_iter().filter(|(_, set)| *set).map(|(name, _)| name).collect(),
        ..RawParams::default()
    })
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use petek_core::params::SamplingDefaults;
    use petek_core::refusal::Reason;
    use prost::Message;

    use super::*;
    use crate::inference::v1::{Grammar, TokenIds};

    const EPOCH: Epoch = Epoch(77);

    /// Its own defaults must not leak into what the router filled in.
    fn model() -> ModelLimits {
        let defaults =
            SamplingDefaults { temperature: 0.1, top_k: NonZeroU32::new(1), top_p: 0.1, min_p: 0.9 };
        ModelLimits { vocabulary: 100, context_tokens: 64, eos_ids: [2, 7].into(), defaults }
    }

    fn submit(raw: RawParams) -> (Params, Submit) {
        let params = raw.check(&ModelLimits { defaults: SamplingDefaults::BUILT_IN, ..model() }, 5).unwrap();
        let prompt: Vec<TokenId> = (0..10).collect();
        let max_tokens = params.max_tokens_after(&prompt, &model()).unwrap();
        let submit = Submit::of(&params, prompt, max_tokens);
        (params, Submit { dispatch: 1, attempt: 1, epoch: EPOCH.0, request_id: vec![9; 16].into(), ..submit })
    }

    fn received(submit: &Submit) -> Result<Submission, Refusal> {
        Submission::check(Submit::decode(&submit.encode_to_vec()[..]).unwrap(), EPOCH, &model())
    }

    #[test]
    fn a_worker_draws_as_the_router_was_told() {
        let asked = [
            RawParams::default(),
            RawParams { temperature: Some(0.0), ..RawParams::default() },
            RawParams {
                temperature: Some(1.5),
                top_p: Some(0.5),
                top_k: Some(i64::MAX),
                min_p: Some(0.25),
                n: Some(3),
                stop_token_ids: vec![9, 3],
                ignore_eos: Some(true),
                min_tokens: Some(4),
                max_tokens: Some(9),
                logprobs: Some(0),
                cache_salt: vec![0xff, 0],
                bypass_prefix_cache: Some(true),
                priority: Some(7),
                ..RawParams::default()
            },
            // More than the context leaves, min_tokens too.
            RawParams { max_tokens: Some(60), min_tokens: Some(60), ..RawParams::default() },
            RawParams { resumed_ids: vec![4, 5], seed: Some(3), ..RawParams::default() },
        ];
        for raw in asked {
            let (asked, message) = submit(raw);
            let got = received(&message).unwrap();
            assert_eq!(got.max_tokens, asked.max_tokens_after(&got.prompt_ids, &model()).unwrap());
            assert_eq!(got.sequences.len(), asked.n as usize);
            for (index, sequence) in (0..).zip(&got.sequences) {
                let mut expected = asked.slot_sampling(index);
                expected.min_tokens = expected.min_tokens.min(got.max_tokens);
                assert_eq!(got.params.slot_sampling_seeded(sequence.seed), expected);
                assert_eq!((sequence.index, &sequence.resumed_ids), (index, &asked.resumed_ids));
            }
            assert_eq!((&got.params.eos_ids, &got.params.stop_ids), (&asked.eos_ids, &asked.stop_ids));
            assert_eq!((&got.params.cache_salt, got.params.cache_use), (&asked.cache_salt, asked.cache_use));
            assert_eq!(got.params.priority, asked.priority);
        }
    }

    #[test]
    fn the_rest_of_a_submit_arrives() {
        let (_, message) = submit(RawParams { n: Some(2), ..RawParams::default() });
        let mut message = Submit {
            dispatch: u64::MAX,
            attempt: 3,
            tenant: "acme".into(),
            deadline_ms: Some(0),
            traceparent: "00-ab-cd-01".into(),
            believed_queue_tokens: 512,
            ..message
        };
        // A move: each sequence has come as far as it has, and one of them has ended before.
        message.sequences = vec![SubmitSequence { index: 1, seed: 6, resumed_ids: vec![1; 20] }];
        let got = received(&message).unwrap();
        assert_eq!((got.dispatch, got.attempt, got.request_id), (u64::MAX, 3, [9; 16]));
        assert_eq!((&got.tenant[..], got.deadline_ms), ("acme", Some(0)));
        assert_eq!((got.traceparent.as_deref(), got.queue), (Some("00-ab-cd-01"), QueueBelief::Tokens(512)));
        assert_eq!((got.params.n, got.sequences[0].index, got.sequences[0].seed), (1, 1, 6));
        message.forced = true;
        assert_eq!(received(&message).unwrap().queue, QueueBelief::Forced);
        assert_eq!(received(&Submit { traceparent: String::new(), ..message }).unwrap().traceparent, None);
    }

    #[test]
    fn a_worker_trusts_nobody() {
        let check = |change: fn(&mut Submit), reason: Reason, says: &str| {
            let (_, mut message) = submit(RawParams { n: Some(2), ..RawParams::default() });
            change(&mut message);
            let refusal = received(&message).expect_err(says);
            assert_eq!(refusal.reason(), reason, "{refusal}");
            assert!(refusal.to_string().contains(says), "{refusal} does not say {says}");
        };
        fn params(message: &mut Submit) -> &mut SamplingParams {
            message.params.as_mut().unwrap()
        }
        check(|m| m.epoch = 76, Reason::StaleEpoch, "names epoch 76 and the engine's is 77");
        check(|m| m.dispatch = 0, Reason::Protocol, "count from 1, not 0 and 1");
        check(|m| m.attempt = 0, Reason::Protocol, "count from 1, not 1 and 0");
        check(|m| m.request_id.clear(), Reason::Protocol, "request_id must have 16 bytes, not 0");
        check(|m| m.tenant = "x".repeat(257), Reason::Protocol, "tenant has 257 bytes");
        check(|m| m.params = None, Reason::Protocol, "params must be set");
        check(|m| m.sequences.clear(), Reason::Protocol, "sequences has 0");
        check(|m| m.sequences = vec![SubmitSequence::default(); 65], Reason::Protocol, "sequences has 65");
        check(|m| m.sequences[0].index = 1, Reason::Protocol, "index 1 twice");
        check(|m| m.sequences[0].index = 64, Reason::Protocol, "index 64 twice or out of range");
        check(|m| m.prompt_ids.clear(), Reason::InvalidField, "at least one token");
        check(|m| m.prompt_ids[3] = 100, Reason::InvalidField, "prompt_ids[3]");
        check(|m| m.prompt_ids = vec![1; 64], Reason::ContextLengthExceeded, "64 tokens");
        check(
            |m| m.sequences[1].resumed_ids = vec![100],
            Reason::InvalidField,
            "sequences[1].resumed_ids[0]",
        );
        check(|m| m.sequences[1].resumed_ids = vec![1; 55], Reason::InvalidField, "max_tokens is 54");
        check(|m| m.adapter = "sql".into(), Reason::UnsupportedParameter, "adapter");
        check(|m| m.priority = 8, Reason::InvalidField, "priority");
        check(|m| params(m).temperature = Some(f32::NAN), Reason::InvalidField, "temperature");
        check(|m| params(m).min_p = 2.0, Reason::InvalidField, "min_p");
        check(|m| params(m).max_tokens = 0, Reason::InvalidField, "max_tokens");
        check(|m| params(m).logprobs = Some(21), Reason::InvalidField, "logprobs");
        check(|m| params(m).stop_token_ids = vec![100], Reason::InvalidField, "stop_token_ids[0]");
        check(|m| params(m).grammar = Some(Grammar::default()), Reason::UnsupportedParameter, "grammar");
        check(|m| params(m).bad_words = vec![TokenIds::default()], Reason::UnsupportedParameter, "bad_words");
        check(|m| params(m).logit_bias = [(1, 1.0)].into(), Reason::UnsupportedParameter, "logit_bias");
        check(|m| params(m).presence_penalty = 1.0, Reason::UnsupportedParameter, "presence_penalty");
        check(|m| params(m).prompt_logprobs = Some(0), Reason::UnsupportedParameter, "prompt_logprobs");
    }

    #[test]
    fn unset_values_are_off_and_not_the_models_own() {
        let (_, mut message) = submit(RawParams::default());
        message.params = Some(SamplingParams { max_tokens: 5, ..SamplingParams::default() });
        assert_eq!(received(&message).unwrap().params.sampling, SamplingDefaults::BUILT_IN);
    }
}
