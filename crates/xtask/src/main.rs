//! The tasks of this house.

fn main() {}
