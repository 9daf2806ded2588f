//! This crate knows tensor operations, collectives, file mapping and thread pinning, by shape. It must never
//! know what a request, a token text or a model family is. It is the only crate with `unsafe`.
#![allow(unsafe_code)]
