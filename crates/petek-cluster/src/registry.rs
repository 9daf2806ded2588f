//! What a registry can do: a small store of keys under leases, with revisions and watches. etcd is one, memory the
//! other; [`Registration`](crate::Registration) and [`WorkersView`](crate::WorkersView) are built on either.
//!
//! Every method answers within a bound of its own; a deadline that passes is [`RegistryError::Away`]. A call that
//! failed as `Away` may have been carried out all the same: so the one write there is compares before it writes,
//! and doing it again shows what happened.

use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;

/// Counts the changes of the whole registry, up by one with each, from the time it was set up; 0 is before all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegistryRevision(pub i64);

/// Names a lease. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId(pub i64);

/// A lease as it was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// How long it lives from here and from each keep-alive: the registry's word, which may be more than was asked.
    pub ttl: Duration,
}

/// A key and what stands at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// When it was last written.
    pub revision: RegistryRevision,
    /// The lease under which it stands.
    pub lease: Option<LeaseId>,
}

/// How a [`Registry::swap`] ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swapped {
    /// Written, at this revision.
    Done(RegistryRevision),
    /// Not written: this stands there, or nothing.
    Found(Option<Entry>),
}

/// All entries under a prefix at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// By key.
    pub entries: Vec<Entry>,
    /// Of the whole registry when it was made.
    pub revision: RegistryRevision,
    /// Whether there were more than [`ENTRIES_MAX`]; those are left out.
    pub is_cut: bool,
}

/// The most entries of a [`Listing`].
pub const ENTRIES_MAX: usize = 4_096;

/// One change under a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Written.
    Put(Entry),
    /// Gone: its lease ended, or someone removed it.
    Deleted {
        /// The key.
        key: String,
        /// When.
        revision: RegistryRevision,
    },
}

/// Changes that came together, oldest first; none: nothing changed up to `revision`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// In order.
    pub list: Vec<Change>,
    /// All changes up to here have been told.
    pub revision: RegistryRevision,
}

/// Why a watch ended. It never ends by falling silent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchEnd {
    /// The registry is out of reach: watch again from the last revision.
    #[error(transparent)]
    Lost(#[from] RegistryError),
    /// What is asked for is not to be had from there: list, and watch from the listing.
    #[error("list again: {0}")]
    ListAgain(String),
}

/// Why a call to the registry failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// It does not answer, or cannot do its work now: trying again can help.
    #[error("registry {endpoint} is out of reach: {why}")]
    Away {
        /// Where it was looked for.
        endpoint: String,
        /// What happened.
        why: String,
    },
    /// User, password, certificate or rights are wrong: trying again does not help.
    #[error("registry {endpoint} refuses us: {why}")]
    Denied {
        /// Who refuses.
        endpoint: String,
        /// Its words.
        why: String,
    },
    /// The lease is over.
    #[error("the lease is over: the registry does not know it any more")]
    LeaseLost,
    /// The call itself cannot be: a value too large, a message we do not know.
    #[error("registry {endpoint} cannot do this: {why}")]
    Unable {
        /// Who.
        endpoint: String,
        /// Its words.
        why: String,
    },
}

impl RegistryError {
    /// True where trying the same again later can help.
    pub fn is_passing(&self) -> bool {
        matches!(self, RegistryError::Away { .. } | RegistryError::LeaseLost)
    }
}

/// A call under way.
pub type Call<'a, T> = BoxFuture<'a, Result<T, RegistryError>>;

/// Batches of changes in the order of their revisions, then one [`WatchEnd`].
pub type Watch = BoxStream<'static, Result<Changes, WatchEnd>>;

/// A store of keys under leases. All methods may be called at the same time from anywhere.
///
/// *Cancel safety*: a call that is dropped may have been carried out.
pub trait Registry: Send + Sync + 'static {
    /// Where it is, for people.
    fn endpoint(&self) -> &str;

    /// Grants a lease of about `ttl`.
    fn grant(&self, ttl: Duration) -> Call<'_, Lease>;

    /// Lets the lease live for its whole time again from now.
    ///
    /// # Errors
    /// [`RegistryError::LeaseLost`] where it is over.
    fn keep_alive(&self, lease: LeaseId) -> Call<'_, ()>;

    /// Ends the lease and removes what stands under it. One that is over already is no error.
    fn revoke(&self, lease: LeaseId) -> Call<'_, ()>;

    /// What stands at `key`.
    fn get<'a>(&'a self, key: &'a str) -> Call<'a, Option<Entry>>;

    /// Writes `value` if what stands at `key` was last written at `expected`; [`RegistryRevision`] 0: if nothing
    /// stands there. Then it stands under `lease`, or for ever without one.
    ///
    /// # Errors
    /// [`RegistryError::LeaseLost`] where the lease is over: nothing is written then.
    fn swap<'a>(
        &'a self,
        key: &'a str,
        expected: RegistryRevision,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    ) -> Call<'a, Swapped>;

    /// All entries whose keys begin with `prefix`, as of one revision not older than any answer before.
    fn list<'a>(&'a self, prefix: &'a str) -> Call<'a, Listing>;

    /// All changes under `prefix` after the revision `after`. When this returns, the watch stands.
    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: RegistryRevision,
    ) -> BoxFuture<'a, Result<Watch, WatchEnd>>;
}
