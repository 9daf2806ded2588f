//! What each rank holds under tensor parallelism, as pure data.
//!
//! ```text
//!  q, k, v, gate, up   by outputs (heads, MLP columns)          o, down   by inputs, in slices, summed over the ranks
//!  embedding           whole on every rank                      head      by vocabulary, gathered
//! ```
//!
//! The inputs of `o` and `down` are summed in S equal slices whose sums are added as a balanced tree, at every degree: a rank
//! that owns whole subtrees gives the same bits as one rank alone. S is the largest power of two ≤ 8 that divides the query
//! heads (`o`), or that divides the MLP width into multiples of 32 (`down`).

use std::ops::Range;

use petek_device::ops::Heads;

use crate::config::{DecoderConfig, Mlp};

/// Slices at most.
const SLICES_MAX: usize = 8;
/// A slice of `down` is a multiple of this many inputs.
const SLICE_INPUTS: usize = 32;

/// In how many slices the row-parallel matrices are summed: part of the numerics id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slices {
    /// Of the attention's output projection.
    pub o: usize,
    /// Of the MLP's down projection.
    pub down: usize,
}

impl Slices {
    /// The slices of a model.
    pub fn of(config: &DecoderConfig) -> Self {
        let Mlp::SwiGlu { width, .. } = config.mlp;
        let largest = |fits: &dyn Fn(usize) -> bool| {
            [SLICES_MAX, 4, 2].into_iter().find(|slices| fits(*slices)).unwrap_or(1)
        };
        Self {
            o: largest(&|s| config.heads.query.is_multiple_of(s)),
            down: largest(&|s| width.is_multiple_of(s * SLICE_INPUTS)),
        }
    }

    /// Whether ranks of this degree own whole subtrees of both sums, so that their bits are those of one rank.
    pub fn keeps_bits(&self, ranks: usize) -> bool {
        self.o.is_multiple_of(ranks) && self.down.is_multiple_of(ranks)
    }
}

/// A degree that does not fit the model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tensor parallelism of {ranks} does not fit this model: it must {rule} {number}{hint}")]
pub struct ShardError {
    ranks: usize,
    rule: &'static str,
    number: usize,
    hint: String,
}

/// One rank's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// This rank.
    pub rank: usize,
    /// Ranks in all.
    pub ranks: usize,
    /// Query heads of this rank.
    pub query_heads: Range<usize>,
    /// Key and value heads of this rank; where there are fewer than ranks, neighbours hold the same one.
    pub kv_heads: Range<usize>,
    /// Outputs of gate and up, inputs of down.
    pub mlp: Range<usize>,
    /// Rows of the head that hold vocabulary; `vocabulary_width` minus these are padding (the last rank's).
    pub vocabulary: Range<usize>,
    /// Rows of the head on every rank, padding included.
    pub vocabulary_width: usize,
    /// How many slices of `o` and of `down` this rank sums.
    pub slices: Slices,
}

impl Shard {
    /// The shares of all ranks.
    ///
    /// *Errors*: [`ShardError`] where the degree does not divide the query heads, the MLP's width, neither divides nor is a
    /// multiple of the key and value heads, or leaves a rank without vocabulary.
    pub fn plan(config: &DecoderConfig, ranks: usize) -> Result<Vec<Shard>, ShardError> {
        let Mlp::SwiGlu { width, .. } = config.mlp;
        let Heads { query, kv, .. } = config.heads;
        let fits_kv = |ranks: usize| kv.is_multiple_of(ranks) || ranks.is_multiple_of(kv);
        // Parts are equally wide, but for what the last rank lacks.
        let fits_vocabulary =
            |ranks: usize| (ranks - 1) * config.vocabulary.div_ceil(ranks) < config.vocabulary;
        let fits = |rule, number: usize, fits: bool| {
            let hint = || {
                let good: Vec<String> = (1..=query.min(64))
                    .filter(|r| query.is_multiple_of(*r) && width.is_multiple_of(*r))
                    .filter(|r| fits_kv(*r) && fits_vocabulary(*r))
                    .map(|r| r.to_string())
                    .collect();
                format!(" (these do: {})", good.join(", "))
            };
            if fits { Ok(()) } else { Err(ShardError { ranks, rule, number, hint: hint() }) }
        };
        fits("divide the attention heads", query, ranks > 0 && query.is_multiple_of(ranks))?;
        fits("divide or be a multiple of the key and value heads", kv, fits_kv(ranks))?;
        fits("divide the MLP width", width, width.is_multiple_of(ranks))?;
        fits("leave each rank some of the vocabulary", config.vocabulary, fits_vocabulary(ranks))?;
        let whole = Slices::of(config);
        let slices = if whole.keeps_bits(ranks) {
            Slices { o: whole.o / ranks, down: whole.down / ranks }
        } else {
            Slices { o: 1, down: 1 }
        };
        let vocabulary_width = config.vocabulary.div_ceil(ranks);
        Ok((0..ranks)
            .map(|rank| {
                let share = |n: usize| n / ranks * rank..n / ranks * (rank + 1);
                let first = (vocabulary_width * rank).min(config.vocabulary);
                Shard {
                    rank,
                    ranks,
                    query_heads: share(query),
                    kv_heads: if kv.is_multiple_of(ranks) {
                        share(kv)
                    } else {
                        let replicas = ranks / kv;
                        rank / replicas..rank / replicas + 1
                    },
                    mlp: share(width),
                    vocabulary: first..(first + vocabulary_width).min(config.vocabulary),
                    vocabulary_width,
                    slices,
                }
            })
            .collect())
    }

    /// This rank's heads.
    pub fn heads(&self, config: &DecoderConfig) -> Heads {
        Heads { query: self.query_heads.len(), kv: self.kv_heads.len(), dim: config.heads.dim }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{AttentionBias, HeadWeights, NormKind, Position, RotaryScaling};

    fn config(query: usize, kv: usize, width: usize, vocabulary: usize) -> DecoderConfig {
        DecoderConfig {
            architecture: "LlamaForCausalLM".to_owned(),
            layers: 1,
            hidden: 64,
            heads: Heads { query, kv, dim: 16 },
            vocabulary,
            context: 64,
            norm: NormKind::Rms { eps: 1e-5 },
            position: Position::Rotary { theta: 10_000.0, scaling: RotaryScaling::None },
            attention_bias: AttentionBias::None,
            mlp: Mlp::SwiGlu { width, bias: false },
            head: HeadWeights::Own,
            format: None,
            eos: Vec::new(),
            bos: None,
        }
    }

    #[test]
    fn every_part_is_held_once_and_kv_heads_by_neighbours() {
        for (query, kv, width, vocabulary) in
            [(8, 2, 256, 300), (8, 8, 512, 1003), (9, 3, 1536, 49_152), (32, 8, 8192, 7)]
        {
            let config = config(query, kv, width, vocabulary);
            for ranks in (1..=32).filter(|ranks| Shard::plan(&config, *ranks).is_ok()) {
                let shards = Shard::plan(&config, ranks).expect("planned");
                let joined = |part: &dyn Fn(&Shard) -> Range<usize>| -> Vec<usize> {
                    shards.iter().flat_map(part).collect()
                };
                assert_eq!(
                    joined(&|s| s.query_heads.clone()),
                    (0..query).collect::<Vec<_>>(),
                    "{ranks} ranks"
                );
                assert_eq!(joined(&|s| s.mlp.clone()), (0..width).collect::<Vec<_>>());
                assert_eq!(joined(&|s| s.vocabulary.clone()), (0..vocabulary).collect::<Vec<_>>());
                for shard in &shards {
                    // Each query head finds its key and value head on its own rank, at the place that grouping implies.
                    let group = query / kv;
                    let local = shard.heads(&config);
                    for (place, head) in shard.query_heads.clone().enumerate() {
                        let kv_head = shard.kv_heads.start + place / (local.query / local.kv);
                        assert_eq!(kv_head, head / group, "{ranks} ranks, rank {}", shard.rank);
                    }
                    let is_last = shard.rank + 1 == ranks;
                    assert!(!shard.vocabulary.is_empty(), "{ranks} ranks, rank {}", shard.rank);
                    assert!(is_last || shard.vocabulary.len() == shard.vocabulary_width);
                    assert!(shard.vocabulary.len() <= shard.vocabulary_width);
                }
            }
        }
    }

    #[test]
    fn slices_are_the_largest_that_fit_and_ranks_own_whole_subtrees() {
        for (query, width, o, down) in
            [(8, 256, 8, 8), (9, 1536, 1, 8), (12, 96, 4, 1), (32, 8192, 8, 8), (6, 64, 2, 2)]
        {
            let config = config(query, 1, width, 64);
            assert_eq!(Slices::of(&config), Slices { o, down }, "{query} heads, width {width}");
        }
        let config = config(8, 2, 256, 64);
        for ranks in [1, 2, 4, 8] {
            let shard = Shard::plan(&config, ranks).expect("planned").remove(0);
            assert_eq!(shard.slices, Slices { o: 8 / ranks, down: 8 / ranks });
        }
        let three = Shard::plan(&super::tests::config(9, 3, 1536, 64), 3).expect("planned").remove(2);
        assert_eq!(three.slices, Slices { o: 1, down: 1 }, "one chain a rank");
    }

    #[test]
    fn a_degree_that_does_not_fit_is_refused_in_one_line() {
        for (ranks, part) in
            [(2, "divide the attention heads 9 (these do: 1, 3, 9)"), (0, "attention heads 9")]
        {
            let error = Shard::plan(&config(9, 3, 1536 * 9, 640), ranks).expect_err("refused").to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{error}");
        }
        let error = Shard::plan(&config(8, 2, 100, 64), 8).expect_err("refused").to_string();
        assert!(error.contains("MLP width 100"), "{error}");
        let error = Shard::plan(&config(12, 4, 96, 64), 6).expect_err("refused").to_string();
        assert!(error.contains("key and value heads 4"), "{error}");
        let error = Shard::plan(&config(8, 2, 256, 33), 8).expect_err("refused").to_string();
        assert!(error.contains("each rank some of the vocabulary 33 (these do: 1, 2, 4)"), "{error}");
    }
}
