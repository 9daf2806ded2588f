//! What every process does around its work: settings, logs, traces, metrics, health, shutdown, exit codes.
//!
//! This crate knows what a process is; it must never know what the process does. Router and worker hand it their
//! settings and fill the metrics; it reads no request, no model and no registry.
//!
//! The order in a process: [`Shutdown::install`], [`limit_core_dumps`], [`Layers`], [`Telemetry::start`],
//! [`Ops::bind`], load, [`Shutdown::serving`].

mod failure;
mod shutdown;

mod config;
mod escape;
mod telemetry;
mod trace_context;

mod metrics;
mod ops;

mod http2;

pub use config::{Config, ConfigError, Layers, Setting, Source};
pub use escape::{Escaped, client_request_id, escape};
pub use failure::{Exit, Failure, limit_core_dumps};
pub use http2::{Http2Limits, Lifetime, serve_http2};
pub use metrics::{
    Counter, Counters, Gauge, Gauges, Histogram, Label, Registry,
    list::{
        BlockState, KvBatchFate, KvChange, KvRelapse, Outcome, Prediction, RouteReason, RouterMetrics,
        RouterSeries, SequenceState, Suspect, WorkerMetrics,
    },
};
pub use ops::{Ops, Readiness};
pub use shutdown::Shutdown;
pub use telemetry::{LogFormat, Telemetry, TelemetrySettings};
pub use trace_context::{extract, inject, set_parent, traceparent};
