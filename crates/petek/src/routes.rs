//! `petek routes`: where a router would send a request, and all numbers of that decision.

use clap::{Args, Subcommand};
use petek_proto::admin::v1::explain_route_request::Request;
use petek_proto::admin::v1::{CandidateState, ExplainRouteRequest, RouteCandidate, RouteDecision};
use petek_service::{Exit, Failure};

use crate::client::{AdminEndpoint, Client};
use crate::json::json_line;
use crate::output::{End, Shown, print_line, word};
use crate::request::{PromptArgs, RequestArgs};
use crate::table::Column::{Numbers, Words};
use crate::table::table;

/// Looks into a router's decisions
#[derive(Subcommand, Debug)]
pub(crate) enum Routes {
    Explain(Explain),
}

impl Routes {
    /// Asks, shows.
    ///
    /// # Errors
    /// Where there is no router, or it refuses.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        match self {
            Routes::Explain(explain) => explain.run(),
        }
    }
}

/// Shows where a request would go now, and why, without sending it
///
/// Takes the flags of `petek generate`. Times are in milliseconds; the least cost wins.
#[derive(Args, Debug)]
pub(crate) struct Explain {
    #[command(flatten)]
    prompt: PromptArgs,
    /// The text is the one message of a conversation, as for `petek chat --once`
    #[arg(long, conflicts_with = "ids")]
    chat: bool,
    #[command(flatten)]
    to: AdminEndpoint,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    request: RequestArgs,
}

impl Explain {
    fn run(&self) -> Result<(), Failure> {
        let client = Client::connect(&self.to.admin)?;
        let request = Some(if self.chat {
            Request::Chat(self.prompt.chat(&self.request))
        } else {
            Request::Generation(self.prompt.generation(&self.request))
        });
        let response = client.call(client.admin().explain_route(ExplainRouteRequest { request }))?;
        if self.json {
            let line = json_line("petek.admin.v1.ExplainRouteResponse", &response);
            return print_line(&line).or_else(End::outcome);
        }
        let decision = response.decision.ok_or_else(|| {
            Failure::new(Exit::Remote, "the router's answer holds no decision", "see --json")
        })?;
        print_line(&summary(&decision)).and_then(|()| print_line(&costs(&decision))).or_else(End::outcome)
    }
}

fn summary(decision: &RouteDecision) -> String {
    let to = match &decision.worker[..] {
        "" => "no worker can take it".to_owned(),
        worker => format!("to {worker}: {}", word(decision.reason().as_str_name(), "ROUTE_REASON_")),
    };
    let summary = format!(
        "{to}\n{} ({:.12}): {} prompt tokens, {} full blocks of {}; {} output tokens count\nmean wait {} ms, its weight \
         {}/s; costs within {:.0} % are drawn from",
        decision.model,
        decision.revision,
        decision.prompt_tokens,
        decision.prompt_blocks,
        decision.block_size_tokens,
        decision.decode_tokens,
        ms(decision.mean_wait_s),
        decision.wait_weight_per_s,
        decision.tie_share * 100.0,
    );
    Shown { text: &summary, kept: &['\n'] }.to_string()
}

fn costs(decision: &RouteDecision) -> String {
    let columns = [
        Words("WORKER"),
        Words("STATE"),
        Numbers("COST"),
        Numbers("WAIT"),
        Numbers("PREFILL"),
        Numbers("DECODE"),
        Numbers("MATCHED"),
        Numbers("PREDICTED"),
        Numbers("UNCACHED"),
        Numbers("WAITING"),
        Numbers("RUNNING"),
        Numbers("PREFILL/S"),
        Numbers("STEP"),
        Numbers("AGE"),
    ];
    table(columns, decision.candidates.iter().map(row))
}

/// A worker that could not take the request has no costs to show.
fn row(candidate: &RouteCandidate) -> [String; 14] {
    let cost = |seconds: f64| match candidate.state() {
        CandidateState::Eligible => ms(seconds),
        _ => String::new(),
    };
    [
        candidate.worker.clone(),
        word(candidate.state().as_str_name(), "CANDIDATE_STATE_"),
        cost(candidate.cost_s),
        cost(candidate.wait_s),
        cost(candidate.prefill_s),
        cost(candidate.decode_s),
        candidate.matched_tokens.to_string(),
        candidate.predicted_tokens.to_string(),
        candidate.uncached_tokens.to_string(),
        candidate.waiting_tokens.to_string(),
        candidate.running.to_string(),
        format!("{:.0}", candidate.prefill_tokens_per_s),
        ms(candidate.step_s),
        format!("{:.0}", candidate.load_age_ms),
    ]
}

fn ms(seconds: f64) -> String {
    format!("{:.1}", seconds * 1e3)
}
