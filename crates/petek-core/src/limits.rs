//! Every bound of the system in one place, with the assertions between them. A bound that a user may set has its
//! default here; what is measured at start (blocks of the pool, context) is checked against these where it is read.
//!
//! Units stand last in a name: `_bytes`, `_ms`, `_s`, else a count.

/// Bounds of a public connection and its messages.
pub mod listener {
    /// Streams that one public connection may hold at once.
    pub const CONCURRENT_STREAMS_MAX: u32 = 256;
    /// Streams that we reset on one connection before it is told to go away.
    pub const LOCAL_ERROR_RESET_STREAMS_MAX: usize = 64;
    /// Streams that a peer may reset before they were accepted.
    pub const PENDING_ACCEPT_RESET_STREAMS_MAX: usize = 20;
    /// All headers of one call together.
    pub const HEADER_LIST_BYTES: u32 = 16 << 10;
    /// Unread bytes of one stream.
    pub const STREAM_WINDOW_BYTES: u32 = 256 << 10;
    /// Unread bytes of one connection.
    pub const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
    /// A message that comes in, by our own layer, which answers with details.
    pub const MESSAGE_IN_BYTES_MAX: usize = 8 << 20;
    /// The transport's own limit, which answers without any: above ours, so that ours speaks first.
    pub const MESSAGE_TRANSPORT_BYTES_MAX: usize = 16 << 20;
    /// A message that goes out.
    pub const MESSAGE_OUT_BYTES_MAX: usize = 4 << 20;
    /// A ping after this long without traffic.
    pub const KEEPALIVE_INTERVAL_S: u64 = 20;
    /// A connection is closed when its ping is unanswered for this long.
    pub const KEEPALIVE_TIMEOUT_S: u64 = 10;
    /// Until TLS and the HTTP/2 preface are done.
    pub const HANDSHAKE_S_MAX: u64 = 10;
    /// A connection without a stream is closed after this.
    pub const IDLE_S_MAX: u64 = 15 * 60;
    /// A connection is asked to go away after this, give or take a tenth.
    pub const AGE_S_MAX: u64 = 30 * 60;
    /// Streams of a connection that was asked to go away may run on for this long.
    pub const AGE_GRACE_S: u64 = super::call::DEADLINE_S_MAX;
    /// Connections open at once.
    pub const CONNECTIONS_MAX: usize = 10_000;

    const _: () = assert!(MESSAGE_IN_BYTES_MAX < MESSAGE_TRANSPORT_BYTES_MAX);
    const _: () = assert!(STREAM_WINDOW_BYTES <= CONNECTION_WINDOW_BYTES);
    const _: () = assert!(KEEPALIVE_TIMEOUT_S < KEEPALIVE_INTERVAL_S);
    const _: () = assert!(super::text::BYTES_MAX < MESSAGE_IN_BYTES_MAX);
}

/// Bounds of the stream between a router and a worker.
pub mod link {
    /// Unread bytes of the one stream.
    pub const STREAM_WINDOW_BYTES: u32 = 64 << 10;
    /// Unread bytes of the connection: as good as none, the router always drains.
    pub const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;
    /// Pinged this often, also when idle.
    pub const PING_INTERVAL_MS: u64 = 1_000;
    /// The peer is lost when a ping is unanswered for this long.
    pub const PING_TIMEOUT_MS: u64 = 2_000;
    /// Until a connection stands.
    pub const CONNECT_MS_MAX: u64 = 300;
    /// Both sides say that they live this often.
    pub const HEARTBEAT_INTERVAL_MS: u64 = 1_000;
    /// A worker frees the sequences of a router that said nothing for this long.
    pub const ROUTER_SILENCE_MS_MAX: u64 = 5_000;
    /// A worker without a load report for this long gets no new work.
    pub const LOAD_SUSPECT_MS: u64 = 300;
    /// A worker that said nothing at all for this long is lost.
    pub const WORKER_SILENCE_MS_MAX: u64 = 3_000;
    /// Load is pushed on change, but no more often.
    pub const LOAD_INTERVAL_MS_MIN: u64 = 10;
    /// Load is pushed without change this often.
    pub const LOAD_INTERVAL_MS_MAX: u64 = 100;
    /// KV events of this long go into one batch.
    pub const KV_BATCH_MS_MAX: u64 = 5;
    /// Blocks that one batch of KV events names.
    pub const KV_BATCH_BLOCKS_MAX: usize = 256;
    /// Batches that a worker keeps for a router that missed some.
    pub const KV_RING_BATCHES: usize = 4_096;
    /// Other workers that a router tries when one answers that its queue is full.
    pub const QUEUE_FULL_RETRIES_MAX: u32 = 2;
    /// A chunk of the model card.
    pub const CARD_CHUNK_BYTES_MAX: usize = 1 << 20;
    /// The whole model card.
    pub const CARD_BYTES_MAX: usize = 128 << 20;
    /// A worker's record in the registry.
    pub const RECORD_BYTES_MAX: usize = 16 << 10;

    const _: () = assert!(STREAM_WINDOW_BYTES < CONNECTION_WINDOW_BYTES);
    const _: () =
        assert!(LOAD_INTERVAL_MS_MIN < LOAD_INTERVAL_MS_MAX && LOAD_INTERVAL_MS_MAX < LOAD_SUSPECT_MS);
    const _: () = assert!(LOAD_SUSPECT_MS < WORKER_SILENCE_MS_MAX);
    const _: () = assert!(2 * HEARTBEAT_INTERVAL_MS < WORKER_SILENCE_MS_MAX);
    const _: () = assert!(2 * HEARTBEAT_INTERVAL_MS < ROUTER_SILENCE_MS_MAX);
    const _: () = assert!(CARD_CHUNK_BYTES_MAX < super::listener::MESSAGE_OUT_BYTES_MAX);
    const _: () = assert!(super::model::TOKENIZER_BYTES_MAX < CARD_BYTES_MAX);
}

/// Bounds of one call.
pub mod call {
    /// Where the client says none.
    pub const DEADLINE_S_DEFAULT: u64 = 600;
    /// The longest that a client may ask for.
    pub const DEADLINE_S_MAX: u64 = 3_600;
    /// Bytes that wait for a client before it counts as slow.
    pub const SLOW_CONSUMER_BYTES: usize = 256 << 10;
    /// How long bytes may wait for a client before it counts as slow.
    pub const SLOW_CONSUMER_S: u64 = 30;
    /// Fields that one refusal names.
    pub const ERROR_FIELDS_MAX: usize = 16;
    /// A refusal's details on the wire.
    pub const ERROR_BYTES_MAX: usize = 4 << 10;
    /// Characters of the client's input that a refusal quotes.
    pub const QUOTE_CHARS_MAX: usize = 64;
    /// Characters of the client's text that a log line quotes.
    pub const LOG_CHARS_MAX: usize = 128;
    /// A client's own request id.
    pub const CLIENT_REQUEST_ID_BYTES_MAX: usize = 64;

    const _: () = assert!(DEADLINE_S_DEFAULT <= DEADLINE_S_MAX);
    // Each field: a path and a sentence of at most a quote and 128 bytes around it; a character has at most 4 bytes.
    const _: () = assert!(ERROR_BYTES_MAX >= 2 * (QUOTE_CHARS_MAX * 4 + 128));
}

/// Bounds of a request's parameters.
pub mod request {
    /// The largest temperature.
    pub const TEMPERATURE_MAX: f32 = 2.0;
    /// A temperature below this is greedy: the division would overflow long before it mattered.
    pub const TEMPERATURE_GREEDY: f32 = 1e-5;
    /// Continuations of one prompt.
    pub const SEQUENCES_MAX: u32 = 64;
    /// Stop strings.
    pub const STOPS_MAX: usize = 16;
    /// One stop string: a stream holds back as much as this.
    pub const STOP_BYTES_MAX: usize = 4 << 10;
    /// Stop ids.
    pub const STOP_IDS_MAX: usize = 256;
    /// Most likely tokens reported beside the chosen one.
    pub const LOGPROBS_MAX: u8 = 20;
    /// A cache salt: hashed with every block.
    pub const CACHE_SALT_BYTES_MAX: usize = 256;
    /// A tenant's name: hashed with every block.
    pub const TENANT_BYTES_MAX: usize = 256;

    // What a stream may hold back waiting for a stop stays well below what makes its reader slow.
    const _: () = assert!(STOPS_MAX * STOP_BYTES_MAX <= super::call::SLOW_CONSUMER_BYTES);
}

/// Bounds of text, templates and tokenising.
pub mod text {
    /// Text given to the tokeniser.
    pub const BYTES_MAX: usize = 4 << 20;
    /// A chat template's source.
    pub const TEMPLATE_BYTES_MAX: usize = 64 << 10;
    /// One tag of a template: the parser is recursive.
    pub const TEMPLATE_TAG_BYTES_MAX: usize = 8 << 10;
    /// The stack of a thread that compiles or renders templates.
    pub const TEMPLATE_STACK_BYTES: usize = 64 << 20;
    /// What a template may burn whatever it renders.
    pub const TEMPLATE_FUEL: u64 = 20_000;
    /// What it may burn besides for each message.
    pub const TEMPLATE_FUEL_PER_MESSAGE: u64 = 500;
    /// Text that a template may give.
    pub const TEMPLATE_OUTPUT_BYTES_MAX: usize = 8 << 20;
    /// Scalars that a request may hand to a template.
    pub const TEMPLATE_KWARGS_MAX: usize = 32;
    /// Time of the self-test of a pre-tokeniser pattern that is not on the known list.
    pub const PATTERN_TEST_S_MAX: u64 = 1;

    const _: () = assert!(TEMPLATE_TAG_BYTES_MAX <= TEMPLATE_BYTES_MAX);
    const _: () = assert!(TEMPLATE_BYTES_MAX < TEMPLATE_STACK_BYTES);
}

/// Bounds of a model's files.
pub mod model {
    /// Layers.
    pub const LAYERS_MAX: u32 = 512;
    /// Query heads.
    pub const HEADS_MAX: u32 = 1_024;
    /// Width of the residual stream, and of an MLP.
    pub const WIDTH_MAX: u32 = 65_536;
    /// Token ids.
    pub const VOCABULARY_MAX: u32 = 4 << 20;
    /// tokenizer.json.
    pub const TOKENIZER_BYTES_MAX: usize = 64 << 20;
    /// Positions of one sequence, whatever config.json says.
    pub const CONTEXT_MAX: u32 = 16 << 20;

    // All ids of a full context, tokens of at least a byte, times four bytes each: sums stay far inside u32 and i64.
    const _: () = assert!((CONTEXT_MAX as u64) * 4 < u32::MAX as u64);
}

/// Bounds of the engine. The pool's size and the context are measured at start and checked there.
pub mod engine {
    /// The smallest block: one half-filled panel of the CPU's kernels.
    pub const BLOCK_TOKENS_MIN: u32 = 16;
    /// The largest block.
    pub const BLOCK_TOKENS_MAX: u32 = 256;
    /// Block size of a CPU worker, where nothing says otherwise.
    pub const BLOCK_TOKENS_CPU: u32 = 32;
    /// Block size of a CUDA worker, where nothing says otherwise.
    pub const BLOCK_TOKENS_CUDA: u32 = 16;
    /// Sequences that run at once, where nothing says otherwise: the runner's slots.
    pub const SLOTS_DEFAULT: u32 = 256;
    /// The most slots that a worker may be given.
    pub const SLOTS_MAX: u32 = 4_096;
    /// Rows of one step, where nothing says otherwise.
    pub const STEP_ROWS_DEFAULT: u32 = 512;
    /// The most rows that a step may be given.
    pub const STEP_ROWS_MAX: u32 = 65_536;
    /// Requests that wait, where nothing says otherwise; one more is refused.
    pub const QUEUE_DEFAULT: usize = 1_024;
    /// Steps submitted and not yet collected.
    pub const STEPS_IN_FLIGHT_MAX: usize = 2;
    /// Priorities: 0 is served first.
    pub const PRIORITY_MAX: u8 = 7;
    /// Steps after which a waiting request counts as one priority higher.
    pub const AGEING_STEPS: u64 = 256;
    /// Requests that broke the numbers within a minute before the worker drains itself.
    pub const NUMERICAL_ERRORS_MAX: u32 = 3;

    const _: () = assert!(BLOCK_TOKENS_MIN.is_power_of_two() && BLOCK_TOKENS_MAX.is_power_of_two());
    const _: () = assert!(BLOCK_TOKENS_CPU >= BLOCK_TOKENS_MIN && BLOCK_TOKENS_CPU <= BLOCK_TOKENS_MAX);
    const _: () = assert!(BLOCK_TOKENS_CUDA >= BLOCK_TOKENS_MIN && BLOCK_TOKENS_CUDA <= BLOCK_TOKENS_MAX);
    // The step's budget covers every decode row and leaves as much again for a prefill.
    const _: () = assert!(STEP_ROWS_DEFAULT >= 2 * SLOTS_DEFAULT && STEP_ROWS_MAX >= 2 * SLOTS_MAX);
    // A request's sequences may all run at once.
    const _: () = assert!(super::request::SEQUENCES_MAX <= SLOTS_DEFAULT);
}
