//! What stands in the registry: a worker's record, the settings that all workers of a revision share, and the keys
//! of both. JSON that a person can read with `etcdctl`; 64-bit numbers are strings, since other readers of JSON
//! round them; unknown keys are ignored, so that a newer worker can say more.
//!
//! ```text
//! /petek/v1/{cluster}/workers/{name}/{worker}      under the worker's lease
//! /petek/v1/{cluster}/settings/{name}/{revision}   without a lease, written once
//! ```
//!
//! A name may hold slashes, a worker's id and a revision may not: so the last slash of a key ends the name.

use std::collections::BTreeSet;
use std::fmt;

use petek_core::hash::Revision;
use petek_core::ids::Epoch;
use petek_core::limits::engine::{BLOCK_TOKENS_MAX, BLOCK_TOKENS_MIN};
use petek_core::limits::link::RECORD_BYTES_MAX;
use petek_core::limits::model::{CONTEXT_MAX, HEADS_MAX};
use serde::{Deserialize, Serialize};

use crate::registry::ENTRIES_MAX;

/// Bytes of a name, of a worker's id and of an address.
const TEXT_BYTES_MAX: usize = 256;
/// Addresses, and roles.
const LIST_MAX: usize = 16;

/// A worker, as it describes itself in the registry. A hint, never a proof: a router compares it with the worker's
/// own first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerRecord {
    /// Given, or host:port; no slash.
    pub worker: String,
    /// Of its engine's start.
    #[serde(with = "text::epoch")]
    pub epoch: Epoch,
    /// Where routers reach it, `host:port`, the best first: not where it listens.
    pub addresses: Vec<String>,
    /// What clients call the model.
    pub name: String,
    /// Of the model's files.
    #[serde(with = "text::revision")]
    pub revision: Revision,
    /// BLAKE3 over the names and hashes of the model card's files.
    #[serde(with = "text::hash")]
    pub text_hash: [u8; 32],
    /// Workers of equal ones give equal bits.
    pub numerics_id: String,
    /// Tokens per block of the KV cache.
    pub block_size_tokens: u32,
    /// How blocks are hashed.
    pub hash_scheme: u32,
    /// Tokens that prompt and output of a request may have together.
    pub context_tokens: u32,
    /// Blocks of the KV cache.
    pub blocks_total: u32,
    /// Ranks that share the model.
    pub tp: u32,
    /// What it does: `generate` today.
    #[serde(default)]
    pub roles: BTreeSet<String>,
    /// Adapters that it has loaded.
    #[serde(default)]
    pub adapters: Vec<AdapterRecord>,
    /// What it does with new work.
    pub state: WorkerState,
    /// Versions of the wire that it speaks.
    pub wire: WireVersions,
    /// When it started, by its own clock, in milliseconds since 1970. To be shown; nothing is decided by it.
    #[serde(with = "text::number")]
    pub started_unix_ms: u64,
}

/// An adapter that a worker has loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AdapterRecord {
    /// What clients call it.
    pub name: String,
    /// Counts its loads.
    #[serde(with = "text::number")]
    pub generation: u64,
}

/// What a worker does with new work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum WorkerState {
    /// Takes none yet: it warms up.
    Loading,
    /// Takes it.
    Serving,
    /// Takes none any more and finishes what it has.
    Draining,
    /// A word of a newer version; whatever it means, send no new work. Never written.
    #[serde(other, skip_serializing)]
    Unknown,
}

/// Versions of the wire, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireVersions {
    /// The oldest.
    pub min: u32,
    /// The newest.
    pub max: u32,
}

/// What all workers of one (name, revision) must have in common: else the same prompt would have other block hashes,
/// and nothing would say so. The first worker writes it, nobody overwrites it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SettingsRecord {
    /// Tokens per block of the KV cache.
    pub block_size_tokens: u32,
    /// How blocks are hashed.
    pub hash_scheme: u32,
    /// Of the model card.
    #[serde(with = "text::hash")]
    pub text_hash: [u8; 32],
}

/// Names a worker within its cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerKey {
    /// What clients call the model.
    pub name: String,
    /// The worker's id.
    pub worker: String,
}

impl fmt::Display for WorkerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.worker)
    }
}

/// A cluster's name, and with it where everything of the cluster stands in the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster(String);

/// Why a record is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Longer than a record may be.
    #[error("has {bytes} bytes; a record has at most {RECORD_BYTES_MAX}")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// Stands at a key that names no worker.
    #[error("stands at a key that names no worker")]
    Key,
    /// One more than a view holds.
    #[error("is one too many: {ENTRIES_MAX} records at most are looked at")]
    TooMany,
    /// No JSON, or a field is missing or of another type.
    #[error("does not read as a record: {why}")]
    Malformed {
        /// What the parser says.
        why: String,
    },
    /// A field's value cannot be.
    #[error("{field}: {problem}")]
    Field {
        /// As in the JSON.
        field: &'static str,
        /// What it must be and what it is.
        problem: String,
    },
}

impl Cluster {
    /// Takes a cluster's name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    ///
    /// # Errors
    /// [`RecordError::Field`] for any other.
    pub fn new(name: &str) -> Result<Self, RecordError> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=64).contains(&name.len()) || !name.bytes().all(is_plain) {
            return field("cluster", format!("must be 1 to 64 of A-Z a-z 0-9 . _ -, not {}", quote(name)));
        }
        Ok(Cluster(name.into()))
    }

    /// What all keys of workers begin with.
    pub fn workers_prefix(&self) -> String {
        format!("/petek/v1/{}/workers/", self.0)
    }

    /// Where a worker's record stands.
    pub fn worker_key(&self, key: &WorkerKey) -> String {
        format!("{}{}/{}", self.workers_prefix(), key.name, key.worker)
    }

    /// Where the settings of a revision stand.
    pub fn settings_key(&self, name: &str, revision: &Revision) -> String {
        format!("/petek/v1/{}/settings/{name}/{revision}", self.0)
    }

    /// Whose record stands at `key`. `None`: it is no key of a worker of this cluster.
    pub fn worker_of(&self, key: &str) -> Option<WorkerKey> {
        let (name, worker) = key.strip_prefix(&self.workers_prefix())?.rsplit_once('/')?;
        let key = WorkerKey { name: name.into(), worker: worker.into() };
        (check_name(name).is_ok() && check_worker(worker).is_ok()).then_some(key)
    }
}

impl WorkerRecord {
    /// Reads the value that stands at the key of `key`.
    ///
    /// # Errors
    /// Whatever is wrong with it first. Nothing of it may be used then.
    pub fn parse(key: &WorkerKey, value: &[u8]) -> Result<Self, RecordError> {
        let record: WorkerRecord = parse(value)?;
        record.check()?;
        if record.key() != *key {
            return field("worker", format!("stands at the key of {key}, but says {}", record.key()));
        }
        Ok(record)
    }

    /// The value to write.
    ///
    /// # Errors
    /// What [`parse`](Self::parse) would refuse: the cause is a setting of this worker.
    pub fn to_value(&self) -> Result<Vec<u8>, RecordError> {
        self.check()?;
        if self.state == WorkerState::Unknown {
            return field("state", "unknown is not a state to announce".into());
        }
        let value = serde_json::to_vec(self).map_err(|error| malformed(&error))?;
        if value.len() > RECORD_BYTES_MAX {
            return Err(RecordError::TooLarge { bytes: value.len() });
        }
        Ok(value)
    }

    /// Its name in the cluster.
    pub fn key(&self) -> WorkerKey {
        WorkerKey { name: self.name.clone(), worker: self.worker.clone() }
    }

    /// What it must have in common with the others of its revision.
    pub fn settings(&self) -> SettingsRecord {
        SettingsRecord {
            block_size_tokens: self.block_size_tokens,
            hash_scheme: self.hash_scheme,
            text_hash: self.text_hash,
        }
    }

    fn check(&self) -> Result<(), RecordError> {
        check_worker(&self.worker)?;
        check_name(&self.name)?;
        if !(1..=LIST_MAX).contains(&self.addresses.len()) {
            return field("addresses", format!("must be 1 to {LIST_MAX}, not {}", self.addresses.len()));
        }
        for address in &self.addresses {
            check_address(address)?;
        }
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if self.numerics_id.len() != 32 || !self.numerics_id.bytes().all(is_hex) {
            return field("numericsId", format!("must be 32 hex digits, not {}", quote(&self.numerics_id)));
        }
        self.settings().check()?;
        check_range("contextTokens", self.context_tokens, CONTEXT_MAX)?;
        check_range("blocksTotal", self.blocks_total, u32::MAX)?;
        check_range("tp", self.tp, HEADS_MAX)?;
        check_range("wire.max", self.wire.max, u32::MAX)?;
        check_range("wire.min", self.wire.min, self.wire.max)?;
        if self.roles.len() > LIST_MAX {
            return field("roles", format!("at most {LIST_MAX}, not {}", self.roles.len()));
        }
        Ok(())
    }
}

impl SettingsRecord {
    /// Reads the value of a settings key.
    ///
    /// # Errors
    /// Whatever is wrong with it first.
    pub fn parse(value: &[u8]) -> Result<Self, RecordError> {
        let record: SettingsRecord = parse(value)?;
        record.check()?;
        Ok(record)
    }

    /// The value to write.
    ///
    /// # Errors
    /// What [`parse`](Self::parse) would refuse.
    pub fn to_value(&self) -> Result<Vec<u8>, RecordError> {
        self.check()?;
        serde_json::to_vec(self).map_err(|error| malformed(&error))
    }

    /// In what `theirs` differs, for people: empty if in nothing.
    pub fn differences(&self, theirs: &SettingsRecord) -> String {
        let mut all = Vec::new();
        let mut compare = |what: &str, ours: String, theirs: String| {
            if ours != theirs {
                all.push(format!("{what} is {theirs} there and {ours} here"));
            }
        };
        let numbers = [
            ("block size", self.block_size_tokens, theirs.block_size_tokens),
            ("hash scheme", self.hash_scheme, theirs.hash_scheme),
        ];
        for (what, ours, theirs) in numbers {
            compare(what, ours.to_string(), theirs.to_string());
        }
        compare("text hash", Revision(self.text_hash).to_string(), Revision(theirs.text_hash).to_string());
        all.join(", ")
    }

    fn check(&self) -> Result<(), RecordError> {
        let size = self.block_size_tokens;
        if !size.is_power_of_two() || !(BLOCK_TOKENS_MIN..=BLOCK_TOKENS_MAX).contains(&size) {
            return field(
                "blockSizeTokens",
                format!("must be a power of two from {BLOCK_TOKENS_MIN} to {BLOCK_TOKENS_MAX}, not {size}"),
            );
        }
        check_range("hashScheme", self.hash_scheme, u32::MAX)
    }
}

fn parse<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Result<T, RecordError> {
    if value.len() > RECORD_BYTES_MAX {
        return Err(RecordError::TooLarge { bytes: value.len() });
    }
    serde_json::from_slice(value).map_err(|error| malformed(&error))
}

fn malformed(error: &serde_json::Error) -> RecordError {
    RecordError::Malformed { why: error.to_string() }
}

fn field<T>(field: &'static str, problem: String) -> Result<T, RecordError> {
    Err(RecordError::Field { field, problem })
}

/// A stranger's text for a message: escaped and short.
fn quote(text: &str) -> String {
    let short: String = text.chars().take(64).collect();
    format!("{short:?}{}", if short.len() < text.len() { "…" } else { "" })
}

fn check_range(name: &'static str, value: u32, max: u32) -> Result<(), RecordError> {
    if value == 0 || value > max {
        return field(name, format!("must be 1 to {max}, not {value}"));
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), RecordError> {
    let is_good = (1..=TEXT_BYTES_MAX).contains(&name.len())
        && !name.chars().any(char::is_control)
        && name.split('/').all(|part| !part.is_empty());
    if !is_good {
        let rule = format!("must have 1 to {TEXT_BYTES_MAX} bytes, no control characters, no empty part");
        return field("name", format!("{rule} between slashes, not {}", quote(name)));
    }
    Ok(())
}

fn check_worker(worker: &str) -> Result<(), RecordError> {
    let is_good = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    if !(1..=TEXT_BYTES_MAX).contains(&worker.len()) || !worker.bytes().all(is_good) {
        let rule = format!("must be 1 to {TEXT_BYTES_MAX} visible ASCII characters without a slash");
        return field("worker", format!("{rule}, not {}", quote(worker)));
    }
    Ok(())
}

fn check_address(address: &str) -> Result<(), RecordError> {
    let parts = address.rsplit_once(':');
    let port = parts.and_then(|(_, port)| port.parse::<u16>().ok()).unwrap_or(0);
    let host = parts.map_or("", |(host, _)| host);
    // An IPv6 address stands in brackets: its last colon would else be taken for the port's.
    let inside = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = match inside {
        Some(inside) => inside.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
        }
    };
    if port == 0 || !is_host || address.len() > TEXT_BYTES_MAX {
        return field("addresses", format!("must be host:port, not {}", quote(address)));
    }
    Ok(())
}

/// How numbers and hashes look in JSON.
mod text {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer};

    fn string<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
        String::deserialize(from)
    }

    pub(super) mod number {
        use super::*;

        pub(in super::super) fn serialize<S: serde::Serializer>(
            value: &u64,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            to.collect_str(value)
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
            string(from)?
                .parse()
                .map_err(|_| D::Error::custom("expected a decimal number of 64 bits as a string"))
        }
    }

    pub(super) mod epoch {
        use super::*;
        use petek_core::ids::Epoch;

        pub(in super::super) fn serialize<S: serde::Serializer>(
            value: &Epoch,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            number::serialize(&value.0, to)
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Epoch, D::Error> {
            number::deserialize(from).map(Epoch)
        }
    }

    pub(super) mod hash {
        use super::*;
        use petek_core::hash::Revision;

        pub(in super::super) fn serialize<S: serde::Serializer>(
            value: &[u8; 32],
            to: S,
        ) -> Result<S::Ok, S::Error> {
            to.collect_str(&Revision(*value))
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<[u8; 32], D::Error> {
            let text = string(from)?;
            let digit = |byte: u8| (byte as char).to_digit(16).filter(|_| !byte.is_ascii_uppercase());
            let bytes: Option<Vec<u8>> = text
                .as_bytes()
                .chunks(2)
                .map(|pair| match pair {
                    &[high, low] => Some((digit(high)? * 16 + digit(low)?) as u8),
                    _ => None,
                })
                .collect();
            bytes
                .and_then(|bytes| bytes.try_into().ok())
                .ok_or_else(|| D::Error::custom("expected 64 lower-case hex digits"))
        }
    }

    pub(super) mod revision {
        use super::*;
        use petek_core::hash::Revision;

        pub(in super::super) fn serialize<S: serde::Serializer>(
            value: &Revision,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            to.collect_str(value)
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Revision, D::Error> {
            hash::deserialize(from).map(Revision)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"worker":"10.0.0.7:7070","epoch":"18446744073709551615","addresses":["10.0.0.7:7070"],"name":"org/demo","revision":"0707070707070707070707070707070707070707070707070707070707070707","textHash":"08080808080808080808080808080808080808080808080808080808080808ff","numericsId":"00ff00ff00ff00ff00ff00ff00ff00ff","blockSizeTokens":32,"hashScheme":1,"contextTokens":2048,"blocksTotal":64,"tp":1,"roles":["generate"],"adapters":[{"name":"lora","generation":"9007199254740993"}],"state":"serving","wire":{"min":1,"max":2},"startedUnixMs":"1700000000000"}"#;

    fn record() -> WorkerRecord {
        let mut text_hash = [8; 32];
        text_hash[31] = 255;
        WorkerRecord {
            worker: "10.0.0.7:7070".into(),
            epoch: Epoch(u64::MAX),
            addresses: vec!["10.0.0.7:7070".into()],
            name: "org/demo".into(),
            revision: Revision([7; 32]),
            text_hash,
            numerics_id: "00ff".repeat(8),
            block_size_tokens: 32,
            hash_scheme: 1,
            context_tokens: 2048,
            blocks_total: 64,
            tp: 1,
            roles: BTreeSet::from(["generate".to_string()]),
            adapters: vec![AdapterRecord { name: "lora".into(), generation: (1 << 53) + 1 }],
            state: WorkerState::Serving,
            wire: WireVersions { min: 1, max: 2 },
            started_unix_ms: 1_700_000_000_000,
        }
    }

    #[test]
    fn a_record_is_this_json_and_comes_back_as_it_was() {
        assert_eq!(String::from_utf8(record().to_value().unwrap()).unwrap(), JSON);
        assert_eq!(WorkerRecord::parse(&record().key(), JSON.as_bytes()), Ok(record()));
    }

    #[test]
    fn a_newer_worker_may_say_more() {
        let newer = JSON.replacen('{', r#"{"zone":{"a":[1]},"#, 1).replace("serving", "hibernating");
        let read = WorkerRecord::parse(&record().key(), newer.as_bytes()).unwrap();
        assert_eq!(read, WorkerRecord { state: WorkerState::Unknown, ..record() });
        assert!(read.to_value().is_err(), "and what we do not know we do not say");
        let older = JSON
            .replace(r#""roles":["generate"],"#, "")
            .replace(r#""adapters":[{"name":"lora","generation":"9007199254740993"}],"#, "");
        assert!(WorkerRecord::parse(&record().key(), older.as_bytes()).unwrap().roles.is_empty());
    }

    #[test]
    fn a_bad_value_is_refused_by_what_is_wrong() {
        let check = |value: &[u8], says: &str| {
            let error = WorkerRecord::parse(&record().key(), value).expect_err(says).to_string();
            assert!(error.contains(says), "{error}");
        };
        let with = |from: &str, to: &str, says: &str| {
            assert!(JSON.contains(from), "{from}");
            check(JSON.replacen(from, to, 1).as_bytes(), says);
        };
        check(b"", "does not read as a record: EOF");
        check(b"\xff\xfe", "does not read as a record");
        check(b"[]", "does not read as a record");
        check(format!("{{\"zone\":{}", "[".repeat(9_000)).as_bytes(), "does not read as a record: EOF");
        check(&[b' '; 20_000], "has 20000 bytes; a record has at most 16384");
        with(r#""epoch":"18446744073709551615","#, "", "missing field `epoch`");
        with(r#""18446744073709551615""#, "7", "expected a string");
        with("18446744073709551615", "18446744073709551616", "64 bits");
        with("18446744073709551615", "-1", "64 bits");
        with("0707", "070", "expected 64 lower-case hex digits");
        with("ff\",\"num", "FF\",\"num", "expected 64 lower-case hex digits");
        with("00ff00ff", "00ff00f", "numericsId: must be 32 hex digits");
        with(":32,", ":48,", "blockSizeTokens: must be a power of two from 16 to 256, not 48");
        with(r#""hashScheme":1"#, r#""hashScheme":0"#, "hashScheme: must be 1");
        with(":2048", ":0", "contextTokens: must be 1 to 16777216, not 0");
        with(r#""blocksTotal":64"#, r#""blocksTotal":0"#, "blocksTotal");
        with(r#""tp":1"#, r#""tp":9999"#, "tp: must be 1 to 1024, not 9999");
        with(r#""min":1,"max":2"#, r#""min":3,"max":2"#, "wire.min: must be 1 to 2, not 3");
        with(r#"["10.0.0.7:7070"]"#, "[]", "addresses: must be 1 to 16, not 0");
        for address in
            ["", "host", ":80", "host:0", "host:99999", "a b:1", "http://h:1", "::1:80", "[::g]:80"]
        {
            with(r#"["10.0.0.7:7070"]"#, &format!("[\"{address}\"]"), "addresses: must be host:port");
        }
        with(r#""worker":"10.0.0.7:7070""#, r#""worker":"a/b""#, "worker: must be 1 to 256 visible");
        with(
            r#""worker":"10.0.0.7:7070""#,
            r#""worker":"other""#,
            "stands at the key of org/demo/10.0.0.7:7070",
        );
        with("org/demo", "org//demo", "no empty part");
        with("org/demo", "org/demo\\u0007", "no control characters");
    }

    #[test]
    fn addresses_of_all_kinds() {
        for address in ["localhost:1", "10.0.0.7:65535", "pod-3.svc:7070", "[::1]:80", "my_host:9"] {
            assert_eq!(check_address(address), Ok(()), "{address}");
        }
    }

    #[test]
    fn keys_name_their_worker_and_no_other_cluster_s() {
        let cluster = Cluster::new("prod-1").unwrap();
        let key = cluster.worker_key(&record().key());
        assert_eq!(key, "/petek/v1/prod-1/workers/org/demo/10.0.0.7:7070");
        assert_eq!(cluster.worker_of(&key), Some(record().key()));
        assert_eq!(Cluster::new("prod").unwrap().worker_of(&key), None);
        for stray in ["", "demo", "/w", "a//w", "demo/", "demo/a b"] {
            assert_eq!(cluster.worker_of(&format!("{}{stray}", cluster.workers_prefix())), None, "{stray}");
        }
        let settings = cluster.settings_key("org/demo", &Revision([7; 32]));
        assert_eq!(settings, format!("/petek/v1/prod-1/settings/org/demo/{}", "07".repeat(32)));
        for bad in ["", "a/b", "ü", &"x".repeat(65)] {
            assert!(Cluster::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn settings_say_in_what_they_differ() {
        let ours = record().settings();
        let value = ours.to_value().unwrap();
        assert_eq!(SettingsRecord::parse(&value), Ok(ours.clone()));
        assert!(
            String::from_utf8(value)
                .unwrap()
                .starts_with(r#"{"blockSizeTokens":32,"hashScheme":1,"textHash":"08"#)
        );
        assert_eq!(ours.differences(&ours), "");
        let theirs = SettingsRecord { block_size_tokens: 64, hash_scheme: 2, ..ours.clone() };
        assert_eq!(
            ours.differences(&theirs),
            "block size is 64 there and 32 here, hash scheme is 2 there and 1 here"
        );
        assert!(
            ours.differences(&SettingsRecord { text_hash: [9; 32], ..ours.clone() })
                .contains("text hash is 0909")
        );
        assert!(SettingsRecord { block_size_tokens: 8, ..ours }.to_value().is_err());
    }
}
