//! `petek generate`: one text continued by the cluster, shown as it comes.

use clap::Args;
use petek_proto::inference::v1::StreamGenerateRequest;
use petek_service::Failure;
use tokio_stream::StreamExt;
use tonic::Status;

use crate::answer::{GoingOn, Show, receive};
use crate::client::{Client, Endpoint, PublicEndpoint};
use crate::output::End;
use crate::request::{PromptArgs, RequestArgs};

/// Continues a text on the cluster and prints it as it comes
///
/// Standard output gets the text alone; the footer goes to standard error. A flag has the name and the meaning of
/// the API's field; what is left out takes the model's own default.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  petek generate \"I have a dream\"
  petek generate --temperature 0 --max-tokens 20 \"The capital of France is\"
  petek generate --json --logprobs 5 --ids 1,2,3 | jq -r .delta.text")]
pub(crate) struct Generate {
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    to: PublicEndpoint,
    /// One JSON object per event instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    request: RequestArgs,
}

impl Generate {
    /// A plain text, asked of the router at `endpoint`.
    pub(crate) fn of(endpoint: Endpoint, text: String) -> Self {
        let (prompt, request) = (PromptArgs::text(text), RequestArgs::default());
        Self { prompt, to: PublicEndpoint { endpoint }, json: false, request }
    }

    /// Asks, shows.
    ///
    /// # Errors
    /// Where there is no router, or the answer is not whole.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.answer().or_else(End::outcome)
    }

    fn answer(&self) -> Result<(), End> {
        let client = Client::connect(&self.to.endpoint)?;
        let mut inference = client.inference();
        let spec = Some(self.prompt.generation(&self.request));
        let call = async {
            let stream = inference.stream_generate(StreamGenerateRequest { spec }).await?.into_inner();
            Ok::<_, Status>(stream.map(|message| message.map(|message| message.event)))
        };
        let answer = receive(&client, &self.request, Show::of(self.json), call)?;
        answer.failure(GoingOn::Flags).map_or(Ok(()), |failure| Err(failure.into()))
    }
}
