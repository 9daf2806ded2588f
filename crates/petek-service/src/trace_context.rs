//! One trace across processes: W3C trace context, from a span into a message and out of it into another span.
//!
//! Where no traces are exported, nothing is written, and what is read changes nothing.

use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::{OpenTelemetrySpanExt, SetParentError};

const TRACEPARENT: &str = "traceparent";

/// Writes the context of `span` into the headers of a call (tonic's metadata are headers too).
pub fn inject(span: &Span, headers: &mut HeaderMap) {
    TraceContextPropagator::new().inject_context(&span.context(), &mut Headers(headers));
}

/// The context of `span` as one line, for a message that has a field for it.
pub fn traceparent(span: &Span) -> Option<String> {
    let mut headers = HeaderMap::new();
    inject(span, &mut headers);
    headers.get(TRACEPARENT).and_then(|value| value.to_str().ok()).map(String::from)
}

/// Makes `span` a child of the span that the headers of a call name; malformed ones name none. To be called
/// before the span is entered.
pub fn extract(headers: &HeaderMap, span: &Span) {
    let parent = TraceContextPropagator::new().extract(&HeadersRead(headers));
    match span.set_parent(parent) {
        // Traces are off, or this span is: nobody wants to know.
        Ok(()) | Err(SetParentError::LayerNotFound | SetParentError::SpanDisabled) => {}
        Err(error) => tracing::debug!(%error, "the parent of a span came too late"),
    }
}

/// Makes `span` a child of the span that a [`traceparent`] line names, as [`extract`] does.
pub fn set_parent(span: &Span, traceparent: &str) {
    let Ok(value) = HeaderValue::from_str(traceparent) else { return };
    extract(&HeaderMap::from_iter([(HeaderName::from_static(TRACEPARENT), value)]), span);
}

struct Headers<'a>(&'a mut HeaderMap);

impl Injector for Headers<'_> {
    fn set(&mut self, key: &str, value: String) {
        // Both are made by the propagator: an empty `tracestate` is the one that says nothing.
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value))
            && !value.is_empty()
        {
            self.0.insert(name, value);
        }
    }
}

struct HeadersRead<'a>(&'a HeaderMap);

impl Extractor for HeadersRead<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}
