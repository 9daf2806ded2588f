//! Messages of the wire as JSON, by protobuf's own mapping: the names are the fields' in `proto/`, 64-bit numbers
//! are strings, bytes are base64, enum values are their names, and defaults are written out.

use std::sync::LazyLock;

use petek_proto::FILE_DESCRIPTOR_SET;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the build made the descriptors"));

/// The message as one line. `name` is its full name, as in `petek.admin.v1.Worker`.
///
/// # Panics
/// Where `name` is not the message's: both are ours.
pub(crate) fn json_line(name: &str, message: &impl Message) -> String {
    const OPTIONS: SerializeOptions =
        SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
    let mut dynamic = DynamicMessage::new(POOL.get_message_by_name(name).expect("a message of ours"));
    dynamic.transcode_from(message).expect("the message is of that name");
    let mut line = Vec::new();
    let mut serializer = serde_json::Serializer::new(&mut line);
    dynamic.serialize_with_options(&mut serializer, &OPTIONS).expect("all values have a form in JSON");
    String::from_utf8(line).expect("JSON is UTF-8")
}
