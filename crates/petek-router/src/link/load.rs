//! How busy a worker is: its last report, and this router's own requests that the report does not know of yet,
//! counted from the moment of the decision. Without them a burst would see idle workers until the first report, and
//! all of it would go to one; counted longer, they would count twice.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::lock;

/// This router's requests on one worker.
#[derive(Debug, Default)]
pub(super) struct OwnLoad(Mutex<Sums>);

/// What requests weigh that are in no report yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Weight {
    /// Uncached tokens of prompts that have no first token yet.
    pub(super) waiting_tokens: u64,
    pub(super) sequences: u32,
}

#[derive(Debug, Default)]
struct Sums {
    requests: u32,
    unreported: Weight,
    /// The share in `unreported` of each request that was sent.
    sent: BTreeMap<Dispatch, Weight>,
    /// What the last report includes.
    reported: Dispatch,
}

/// A dispatch among all to one worker: the number of its stream, then its own.
type Dispatch = (u32, u64);

impl OwnLoad {
    pub(super) fn requests(&self) -> u32 {
        lock(&self.0).requests
    }

    pub(super) fn unreported(&self) -> Weight {
        lock(&self.0).unreported
    }

    /// A report includes all dispatches of a stream up to this one: the worker counts them from now on.
    pub(super) fn reported(&self, stream: u32, dispatch: u64) {
        let mut sums = lock(&self.0);
        let Sums { unreported, sent, reported, .. } = &mut *sums;
        *reported = (*reported).max((stream, dispatch));
        let later = sent.split_off(&(stream, dispatch.saturating_add(1)));
        std::mem::replace(sent, later).into_values().for_each(|weight| unreported.subtract(weight));
    }
}

impl Weight {
    fn add(&mut self, other: Weight) {
        self.waiting_tokens += other.waiting_tokens;
        self.sequences += other.sequences;
    }

    fn subtract(&mut self, other: Weight) {
        self.waiting_tokens -= other.waiting_tokens;
        self.sequences -= other.sequences;
    }
}

/// One request's share of these sums. It is taken back when this is dropped, however that comes about.
#[derive(Debug)]
pub(super) struct Share {
    load: Arc<OwnLoad>,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Unsent(Weight),
    /// Its weight stands in the table, for as long as no report has it.
    Sent(Dispatch),
}

impl Share {
    pub(super) fn new(load: Arc<OwnLoad>, weight: Weight) -> Self {
        let mut sums = lock(&load.0);
        sums.requests += 1;
        sums.unreported.add(weight);
        drop(sums);
        Share { load, place: Place::Unsent(weight) }
    }

    /// It goes out under this number.
    pub(super) fn sent(&mut self, stream: u32, dispatch: u64) {
        let Place::Unsent(weight) = self.place else { return };
        let mut sums = lock(&self.load.0);
        if (stream, dispatch) <= sums.reported {
            sums.unreported.subtract(weight);
        } else {
            sums.sent.insert((stream, dispatch), weight);
        }
        self.place = Place::Sent((stream, dispatch));
    }

    /// The prompt is computed: its tokens wait no more.
    pub(super) fn prefilled(&mut self) {
        let mut sums = lock(&self.load.0);
        let Sums { unreported, sent, .. } = &mut *sums;
        let weight = match &mut self.place {
            Place::Unsent(weight) => Some(weight),
            Place::Sent(dispatch) => sent.get_mut(dispatch),
        };
        if let Some(weight) = weight {
            unreported.waiting_tokens -= std::mem::take(&mut weight.waiting_tokens);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut sums = lock(&self.load.0);
        sums.requests -= 1;
        let weight = match self.place {
            Place::Unsent(weight) => Some(weight),
            Place::Sent(dispatch) => sums.sent.remove(&dispatch),
        };
        if let Some(weight) = weight {
            sums.unreported.subtract(weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn weight(waiting_tokens: u64, sequences: u32) -> Weight {
        Weight { waiting_tokens, sequences }
    }

    #[test]
    fn what_is_counted_is_taken_back_once() {
        let load = Arc::<OwnLoad>::default();
        let sums = || (load.requests(), load.unreported());
        let mut first = Share::new(load.clone(), weight(500, 3));
        let mut second = Share::new(load.clone(), weight(20, 1));
        assert_eq!(sums(), (2, weight(520, 4)));
        first.prefilled();
        first.prefilled();
        assert_eq!(sums(), (2, weight(20, 4)));
        second.sent(1, 1);
        assert_eq!(sums(), (2, weight(20, 4)));
        second.prefilled();
        drop(second);
        assert_eq!(sums(), (1, weight(0, 3)));
        drop(first);
        assert_eq!(sums(), (0, weight(0, 0)));
        assert!(lock(&load.0).sent.is_empty());
    }

    #[test]
    fn what_a_report_includes_counts_there_and_not_here() {
        let load = Arc::<OwnLoad>::default();
        let mut shares: Vec<Share> = (0..4).map(|_| Share::new(load.clone(), weight(10, 1))).collect();
        for (share, dispatch) in shares.iter_mut().zip(1..) {
            share.sent(2, dispatch);
        }
        load.reported(1, 99);
        assert_eq!(load.unreported(), weight(40, 4), "another stream's numbers say nothing");
        load.reported(2, 2);
        assert_eq!((load.requests(), load.unreported()), (4, weight(20, 2)));
        load.reported(2, 2);
        assert_eq!(load.unreported(), weight(20, 2));
        shares[0].prefilled();
        drop(shares.remove(1));
        assert_eq!((load.requests(), load.unreported()), (3, weight(20, 2)));
        drop(shares.remove(2));
        assert_eq!(load.unreported(), weight(10, 1));
        // One that is sent when its report is here already.
        load.reported(2, 9);
        let mut late = Share::new(load.clone(), weight(7, 1));
        assert_eq!(load.unreported(), weight(7, 1));
        late.sent(2, 9);
        assert_eq!(load.unreported(), weight(0, 0));
        drop((shares, late));
        assert_eq!((load.requests(), load.unreported()), (0, weight(0, 0)));
    }
}
