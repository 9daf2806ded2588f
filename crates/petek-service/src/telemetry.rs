//! Logs to standard error, and spans over OTLP where an endpoint is set.
//!
//! A log line's message is constant; data stands in fields. Text of clients goes through [`escape`](crate::escape);
//! prompts and keys go nowhere.

use std::io::IsTerminal;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider};
use serde::{Deserialize, Serialize};
use tracing::Subscriber;
use tracing_subscriber::filter::{EnvFilter, LevelFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, fmt};

use crate::failure::{Exit, Failure};

/// Spans that wait to be sent; past that, new ones are dropped (and OpenTelemetry says so in the log).
const SPANS_MAX: usize = 4096;
/// For one batch to be taken by the collector.
const EXPORT_TIME_MAX: Duration = Duration::from_secs(5);

/// The settings of logs and traces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetrySettings {
    /// How a log line looks.
    pub format: LogFormat,
    /// What is logged: a level, or `target=level` pairs joined by commas (`info,petek_router=debug`).
    pub filter: String,
    /// Where spans are sent, over gRPC (`http://host:4317`). None: nowhere.
    pub otlp_endpoint: Option<String>,
}

impl Default for TelemetrySettings {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".into(), otlp_endpoint: None }
    }
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Logs and traces of this process, running. [`stop`](Self::stop) it last, or the last spans are lost.
#[derive(Debug)]
#[must_use]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// Starts both, for the process (`petek-router`) and what tells it from others of its kind. Inside a tokio
    /// runtime if spans are sent; the collector need not be there.
    ///
    /// # Errors
    /// [`Exit::Configuration`] for a filter or endpoint that is none.
    ///
    /// # Panics
    /// At a second call in one process.
    pub fn start(settings: &TelemetrySettings, process: &str, instance: &str) -> Result<Self, Failure> {
        let filter = filter(&settings.filter)?;
        let provider =
            settings.otlp_endpoint.as_deref().map(|url| provider(url, process, instance)).transpose()?;
        let is_terminal = std::io::stderr().is_terminal();
        let subscriber = subscriber(settings.format, filter, std::io::stderr, is_terminal, provider.as_ref());
        tracing::subscriber::set_global_default(subscriber).expect("telemetry starts once");
        Ok(Self { provider })
    }

    /// Sends the spans that wait, for as long as one batch may take.
    pub async fn stop(self) {
        let Some(provider) = self.provider else { return };
        // It blocks, and what it waits for may run on this very thread's runtime.
        let stop = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(EXPORT_TIME_MAX));
        match stop.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "send the last spans"),
            Err(error) => tracing::warn!(%error, "stop the sender of spans"),
        }
    }
}

fn filter(text: &str) -> Result<EnvFilter, Failure> {
    let fail = |why: String| {
        let hint = "write a level (error, warn, info, debug, trace) or `target=level,…`";
        Failure::new(Exit::Configuration, format!("log filter `{text}`: {why}"), hint)
    };
    // A misspelt level is read as a target of that name, with everything of it on and all else off.
    for part in text.split(',').filter(|part| !part.contains('=')) {
        part.parse::<LevelFilter>().map_err(|_| fail(format!("`{part}` is no level")))?;
    }
    EnvFilter::builder().parse(text).map_err(|error| fail(error.to_string()))
}

fn provider(url: &str, process: &str, instance: &str) -> Result<SdkTracerProvider, Failure> {
    let fail = |why: String| {
        let hint = "name a collector that speaks OTLP over gRPC, as http://host:4317";
        Failure::new(Exit::Configuration, format!("OTLP endpoint `{url}`: {why}"), hint)
    };
    if !url.starts_with("http://") {
        return Err(fail("only http:// is spoken".into()));
    }
    let exporter = SpanExporter::builder().with_tonic().with_endpoint(url).with_timeout(EXPORT_TIME_MAX);
    let exporter = exporter.build().map_err(|error| fail(error.to_string()))?;
    let batches = BatchConfigBuilder::default().with_max_queue_size(SPANS_MAX).build();
    let resource = Resource::builder_empty().with_service_name(process.to_string()).with_attributes([
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", instance.to_string()),
    ]);
    Ok(SdkTracerProvider::builder()
        .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
        .with_resource(resource.build())
        .build())
}

fn subscriber<W>(
    format: LogFormat,
    filter: EnvFilter,
    writer: W,
    is_terminal: bool,
    provider: Option<&SdkTracerProvider>,
) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = fmt::layer().with_writer(writer).with_ansi(is_terminal);
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
    };
    // Our own spans only: those of the gRPC stack would beget spans by being sent.
    let is_ours =
        filter_fn(|meta| meta.target().starts_with("petek") && *meta.level() <= tracing::Level::INFO);
    let spans = provider.map(|provider| {
        tracing_opentelemetry::layer().with_tracer(provider.tracer("petek")).with_filter(is_ours)
    });
    tracing_subscriber::registry().with(lines.with_filter(filter)).with(spans)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::escape::escape;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What `work` logs under a format and filter.
    fn logged(format: LogFormat, text: &str, work: impl FnOnce()) -> String {
        let captured = Captured::default();
        let writer = captured.clone();
        let subscriber = subscriber(format, filter(text).unwrap(), move || writer.clone(), false, None);
        tracing::subscriber::with_default(subscriber, work);
        String::from_utf8(captured.0.lock().unwrap().clone()).unwrap()
    }

    fn event() {
        tracing::info!(model = %escape("a\n\u{1b}b"), tokens = 3, "request");
        tracing::debug!("detail");
    }

    #[test]
    fn text_is_one_line_per_event() {
        let text = logged(LogFormat::Text, "info", event);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.contains("INFO") && text.contains("request") && text.contains(r"model=a\n\u{1b}b tokens=3")
        );
        assert_eq!(logged(LogFormat::Text, "debug", event).lines().count(), 2);
        assert_eq!(logged(LogFormat::Text, "info,petek_service=warn", event), "");
        assert_eq!(logged(LogFormat::Text, "warn,petek_service=debug", event).lines().count(), 2);
    }

    #[test]
    fn json_is_one_object_per_event() {
        let work = || {
            let _span = tracing::info_span!("generate", request = "r1").entered();
            event();
        };
        let line: serde_json::Value = serde_json::from_str(&logged(LogFormat::Json, "info", work)).unwrap();
        assert_eq!(line["message"], "request");
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["tokens"], 3);
        assert_eq!(line["model"], r"a\n\u{1b}b");
        assert_eq!(line["span"]["request"], "r1");
    }

    #[test]
    fn filters_and_endpoints_that_are_none() {
        for bad in ["debgu", "info,petek", "petek=loud", "a b", "=", "warn, petek=debug"] {
            let failure = filter(bad).unwrap_err();
            assert_eq!(failure.exit(), Exit::Configuration);
            assert!(failure.to_string().contains(bad), "{failure}");
        }
        for good in ["info", "off", "WARN", "warn,petek_router=debug"] {
            filter(good).unwrap();
        }
        for bad in ["collector:4317", "https://collector:4317", "http://", "http://a b"] {
            let failure = provider(bad, "petek-router", "r1").unwrap_err();
            assert_eq!(failure.exit(), Exit::Configuration);
            assert!(failure.to_string().contains(bad), "{failure}");
        }
    }
}
