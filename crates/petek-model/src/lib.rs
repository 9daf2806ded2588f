//! This crate knows one decoder step on one rank: configuration, weights, sharding, decoder, sampling. It must
//! never know of text, sockets or other workers.
