//! The registry in etcd.
//!
//! What etcd and its client do when something fails was measured, and every duty here answers one of the findings:
//!
//! | file | duty |
//! |---|---|
//! | `options` | how etcd is reached, checked |
//! | `links` | one connection per endpoint, a deadline per call, each call once per endpoint, logging in again |
//! | `failure` | what an error means: away, denied, lease lost, or not to be done |
//! | `watching` | a watch that never just falls silent |

mod failure;
mod links;
mod options;
mod watching;

use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, GetResponse, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse,
};
use futures::future::BoxFuture;

use crate::registry::{
    Call, ENTRIES_MAX, Entry, Lease, LeaseId, Listing, Registry, RegistryError, RegistryRevision, Swapped,
    Watch, WatchEnd,
};
use links::{Links, Login};
pub use options::{EtcdOptions, EtcdTls, EtcdUser, OptionsError};

/// Records of one answer to a list: of the largest allowed size they are half of what a message may hold.
const PAGE_ENTRIES: i64 = 128;
/// How often a list begins again because its revision was compacted away meanwhile.
const LISTS_MAX: usize = 3;

/// A registry in etcd, 3.4 or later.
pub struct EtcdRegistry {
    links: Links,
}

impl EtcdRegistry {
    /// Takes the options. Nothing is sent yet: whether anybody is there, the first call shows.
    ///
    /// Must run inside a tokio runtime, which the connections live in.
    ///
    /// # Errors
    /// Options that cannot be: a matter of configuration.
    pub async fn new(options: EtcdOptions) -> Result<Self, OptionsError> {
        Ok(EtcdRegistry { links: Links::new(options.check()?).await? })
    }

    /// One page of entries from `start`, smaller if the server's answer would be too large to read.
    async fn page(
        &self,
        start: &str,
        end: &[u8],
        revision: i64,
        limit: &mut i64,
    ) -> Result<GetResponse, RegistryError> {
        loop {
            let options = GetOptions::new().with_range(end).with_limit(*limit).with_revision(revision);
            let got = self
                .links
                .call(Login::Once, |mut client: Client| {
                    let options = options.clone();
                    async move { client.get(start, Some(options)).await }
                })
                .await;
            match got {
                Err(RegistryError::Unable { why, .. })
                    if failure::is_message_too_large(&why) && *limit > 1 =>
                {
                    *limit /= 2;
                }
                got => return got,
            }
        }
    }

    async fn list_once(&self, prefix: &str) -> Result<Listing, RegistryError> {
        let end = prefix_end(prefix);
        let mut listing = Listing::default();
        let mut start = prefix.to_string();
        let mut limit = PAGE_ENTRIES;
        loop {
            let page = self.page(&start, &end, listing.revision.0, &mut limit).await?;
            if listing.revision.0 == 0 {
                listing.revision = RegistryRevision(page.header().map_or(0, |header| header.revision()));
            }
            for kv in page.kvs() {
                listing.entries.extend(entry(kv));
            }
            let last = page.kvs().last().map(|kv| kv.key().to_vec());
            if listing.entries.len() > ENTRIES_MAX {
                listing.entries.truncate(ENTRIES_MAX);
                listing.is_cut = true;
            }
            match last {
                Some(last) if page.more() && !listing.is_cut => {
                    // The next key after it in the order of bytes.
                    start = String::from_utf8_lossy(&last).into_owned() + "\0";
                }
                _ => return Ok(listing),
            }
        }
    }
}

/// `None` where the key is no text: none of ours.
fn entry(kv: &KeyValue) -> Option<Entry> {
    let Ok(key) = kv.key_str() else {
        tracing::warn!(key = %String::from_utf8_lossy(kv.key()).escape_debug(), "a key that is no text ignored");
        return None;
    };
    Some(Entry {
        key: key.into(),
        value: kv.value().to_vec(),
        revision: RegistryRevision(kv.mod_revision()),
        lease: Some(LeaseId(kv.lease())).filter(|lease| lease.0 != 0),
    })
}

/// The first key after all that begin with `prefix`: its last byte, one higher. Ours end in a slash.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // No prefix at all: to etcd this means "to the last key".
    vec![0]
}

impl Registry for EtcdRegistry {
    fn endpoint(&self) -> &str {
        self.links.endpoints()
    }

    fn grant(&self, ttl: Duration) -> Call<'_, Lease> {
        // etcd counts in whole seconds; a lease must not be shorter than was asked for.
        let seconds = ttl.as_millis().div_ceil(1_000).max(1) as i64;
        Box::pin(async move {
            let lease = self
                .links
                .call(Login::Once, move |mut client: Client| async move {
                    client.lease_grant(seconds, None).await
                })
                .await?;
            Ok(Lease { id: LeaseId(lease.id()), ttl: Duration::from_secs(lease.ttl().max(0) as u64) })
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> Call<'_, ()> {
        Box::pin(async move {
            self.links
                .call(Login::Once, move |mut client: Client| async move {
                    // A stream for one question and its answer, which the client reads before it returns: nothing
                    // is left open that could die unseen.
                    client.lease_keep_alive(lease.0).await.map(drop)
                })
                .await
        })
    }

    fn revoke(&self, lease: LeaseId) -> Call<'_, ()> {
        Box::pin(async move {
            let revoked = self
                .links
                .call(Login::Once, move |mut client: Client| async move {
                    client.lease_revoke(lease.0).await.map(drop)
                })
                .await;
            match revoked {
                Err(RegistryError::LeaseLost) => Ok(()),
                revoked => revoked,
            }
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> Call<'a, Option<Entry>> {
        Box::pin(async move {
            let got = self
                .links
                .call(Login::Once, move |mut client: Client| async move { client.get(key, None).await })
                .await?;
            Ok(got.kvs().first().and_then(entry))
        })
    }

    fn swap<'a>(
        &'a self,
        key: &'a str,
        expected: RegistryRevision,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    ) -> Call<'a, Swapped> {
        // To etcd a key that is not there was last written at 0.
        let is_as_expected = Compare::mod_revision(key, CompareOp::Equal, expected.0);
        let put = PutOptions::new().with_lease(lease.map_or(0, |lease| lease.0));
        let txn = Txn::new()
            .when([is_as_expected])
            .and_then([TxnOp::put(key, value, Some(put))])
            .or_else([TxnOp::get(key, None)]);
        Box::pin(async move {
            let done = self
                .links
                .call(Login::Once, |mut client: Client| {
                    let txn = txn.clone();
                    async move { client.txn(txn).await }
                })
                .await?;
            if done.succeeded() {
                return Ok(Swapped::Done(RegistryRevision(
                    done.header().map_or(0, |header| header.revision()),
                )));
            }
            Ok(Swapped::Found(done.op_responses().into_iter().find_map(|response| match response {
                TxnOpResponse::Get(got) => got.kvs().first().and_then(entry),
                _ => None,
            })))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Call<'a, Listing> {
        Box::pin(async move {
            let mut tries = 1;
            loop {
                match self.list_once(prefix).await {
                    Err(RegistryError::Unable { why, .. })
                        if failure::is_compacted(&why) && tries < LISTS_MAX =>
                    {
                        tries += 1;
                    }
                    result => return result,
                }
            }
        })
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: RegistryRevision,
    ) -> BoxFuture<'a, Result<Watch, WatchEnd>> {
        Box::pin(watching::watch(&self.links, prefix, after))
    }
}
