//! The prefix cache of a scripted worker, as it tells routers of it.

use std::sync::Mutex;

use petek_core::hash::{BlockHash, BlockHasher, BlockName, HashFields};
use petek_proto::blocks::write_names;
use petek_proto::worker::v1::kv_event::Kind;
use petek_proto::worker::v1::watch_kv_events_response::Body;
use petek_proto::worker::v1::{
    KvBatch, KvEvent, KvHeartbeat, KvRemoved, KvResume, KvSnapshotPage, KvStored, Submit,
    WatchKvEventsResponse, WorkerHello,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::{BLOCK, REVISION};

/// What the full blocks of a prompt are called.
pub(crate) fn names(prompt: &[u32], salt: &[u8]) -> Vec<BlockName> {
    let fields = HashFields { salt: salt.to_vec(), ..HashFields::new(REVISION, BLOCK) };
    BlockHasher::new(&fields).chain(prompt).iter().map(BlockHash::name).collect()
}

/// What is held, and who is told of it.
pub(crate) struct Cache {
    hello: WorkerHello,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    seq: u64,
    /// (parent, block), parents first.
    held: Vec<(BlockName, BlockName)>,
    routers: Vec<mpsc::UnboundedSender<WatchKvEventsResponse>>,
    /// What each subscription asked for.
    resumes: Vec<Option<KvResume>>,
}

impl Cache {
    pub(crate) fn new(hello: WorkerHello) -> Self {
        Cache { hello, state: Mutex::default() }
    }

    /// A chain of blocks is held from now on, the first one after the root.
    pub(crate) fn store(&self, chain: &[BlockName]) {
        self.store_after(BlockName::ROOT, chain);
    }

    /// A chain of blocks is held from now on, the first one after `parent`.
    pub(crate) fn store_after(&self, parent: BlockName, chain: &[BlockName]) {
        let blocks = write_names(chain.iter().copied());
        let stored = KvStored { parent: parent.0.to_vec().into(), blocks };
        self.tell(Kind::Stored(stored), |state| {
            let parents = [parent].into_iter().chain(chain.iter().copied());
            state.held.extend(parents.zip(chain.iter().copied()));
        });
    }

    /// Blocks are held no more.
    pub(crate) fn remove(&self, blocks: &[BlockName]) {
        let removed = KvRemoved { blocks: write_names(blocks.iter().copied()) };
        self.tell(Kind::Removed(removed), |state| state.held.retain(|(_, block)| !blocks.contains(block)));
    }

    /// A block is held of which nobody is told, as if its batch were lost on the way.
    pub(crate) fn store_unsaid(&self, block: BlockName) {
        let mut state = self.state.lock().unwrap();
        state.seq += 1;
        state.held.push((BlockName::ROOT, block));
    }

    /// A block is held instead of another one, of which nobody is told and no batch speaks.
    pub(crate) fn swap_unsaid(&self, gone: BlockName, held: BlockName) {
        let mut state = self.state.lock().unwrap();
        let place = state.held.iter_mut().find(|(_, block)| *block == gone).expect("it is held");
        place.1 = held;
    }

    /// Tokens of a request's prompt that are held and not computed.
    pub(super) fn cached_tokens(&self, submit: &Submit) -> u32 {
        if submit.bypass_prefix_cache {
            return 0;
        }
        let state = self.state.lock().unwrap();
        let is_held = |name: &BlockName| state.held.iter().any(|(_, block)| block == name);
        let names = names(&submit.prompt_ids, &submit.cache_salt);
        let held = names.iter().take_while(|name| is_held(name)).count() as u32;
        held.min((submit.prompt_ids.len() as u32 - 1) / BLOCK) * BLOCK
    }

    /// Says how many blocks there are, and their digest.
    pub(crate) fn beat(&self) {
        let mut state = self.state.lock().unwrap();
        let sum = state.held.iter().fold(0, |sum, (_, block)| sum ^ u128::from_le_bytes(block.0));
        let digest = sum.to_le_bytes().to_vec().into();
        let heartbeat = Body::Heartbeat(KvHeartbeat { blocks_held: state.held.len() as u64, digest });
        let message = self.message(state.seq, heartbeat);
        state.routers.retain(|router| router.send(message.clone()).is_ok());
    }

    /// What subscriptions so far asked to go on after.
    pub(crate) fn resumes(&self) -> Vec<Option<KvResume>> {
        self.state.lock().unwrap().resumes.clone()
    }

    /// Ends all subscriptions.
    pub(crate) fn hang_up(&self) {
        self.state.lock().unwrap().routers.clear();
    }

    pub(super) fn subscribe(
        &self,
        resume: Option<KvResume>,
    ) -> UnboundedReceiverStream<WatchKvEventsResponse> {
        let (router, messages) = mpsc::unbounded_channel();
        let mut state = self.state.lock().unwrap();
        let say = |body| router.send(self.message(state.seq, body)).expect("it was just made");
        say(Body::Hello(self.hello.clone()));
        // No ring is kept: it can only go on where nothing was missed.
        if resume.is_none_or(|resume| (resume.epoch, resume.after_seq) != (self.hello.epoch, state.seq)) {
            let parents = write_names(state.held.iter().map(|(parent, _)| *parent));
            let blocks = write_names(state.held.iter().map(|(_, block)| *block));
            say(Body::Page(KvSnapshotPage { page: 0, last: true, parents, blocks }));
        }
        state.routers.push(router);
        state.resumes.push(resume);
        UnboundedReceiverStream::new(messages)
    }

    fn tell(&self, kind: Kind, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap();
        change(&mut state);
        state.seq += 1;
        let batch = KvBatch { events: vec![KvEvent { kind: Some(kind) }] };
        let message = self.message(state.seq, Body::Batch(batch));
        state.routers.retain(|router| router.send(message.clone()).is_ok());
    }

    fn message(&self, seq: u64, body: Body) -> WatchKvEventsResponse {
        let (worker, epoch) = (self.hello.worker.clone(), self.hello.epoch);
        WatchKvEventsResponse { worker, epoch, seq, body: Some(body) }
    }
}
