//! This crate knows what every process does around its work: configuration, telemetry, metrics, health,
//! shutdown. It must never know what the work is.
