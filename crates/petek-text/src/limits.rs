//! Every bound of this crate, with the sums between them.

/// The largest tokenizer.json that is read.
pub const TOKENIZER_FILE_BYTES_MAX: usize = 64 << 20;
/// The largest of the other JSON files and of a chat template's file.
pub const CONFIG_FILE_BYTES_MAX: usize = 4 << 20;
/// Token ids are below this, so that the table of a lying file stays small (a slot is 5 bytes).
pub const VOCABULARY_MAX: usize = 4 << 20;
/// The most text that one call tokenises.
pub const TEXT_BYTES_MAX: usize = 4 << 20;

/// Stop strings of one request.
pub const STOPS_MAX: usize = 16;
/// One stop string. All of a request's cost 5 bytes for each of theirs: 16 × 4 KiB × 5 = 320 KiB at most.
pub const STOP_BYTES_MAX: usize = 4 << 10;

/// One chat template's source.
pub const TEMPLATE_BYTES_MAX: usize = 64 << 10;
/// One `{{ … }}` or `{% … %}`: minijinja's parser recurses inside a tag without a bound of its own.
pub const TEMPLATE_TAG_BYTES_MAX: usize = 8 << 10;
/// Named templates of one model.
pub const TEMPLATES_MAX: usize = 16;
/// The stack of the thread that compiles and renders.
pub const TEMPLATE_STACK_BYTES: usize = 64 << 20;
/// What a template may render.
pub const TEMPLATE_OUTPUT_BYTES_MAX: usize = 8 << 20;
/// Fuel of one rendering: the sum is `TEMPLATE_FUEL + messages × …PER_MESSAGE + client bytes ÷ …BYTES_PER_FUEL`.
pub const TEMPLATE_FUEL: u64 = 20_000;
/// See [`TEMPLATE_FUEL`].
pub const TEMPLATE_FUEL_PER_MESSAGE: u64 = 500;
/// One fuel more for so many bytes of the client's. minijinja charges one fuel for 64 bytes that an operation reads
/// or writes, so this lets a template pass all of the client's text through 32 operations: a message of 4 MiB must
/// not run out where a short one does not.
pub const TEMPLATE_BYTES_PER_FUEL: usize = 2;
/// Scalars of `chat_template_kwargs`.
pub const TEMPLATE_KWARGS_MAX: usize = 32;
/// Nesting of messages and tools.
pub const CHAT_DEPTH_MAX: usize = 128;

const _: () = assert!(TEMPLATE_TAG_BYTES_MAX <= TEMPLATE_BYTES_MAX);
const _: () = assert!(TEXT_BYTES_MAX <= TEMPLATE_OUTPUT_BYTES_MAX);
const _: () = assert!(TEMPLATE_BYTES_MAX * TEMPLATES_MAX <= CONFIG_FILE_BYTES_MAX);
