//! `cargo xtask test`: the one command that proves the repository, on a developer's machine and on CI's.
//!
//! It gets the tools, builds once (release, the whole workspace), lints, runs all tests, and says what ran and
//! what was skipped. Stages go on after a failure where they can, so that one run shows everything.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::Command;
use std::time::Instant;

use crate::{TaskResult, call, cargo, is_ci, lint, real_model, shown, target_dir, tools};

pub(crate) const HELP: &str =
    "builds, lints and runs all tests, says what ran; `--only PATTERN`: just the tests whose names hold it";

pub(crate) fn run(args: &[String]) -> TaskResult {
    let only = match args {
        [] => None,
        [flag, pattern] if flag == "--only" => Some(pattern.as_str()),
        _ => return Err(format!("`{}` is not understood; {HELP}", args.join(" "))),
    };
    let mut stages = Stages::default();
    let mut skipped = stages.time("tools", || Ok(tools::ensure()))?;

    stages.call("fetch", cargo(&["fetch", "--locked", "--quiet"]))?;
    // The binary first, by the very command that a user types: `cargo test` builds no other package's binary,
    // and the end-to-end tests need it.
    stages.call("build", cargo(&["build", "--release", "--quiet"]))?;
    stages.call("build of the tests", cargo(&["test", "--release", "--workspace", "--no-run", "--quiet"]))?;
    if only.is_none() {
        // Not to be had (no network, no pip) is a skip, which CI takes for a failure.
        if let Err(why) = stages.time("real model", || Ok(real_model::run(&[])))? {
            skipped.push(format!("SKIPPED: the tests on the real model: {why}"));
        }
        for (name, check) in lint::checks() {
            // A failed lint must not hide what the tests say: the summary repeats it.
            let _ = stages.call(name, check);
        }
    }

    let ran = stages.time("tests", || run_tests(only))?;
    skipped.extend(ran.skipped.iter().cloned());
    summary(&stages, &ran, &skipped, is_ci())
}

/// What was done before the tests: name, seconds, result.
#[derive(Default)]
struct Stages(Vec<(&'static str, u64, TaskResult)>);

impl Stages {
    fn call(&mut self, name: &'static str, command: Command) -> TaskResult {
        eprintln!("xtask: {name}: {}", shown(&command));
        self.time(name, || call(command))
    }

    fn time<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
        let start = Instant::now();
        let result = work();
        let kept = result.as_ref().map(|_| ()).map_err(String::clone);
        if let Err(why) = &kept {
            eprintln!("xtask: {name} FAILED: {why}");
        }
        self.0.push((name, start.elapsed().as_secs(), kept));
        result
    }
}

/// Runs the tests, everything that they print going to a log: libtest hides what passing tests say, and a
/// `SKIPPED:` line of a passing test is just what must be seen.
fn run_tests(only: Option<&str>) -> Result<Transcript, String> {
    let mut tests = cargo(&["test", "--release", "--workspace", "--no-fail-fast", "--", "--show-output"]);
    tests.args(only);
    tests.env("PATH", tools::path());
    tests.env(
        "PETEK_BIN",
        target_dir().join("release").join(format!("petek{}", std::env::consts::EXE_SUFFIX)),
    );
    eprintln!("xtask: tests: {}", shown(&tests));

    let log_path = target_dir().join("xtask-test.log");
    let mut log =
        File::create(&log_path).map_err(|error| format!("create {}: {error}", log_path.display()))?;
    let (reader, writer) = std::io::pipe().map_err(|error| format!("make a pipe: {error}"))?;
    // One pipe for both streams keeps cargo's "Running …" before the results that it announces.
    tests.stdout(writer.try_clone().map_err(|error| format!("copy a pipe: {error}"))?).stderr(writer);
    let mut child = tests.spawn().map_err(|error| format!("start cargo: {error}"))?;
    drop(tests); // It holds the pipe's other end, without which the reader would never see the end.

    let mut transcript = Transcript::default();
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.map_err(|error| format!("read what the tests print: {error}"))?;
        let line = String::from_utf8_lossy(&line);
        writeln!(log, "{line}").map_err(|error| format!("write {}: {error}", log_path.display()))?;
        if transcript.read(&line) {
            eprintln!("{line}");
        }
    }
    let status = child.wait().map_err(|error| format!("wait for cargo: {error}"))?;
    transcript.cargo_succeeded = status.success();
    eprintln!("xtask: all that the tests printed: {}", log_path.display());
    Ok(transcript)
}

/// What the tests printed, read line by line.
#[derive(Default)]
struct Transcript {
    /// In the order in which they ran. `None`: it did not live to print a result.
    binaries: Vec<(String, Option<Counts>)>,
    /// The lines of tests that could not run here.
    skipped: Vec<String>,
    cargo_succeeded: bool,
    /// Inside a list of failures, which is shown to the person as it comes.
    in_failures: bool,
}

#[derive(Clone, Copy, Default, Debug, PartialEq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Transcript {
    /// Takes a line. True: it is worth showing at once.
    fn read(&mut self, line: &str) -> bool {
        let word = line.trim_start();
        if let Some(name) = binary_name(word) {
            self.binaries.push((name, None));
            self.in_failures = false;
        } else if let Some(counts) = word.strip_prefix("test result: ").and_then(counts) {
            if let Some((_, result)) = self.binaries.last_mut() {
                *result = Some(counts);
            }
            self.in_failures = false;
        } else if line.starts_with("SKIPPED") {
            self.skipped.push(line.to_string());
        } else if line == "failures:" {
            self.in_failures = true;
        } else if line == "successes:" {
            self.in_failures = false;
            return false;
        } else {
            // Until the first test runs, and after cargo's own "error", a person wants all of it.
            let of_a_test = self.binaries.last().is_some_and(|(_, result)| result.is_none());
            let is_failed = line.starts_with("test ") && line.ends_with("FAILED");
            return self.in_failures || line.starts_with("error") || is_failed || !of_a_test;
        }
        true
    }

    fn total(&self) -> Counts {
        self.binaries.iter().filter_map(|(_, counts)| *counts).fold(Counts::default(), |a, b| Counts {
            passed: a.passed + b.passed,
            failed: a.failed + b.failed,
            ignored: a.ignored + b.ignored,
        })
    }
}

/// `Running tests/house.rs (target/release/deps/house-0123abcd)` → `house (tests/house.rs)`.
fn binary_name(line: &str) -> Option<String> {
    if let Some(name) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{name} (doc tests)"));
    }
    let (what, file) = line.strip_prefix("Running ")?.strip_suffix(')')?.split_once(" (")?;
    let stem = file.rsplit(['/', '\\']).next()?;
    let (name, _hash) = stem.rsplit_once('-')?;
    Some(format!("{name} ({what})"))
}

/// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; …` → the first three numbers.
fn counts(line: &str) -> Option<Counts> {
    let (_verdict, numbers) = line.split_once(". ")?;
    let by_word: BTreeMap<&str, u64> = numbers
        .split("; ")
        .filter_map(|part| part.split_once(' '))
        .filter_map(|(number, word)| Some((word, number.parse().ok()?)))
        .collect();
    Some(Counts {
        passed: *by_word.get("passed")?,
        failed: *by_word.get("failed")?,
        ignored: *by_word.get("ignored")?,
    })
}

/// A skip that even CI accepts says so itself: `SKIPPED (allowed): …`.
fn is_allowed(skipped: &str) -> bool {
    skipped.starts_with("SKIPPED (allowed):")
}

fn summary(stages: &Stages, ran: &Transcript, skipped: &[String], is_ci: bool) -> TaskResult {
    let mut wrong = Vec::new();
    eprintln!("\nwhat ran\n  seconds  stage");
    for (name, seconds, result) in &stages.0 {
        eprintln!("  {seconds:>7}  {name}{}", if result.is_ok() { "" } else { "  FAILED" });
        if result.is_err() {
            wrong.push(format!("{name} failed"));
        }
    }
    eprintln!("  passed failed ignored  tests");
    for (name, counts) in &ran.binaries {
        match counts {
            Some(c) if c.passed + c.failed + c.ignored == 0 => {}
            Some(c) => eprintln!("  {:>6} {:>6} {:>7}  {name}", c.passed, c.failed, c.ignored),
            None => {
                eprintln!("       -      -       -  {name}  DIED");
                wrong.push(format!("{name} ended without a result"));
            }
        }
    }
    for line in skipped {
        eprintln!("  {line}");
    }
    let total = ran.total();
    let skips = skipped.len() as u64 + total.ignored;
    eprintln!("{} passed, {} failed, {skips} skipped", total.passed, total.failed);

    if total.failed > 0 || !ran.cargo_succeeded {
        wrong.push("tests failed".into());
    }
    if total.passed + total.failed == 0 {
        wrong.push("no test ran".into());
    }
    if is_ci && (total.ignored > 0 || skipped.iter().any(|line| !is_allowed(line))) {
        wrong.push("on CI nothing may be skipped".into());
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
   Compiling petek-core v0.1.0
     Running unittests src/lib.rs (target/release/deps/petek_core-00ff)

running 2 tests
test a ... ok
test b ... FAILED

successes:

---- a stdout ----
SKIPPED: buf is missing
chatter

failures:

---- b stdout ----
the reason

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

     Running tests/end.rs (target/release/deps/end-00aa)

running 1 test
error: test failed, to rerun pass `-p petek-tests --test end`
   Doc-tests petek_core

test result: ok. 0 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn a_transcript_is_read() {
        let mut transcript = Transcript::default();
        let shown: Vec<&str> = LOG.lines().filter(|line| transcript.read(line)).collect();

        let names: Vec<&str> = transcript.binaries.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            ["petek_core (unittests src/lib.rs)", "end (tests/end.rs)", "petek_core (doc tests)"]
        );
        let results: Vec<_> = transcript.binaries.iter().map(|(_, counts)| *counts).collect();
        let of = |passed, failed, ignored| Some(Counts { passed, failed, ignored });
        assert_eq!(results, [of(1, 1, 0), None, of(0, 0, 3)]);
        assert_eq!(transcript.total(), Counts { passed: 1, failed: 1, ignored: 3 });
        assert_eq!(transcript.skipped, ["SKIPPED: buf is missing"]);

        assert!(shown.contains(&"the reason") && shown.contains(&"test b ... FAILED"));
        assert!(!shown.contains(&"chatter") && !shown.contains(&"test a ... ok"));
    }

    #[test]
    fn what_is_wrong_fails_the_run() {
        let good = || Transcript {
            binaries: vec![("a".into(), Some(Counts { passed: 1, ..Counts::default() }))],
            cargo_succeeded: true,
            ..Transcript::default()
        };
        let no_stages = Stages::default();
        let check =
            |ran: &Transcript, skipped: &[String], is_ci| summary(&no_stages, ran, skipped, is_ci).is_ok();
        assert!(check(&good(), &[], true));

        let mut died = good();
        died.binaries.push(("b".into(), None));
        assert!(!check(&died, &[], false));
        assert!(!check(&Transcript { cargo_succeeded: false, ..good() }, &[], false));
        assert!(!check(&Transcript { binaries: vec![], ..good() }, &[], false));
        let lint_failed = Stages(vec![("clippy", 1, Err("2 warnings".into()))]);
        assert!(summary(&lint_failed, &good(), &[], false).is_err());

        let skipped = ["SKIPPED: etcd is missing".to_string()];
        assert!(check(&good(), &skipped, false) && !check(&good(), &skipped, true));
        assert!(check(&good(), &["SKIPPED (allowed): traces".into()], true));
        let mut ignored = good();
        ignored.binaries[0].1.as_mut().unwrap().ignored = 1;
        assert!(check(&ignored, &[], false) && !check(&ignored, &[], true));
    }
}
