//! Who begins: the head of the queue, and the siblings of a sequence whose prompt has been computed.

use std::sync::Arc;

use super::Scheduler;
use super::plan::Draft;
use super::request::{Fork, Run, SequenceKey, State};
use crate::hash::BlockHash;
use crate::ids::{BlockId, TokenId};
use crate::plan::{BlockCopy, SlotFill};

impl Scheduler {
    /// Admits the head of the queue, again and again, while rows, a slot and blocks for all its known tokens are left.
    pub(super) fn admit(&mut self, draft: &mut Draft) {
        while draft.rows > 0
            && !self.free_slots.is_empty()
            && let Some(key) = self.queue.head(self.step)
        {
            let sequence = &self.sequences[key];
            let hits: Vec<BlockId> = self.hits(&sequence.ids, &sequence.hashes).collect();
            let total = sequence.ids.len().div_ceil(self.config.block_size as usize);
            let taken = hits.iter().filter(|block| self.pool.is_available(**block)).count();
            // Those that run will each ask for a block within the next block's tokens, an eighth of them soon: taking
            // their last ones would only mean to be preempted at once. Whoever is alone needs no such regard.
            let spare = self.running.len().div_ceil(8);
            if self.pool.available() < total - hits.len() + taken + spare {
                return;
            }
            hits.iter().for_each(|block| self.pool.hold(*block));
            let (hit_blocks, hit_tokens) = (hits.len(), hits.len() as u32 * self.config.block_size);
            self.vacate(key);
            self.sequences[key].blocks = hits;
            self.sequences[key].hit_blocks = hit_blocks;
            self.begin_run(key, total, hit_tokens, draft);
            let request_key = self.sequences[key].request;
            let request = &mut self.requests[request_key];
            let cached = hit_tokens.min(request.prompt.len() as u32);
            request.prompt_done = request.prompt_done.max(cached);
            self.admitted(request_key, cached);
        }
    }

    /// Starts the siblings of computed prompts, in the order in which they came, while rows and slots are left. One
    /// that finds no block waits its turn in the queue like any other.
    pub(super) fn start_forks(&mut self, draft: &mut Draft) {
        while draft.rows > 0
            && !self.free_slots.is_empty()
            && let Some(&key) = self.forks.front()
        {
            let sequence = &mut self.sequences[key];
            let State::Forked(Fork { start, source }) = sequence.state else { unreachable!("it is a fork") };
            let total = sequence.ids.len().div_ceil(self.config.block_size as usize);
            // A source that nobody else has, can find, or still writes, need not be copied.
            let own = source.filter(|block| self.pool.is_private(*block) && self.in_flight.is_empty());
            let missing = total - sequence.blocks.len() - usize::from(own.is_some());
            if self.pool.available() < missing {
                self.preempt(key);
                continue;
            }
            // The sources are let go only after this step, so that no other copy of this plan overwrites them.
            match (own, source) {
                (Some(block), _) => sequence.blocks.push(block),
                (None, Some(from)) => {
                    let to = self.pool.allocate(&mut draft.plan.zeroes).expect("counted before");
                    sequence.blocks.push(to);
                    draft.plan.copies.push(BlockCopy { from, to });
                    draft.copied.push(from);
                }
                (None, None) => {}
            }
            self.forks.pop_front();
            self.begin_run(key, total, start, draft);
        }
    }

    /// Gives a sequence that holds its first blocks the others, a slot, and its first span from `start` on.
    fn begin_run(&mut self, key: SequenceKey, total_blocks: usize, start: u32, draft: &mut Draft) {
        let sequence = &mut self.sequences[key];
        let published = (start / self.config.block_size) as usize;
        while sequence.blocks.len() < total_blocks {
            sequence.blocks.push(self.pool.allocate(&mut draft.plan.zeroes).expect("counted before"));
        }
        let slot = self.free_slots.pop().expect("looked for before");
        self.last_run += 1;
        sequence.state = State::Running(Run {
            number: self.last_run,
            slot,
            planned: start,
            computed: start,
            drawing: 0,
            blocks_sent: 0,
            published,
        });
        draft.plan.fills.push(SlotFill {
            slot,
            ids: sequence.ids.as_slice().into(),
            prompt_tokens: sequence.prompt_tokens,
            sampling: Arc::clone(&sequence.sampling),
        });
        self.running.push(key);
        self.push_span(key, draft);
    }

    /// Gives the siblings of a sequence that has just computed the request's prompt their part of it: its full blocks
    /// shared, the one in which they begin themselves to be copied. A sibling without output begins with the prompt's
    /// last token, for its first token is drawn from there.
    pub(super) fn fork_siblings(&mut self, key: SequenceKey) {
        let request = &mut self.requests[self.sequences[key].request];
        if std::mem::replace(&mut request.prompt_shared, true) {
            return;
        }
        for &sibling in &request.sequences {
            if sibling == key {
                continue;
            }
            let [first, sequence] =
                self.sequences.get_disjoint_mut([key, sibling]).expect("two that are there");
            sequence.begin(&request.prompt, &request.prompt_hashes);
            let start = sequence.prompt_tokens.min(sequence.ids.len() as u32 - 1);
            let shared = (start / self.config.block_size) as usize;
            let source = (start % self.config.block_size != 0).then(|| first.blocks[shared]);
            sequence.blocks = first.blocks[..shared].to_vec();
            sequence.hit_blocks = first.hit_blocks.min(shared);
            sequence.blocks.iter().chain(&source).for_each(|block| self.pool.hold(*block));
            sequence.state = State::Forked(Fork { start, source });
            self.forks.push_back(sibling);
        }
    }

    /// Blocks of the cache that hold the beginning of `ids`: never all of it, for a token is drawn from its last
    /// position. Empty hashes find nothing.
    pub(super) fn hits<'a>(
        &'a self,
        ids: &'a [TokenId],
        hashes: &'a [BlockHash],
    ) -> impl Iterator<Item = BlockId> + 'a {
        let size = self.config.block_size as usize;
        let blocks = hashes.iter().zip(ids.chunks_exact(size)).take((ids.len() - 1) / size);
        blocks.map_while(|(hash, tokens)| self.pool.find(hash, tokens))
    }
}
