use std::collections::HashSet;

use super::*;
use crate::draw::{Draw, Forest, block_name as name};

const S: Duration = Duration::from_secs(1);

impl Index {
    /// Whether a worker holds a block, as its events have it.
    fn holds(&self, key: WorkerKey, name: BlockName) -> bool {
        let Some(worker) = self.worker(key) else { return false };
        self.blocks.find(name).is_some_and(|node| self.sets.contains(self.blocks[node].holders, worker.slot))
    }

    /// Everything that is counted twice, counted again.
    fn check(&self) {
        let live: Vec<NodeId> =
            (0..self.blocks.id_end()).map(NodeId).filter(|id| self.blocks.live(id.0).is_some()).collect();
        assert_eq!(live.len(), self.blocks.len());
        let mut children = vec![0; self.blocks.id_end() as usize];
        let mut of_sets = std::collections::HashMap::<SetId, u32>::new();
        let mut of_slots = vec![0; self.slots.len()];
        for &id in &live {
            let node = &self.blocks[id];
            assert_eq!(self.blocks.find(node.name), Some(id));
            if let Some(parent) = node.parent() {
                assert!(self.blocks.live(parent.0).is_some(), "a parent is there");
                children[parent.0 as usize] += 1;
            }
            *of_sets.entry(node.holders).or_default() += 1;
            self.sets.members(node.holders).iter().for_each(|&slot| of_slots[slot as usize] += 1);
        }
        for &id in &live {
            let node = &self.blocks[id];
            assert_eq!(node.children(), children[id.0 as usize]);
            assert!(!node.is_bare() || node.children() > 0, "nothing stands there for nothing");
        }
        of_sets.remove(&SetId::EMPTY);
        assert_eq!(of_sets.len(), self.sets.len());
        of_sets.iter().for_each(|(set, blocks)| assert_eq!(self.sets.blocks(*set), *blocks));
        for (number, worker) in self.workers.iter().enumerate().filter(|(_, w)| w.state != View::Absent) {
            assert_eq!(self.slots[worker.slot as usize], Some(number as u32));
            assert_eq!(worker.held - worker.forgotten, of_slots[worker.slot as usize]);
        }
        self.slots_free
            .iter()
            .for_each(|slot| assert_eq!(of_slots[*slot as usize], 0, "a free slot is nobody's"));
    }

    fn sweep_all(&mut self) {
        while self.sweep(1_000) {}
    }
}

fn names(of: impl IntoIterator<Item = usize>) -> Vec<BlockName> {
    of.into_iter().map(name).collect()
}

fn synced(index: &mut Index) -> WorkerKey {
    let key = index.add_worker();
    index.synced(key);
    key
}

fn store(index: &mut Index, key: WorkerKey, parent: Option<usize>, blocks: std::ops::Range<usize>) {
    let parent = parent.map_or(BlockName::ROOT, name);
    index.stored(key, parent, blocks.map(name)).unwrap();
}

#[test]
fn leading_blocks_match_and_no_others() {
    let mut index = Index::new(1 << 30);
    let [a, b, c] = [(); 3].map(|()| synced(&mut index));
    store(&mut index, a, None, 0..10);
    store(&mut index, b, None, 0..4);
    store(&mut index, b, Some(3), 20..30);
    let mut check = |prompt: &[BlockName], expected: [u32; 3]| {
        let matches = index.matches(prompt, S);
        assert_eq!([a, b, c].map(|key| matches.of(key).blocks), expected);
    };
    check(&names(0..10), [10, 4, 0]);
    check(&names(0..20), [10, 4, 0]);
    check(&names((0..4).chain(20..25)), [4, 9, 0]);
    check(&names(1..10), [9, 3, 0]);
    check(&names(40..50), [0, 0, 0]);
    check(&[], [0, 0, 0]);
    // Of a hole nothing after it counts.
    assert_eq!(index.removed(a, names([3, 77]).into_iter()), 1);
    assert_eq!(index.matches(&names(0..10), S).of(a).blocks, 3);
    assert_eq!(index.held(a).blocks, 9);
    index.check();
}

#[test]
fn one_eviction_takes_a_block_from_one_worker_alone() {
    let mut index = Index::new(1 << 30);
    let [a, b] = [(); 2].map(|()| synced(&mut index));
    store(&mut index, a, None, 0..3);
    store(&mut index, b, None, 0..3);
    index.removed(a, names([2]).into_iter());
    let matches = index.matches(&names(0..3), S);
    assert_eq!((matches.of(a).blocks, matches.of(b).blocks), (2, 3));
    assert_eq!(index.figures().blocks, 3);
    index.removed(b, names([2]).into_iter());
    assert_eq!((index.figures().blocks, index.figures().holder_blocks), (2, 4));
}

#[test]
fn what_is_stored_behind_nothing_is_a_gap() {
    let mut index = Index::new(1 << 30);
    let [a, b] = [(); 2].map(|()| synced(&mut index));
    store(&mut index, a, None, 0..3);
    // That another worker holds it is no excuse.
    assert_eq!(index.stored(b, name(2), names([3]).into_iter()), Err(Stray::UnknownParent));
    assert_eq!(index.stored(a, name(0), names([2]).into_iter()), Err(Stray::Misplaced));
    assert_eq!(index.stored(a, name(2), [BlockName::ROOT].into_iter()), Err(Stray::Misplaced));
    assert_eq!((index.held(a).blocks, index.held(b).blocks), (3, 0));
    index.check();
}

/// [llmd#1738]
#[test]
fn a_worker_that_left_is_gone_at_once_whatever_still_comes() {
    let mut index = Index::new(1 << 30);
    let stays = synced(&mut index);
    store(&mut index, stays, None, 0..50);
    let before = index.figures();
    let left = synced(&mut index);
    store(&mut index, left, None, 0..3_000);
    index.remove_worker(left);
    assert_eq!(index.matches(&names(0..100), S).of(left), Match::default());
    // 500 batches that were still unread, and the same worker again, empty.
    for batch in 0..500 {
        assert_eq!(index.stored(left, BlockName::ROOT, names([5_000 + batch]).into_iter()), Ok(()));
        index.removed(left, names([batch]).into_iter());
    }
    let again = synced(&mut index);
    assert_eq!(index.matches(&names(0..100), S).of(again), Match::default());
    index.sweep_all();
    index.check();
    assert_eq!(index.figures(), Figures { bytes: index.figures().bytes, ..before });
    assert!(index.figures().bytes <= before.bytes + before.bytes / 5, "{:?}", (index.figures(), before));
    store(&mut index, again, None, 0..7);
    assert_eq!(index.matches(&names(0..100), S).of(again).blocks, 7);
    assert_eq!(index.matches(&names(0..100), S).of(stays).blocks, 50);
}

#[test]
fn a_view_that_is_not_whole_matches_predictions_alone() {
    let mut index = Index::new(1 << 30);
    let key = synced(&mut index);
    store(&mut index, key, None, 0..10);
    index.begin_sync(key);
    assert_eq!(index.matches(&names(0..10), S).of(key), Match::default());
    store(&mut index, key, None, 0..5);
    assert_eq!(index.matches(&names(0..10), S).of(key), Match::default());
    index.predict(key, &names(0..8), S, 9 * S).unwrap();
    assert_eq!(index.matches(&names(0..10), S).of(key), Match { blocks: 8, predicted: 8 });
    index.synced(key);
    // Of the first five the prediction was not settled, for events speak later.
    assert_eq!(index.matches(&names(0..10), S).of(key), Match { blocks: 8, predicted: 3 });
    index.cleared(key);
    assert!(index.is_synced(key));
    assert_eq!(index.matches(&names(0..10), 9 * S).of(key), Match::default());
    index.expire(9 * S);
    index.sweep_all();
    index.check();
    assert_eq!(index.figures().blocks, 0);
}

#[test]
fn a_prediction_lasts_until_events_or_time_have_spoken() {
    let mut index = Index::new(1 << 30);
    let [a, b] = [(); 2].map(|()| synced(&mut index));
    store(&mut index, a, None, 0..4);
    let id = index.predict(a, &names(0..10), S, 5 * S).unwrap();
    let of = |index: &mut Index, key, now| index.matches(&names(0..12), now).of(key);
    assert_eq!(of(&mut index, a, S), Match { blocks: 10, predicted: 6 });
    assert_eq!(of(&mut index, b, S), Match::default());
    // Confirmed block by block.
    store(&mut index, a, Some(3), 4..8);
    assert_eq!(of(&mut index, a, S), Match { blocks: 10, predicted: 2 });
    // Confirmed, then evicted: the prediction is over with the confirmation.
    index.removed(a, names([7]).into_iter());
    assert_eq!(of(&mut index, a, S), Match { blocks: 7, predicted: 0 });
    // A second one that shares blocks keeps them when the first goes.
    let other = index.predict(a, &names(0..9), S, 8 * S).unwrap();
    index.withdraw(id);
    index.withdraw(id);
    assert_eq!(of(&mut index, a, S), Match { blocks: 9, predicted: 2 });
    index.retime(other, 6 * S);
    index.check();
    assert_eq!(of(&mut index, a, 6 * S - Duration::from_nanos(1)).blocks, 9);
    assert_eq!(of(&mut index, a, 6 * S).blocks, 7);
    index.expire(6 * S);
    index.check();
    assert_eq!((index.figures().blocks, index.predictions.entries()), (7, 0));
    // Of a worker that left nothing is left.
    index.predict(b, &names(0..9), S, 9 * S).unwrap();
    index.remove_worker(b);
    let again = synced(&mut index);
    assert_eq!(of(&mut index, again, S), Match::default());
}

#[test]
fn a_full_index_forgets_the_oldest_ends_and_goes_on_learning() {
    let bytes_max = 400 << 10;
    let mut index = Index::new(bytes_max);
    let key = synced(&mut index);
    let room = bytes_max / BLOCK_BYTES;
    // Chains of 100 blocks; the first one is asked for again and again.
    let chain = |number: usize| 1_000 * number..1_000 * number + 100;
    let chains = 3 * room / 100;
    for number in 0..chains {
        store(&mut index, key, None, chain(number));
        index.matches(&names(chain(0)), S);
    }
    index.check();
    let figures = index.figures();
    assert!(figures.bytes as usize <= bytes_max + bytes_max / 5, "{figures:?}");
    assert!(figures.blocks as usize > room / 2, "{figures:?}");
    assert_eq!(figures.blocks + figures.forgotten_total, 100 * chains as u64);
    let mut matched = |number| index.matches(&names(chain(number)), S).of(key).blocks;
    assert_eq!((matched(0), matched(chains - 1)), (100, 100), "the one that is hit, and the newest");
    assert_eq!(matched(1), 0, "the oldest");
    // To the worker all is as it was.
    let digest = |of: &mut dyn Iterator<Item = usize>| {
        BlockName(of.fold(0, |sum, number| sum ^ bits(name(number))).to_le_bytes())
    };
    let all = Held {
        blocks: 100 * chains as u64,
        digest: digest(&mut (0..chains).flat_map(chain)),
        forgotten: figures.forgotten_total,
    };
    assert_eq!(index.held(key), all);
    for number in 1..chains {
        assert_eq!(index.removed(key, names(chain(number).rev()).into_iter()), 0);
    }
    assert_eq!(index.held(key), Held { blocks: 100, digest: digest(&mut chain(0)), forgotten: 0 });
    assert_eq!(index.removed(key, names([5_050]).into_iter()), 1);
    index.check();
}

#[test]
fn predictions_have_a_bound_of_their_own() {
    let mut index = Index::new(1 << 20);
    let key = synced(&mut index);
    let fits = (1 << 20) / PREDICTED_SHARE / (ENTRY_BYTES + BLOCK_BYTES);
    assert!(index.predict(key, &names(0..fits), S, 2 * S).is_some());
    assert!(index.predict(key, &names(0..1), S, 2 * S).is_none());
    assert_eq!(index.figures().unpredicted_total, 1);
    assert!(index.predict(key, &names(0..fits), 2 * S, 3 * S).is_some(), "the first one is over");
}

/// A million events against brute force, block by block and worker by worker: chains stored and stored again, behind
/// parents that are there or not, removed in any order, cleared, restarted, resynced, sent under keys of workers that
/// left, with a sweep that runs behind.
#[test]
#[expect(clippy::print_stdout, reason = "a test that fails shows its seed and what it drew")]
fn a_million_events_equal_brute_force() {
    const EVENTS: usize = 1_000_000;
    const NAMES: usize = 3_000;
    const WORKERS: usize = 7;
    let mut draw = Draw::announced("a_million_events_equal_brute_force", 20_261_125);
    let forest = Forest::drawn(&mut draw, NAMES);
    let mut index = Index::new(1 << 30);
    let mut keys: Vec<WorkerKey> = (0..WORKERS).map(|_| index.add_worker()).collect();
    let mut model: Vec<HashSet<usize>> = vec![HashSet::new(); WORKERS];
    let mut whole = [false; WORKERS];
    let mut left: Vec<WorkerKey> = Vec::new();
    let mut bytes_max = 0;
    let (mut events, mut gaps, mut unknown, mut restarts) = (0, 0, 0, 0);
    while events < EVENTS {
        let w = draw.below(WORKERS);
        let key = keys[w];
        match draw.below(1_000) {
            0 => {
                index.remove_worker(key);
                left.push(key);
                keys[w] = index.add_worker();
                (model[w], whole[w], restarts) = (HashSet::new(), false, restarts + 1);
            }
            1 => {
                index.cleared(key);
                model[w].clear();
            }
            2 => {
                index.begin_sync(key);
                (model[w], whole[w]) = (HashSet::new(), false);
            }
            3..8 => {
                index.synced(key);
                whole[w] = true;
            }
            8..12 if !left.is_empty() => {
                let gone = *draw.pick(&left);
                assert_eq!(
                    index.stored(gone, BlockName::ROOT, names([draw.below(NAMES)]).into_iter()),
                    Ok(())
                );
                assert_eq!(index.removed(gone, names([draw.below(NAMES)]).into_iter()), 0);
            }
            12..600 => {
                let at = draw.below(NAMES);
                let most = 1 + draw.below(40);
                let path = forest.path(at, most);
                let parent = forest.0[path[0]];
                events += path.len();
                let stored =
                    index.stored(key, parent.map_or(BlockName::ROOT, name), path.iter().map(|at| name(*at)));
                if parent.is_none_or(|parent| model[w].contains(&parent)) {
                    assert_eq!(stored, Ok(()));
                    model[w].extend(path);
                } else {
                    assert_eq!(stored, Err(Stray::UnknownParent));
                    gaps += 1;
                }
            }
            600..950 => {
                // In any order, parents before children too.
                let at = draw.below(NAMES);
                let of: Vec<usize> = (0..draw.below(40)).map(|i| (at + i * 7) % NAMES).collect();
                events += of.len();
                let missed = of.iter().filter(|at| !model[w].remove(at)).count() as u64;
                assert_eq!(index.removed(key, names(of).into_iter()), missed);
                unknown += missed;
            }
            _ => {
                let at = draw.below(NAMES);
                let prompt = forest.path(at, usize::MAX);
                let matches = index.matches(&names(prompt.iter().copied()), S);
                for (w, key) in keys.iter().enumerate() {
                    let held = prompt.iter().take_while(|at| whole[w] && model[w].contains(at)).count();
                    assert_eq!(matches.of(*key), Match { blocks: held as u32, predicted: 0 });
                }
            }
        }
        if draw.one_in(50) {
            index.sweep(500);
        }
        if draw.one_in(3_000) {
            index.check();
            bytes_max = bytes_max.max(index.figures().bytes);
            for (key, model) in keys.iter().zip(&model) {
                assert!((0..NAMES).all(|at| index.holds(*key, name(at)) == model.contains(&at)));
                let sum = model.iter().fold(0, |sum, at| sum ^ bits(name(*at)));
                let digest = BlockName(sum.to_le_bytes());
                assert_eq!(index.held(*key), Held { blocks: model.len() as u64, digest, forgotten: 0 });
            }
        }
    }
    println!("{events} events, {gaps} gaps, {unknown} unknown, {restarts} restarts");
    assert!(gaps > 1_000 && unknown > 1_000 && restarts > 10, "the draw covers it all");
    keys.iter().for_each(|key| index.remove_worker(*key));
    index.sweep_all();
    index.check();
    assert_eq!((index.figures().blocks, index.figures().sets), (0, 0));
    assert!(index.figures().bytes < bytes_max / 5, "memory goes back: {:?} of {bytes_max}", index.figures());
}
