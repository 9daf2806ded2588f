//! `petek workers`: who is there, as a router sees it.

use std::collections::BTreeMap;

use clap::Args;
use petek_proto::admin::v1::watch_workers_response::Event;
use petek_proto::admin::v1::{
    IndexState, ListWorkersRequest, ListWorkersResponse, WatchWorkersRequest, WatchWorkersResponse, Worker,
};
use petek_service::Failure;

use crate::client::{AdminEndpoint, Client, Refused};
use crate::json::json_line;
use crate::output::{End, print_line, remark, word};
use crate::table::Column::{Numbers, Words};
use crate::table::table;

/// Shows the workers that a router knows
#[derive(Args, Debug)]
pub(crate) struct Workers {
    #[command(flatten)]
    to: AdminEndpoint,
    /// Only those of this model's name or alias
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    model: String,
    /// Show them again at each change, until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// JSON instead of a table: one object, or with --watch one per change
    #[arg(long)]
    json: bool,
}

impl Workers {
    /// Asks, shows.
    ///
    /// # Errors
    /// Where there is no router, or it refuses, or leaves while it is watched.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let client = Client::connect(&self.to.admin)?;
        let shown = if self.watch { self.watched(&client) } else { self.listed(&client) };
        shown.or_else(End::outcome)
    }

    fn listed(&self, client: &Client) -> Result<(), End> {
        let request = ListWorkersRequest { model: self.model.clone() };
        let list = client.call(client.admin().list_workers(request))?;
        if self.json {
            return print_line(&json_line("petek.admin.v1.ListWorkersResponse", &list));
        }
        View::from(list).show()
    }

    fn watched(&self, client: &Client) -> Result<(), End> {
        let request = WatchWorkersRequest { model: self.model.clone() };
        let mut events = client.call(client.admin().watch_workers(request))?;
        let mut view = View::default();
        loop {
            let message =
                client.wait(events.message()).map_err(|status| Refused::from(status).failure(None))?;
            let message: WatchWorkersResponse = message.ok_or_else(|| Refused::cut().failure(None))?;
            if self.json {
                print_line(&json_line("petek.admin.v1.WatchWorkersResponse", &message))?;
            } else if let Some(event) = message.event {
                view.apply(event);
                view.show()?;
            }
        }
    }
}

/// The workers, as the events so far say.
#[derive(Debug, Default)]
struct View {
    workers: BTreeMap<String, Worker>,
    is_stale: bool,
    times_shown: usize,
}

impl From<ListWorkersResponse> for View {
    fn from(list: ListWorkersResponse) -> Self {
        let workers = list.workers.into_iter().map(|worker| (worker.id.clone(), worker)).collect();
        Self { workers, is_stale: list.registry_stale, times_shown: 0 }
    }
}

impl View {
    fn apply(&mut self, event: Event) {
        match event {
            Event::Snapshot(snapshot) => {
                self.workers =
                    snapshot.workers.into_iter().map(|worker| (worker.id.clone(), worker)).collect();
            }
            Event::Changed(worker) => drop(self.workers.insert(worker.id.clone(), worker)),
            Event::Removed(id) => drop(self.workers.remove(&id)),
            Event::RegistryStale(is_stale) => self.is_stale = is_stale,
        }
    }

    /// A table, below an empty line where one stands already; why a worker gets no work stands beside it.
    fn show(&mut self) -> Result<(), End> {
        if self.times_shown > 0 {
            print_line("")?;
        }
        self.times_shown += 1;
        if self.is_stale {
            remark(
                "petek: warning: the registry is out of reach; these are the workers known before it was lost",
            );
        }
        if self.workers.is_empty() {
            return print_line("no workers");
        }
        let columns = [
            Words("WORKER"),
            Words("MODEL"),
            Words("STATE"),
            Words("LINK"),
            Numbers("RUNNING"),
            Numbers("WAITING"),
            Numbers("FREE"),
            Numbers("BLOCKS"),
            Numbers("INDEXED"),
            Numbers("TP"),
            Words("ADDRESS"),
        ];
        let mut workers: Vec<&Worker> = self.workers.values().collect();
        workers.sort_by(|a, b| (&a.model, &a.id).cmp(&(&b.model, &b.id)));
        print_line(&table(columns, workers.iter().map(|worker| row(worker))))?;
        for worker in workers {
            let problem = worker.view.as_ref().map_or("", |view| &view.link_error[..]);
            if !problem.is_empty() {
                remark(&format!("petek: {} gets no work: {problem}", worker.id));
            }
        }
        Ok(())
    }
}

fn row(worker: &Worker) -> [String; 11] {
    let view = worker.view.clone().unwrap_or_default();
    let load = |of: fn(&petek_proto::worker::v1::LoadReport) -> u32| {
        view.load.as_ref().map(|load| of(load).to_string()).unwrap_or_default()
    };
    let indexed = match view.index() {
        IndexState::Synced => view.index_blocks.to_string(),
        _ => String::new(),
    };
    [
        worker.id.clone(),
        worker.model.clone(),
        word(worker.state().as_str_name(), "WORKER_STATE_"),
        word(view.link().as_str_name(), "LINK_"),
        load(|load| load.running),
        load(|load| load.waiting),
        load(|load| load.blocks_free),
        worker.blocks_total.to_string(),
        indexed,
        worker.tp.to_string(),
        worker.addresses.first().cloned().unwrap_or_default(),
    ]
}
