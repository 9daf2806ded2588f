//! The harness of the tests and the programs that make their models.
