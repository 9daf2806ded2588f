//! `petek models`: what is served.

use clap::Args;
use petek_proto::inference::v1::{ListModelsRequest, Model};
use petek_service::Failure;

use crate::client::{Client, PublicEndpoint};
use crate::json::json_line;
use crate::output::{End, print_line};
use crate::table::Column::{Numbers, Words};
use crate::table::table;

/// Shows the models that are served
#[derive(Args, Debug)]
pub(crate) struct Models {
    #[command(flatten)]
    to: PublicEndpoint,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

impl Models {
    /// Asks, shows.
    ///
    /// # Errors
    /// Where there is no router, or it refuses.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let client = Client::connect(&self.to.endpoint)?;
        let list = client.call(client.inference().list_models(ListModelsRequest {}))?;
        let shown = if self.json {
            json_line("petek.inference.v1.ListModelsResponse", &list)
        } else if list.models.is_empty() {
            "no models".to_owned()
        } else {
            let columns = [
                Words("MODEL"),
                Words("ALIASES"),
                Words("REVISION"),
                Numbers("WORKERS"),
                Numbers("CONTEXT"),
                Numbers("VOCABULARY"),
                Numbers("BLOCK"),
                Words("CHAT"),
            ];
            table(columns, list.models.iter().map(row))
        };
        print_line(&shown).or_else(End::outcome)
    }
}

fn row(model: &Model) -> [String; 8] {
    [
        model.name.clone(),
        model.aliases.join(","),
        model.revision.chars().take(12).collect(),
        model.workers_serving.to_string(),
        model.context_tokens.to_string(),
        model.vocabulary_tokens.to_string(),
        model.block_size_tokens.to_string(),
        if model.has_chat_template { "yes" } else { "no" }.to_owned(),
    ]
}
