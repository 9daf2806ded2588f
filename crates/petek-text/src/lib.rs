//! This crate knows how text becomes token ids and back, piece by piece. It must never know of requests
//! in flight, workers or networks.
