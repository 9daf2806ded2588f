//! Trains the demo model and writes its folder: see `tests/README.md`. `--texts N` prints N texts of the
//! corpus.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use petek_tests::demo::train::Training;
use petek_tests::demo::{self, corpus::document};
use petek_tests::random::Random;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("train_demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut training = Training { seed: 1, steps: 1000 };
    let mut out = demo::dir();
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let value = args.next().with_context(|| format!("{flag} wants a value"))?;
        let number = || value.parse().with_context(|| format!("{flag} wants a number, not {value}"));
        match flag.as_str() {
            "--out" => out = value.into(),
            "--seed" => training.seed = number()?,
            "--steps" => training.steps = number()? as usize,
            "--texts" => {
                let mut random = Random::new(training.seed);
                (0..number()?).for_each(|_| eprintln!("{}\n", document(&mut random)));
                return Ok(());
            }
            _ => bail!("usage: train_demo [--out DIR] [--seed N] [--steps N] [--texts N]"),
        }
    }
    training.run(&out)
}
