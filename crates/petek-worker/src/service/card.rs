//! The model card as messages: a header, then the files' bytes in chunks, shared by all who ask.

use std::sync::Arc;

use petek_core::hash::Revision;
use petek_core::limits::link::{CARD_BYTES_MAX, CARD_CHUNK_BYTES_MAX};
use petek_core::refusal::Refusal;
use petek_proto::hello::WIRE;
use petek_proto::refusal::status;
use petek_proto::worker::v1::get_model_card_response::Message;
use petek_proto::worker::v1::{GetModelCardResponse, ModelCardChunk, ModelCardFile, ModelCardHeader};
use petek_text::ModelCard;
use prost::bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Status;

use super::{Context, Stop, ms};

/// A card, ready to be sent.
pub(crate) struct CardMessages {
    header: ModelCardHeader,
    files: Vec<Bytes>,
}

impl CardMessages {
    /// Reads a card. None: it is larger than a card may be; its bytes.
    pub(crate) fn new(
        name: String,
        aliases: Vec<String>,
        revision: Revision,
        card: &ModelCard,
    ) -> Result<Self, usize> {
        let bytes = card.files().map(|(_, bytes, _)| bytes.len()).sum();
        if bytes > CARD_BYTES_MAX {
            return Err(bytes);
        }
        let files = card.files().map(|(file, bytes, hash)| ModelCardFile {
            name: file.name().into(),
            length_bytes: bytes.len() as u64,
            blake3: hash.as_bytes().to_vec().into(),
        });
        let header = ModelCardHeader {
            wire: Some(WIRE),
            name,
            aliases,
            revision: revision.0.to_vec().into(),
            text_hash: card.text_hash().as_bytes().to_vec().into(),
            files: files.collect(),
        };
        let files = card.files().map(|(_, bytes, _)| Bytes::copy_from_slice(bytes)).collect();
        Ok(CardMessages { header, files })
    }

    fn messages(&self) -> impl Iterator<Item = Message> {
        let chunks = self.files.iter().enumerate().flat_map(|(file, bytes)| {
            (0..bytes.len()).step_by(CARD_CHUNK_BYTES_MAX).map(move |offset| {
                let end = bytes.len().min(offset + CARD_CHUNK_BYTES_MAX);
                Message::Chunk(ModelCardChunk {
                    file: file as u32,
                    offset_bytes: offset as u64,
                    data: bytes.slice(offset..end),
                })
            })
        });
        std::iter::once(Message::Header(self.header.clone())).chain(chunks)
    }
}

/// Sends all of it, within the time that there is for it.
pub(super) async fn send(
    context: Arc<Context>,
    out: mpsc::Sender<Result<GetModelCardResponse, Status>>,
) -> Result<(), Stop> {
    let all = async {
        for message in context.card.messages() {
            if out.send(Ok(GetModelCardResponse { message: Some(message) })).await.is_err() {
                break;
            }
        }
    };
    let in_time = timeout(ms(context.settings.link.card_ms_max), all).await;
    in_time.map_err(|_| status(&Refusal::DeadlineExceeded { output_tokens: 0 }).into())
}
