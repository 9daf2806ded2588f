//! The workers of the cluster as this router knows them: a link to each, pools of those that serve the same files,
//! and the choice of one for a request.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use petek_core::hash::{BlockName, HASH_SCHEME, Revision};
use petek_core::params::ModelLimits;
use petek_core::refusal::Refusal;
use petek_proto::admin::v1::CandidateState;
use petek_proto::hello::WIRE;
use petek_proto::inference::v1::RouteReason;
use petek_service::Suspect;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::feed::{Freshness, WorkerEntry, WorkerFeed, WorkerState};
use crate::index::{Figures, Matches};
use crate::link::{Common, InFlight, Link, Session};
use crate::lock;
use crate::models::{CardError, Model, Models};
use crate::relay::RETRY_MS;
use crate::route::{Ask, Decision, Suspicion, WorkerView, decide, judge};

/// Between two tries to get a model card.
const CARD_RETRY: Duration = Duration::from_secs(1);
/// Nodes of the index that a sweep looks at while it is locked.
const SWEEP_NODES: u32 = 4_096;

/// See the head of this file.
pub(crate) struct Workers {
    known: Mutex<Known>,
    models: Arc<Models>,
    common: Arc<Common>,
}

#[derive(Default)]
struct Known {
    links: BTreeMap<String, Arc<Link>>,
    pools: BTreeMap<(String, Revision), Arc<Pool>>,
    freshness: Freshness,
}

impl Drop for Workers {
    /// A router that has stopped misses nobody.
    fn drop(&mut self) {
        lock(&self.known).links.values().for_each(|link| link.dismiss());
    }
}

/// The workers of one name and revision.
pub(crate) struct Pool {
    pub(crate) name: String,
    pub(crate) revision: Revision,
    pub(crate) text_hash: [u8; 32],
    pub(crate) block_size: u32,
    links: Mutex<Vec<Arc<Link>>>,
    card: Mutex<Card>,
    /// Held from the look at the loads to the counting of the new one, so that a burst spreads.
    placing: Mutex<()>,
    suspicion: Mutex<Suspicion>,
    common: Arc<Common>,
}

enum Card {
    Loading,
    Ready {
        model: Arc<Model>,
        aliases: Vec<String>,
    },
    /// It was fetched and cannot be used; the log says why.
    Unusable,
}

/// A pool that can be asked now.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) pool: Arc<Pool>,
    pub(crate) model: Arc<Model>,
    pub(crate) aliases: Vec<String>,
    pub(crate) limits: ModelLimits,
}

/// A worker chosen for an attempt, and already counted there.
pub(crate) struct Placed {
    pub(crate) link: Arc<Link>,
    pub(crate) session: Arc<Session>,
    pub(crate) in_flight: InFlight,
    pub(crate) reason: RouteReason,
    pub(crate) matched_tokens: u32,
    pub(crate) waiting_tokens: u64,
}

/// A request as it is placed.
pub(crate) struct Wanted<'a> {
    pub(crate) ask: Ask,
    /// Its full blocks; none, where it uses no cache.
    pub(crate) names: &'a [BlockName],
}

/// A decision that is not acted on, beside what it was made from.
pub(crate) struct Explained {
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) decision: Decision,
}

/// A worker of a pool, looked at once: what is chosen is what was seen.
pub(crate) struct Candidate {
    pub(crate) link: Arc<Link>,
    pub(crate) view: WorkerView,
    session: Option<Arc<Session>>,
}

impl Workers {
    /// Follows a feed for as long as somebody sends to it; in the end the last list stays.
    pub(crate) fn follow(mut feed: WorkerFeed, common: Common) -> Arc<Self> {
        let common = Arc::new(common);
        let workers = Arc::new(Workers { known: Mutex::default(), models: Arc::default(), common });
        tokio::spawn(keep_vigil(Arc::downgrade(&workers)));
        tokio::spawn(keep_house(Arc::downgrade(&workers)));
        let following = Arc::downgrade(&workers);
        tokio::spawn(async move {
            loop {
                let list = feed.borrow_and_update().clone();
                let Some(workers) = following.upgrade() else { return };
                workers.learn(list.workers, list.freshness);
                drop(workers);
                if feed.changed().await.is_err() {
                    return;
                }
            }
        });
        workers
    }

    /// All links, by model and id.
    pub(crate) fn links(&self) -> Vec<Arc<Link>> {
        let mut links: Vec<_> = lock(&self.known).links.values().cloned().collect();
        links.sort_by(|a, b| (&a.entry.name, &a.entry.id).cmp(&(&b.entry.name, &b.entry.id)));
        links
    }

    pub(crate) fn link(&self, id: &str) -> Option<Arc<Link>> {
        lock(&self.known).links.get(id).cloned()
    }

    pub(crate) fn freshness(&self) -> Freshness {
        lock(&self.known).freshness
    }

    /// Tells of changes; the number itself means nothing.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.common.changed.subscribe()
    }

    /// All pools that can be asked now, by name.
    pub(crate) fn served(&self) -> Vec<Served> {
        let pools: Vec<_> = lock(&self.known).pools.values().cloned().collect();
        pools.iter().filter_map(|pool| pool.served().ok()).collect()
    }

    /// The pool that requests for a name or alias get. Of several revisions it is the one that most workers serve,
    /// of equals the one with the youngest worker.
    ///
    /// # Errors
    /// Nobody serves the name, or it is empty and several are served, or none of its workers can be asked now.
    pub(crate) fn resolve(&self, asked: &str) -> Result<Served, Refusal> {
        let pools: Vec<Arc<Pool>> = lock(&self.known).pools.values().cloned().collect();
        let mut names: Vec<&str> = pools.iter().map(|pool| &pool.name[..]).collect();
        names.dedup();
        let name = match (asked, &names[..]) {
            ("", [only]) => (*only).to_owned(),
            ("", []) => return Err(Refusal::NoWorker { model: String::new(), retry_ms: RETRY_MS }),
            ("", several) => {
                let problem = format!("must be set, for several are served: {}", list(several));
                return Err(Refusal::invalid("model", problem));
            }
            (asked, _) => {
                let named = pools.iter().find(|pool| pool.name == asked);
                let called = named.or_else(|| pools.iter().find(|pool| pool.is_called(asked)));
                let unknown = || Refusal::UnknownModel { model: asked.to_owned(), served: list(&names) };
                called.ok_or_else(unknown)?.name.clone()
            }
        };
        let of_name = pools.iter().filter(|pool| pool.name == name);
        let served = of_name.filter_map(|pool| pool.served().ok());
        let best = served.max_by_key(|served| (served.pool.serving(), served.pool.youngest_unix_ms()));
        best.ok_or(Refusal::NoWorker { model: name, retry_ms: RETRY_MS })
    }

    /// Takes over a list: new and changed workers are connected, those that left are dismissed.
    fn learn(&self, mut entries: Vec<WorkerEntry>, freshness: Freshness) {
        entries.sort_by(|a, b| a.id.cmp(&b.id));
        let mut known = lock(&self.known);
        let mut before = std::mem::take(&mut known.links);
        let mut members: BTreeMap<(String, Revision), Vec<Arc<Link>>> = BTreeMap::new();
        for entry in entries {
            let key = (entry.name.clone(), entry.revision);
            let link = match before.remove(&entry.id) {
                Some(link) if !link.entry.is_elsewhere(&entry) => {
                    link.set_state(entry.state);
                    link
                }
                old => {
                    if let Some(old) = old {
                        old.dismiss();
                    }
                    self.connect(&mut known.pools, entry)
                }
            };
            members.entry(key).or_default().push(link.clone());
            known.links.insert(link.entry.id.clone(), link);
        }
        before.into_values().for_each(|left| left.dismiss());
        known.pools.retain(|key, _| members.contains_key(key));
        for (key, links) in members {
            if let Some(pool) = known.pools.get(&key) {
                *lock(&pool.links) = links;
            }
        }
        known.freshness = freshness;
        self.common.metrics.workers.set(known.links.len() as i64);
        drop(known);
        self.common.changed.send_modify(|count| *count += 1);
    }

    /// A link to a worker whose record is good by itself and in its pool. The first good record of a pool says what
    /// all of its workers must have.
    fn connect(&self, pools: &mut BTreeMap<(String, Revision), Arc<Pool>>, entry: WorkerEntry) -> Arc<Link> {
        let checked = check(&entry).and_then(|()| {
            let pool = pools.entry((entry.name.clone(), entry.revision)).or_insert_with(|| {
                let pool = Arc::new(Pool::new(&entry, self.common.clone()));
                tokio::spawn(self.get_card(Arc::downgrade(&pool)));
                pool
            });
            check_in_pool(&entry, pool)
        });
        let common = self.common.clone();
        match checked {
            Ok(()) => Link::start(entry, common),
            Err(why) => {
                common.dialler.count_bad_record();
                Link::refused(entry, common, &why)
            }
        }
    }

    /// Gets a pool its model from whichever of its workers is connected; ends when it has it, or the pool is gone.
    fn get_card(&self, pool: Weak<Pool>) -> impl Future<Output = ()> + Send + 'static {
        let (models, common) = (self.models.clone(), self.common.clone());
        let mut changes = common.changed.subscribe();
        async move {
            for tries in 0.. {
                let Some(pool) = pool.upgrade() else { return };
                let mut links = lock(&pool.links).clone();
                links.retain(|link| link.session().is_some());
                // Another one each time: one bad worker keeps nobody from the card.
                let Some(link) = links.get(tries % links.len().max(1)) else {
                    drop(pool);
                    if changes.changed().await.is_err() {
                        return;
                    }
                    continue;
                };
                let card = match models.load(link).await {
                    Ok((model, aliases)) => {
                        tracing::info!(model = %pool.name, revision = %pool.revision, "model card loaded");
                        common.metrics.add_model(&pool.name);
                        Card::Ready { model, aliases }
                    }
                    Err(error @ CardError::Unusable(_)) => {
                        tracing::error!(model = %pool.name, revision = %pool.revision, %error, "no model");
                        Card::Unusable
                    }
                    Err(error) => {
                        tracing::warn!(model = %pool.name, worker = %link.entry.id, %error, "no model card yet");
                        drop(pool);
                        tokio::time::sleep(CARD_RETRY).await;
                        continue;
                    }
                };
                *lock(&pool.card) = card;
                common.changed.send_modify(|count| *count += 1);
                return;
            }
        }
    }

    /// Looks for silence, in every pool and at home.
    fn look_around(&self) {
        if self.common.tick() {
            tracing::warn!("this router was stalled: it suspects nobody else of silence for a while");
            self.common.metrics.suspicions.of(Suspect::Router).inc();
        }
        let pools: Vec<_> = lock(&self.known).pools.values().cloned().collect();
        pools.iter().for_each(|pool| pool.look_around());
    }
}

/// Looks around as often as silence asks for, and so notices when it could not.
async fn keep_vigil(workers: Weak<Workers>) {
    let Some(period) = workers.upgrade().map(|workers| workers.common.dialler.settings().vigil_period())
    else {
        return;
    };
    let mut timer = interval(period);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let Some(workers) = workers.upgrade() else { return };
        workers.look_around();
    }
}

/// Ends predictions whose time is over, takes workers that left out of the index, and tells the metrics.
async fn keep_house(workers: Weak<Workers>) {
    const PERIOD: Duration = Duration::from_millis(100);
    let mut timer = interval(PERIOD);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = Figures::default();
    loop {
        timer.tick().await;
        let Some(common) = workers.upgrade().map(|workers| workers.common.clone()) else { return };
        lock(&common.index).expire(common.now());
        while lock(&common.index).sweep(SWEEP_NODES) {
            tokio::task::yield_now().await;
        }
        let figures = lock(&common.index).figures();
        let metrics = &common.metrics;
        metrics.index_blocks.set(figures.blocks as i64);
        metrics.index_holder_blocks.set(figures.holder_blocks as i64);
        metrics.index_bytes.set(figures.bytes as i64);
        metrics.index_forgotten.inc_by(figures.forgotten_total - told.forgotten_total);
        metrics.index_unpredicted.inc_by(figures.unpredicted_total - told.unpredicted_total);
        told = figures;
    }
}

impl Pool {
    fn new(first: &WorkerEntry, common: Arc<Common>) -> Self {
        Pool {
            name: first.name.clone(),
            revision: first.revision,
            text_hash: first.text_hash,
            block_size: first.block_size,
            links: Mutex::default(),
            card: Mutex::new(Card::Loading),
            placing: Mutex::default(),
            suspicion: Mutex::new(Suspicion::Nobody),
            common,
        }
    }

    /// What a request needs of the pool, if it can be asked now.
    fn served(self: &Arc<Self>) -> Result<Served, Refusal> {
        let no_worker = || Refusal::NoWorker { model: self.name.clone(), retry_ms: RETRY_MS };
        let card = lock(&self.card);
        let Card::Ready { model, aliases } = &*card else { return Err(no_worker()) };
        // What every worker holds: a request must not depend on which it gets.
        let links = lock(&self.links);
        let connected = links.iter().filter(|link| link.session().is_some());
        let contexts = connected.map(|link| link.entry.context_tokens).min();
        drop(links);
        let limits = ModelLimits {
            vocabulary: model.vocabulary,
            context_tokens: contexts.ok_or_else(no_worker)?,
            eos_ids: model.text.eos_ids.as_slice().into(),
            defaults: model.defaults,
        };
        Ok(Served { pool: self.clone(), model: model.clone(), aliases: aliases.clone(), limits })
    }

    /// Workers that take requests now.
    pub(crate) fn serving(&self) -> u32 {
        let takes = |link: &&Arc<Link>| link.state() == WorkerState::Serving && link.session().is_some();
        lock(&self.links).iter().filter(takes).count() as u32
    }

    /// Whether a worker takes requests now and has said so itself.
    pub(crate) fn is_reported_serving(&self) -> bool {
        let now = self.common.now();
        let says_so = |link: &Arc<Link>| link.load(now).is_some() && link.session().is_some();
        lock(&self.links).iter().any(|link| link.state() == WorkerState::Serving && says_so(link))
    }

    /// Chooses a worker that was not tried yet, and counts the request there. `random` is any 64 bits.
    pub(crate) fn place(
        &self,
        wanted: &Wanted<'_>,
        sequences: u32,
        tried: &[String],
        random: u64,
    ) -> Option<Placed> {
        let _placing = lock(&self.placing);
        let now = self.common.now();
        let (mut candidates, _) = self.candidates(wanted, now);
        candidates.retain(|candidate| !tried.contains(&candidate.link.entry.id));
        let decision = decide(&wanted.ask, &views(&candidates), random);
        let chosen = decision.chosen?;
        let (Candidate { link, view, session }, cost) =
            (candidates.swap_remove(chosen), &decision.costs[chosen]);
        Some(Placed {
            session: session?,
            in_flight: link.count(cost, wanted.ask.prompt_tokens, wanted.names, sequences, now),
            link,
            reason: decision.reason,
            matched_tokens: cost.matched_tokens,
            waiting_tokens: view.waiting_uncached_tokens,
        })
    }

    /// Decides as [`Pool::place`] does, and sends nothing.
    pub(crate) fn explain(&self, wanted: &Wanted<'_>, random: u64) -> Explained {
        let (candidates, _) = self.candidates(wanted, self.common.now());
        let decision = decide(&wanted.ask, &views(&candidates), random);
        Explained { candidates, decision }
    }

    /// Every worker of the pool, with what is known of it and of the prompt there, and whether silence is suspect.
    fn candidates(&self, wanted: &Wanted<'_>, now: Duration) -> (Vec<Candidate>, Suspicion) {
        let names = &wanted.names[..wanted.names.len().min(wanted.ask.reusable_blocks() as usize)];
        let matches = match names {
            [] => Matches::none(),
            names => lock(&self.common.index).matches(names, now),
        };
        let links = lock(&self.links).clone();
        let look = |link: Arc<Link>| {
            let session = link.session();
            let view = link.view(session.as_deref(), matches.of(link.key()), now);
            Candidate { link, view, session }
        };
        let mut candidates: Vec<Candidate> = links.into_iter().map(look).collect();
        let silence_max = Duration::from_millis(self.common.dialler.settings().load_silence_ms_max);
        let mut judged = views(&candidates);
        let suspicion = judge(&mut judged, silence_max, self.common.awake(now));
        candidates.iter_mut().zip(judged).for_each(|(candidate, view)| candidate.view = view);
        (candidates, suspicion)
    }

    /// Looks for silent workers, so that operators see them without a request.
    fn look_around(&self) {
        let nothing = Ask { prompt_tokens: 1, max_tokens: 1, block_size: self.block_size };
        let (candidates, suspicion) =
            self.candidates(&Wanted { ask: nothing, names: &[] }, self.common.now());
        let before = std::mem::replace(&mut *lock(&self.suspicion), suspicion);
        let suspicions = &self.common.metrics.suspicions;
        if suspicion == Suspicion::Itself && before != Suspicion::Itself {
            tracing::warn!(model = %self.name, "most load reports stopped at once: no worker is dropped for it");
            suspicions.of(Suspect::Router).inc();
        }
        for Candidate { link, view, .. } in candidates {
            if link.set_suspect(view.state == CandidateState::Suspect) {
                suspicions.of(Suspect::Worker).inc();
            }
        }
    }

    fn is_called(&self, name: &str) -> bool {
        matches!(&*lock(&self.card), Card::Ready { aliases, .. } if aliases.iter().any(|alias| alias == name))
    }

    fn youngest_unix_ms(&self) -> u64 {
        lock(&self.links).iter().map(|link| link.entry.started_unix_ms).max().unwrap_or(0)
    }
}

fn views(candidates: &[Candidate]) -> Vec<WorkerView> {
    candidates.iter().map(|candidate| candidate.view).collect()
}

/// Checks a record by itself.
fn check(entry: &WorkerEntry) -> Result<(), Refusal> {
    entry.check()?;
    WIRE.meet(&entry.wire)?;
    if entry.hash_scheme != HASH_SCHEME {
        let (ours, theirs) = (HASH_SCHEME.to_string(), entry.hash_scheme.to_string());
        return Err(Refusal::PeerMismatch { what: "hash scheme", ours, theirs });
    }
    Ok(())
}

/// Checks a record against what its pool agreed on.
fn check_in_pool(entry: &WorkerEntry, pool: &Pool) -> Result<(), Refusal> {
    let differs = |what, ours: String, theirs: String| Err(Refusal::PeerMismatch { what, ours, theirs });
    if entry.block_size != pool.block_size {
        return differs("block size", pool.block_size.to_string(), entry.block_size.to_string());
    }
    if entry.text_hash != pool.text_hash {
        return differs("text hash", "that of its pool".into(), "another one".into());
    }
    Ok(())
}

fn list(names: &[&str]) -> String {
    /// A refusal is short; whoever serves more has ListModels.
    const NAMES_MAX: usize = 16;
    let shown = names.iter().take(NAMES_MAX).copied().collect::<Vec<_>>().join(", ");
    match names.len() {
        0 => "none yet".into(),
        1..=NAMES_MAX => shown,
        _ => format!("{shown}, …"),
    }
}
