//! Metrics: how they are made and shown. Which ones there are stands in [`list`].
//!
//! A label is an enum ([`Label`]), or a name fixed when a process starts. All series of an enum exist from the
//! start, at zero; so their number is bounded by construction, no client's text can become a label, and a rate has
//! a first point. Units are base units and stand last in a name: `_seconds`, `_bytes`; a counter ends in `_total`.

pub(crate) mod list;

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::Arc;

use prometheus::core::Collector;
use prometheus::{HistogramOpts, IntCounter, IntGauge, Opts, TextEncoder};

/// A count that only grows.
pub type Counter = IntCounter;
/// A whole number that goes up and down.
pub type Gauge = IntGauge;
/// How values are spread over buckets.
pub type Histogram = prometheus::Histogram;

/// A label with a closed set of values. All of ours are in the list of metrics.
pub trait Label: Copy + 'static {
    /// The label's name.
    const NAME: &'static str;
    /// All values, in the order of [`index`](Self::index).
    const ALL: &'static [Self];
    /// The value as it is shown.
    fn text(self) -> &'static str;
    /// Its place in [`ALL`](Self::ALL).
    fn index(self) -> usize;
}

/// Makes an enum a [`Label`]: its doc, name, the label's name, then each variant with its doc and text.
macro_rules! labels {
    ($(#[doc = $doc:literal])+ $enum:ident, $name:literal:
     $($(#[doc = $variant_doc:literal])+ $variant:ident $text:literal,)+) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $enum {
            $($(#[doc = $variant_doc])+ $variant,)+
        }

        impl $crate::metrics::Label for $enum {
            const NAME: &'static str = $name;
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn text(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}
pub(crate) use labels;

/// One counter per value of a label.
#[derive(Clone)]
pub struct Counters<L>(Arc<[IntCounter]>, PhantomData<fn(L)>);

impl<L: Label> Counters<L> {
    /// The counter of one value.
    pub fn of(&self, label: L) -> &Counter {
        &self.0[label.index()]
    }
}

/// One gauge per value of a label.
#[derive(Clone)]
pub struct Gauges<L>(Arc<[IntGauge]>, PhantomData<fn(L)>);

impl<L: Label> Gauges<L> {
    /// The gauge of one value.
    pub fn of(&self, label: L) -> &Gauge {
        &self.0[label.index()]
    }
}

/// All metrics of a process. Clones are the same registry.
#[derive(Clone, Default)]
pub struct Registry(prometheus::Registry);

impl Registry {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// All metrics in Prometheus' text format.
    pub fn text(&self) -> String {
        // A name or a number of labels that does not fit is found at registration, not here.
        TextEncoder::new().encode_to_string(&self.0.gather()).expect("registered metrics can be shown")
    }

    /// Where series with these fixed labels (names from configuration) are made.
    fn scope(&self, labels: &[(&'static str, &str)]) -> Scope<'_> {
        let labels = labels.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Scope { registry: self, labels }
    }
}

/// Makes series under fixed labels.
///
/// *Panics* (all methods): at a series that exists already, or a malformed name: mistakes of ours.
struct Scope<'a> {
    registry: &'a Registry,
    labels: HashMap<String, String>,
}

impl Scope<'_> {
    fn counter(&self, name: &str, help: &str) -> Counter {
        debug_assert!(name.ends_with("_total"), "{name}: a counter ends in _total");
        self.register(IntCounter::with_opts(self.opts(name, help)))
    }

    fn counters<L: Label>(&self, name: &str, help: &str) -> Counters<L> {
        let series = |label: &L| self.with(*label).counter(name, help);
        Counters(L::ALL.iter().map(series).collect(), PhantomData)
    }

    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(IntGauge::with_opts(self.opts(name, help)))
    }

    fn gauges<L: Label>(&self, name: &str, help: &str) -> Gauges<L> {
        let series = |label: &L| self.with(*label).gauge(name, help);
        Gauges(L::ALL.iter().map(series).collect(), PhantomData)
    }

    /// `buckets`: upper bounds, rising; the last one, infinity, is added.
    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts { common_opts: self.opts(name, help), buckets: buckets.to_vec() };
        self.register(Histogram::with_opts(opts))
    }

    fn with(&self, label: impl Label) -> Scope<'_> {
        fn name<L: Label>(_: L) -> &'static str {
            L::NAME
        }
        let mut labels = self.labels.clone();
        labels.insert(name(label).to_string(), label.text().to_string());
        Scope { registry: self.registry, labels }
    }

    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help).const_labels(self.labels.clone())
    }

    fn register<C: Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> C {
        let metric = metric.unwrap_or_else(|error| panic!("make a metric: {error}"));
        let registered = self.registry.0.register(Box::new(metric.clone()));
        registered.unwrap_or_else(|error| panic!("register a metric: {error}"));
        metric
    }
}
