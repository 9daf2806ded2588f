//! A request's parameters: raw, as a client typed them, and checked, as they are meant.
//!
//! In [`RawParams`] unset is not zero: an absent value takes the model's default, a zero is what the client said.
//! [`RawParams::check`] is the only way to [`Params`], on the router and again on the worker, which trusts nobody.
//! What is known but not built yet is refused by name; nothing is ignored.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::ids::TokenId;
use crate::limits::request as limit;
use crate::plan::SlotSampling;
use crate::refusal::Refusal;
use crate::seed::sequence_seed;

/// Parameters as a client typed them; integers are wide enough to name a wrong one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RawParams {
    /// 0 to 2; 0 is greedy.
    pub temperature: Option<f32>,
    /// Above 0, to 1.
    pub top_p: Option<f32>,
    /// At least 1; 0 and -1 are off.
    pub top_k: Option<i64>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// Not built yet: anything but 1 is refused.
    pub typical_p: Option<f32>,
    /// Not built yet: anything but 1 is refused.
    pub repetition_penalty: Option<f32>,
    /// Not built yet: anything but 0 is refused.
    pub frequency_penalty: Option<f32>,
    /// Not built yet: anything but 0 is refused.
    pub presence_penalty: Option<f32>,
    /// Not built yet: anything but an empty list is refused.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Not built yet: anything but an empty list is refused.
    pub allowed_token_ids: Vec<TokenId>,
    /// Not built yet: anything but an empty list is refused.
    pub banned_token_ids: Vec<TokenId>,
    /// Not built yet: anything but an empty list is refused.
    pub bad_words: Vec<String>,
    /// Any 64 bits; where HTTP says them as text, [`crate::seed::parse_seed`] reads it.
    pub seed: Option<u64>,
    /// 1 to 64.
    pub n: Option<i64>,
    /// Refused by name.
    pub best_of: Option<i64>,
    /// At most 16, none empty.
    pub stop: Vec<String>,
    /// Whether the stop that matched stays in the text.
    pub include_stop: Option<bool>,
    /// Tokens that end a sequence, like EOS.
    pub stop_token_ids: Vec<TokenId>,
    /// Whether EOS is a token like others.
    pub ignore_eos: Option<bool>,
    /// At most max_tokens.
    pub min_tokens: Option<i64>,
    /// At least 1; absent is what the context leaves.
    pub max_tokens: Option<i64>,
    /// 0 to 20.
    pub logprobs: Option<i64>,
    /// Not built yet: refused.
    pub prompt_logprobs: Option<i64>,
    /// Not built yet: true is refused.
    pub echo: Option<bool>,
    /// Whether special tokens are left out of the text; true where absent.
    pub skip_special_tokens: Option<bool>,
    /// Keeps this request's blocks apart from those of every other salt.
    pub cache_salt: Vec<u8>,
    /// Whether the prefix cache is neither read nor written.
    pub bypass_prefix_cache: Option<bool>,
    /// Output tokens of an earlier, broken stream.
    pub resumed_ids: Vec<TokenId>,
    /// 0 (first) to 7.
    pub priority: Option<i64>,
    /// Names of parameters that were set and have no field here, for we know them only to refuse them: beam search,
    /// suffix, images, audio, grammars, adapters.
    pub unsupported: Vec<&'static str>,
}

/// What the model and its configuration allow and suppose.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelLimits {
    /// Of the model's configuration; ids are below it.
    pub vocabulary: u32,
    /// Positions of one sequence, as served.
    pub context_tokens: u32,
    /// Union of what the model's files call EOS, ascending.
    pub eos_ids: Arc<[TokenId]>,
    /// Where the client says nothing.
    pub defaults: SamplingDefaults,
}

/// Sampling where the client says nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// 0 is greedy.
    pub temperature: f32,
    /// None is off.
    pub top_k: Option<NonZeroU32>,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
}

impl SamplingDefaults {
    /// Where the model says nothing either.
    pub const BUILT_IN: SamplingDefaults =
        SamplingDefaults { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0 };

    /// What a model's generation_config says, and [`Self::BUILT_IN`] where it says nothing: its values are held to the
    /// same ranges as a client's. A `top_k` of 0 is off.
    ///
    /// # Errors
    /// A refusal that names the value out of range.
    pub fn of_model(
        temperature: Option<f32>,
        top_k: Option<u32>,
        top_p: Option<f32>,
        min_p: Option<f32>,
    ) -> Result<Self, Refusal> {
        let top_k = top_k.map(i64::from);
        Self::BUILT_IN.overridden_by(&RawParams { temperature, top_k, top_p, min_p, ..RawParams::default() })
    }

    fn overridden_by(self, raw: &RawParams) -> Result<Self, Refusal> {
        let temperature =
            between("temperature", raw.temperature.unwrap_or(self.temperature), 0.0, limit::TEMPERATURE_MAX)?;
        let top_p = between("top_p", raw.top_p.unwrap_or(self.top_p), 0.0, 1.0)?;
        if top_p == 0.0 {
            return Err(Refusal::invalid("top_p", "must be above 0 and at most 1, not 0"));
        }
        Ok(SamplingDefaults {
            temperature: if temperature < limit::TEMPERATURE_GREEDY { 0.0 } else { temperature },
            top_k: match raw.top_k {
                None => self.top_k,
                Some(-1 | 0) => None,
                Some(k) if k > 0 => NonZeroU32::new(u32::try_from(k).unwrap_or(u32::MAX)),
                Some(k) => return Err(Refusal::invalid("top_k", format!("must be at least -1, not {k}"))),
            },
            top_p,
            min_p: between("min_p", raw.min_p.unwrap_or(self.min_p), 0.0, 1.0)?,
        })
    }
}

/// Parameters as they are meant. Everything in them has been checked against a [`ModelLimits`].
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// Temperature and filters.
    pub sampling: SamplingDefaults,
    /// The request's seed: the client's, or the random one that it got.
    pub seed: u64,
    /// Sequences of the one prompt.
    pub n: u32,
    /// Stop strings: the router's business.
    pub stop: Arc<[String]>,
    /// What becomes of the stop's text.
    pub stop_text: StopText,
    /// Tokens that end a sequence with STOP_EOS; empty where EOS is ignored. Ascending.
    pub eos_ids: Arc<[TokenId]>,
    /// Tokens that end a sequence with STOP_TOKEN. Ascending.
    pub stop_ids: Arc<[TokenId]>,
    /// What min_tokens masks: EOS, ignored or not, and stop ids. Ascending.
    pub masked_ids: Arc<[TokenId]>,
    /// Below this output position nothing ends a sequence but length.
    pub min_tokens: u32,
    /// As asked, or as much as the context leaves. See [`Params::max_tokens_after`].
    pub max_tokens: Option<u32>,
    /// None, or how many of the most likely tokens are reported beside the chosen one.
    pub logprobs: Option<u8>,
    /// Whether special tokens stand in the text.
    pub special_tokens: SpecialTokens,
    /// Empty is none.
    pub cache_salt: Arc<[u8]>,
    /// Whether the prefix cache is used.
    pub cache_use: CacheUse,
    /// Output of an earlier, broken stream: the new tokens' positions follow them.
    pub resumed_ids: Arc<[TokenId]>,
    /// 0 is served first.
    pub priority: u8,
}

/// What becomes of the text of a stop that matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopText {
    /// It is left out.
    LeftOut,
    /// It stays.
    Included,
}

/// What becomes of special tokens' text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// They are left out of the text, never of the ids.
    Skipped,
    /// They stand in it.
    Kept,
}

/// Whether a request uses the prefix cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheUse {
    /// It reads and writes it.
    Shared,
    /// It neither reads nor writes it.
    Bypassed,
}

impl RawParams {
    /// Checks everything that can be checked without the prompt.
    ///
    /// `random_seed` is the seed of a request that names none.
    ///
    /// # Errors
    /// A refusal that names the first field that is wrong, in the order of the fields, and what it must be.
    pub fn check(&self, model: &ModelLimits, random_seed: u64) -> Result<Params, Refusal> {
        self.refuse_what_is_not_built()?;
        let sampling = model.defaults.overridden_by(self)?;
        let n = integer("n", self.n, 1, limit::SEQUENCES_MAX.into())?.unwrap_or(1);
        check_stops(&self.stop)?;
        at_most("stop_token_ids", self.stop_token_ids.len(), limit::STOP_IDS_MAX, "ids")?;
        check_ids("stop_token_ids", &self.stop_token_ids, model)?;
        let max_tokens = integer("max_tokens", self.max_tokens, 1, i64::MAX)?;
        let min_tokens = integer("min_tokens", self.min_tokens, 0, i64::MAX)?.unwrap_or(0);
        if let Some(max) = max_tokens.filter(|max| min_tokens > *max) {
            let problem = format!("must be at most max_tokens, which is {max}, not {min_tokens}");
            return Err(Refusal::invalid("min_tokens", problem));
        }
        let logprobs = integer("logprobs", self.logprobs, 0, limit::LOGPROBS_MAX.into())?.map(|n| n as u8);
        at_most("cache_salt", self.cache_salt.len(), limit::CACHE_SALT_BYTES_MAX, "bytes")?;
        check_ids("resumed_ids", &self.resumed_ids, model)?;
        if n > 1 && !self.resumed_ids.is_empty() {
            return Err(Refusal::invalid("resumed_ids", format!("continue one sequence, but n is {n}")));
        }
        if let Some(max) = max_tokens.filter(|max| self.resumed_ids.len() > *max as usize) {
            let got = self.resumed_ids.len();
            return Err(Refusal::invalid(
                "resumed_ids",
                format!("are {got} tokens, but max_tokens is {max}"),
            ));
        }
        if !self.resumed_ids.is_empty() && self.seed.is_none() && sampling.temperature > 0.0 {
            let problem =
                "must be the one that the broken stream reported, for resumed_ids to go on as it would have";
            return Err(Refusal::invalid("seed", problem));
        }
        let priority = integer("priority", self.priority, 0, crate::limits::engine::PRIORITY_MAX.into())?;

        let stop_ids = ascending(self.stop_token_ids.iter());
        let yes = |flag: Option<bool>| flag == Some(true);
        Ok(Params {
            sampling,
            seed: self.seed.unwrap_or(random_seed),
            n,
            stop: self.stop.clone().into(),
            stop_text: if yes(self.include_stop) { StopText::Included } else { StopText::LeftOut },
            eos_ids: if yes(self.ignore_eos) { Arc::default() } else { model.eos_ids.clone() },
            masked_ids: ascending(model.eos_ids.iter().chain(stop_ids.iter())),
            stop_ids,
            min_tokens,
            max_tokens,
            logprobs,
            special_tokens: match self.skip_special_tokens {
                None | Some(true) => SpecialTokens::Skipped,
                Some(false) => SpecialTokens::Kept,
            },
            cache_salt: self.cache_salt.as_slice().into(),
            cache_use: if yes(self.bypass_prefix_cache) { CacheUse::Bypassed } else { CacheUse::Shared },
            resumed_ids: self.resumed_ids.as_slice().into(),
            priority: priority.unwrap_or(0) as u8,
        })
    }

    fn refuse_what_is_not_built(&self) -> Result<(), Refusal> {
        // NaN is none of these values, so it is refused too.
        let set = [
            ("typical_p", self.typical_p.is_some_and(|p| p != 1.0)),
            ("repetition_penalty", self.repetition_penalty.is_some_and(|p| p != 1.0)),
            ("frequency_penalty", self.frequency_penalty.is_some_and(|p| p != 0.0)),
            ("presence_penalty", self.presence_penalty.is_some_and(|p| p != 0.0)),
            ("logit_bias", !self.logit_bias.is_empty()),
            ("allowed_token_ids", !self.allowed_token_ids.is_empty()),
            ("banned_token_ids", !self.banned_token_ids.is_empty()),
            ("bad_words", !self.bad_words.is_empty()),
            ("best_of", self.best_of.is_some()),
            ("prompt_logprobs", self.prompt_logprobs.is_some()),
            ("echo", self.echo == Some(true)),
        ];
        let first = set.iter().find(|(_, set)| *set).map(|(name, _)| *name);
        match first.or(self.unsupported.first().copied()) {
            Some(name) => Err(Refusal::unsupported(name)),
            None => Ok(()),
        }
    }
}

impl Params {
    /// The most tokens that a sequence of this request may have after `prompt`: what was asked for, or less where
    /// the context leaves less. Resumed tokens count among them.
    ///
    /// # Errors
    /// A refusal of an empty prompt, of an id outside the vocabulary, of a prompt that leaves no room for a token,
    /// of more resumed tokens or a larger min_tokens than there is room for.
    pub fn max_tokens_after(&self, prompt: &[TokenId], model: &ModelLimits) -> Result<u32, Refusal> {
        if prompt.is_empty() {
            return Err(Refusal::invalid("prompt", "must have at least one token"));
        }
        if prompt.len() >= model.context_tokens as usize {
            return Err(Refusal::ContextLengthExceeded {
                prompt_tokens: prompt.len() as u64,
                context_tokens: model.context_tokens.into(),
            });
        }
        check_ids("prompt_ids", prompt, model)?;
        let room = model.context_tokens - prompt.len() as u32;
        if self.resumed_ids.len() > room as usize {
            let got = self.resumed_ids.len();
            let problem = format!("are {got} tokens, but the context leaves {room} after the prompt");
            return Err(Refusal::invalid("resumed_ids", problem));
        }
        if self.max_tokens.is_none() && self.min_tokens > room {
            let problem = format!("must be at most what the context leaves, {room}, not {}", self.min_tokens);
            return Err(Refusal::invalid("min_tokens", problem));
        }
        Ok(self.max_tokens.unwrap_or(room).min(room))
    }

    /// How sequence `index` of this request draws its tokens.
    pub fn slot_sampling(&self, index: u32) -> SlotSampling {
        self.slot_sampling_seeded(sequence_seed(self.seed, index))
    }

    /// How a sequence with the given seed of its own draws its tokens: a worker gets seeds, not the request's.
    pub fn slot_sampling_seeded(&self, seed: u64) -> SlotSampling {
        SlotSampling {
            temperature: self.sampling.temperature,
            top_k: self.sampling.top_k,
            top_p: self.sampling.top_p,
            min_p: self.sampling.min_p,
            seed,
            logprobs: self.logprobs,
            min_tokens: self.min_tokens,
            masked_ids: self.masked_ids.clone(),
        }
    }
}

/// Checks that ids of `field` stand in the vocabulary.
///
/// # Errors
/// A refusal that names the position of the first that does not.
pub fn check_ids(field: &str, ids: &[TokenId], model: &ModelLimits) -> Result<(), Refusal> {
    match ids.iter().position(|id| *id >= model.vocabulary) {
        None => Ok(()),
        Some(at) => {
            let problem = format!("must be below the vocabulary's {}, not {}", model.vocabulary, ids[at]);
            Err(Refusal::invalid(format!("{field}[{at}]"), problem))
        }
    }
}

fn check_stops(stops: &[String]) -> Result<(), Refusal> {
    at_most("stop", stops.len(), limit::STOPS_MAX, "strings")?;
    for (at, stop) in stops.iter().enumerate() {
        if stop.is_empty() {
            return Err(Refusal::invalid(format!("stop[{at}]"), "must not be empty"));
        }
        at_most(&format!("stop[{at}]"), stop.len(), limit::STOP_BYTES_MAX, "bytes")?;
    }
    Ok(())
}

fn between(field: &str, value: f32, low: f32, high: f32) -> Result<f32, Refusal> {
    // NaN is not between anything. -0 would pass as 0 and make infinities of the wrong sign later: + 0.0 ends it.
    if value >= low && value <= high {
        return Ok(value + 0.0);
    }
    Err(Refusal::invalid(field, format!("must be from {low} to {high}, not {value}")))
}

/// Checks an integer's range; what lies above u32 and in the range is as good as u32's largest.
fn integer(field: &str, value: Option<i64>, low: i64, high: i64) -> Result<Option<u32>, Refusal> {
    let Some(v) = value else { return Ok(None) };
    if v < low || v > high {
        let range =
            if high == i64::MAX { format!("at least {low}") } else { format!("from {low} to {high}") };
        return Err(Refusal::invalid(field, format!("must be {range}, not {v}")));
    }
    Ok(Some(u32::try_from(v).unwrap_or(u32::MAX)))
}

fn at_most(field: &str, got: usize, most: usize, what: &str) -> Result<(), Refusal> {
    if got <= most {
        Ok(())
    } else {
        Err(Refusal::invalid(field, format!("has {got} {what}, at most {most} are allowed")))
    }
}

fn ascending<'a>(ids: impl Iterator<Item = &'a TokenId>) -> Arc<[TokenId]> {
    let mut ids: Vec<TokenId> = ids.copied().collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::Reason;

    fn model() -> ModelLimits {
        ModelLimits {
            vocabulary: 100,
            context_tokens: 64,
            eos_ids: [2, 7].into(),
            defaults: SamplingDefaults::BUILT_IN,
        }
    }

    fn accepted(raw: RawParams) -> Params {
        raw.check(&model(), 99).unwrap_or_else(|refusal| panic!("{raw:?}: {refusal}"))
    }

    /// Expects a refusal of `field` whose text says `says`.
    fn refused(raw: RawParams, field: &str, says: &str) {
        let refusal = raw.check(&model(), 99).expect_err(says);
        assert_eq!(refusal.field(), Some(field), "{refusal}");
        assert_eq!(refusal.reason(), Reason::InvalidField);
        assert!(refusal.to_string().contains(says), "{refusal} does not say {says}");
    }

    macro_rules! raw {
        ($($field:ident: $value:expr),* $(,)?) => { RawParams { $($field: $value),*, ..RawParams::default() } };
    }

    #[test]
    fn unset_is_not_zero() {
        let defaults =
            SamplingDefaults { temperature: 0.6, top_k: NonZeroU32::new(40), top_p: 0.9, min_p: 0.05 };
        let model = ModelLimits { defaults, ..model() };
        let unset = RawParams::default().check(&model, 99).unwrap();
        assert_eq!(unset.sampling, defaults);
        assert_eq!((unset.seed, unset.n, unset.max_tokens, unset.logprobs), (99, 1, None, None));
        let zero =
            raw!(temperature: Some(0.0), top_k: Some(0), min_p: Some(0.0), seed: Some(0), logprobs: Some(0));
        let zero = zero.check(&model, 99).unwrap();
        assert_eq!(zero.sampling, SamplingDefaults { temperature: 0.0, top_k: None, top_p: 0.9, min_p: 0.0 });
        assert_eq!((zero.seed, zero.logprobs), (0, Some(0)));
    }

    #[test]
    fn numbers_keep_to_their_ranges() {
        for bad in [-0.1, 2.1, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            refused(raw!(temperature: Some(bad)), "temperature", &format!("from 0 to 2, not {bad}"));
        }
        for bad in [0.0, -0.0, -1.0, 1.1, f32::NAN] {
            refused(raw!(top_p: Some(bad)), "top_p", "must be");
        }
        for bad in [-0.1, 1.1, f32::NAN] {
            refused(raw!(min_p: Some(bad)), "min_p", &format!("from 0 to 1, not {bad}"));
        }
        refused(raw!(top_k: Some(-2)), "top_k", "at least -1, not -2");
        refused(raw!(n: Some(0)), "n", "from 1 to 64, not 0");
        refused(raw!(n: Some(65)), "n", "from 1 to 64, not 65");
        refused(raw!(max_tokens: Some(0)), "max_tokens", "at least 1, not 0");
        refused(raw!(max_tokens: Some(-5)), "max_tokens", "at least 1, not -5");
        refused(raw!(min_tokens: Some(-1)), "min_tokens", "at least 0, not -1");
        refused(raw!(min_tokens: Some(9), max_tokens: Some(8)), "min_tokens", "which is 8, not 9");
        refused(raw!(logprobs: Some(21)), "logprobs", "from 0 to 20, not 21");
        refused(raw!(logprobs: Some(-1)), "logprobs", "from 0 to 20, not -1");
        refused(raw!(priority: Some(8)), "priority", "from 0 to 7, not 8");
    }

    #[test]
    fn borders_are_accepted() {
        let p = accepted(raw!(
            temperature: Some(2.0), top_p: Some(1.0), min_p: Some(1.0), top_k: Some(i64::MAX), n: Some(64),
            max_tokens: Some(i64::MAX), min_tokens: Some(1), logprobs: Some(20), priority: Some(7),
        ));
        assert_eq!(p.sampling.top_k.unwrap().get(), u32::MAX);
        assert_eq!((p.n, p.max_tokens, p.logprobs, p.priority), (64, Some(u32::MAX), Some(20), 7));
        assert_eq!(accepted(raw!(temperature: Some(9.9e-6))).sampling.temperature, 0.0);
        assert_eq!(accepted(raw!(temperature: Some(1e-5))).sampling.temperature, 1e-5);
        assert!(accepted(raw!(temperature: Some(-0.0))).sampling.temperature.is_sign_positive());
        assert_eq!(accepted(raw!(top_k: Some(-1))).sampling.top_k, None);
    }

    #[test]
    fn stops_are_few_short_and_never_empty() {
        let stops = |n: usize| vec!["x".to_owned(); n];
        assert_eq!(accepted(raw!(stop: stops(16))).stop.len(), 16);
        refused(raw!(stop: stops(17)), "stop", "has 17 strings, at most 16");
        refused(raw!(stop: vec!["a".into(), String::new()]), "stop[1]", "empty");
        refused(raw!(stop: vec!["a".repeat(4_097)]), "stop[0]", "has 4097 bytes");
        refused(raw!(stop_token_ids: vec![0; 257]), "stop_token_ids", "has 257 ids");
        refused(raw!(stop_token_ids: vec![99, 100]), "stop_token_ids[1]", "vocabulary's 100, not 100");
        refused(raw!(cache_salt: vec![0; 257]), "cache_salt", "has 257 bytes");
    }

    #[test]
    fn eos_and_stop_ids_end_and_are_masked() {
        let p = accepted(raw!(stop_token_ids: vec![9, 3, 7, 9]));
        assert_eq!(
            (&*p.eos_ids, &*p.stop_ids, &*p.masked_ids),
            (&[2, 7][..], &[3, 7, 9][..], &[2, 3, 7, 9][..])
        );
        // min_tokens masks EOS also where it is ignored (CASES: llama eos list).
        let p = accepted(raw!(stop_token_ids: vec![9], ignore_eos: Some(true)));
        assert_eq!((&*p.eos_ids, &*p.stop_ids, &*p.masked_ids), (&[][..], &[9][..], &[2, 7, 9][..]));
    }

    #[test]
    fn what_is_not_built_is_refused_by_name_and_what_is_off_is_not() {
        let off = raw!(
            typical_p: Some(1.0), repetition_penalty: Some(1.0), frequency_penalty: Some(0.0),
            presence_penalty: Some(-0.0), echo: Some(false),
        );
        accepted(off);
        let check = |raw: RawParams, name: &str| {
            let refusal = raw.check(&model(), 99).expect_err(name);
            assert_eq!((refusal.reason(), refusal.field()), (Reason::UnsupportedParameter, Some(name)));
        };
        check(raw!(typical_p: Some(0.9)), "typical_p");
        check(raw!(typical_p: Some(f32::NAN)), "typical_p");
        check(raw!(repetition_penalty: Some(1.1)), "repetition_penalty");
        check(raw!(frequency_penalty: Some(f32::NAN)), "frequency_penalty");
        check(raw!(presence_penalty: Some(2.0)), "presence_penalty");
        check(raw!(logit_bias: vec![(1, 0.0)]), "logit_bias");
        check(raw!(allowed_token_ids: vec![1]), "allowed_token_ids");
        check(raw!(banned_token_ids: vec![1]), "banned_token_ids");
        check(raw!(bad_words: vec![String::new()]), "bad_words");
        check(raw!(best_of: Some(1)), "best_of");
        check(raw!(prompt_logprobs: Some(0)), "prompt_logprobs");
        check(raw!(echo: Some(true)), "echo");
        check(raw!(unsupported: vec!["grammar"]), "grammar");
    }

    #[test]
    fn the_context_bounds_prompt_and_output() {
        let room = |raw: RawParams, prompt: usize| accepted(raw).max_tokens_after(&vec![1; prompt], &model());
        assert_eq!(room(RawParams::default(), 10), Ok(54));
        assert_eq!(room(raw!(max_tokens: Some(5)), 10), Ok(5));
        assert_eq!(room(raw!(max_tokens: Some(55)), 10), Ok(54), "clamped");
        assert_eq!(
            room(raw!(max_tokens: Some(60), min_tokens: Some(60)), 10),
            Ok(54),
            "clamped, min_tokens too"
        );
        assert_eq!(room(raw!(max_tokens: Some(1)), 63), Ok(1));
        for prompt in [64, 65, 1_000] {
            let refusal = room(raw!(max_tokens: Some(1)), prompt).unwrap_err();
            assert_eq!(refusal.reason(), Reason::ContextLengthExceeded);
            let said = refusal.to_string();
            assert!(said.contains(&prompt.to_string()) && said.contains("64"), "{said}");
        }
        let field = |result: Result<u32, Refusal>| result.unwrap_err().field().unwrap().to_owned();
        assert_eq!(field(room(RawParams::default(), 0)), "prompt");
        assert_eq!(field(room(raw!(min_tokens: Some(55)), 10)), "min_tokens");
        let outside = accepted(RawParams::default()).max_tokens_after(&[1, 100, 200], &model());
        assert_eq!(field(outside), "prompt_ids[1]");
    }

    #[test]
    fn resumed_tokens_are_output() {
        let resumed = |n: usize| vec![5; n];
        let p = accepted(raw!(seed: Some(1), resumed_ids: resumed(8), max_tokens: Some(8)));
        assert_eq!(p.max_tokens_after(&[1; 10], &model()), Ok(8));
        refused(
            raw!(seed: Some(1), resumed_ids: resumed(9), max_tokens: Some(8)),
            "resumed_ids",
            "9 tokens, but max_tokens is 8",
        );
        refused(raw!(seed: Some(1), resumed_ids: resumed(1), n: Some(2)), "resumed_ids", "n is 2");
        refused(raw!(seed: Some(1), resumed_ids: vec![5, 101]), "resumed_ids[1]", "not 101");
        let long =
            accepted(raw!(seed: Some(1), resumed_ids: resumed(55))).max_tokens_after(&[1; 10], &model());
        assert_eq!(long.unwrap_err().field(), Some("resumed_ids"));
        refused(raw!(resumed_ids: resumed(1)), "seed", "the one that the broken stream reported");
        accepted(raw!(resumed_ids: resumed(1), temperature: Some(0.0)));
    }

    #[test]
    fn each_sequence_has_its_seed() {
        let p = accepted(raw!(seed: Some(42), n: Some(3), temperature: Some(0.7), min_tokens: Some(4)));
        assert_eq!(p.slot_sampling(0).seed, 42);
        let third = p.slot_sampling(2);
        assert_eq!(third, p.slot_sampling_seeded(sequence_seed(42, 2)));
        assert_eq!((third.temperature, third.min_tokens, &*third.masked_ids), (0.7, 4, &[2, 7][..]));
    }

    #[test]
    fn a_models_own_defaults_keep_to_the_ranges_too() {
        let good = SamplingDefaults::of_model(Some(0.6), Some(50), None, None).unwrap();
        assert_eq!(
            good,
            SamplingDefaults { temperature: 0.6, top_k: NonZeroU32::new(50), top_p: 1.0, min_p: 0.0 }
        );
        assert_eq!(
            SamplingDefaults::of_model(None, None, Some(1.5), None).unwrap_err().field(),
            Some("top_p")
        );
    }
}
