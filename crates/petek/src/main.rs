//! The petek command.

fn main() {}
