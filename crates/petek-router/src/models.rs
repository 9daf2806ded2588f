//! Model cards: fetched from a worker once per text hash, held against their hashes, and loaded off the I/O threads.
//! A router has no model folder.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use petek_core::limits::link::{CARD_BYTES_MAX, CARD_CHUNK_BYTES_MAX};
use petek_core::limits::model::VOCABULARY_MAX;
use petek_core::params::SamplingDefaults;
use petek_proto::hello::WIRE;
use petek_proto::worker::v1::get_model_card_response::Message;
use petek_proto::worker::v1::{
    GetModelCardRequest, GetModelCardResponse, ModelCardChunk, ModelCardHeader, RouterHello,
};
use petek_text::{CardFile, GenerationDefaults, ModelCard, ModelText};
use serde_json::Value;
use tokio::time::timeout;
use tonic::{Status, Streaming};

use crate::feed::WorkerEntry;
use crate::link::Link;
use crate::lock;

/// A worker that sends nothing of its card for this long is asked no more.
const CARD_SILENCE: Duration = Duration::from_secs(10);

/// All that a router knows of a model: its text side and what its requests get by default.
pub(crate) struct Model {
    pub(crate) text: ModelText,
    /// Ids are below it.
    pub(crate) vocabulary: u32,
    pub(crate) defaults: SamplingDefaults,
}

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CardError {
    /// The worker or the way to it; another time, or another worker.
    #[error("fetch the model card: {0}")]
    Unreachable(String),
    /// The worker sends what no worker of petek sends, or another card than its record names.
    #[error("model card: {0}")]
    Malformed(String),
    /// Its files cannot be used, by nobody's second try.
    #[error("model card: {0}")]
    Unusable(String),
}

/// The models that some worker serves, one per text hash.
#[derive(Default)]
pub(crate) struct Models {
    slots: Mutex<HashMap<[u8; 32], Arc<Slot>>>,
}

/// Locked while it loads, so that a card is fetched once; weak, so that a model lives while a pool has it.
type Slot = tokio::sync::Mutex<Weak<Model>>;

impl Models {
    /// The model of this worker, loaded if it was not, and the names that clients may also call it.
    pub(crate) async fn load(&self, link: &Link) -> Result<(Arc<Model>, Vec<String>), CardError> {
        let slot = self.slot(link.entry.text_hash);
        let mut model = slot.lock().await;
        let unreachable = |status: Status| CardError::Unreachable(status.message().to_owned());
        let mut client = link.dial().await.map_err(unreachable)?;
        let hello: RouterHello = link.hello();
        let stream =
            timeout(CARD_SILENCE, client.get_model_card(GetModelCardRequest { hello: Some(hello) })).await;
        let stream = stream.map_err(|_| silent())?.map_err(unreachable)?.into_inner();
        let mut files = Files { stream };
        let header = files.header(&link.entry).await?;
        let aliases = header.aliases.clone();
        if let Some(loaded) = model.upgrade() {
            return Ok((loaded, aliases));
        }
        let card = files.read(&header).await?;
        if card.text_hash().as_bytes() != &link.entry.text_hash {
            return Err(CardError::Malformed("its files do not give its text hash".into()));
        }
        let loaded = tokio::task::spawn_blocking(move || load(&card)).await;
        let loaded = Arc::new(loaded.map_err(|error| CardError::Unusable(error.to_string()))??);
        *model = Arc::downgrade(&loaded);
        Ok((loaded, aliases))
    }

    fn slot(&self, text_hash: [u8; 32]) -> Arc<Slot> {
        let mut slots = lock(&self.slots);
        // Nobody loads it and nobody has it.
        slots.retain(|hash, slot| {
            let unused = Arc::strong_count(slot) == 1 && slot.try_lock().is_ok_and(|m| m.strong_count() == 0);
            *hash == text_hash || !unused
        });
        slots.entry(text_hash).or_default().clone()
    }
}

/// A card on its way in: a header, then the files' bytes in the header's order.
struct Files {
    stream: Streaming<GetModelCardResponse>,
}

impl Files {
    async fn next(&mut self) -> Result<Option<Message>, CardError> {
        let next = timeout(CARD_SILENCE, self.stream.message()).await.map_err(|_| silent())?;
        let next = next.map_err(|status| CardError::Unreachable(status.message().to_owned()))?;
        Ok(next.and_then(|response| response.message))
    }

    async fn header(&mut self, entry: &WorkerEntry) -> Result<ModelCardHeader, CardError> {
        let Some(Message::Header(header)) = self.next().await? else {
            return Err(CardError::Malformed("it must begin with a header".into()));
        };
        let malformed = |problem: String| Err(CardError::Malformed(problem));
        if let Err(refusal) = WIRE.meet(&header.wire.unwrap_or_default()) {
            return malformed(refusal.to_string());
        }
        if header.name != entry.name
            || header.revision != entry.revision.0[..]
            || header.text_hash != entry.text_hash[..]
        {
            return malformed("its name, revision or text hash is not that of the worker's record".into());
        }
        let places: Vec<Option<CardFile>> =
            header.files.iter().map(|file| CardFile::of(&file.name)).collect();
        if places.contains(&None) || !places.is_sorted_by(|a, b| a < b) {
            return malformed("its files are not those of a card, each once, in their order".into());
        }
        let bytes = header.files.iter().fold(0u64, |sum, file| sum.saturating_add(file.length_bytes));
        if bytes > CARD_BYTES_MAX as u64 {
            return malformed(format!("its files have {bytes} bytes; the limit is {CARD_BYTES_MAX}"));
        }
        Ok(header)
    }

    async fn read(&mut self, header: &ModelCardHeader) -> Result<ModelCard, CardError> {
        let mut card = ModelCard::default();
        for (number, file) in header.files.iter().enumerate() {
            let malformed = |problem: &str| CardError::Malformed(format!("{}: {problem}", file.name));
            let name = CardFile::of(&file.name).ok_or_else(|| malformed("no file of a card"))?;
            let length = file.length_bytes as usize;
            // It grows with what really comes, not with what was announced.
            let mut bytes = Vec::new();
            while bytes.len() < length {
                let Some(Message::Chunk(chunk)) = self.next().await? else {
                    return Err(malformed("it ends too early"));
                };
                let ModelCardChunk { file: of, offset_bytes, data } = chunk;
                let room = (length - bytes.len()).min(CARD_CHUNK_BYTES_MAX);
                let follows = of as usize == number && offset_bytes == bytes.len() as u64;
                if !follows || data.is_empty() || data.len() > room {
                    return Err(malformed("a chunk is not the next one"));
                }
                bytes.extend_from_slice(&data);
            }
            card.insert(name, bytes);
        }
        let sound =
            card.files().zip(&header.files).all(|((_, _, hash), file)| hash.as_bytes()[..] == file.blake3);
        if sound { Ok(card) } else { Err(CardError::Malformed("a file is not what its hash says".into())) }
    }
}

fn silent() -> CardError {
    CardError::Unreachable(format!("nothing came for {} s", CARD_SILENCE.as_secs()))
}

fn load(card: &ModelCard) -> Result<Model, CardError> {
    let start = Instant::now();
    let text =
        ModelText::load(card, &|| start.elapsed()).map_err(|error| CardError::Unusable(error.to_string()))?;
    let vocabulary = vocabulary(card.bytes(CardFile::Config))?;
    let GenerationDefaults { temperature, top_k, top_p, min_p, .. } = text.defaults;
    let defaults = SamplingDefaults::of_model(temperature, top_k, top_p, min_p)
        .map_err(|refusal| CardError::Unusable(format!("generation_config.json: {refusal}")))?;
    Ok(Model { text, vocabulary, defaults })
}

fn vocabulary(config: Option<&[u8]>) -> Result<u32, CardError> {
    let unusable = |why: &str| CardError::Unusable(format!("config.json: {why}"));
    let config = config.ok_or_else(|| unusable("is missing"))?;
    let config: Value = serde_json::from_slice(config).map_err(|error| unusable(&error.to_string()))?;
    let size = config["vocab_size"].as_u64().and_then(|size| u32::try_from(size).ok());
    let size = size.filter(|size| (1..=VOCABULARY_MAX).contains(size));
    size.ok_or_else(|| unusable(&format!("vocab_size must be a whole number from 1 to {VOCABULARY_MAX}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vocabulary_is_a_number_in_range() {
        let read = |text: &str| vocabulary(Some(text.as_bytes()));
        assert_eq!(read(r#"{"vocab_size": 64}"#).unwrap(), 64);
        for bad in ["{}", r#"{"vocab_size": 0}"#, r#"{"vocab_size": -1}"#, r#"{"vocab_size": 5000000}"#, "x"]
        {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(vocabulary(None).is_err());
    }
}
