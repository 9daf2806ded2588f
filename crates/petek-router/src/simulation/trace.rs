//! What is asked of a cluster: requests at their times, read from a file or drawn.

use std::path::{Path, PathBuf};
use std::time::Duration;

use petek_core::hash::BlockName;
use serde::Deserialize;

use crate::draw::{Draw, block_name};

/// Tokens per block, in the file as here.
pub(super) const BLOCK: u32 = 512;

/// A request.
pub(super) struct Request {
    pub(super) at: Duration,
    pub(super) prompt_tokens: u32,
    pub(super) output_tokens: u32,
    /// Of the full blocks of its prompt.
    pub(super) names: Box<[BlockName]>,
}

impl Request {
    /// How many blocks its prompt takes, the last one maybe in part.
    pub(super) fn blocks(&self) -> usize {
        self.prompt_tokens.div_ceil(BLOCK) as usize
    }
}

/// Where traces lie: in `PETEK_TRACES`, else beside the repository.
pub(super) fn folder() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/traces");
    std::env::var_os("PETEK_TRACES").map_or(beside, PathBuf::from)
}

/// A line of the file.
#[derive(Deserialize)]
struct Line {
    /// Milliseconds.
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    /// Equal ones mean equal blocks after equal blocks.
    hash_ids: Vec<usize>,
}

/// The conversation trace of Mooncake, so many times as fast. Its times are whole multiples of three seconds: a
/// request comes at any time within its three.
pub(super) fn read(file: &Path, draw: &mut Draw, speed: u32) -> Vec<Request> {
    const SPREAD_MS: usize = 3_000;
    let text = std::fs::read_to_string(file).expect("a trace is read");
    let request = |line: &str| {
        let line: Line = serde_json::from_str(line).expect("a line of a trace is JSON");
        let full = (line.input_length / BLOCK) as usize;
        Request {
            at: Duration::from_millis(line.timestamp + draw.below(SPREAD_MS) as u64) / speed,
            prompt_tokens: line.input_length,
            output_tokens: line.output_length,
            names: line.hash_ids[..full].iter().map(|id| block_name(*id)).collect(),
        }
    };
    let mut trace: Vec<Request> = text.lines().map(request).collect();
    trace.sort_by_key(|request| request.at);
    trace
}

/// Conversations that begin within `time`, so many times as fast. All begin with the same block, as if under one
/// system prompt. Their numbers are fitted to the trace that is read above, by eye: 2.08 of them a second; lengths,
/// growths and pauses log-normal by their medians and means; another turn the likelier the more there were.
pub(super) fn drawn(draw: &mut Draw, time: Duration, speed: u32) -> Vec<Request> {
    const PER_S: f64 = 2.08;
    const TOKENS_MAX: f64 = 126_000.0;
    let mut trace = Vec::new();
    let mut begin_s = 0.0;
    let mut blocks_so_far = 1;
    loop {
        begin_s -= draw.open_unit().ln() / PER_S;
        if begin_s > time.as_secs_f64() {
            break;
        }
        let (mut at_s, mut tokens) = (begin_s, draw.log_normal(5_264.0, 1.2));
        let first_block = blocks_so_far;
        for turn in 1.. {
            tokens = tokens.min(TOKENS_MAX);
            let prompt_tokens = (tokens as u32).max(16);
            let full = (prompt_tokens / BLOCK) as usize;
            let block = |at: usize| block_name(if at == 0 { 0 } else { first_block + at });
            trace.push(Request {
                at: Duration::from_secs_f64(at_s) / speed,
                prompt_tokens,
                output_tokens: 1 + draw.below(685) as u32,
                names: (0..full).map(block).collect(),
            });
            blocks_so_far = first_block + full + 1;
            if draw.below(2 * turn + 11) >= 2 * turn + 2 {
                break;
            }
            at_s += draw.log_normal(123.0, 1.05);
            tokens += draw.log_normal(454.0, 1.4);
        }
    }
    trace.sort_by_key(|request| request.at);
    trace
}
