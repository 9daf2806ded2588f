//! Is the house as its pages say? Who uses whom, licences, lints, features, links, and that no file holds what
//! belongs to one machine. Every check is also shown a fault that it must find.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use petek_tests::house::{
    self, CrateRow, Dependency, DependencyKind, Metadata, anchors, check_candle_features, check_crate_table,
    check_features, check_licence, check_licences, check_lints, check_not_in_tree, check_text, check_version,
    crate_table, features, local_links,
};

// The repository, read once.

static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests lie in the repository").to_path_buf()
});

/// Of the platform that the tests run on: others' packages may not even be downloaded.
static METADATA: LazyLock<Metadata> = LazyLock::new(|| {
    let version = output("rustc", &["--version", "--verbose"]);
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc names its host");
    let words = ["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", host];
    serde_json::from_str(&output(&cargo(), &words)).expect("read cargo's metadata")
});

/// All files that are in git or could be added to it, those that are text with it.
static FILES: LazyLock<BTreeMap<PathBuf, String>> = LazyLock::new(|| {
    let list = output("git", &["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let paths = list.split('\0').filter(|path| !path.is_empty()).map(PathBuf::from);
    // A file that is deleted and not yet committed is still listed.
    let texts = paths.filter_map(|path| Some((path.clone(), std::fs::read(ROOT.join(&path)).ok()?)));
    texts.filter_map(|(path, bytes)| Some((path, String::from_utf8(bytes).ok()?))).collect()
});

static TABLE: LazyLock<Vec<CrateRow>> =
    LazyLock::new(|| crate_table(&read("docs/ARCHITECTURE.md")).expect("read the table of crates"));

fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).current_dir(&*ROOT).output();
    let output = output.unwrap_or_else(|error| panic!("start {program}: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("a program's output is UTF-8")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(ROOT.join(path)).unwrap_or_else(|error| panic!("read {path}: {error}"))
}

#[track_caller]
fn assert_none(findings: Vec<String>) {
    assert!(findings.is_empty(), "{} findings:\n  {}", findings.len(), findings.join("\n  "));
}

#[track_caller]
fn assert_finds(findings: Vec<String>, what: &str) {
    assert!(findings.iter().any(|finding| finding.contains(what)), "no finding holds `{what}`: {findings:?}");
}

// Who uses whom.

#[test]
fn crates_use_what_the_table_allows() {
    assert_none(check_crate_table(&TABLE, &METADATA));
}

#[test]
fn the_router_carries_no_candle() {
    assert_none(check_not_in_tree("petek-router", "candle-core", &TABLE, &METADATA));
}

#[test]
fn candle_is_built_for_the_cpu_alone() {
    assert_none(check_candle_features(&METADATA));
}

#[test]
fn faults_in_the_graph_are_found() {
    let id = |name: &str| {
        let package = METADATA.packages.iter().find(|package| package.name == name);
        package.unwrap_or_else(|| panic!("{name} is in the graph")).id.clone()
    };
    let with = |user: &str, used: &str, kind: Option<&str>| {
        let mut metadata = METADATA.clone();
        let user = id(user);
        let node =
            metadata.resolve.nodes.iter_mut().find(|node| node.id == user).expect("a node per package");
        node.deps.push(Dependency {
            pkg: id(used),
            dep_kinds: vec![DependencyKind { kind: kind.map(String::from) }],
        });
        metadata
    };
    let check = |metadata| check_crate_table(&TABLE, &metadata);
    assert_finds(check(with("petek-core", "petek-text", None)), "petek-core may not use petek-text");
    assert_finds(check(with("petek-core", "petek-text", Some("build"))), "petek-core may not use petek-text");
    assert_none(check(with("petek-core", "petek-text", Some("dev"))));
    assert_finds(check(with("petek-core", "candle-core", None)), "petek-core may not use candle-core");
    assert_finds(
        check_not_in_tree("petek-router", "candle-core", &TABLE, &with("tokenizers", "candle-core", None)),
        "candle-core is built into petek-text",
    );

    let mut without_core = METADATA.clone();
    without_core.workspace_members.remove(&id("petek-core"));
    assert_finds(check(without_core), "petek-core stands in the table");
    assert_finds(check_crate_table(&TABLE[1..], &METADATA), "has no row");

    let mut cuda = METADATA.clone();
    let candle =
        cuda.resolve.nodes.iter_mut().find(|node| node.id == id("candle-core")).expect("candle is there");
    candle.features.push("cuda".into());
    assert_finds(check_candle_features(&cuda), "candle-core is built with its feature cuda");

    let mut not_yet = crate_table(&read("docs/ARCHITECTURE.md")).expect("read the table");
    not_yet[0].is_built = false;
    assert_finds(check_crate_table(&not_yet, &METADATA), "not built yet");
    assert!(crate_table("| crate | duty |\n|---|---|\n| a | b |").is_err());
    assert!(crate_table("no table").is_err());
}

// What we take from others.

#[test]
fn licences_are_on_the_list() {
    assert_none(check_licences(&METADATA));
}

#[test]
fn h2_withstands_the_known_floods() {
    assert_none(check_version("h2", [0, 4, 20], &METADATA));
}

#[test]
fn binary_and_tests_build_others_crates_alike() {
    let tree = |more: &[&str]| {
        let words = ["tree", "--locked", "--offline", "--prefix", "none", "--format", "{p}|{f}", "--edges"];
        features(&output(&cargo(), &[&words[..], more].concat()))
    };
    // Without build scripts too: their variant of a crate must not stand in for the one that is linked.
    for edges in ["normal", "normal,build"] {
        let binary = tree(&[edges]);
        assert!(binary.keys().any(|package| package.starts_with("clap ")), "the tree is read: {binary:?}");
        assert_none(check_features(&binary, &tree(&[&format!("{edges},dev"), "--workspace"])));
    }
}

#[test]
fn faults_in_what_we_take_are_found() {
    for good in ["MIT", "MIT OR GPL-3.0-only", "MIT/Apache-2.0", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
        assert_eq!(check_licence(good), Ok(()));
    }
    for bad in ["GPL-3.0-only", "MIT AND GPL-3.0-only", "LicenseRef-ours", "mine", "MIT OR", ""] {
        assert!(check_licence(bad).is_err(), "{bad}");
    }
    let mut nameless = METADATA.clone();
    nameless.packages[0].license = None;
    assert_finds(check_licences(&nameless), "names no licence");

    assert_finds(check_version("h2", [0, 99, 0], &METADATA), "older");
    assert_finds(check_version("h2o", [0, 4, 20], &METADATA), "not there");

    let binary = features("a v1.0.0|x,y\nb v1.0.0|\nours v0.1.0 (/a/b)|z");
    assert_eq!(binary.len(), 2);
    assert_none(check_features(
        &binary,
        &features("c v1.0.0|\na v1.0.0|x,y\nb v1.0.0| (*)\nours v0.1.0 (/a/b)|"),
    ));
    assert_finds(check_features(&binary, &features("a v1.0.0|x\nb v1.0.0|")), "a v1.0.0 is built twice");
    assert_finds(check_features(&binary, &features("a v1.0.0|x,y")), "b v1.0.0 is built twice");
}

// Our own files.

#[test]
fn every_crate_takes_the_lints() {
    for member in METADATA.members() {
        let dir = Path::new(&member.manifest_path).parent().expect("a manifest is in a folder");
        let dir = dir.strip_prefix(&*ROOT).expect("our crates lie in the repository");
        let inside = |path: &Path| path.starts_with(dir) && path.extension().is_some_and(|end| end == "rs");
        let sources: Vec<(String, String)> = FILES
            .iter()
            .filter(|(path, _)| inside(path))
            .map(|(p, t)| (p.display().to_string(), t.clone()))
            .collect();
        assert!(!sources.is_empty(), "{}: no sources found in {}", member.name, dir.display());
        let manifest = read(&format!("{}/Cargo.toml", dir.display()));
        assert_none(check_lints(&manifest, &sources, member.name == "petek-device"));
    }
}

#[test]
fn files_hold_nothing_of_one_machine() {
    assert!(FILES.len() > 10, "git lists our files: {:?}", FILES.keys());
    let with_path = |(path, text): (&PathBuf, &String)| {
        check_text(text)
            .into_iter()
            .map(move |finding| format!("{}, {finding}", path.display()))
            .collect::<Vec<_>>()
    };
    assert_none(FILES.iter().flat_map(with_path).collect());
}

#[test]
fn links_between_pages_resolve() {
    let mut findings = Vec::new();
    let mut links = 0;
    for (page, text) in FILES.iter().filter(|(path, _)| path.extension().is_some_and(|end| end == "md")) {
        for link in local_links(text) {
            links += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target =
                if path.is_empty() { ROOT.join(page) } else { ROOT.join(page).with_file_name("").join(path) };
            let is_heading =
                || std::fs::read_to_string(&target).is_ok_and(|text| anchors(&text).contains(anchor));
            if !target.exists() {
                findings.push(format!("{}: {link} leads nowhere", page.display()));
            } else if !anchor.is_empty() && !is_heading() {
                findings.push(format!("{}: no heading for {link}", page.display()));
            }
        }
    }
    assert!(links > 0, "the pages link to each other");
    assert_none(findings);
}

#[test]
fn ci_runs_the_readmes_test_command() {
    let command = "cargo xtask test";
    let shown = house::commands(&read("README.md")).into_iter().filter(|line| line == command).count();
    assert_eq!(shown, 1, "the README shows `{command}` once");
    let ci = read(".ci/run");
    let last = ci.trim_end().lines().next_back().expect(".ci/run is not empty");
    assert_eq!(last, format!("exec {command}"));
    assert!(ci.contains("\nexport CI=1\n"), "under CI a skip is a failure");
}

#[test]
fn faults_in_files_are_found() {
    let lints = "[package]\n\n[lints]\nworkspace = true\n\n[dependencies]\n";
    let source = |text: &str| vec![("src/lib.rs".to_string(), text.to_string())];
    assert_none(check_lints(lints, &source("fn main() {}"), false));
    assert_finds(check_lints("[package]\n[dependencies]\nworkspace = true\n", &[], false), "lacks");
    let lifted = source(concat!("#![allow(", "unsafe_code)]"));
    assert_finds(check_lints(lints, &lifted, false), "lifts the ban");
    assert_none(check_lints(lints, &lifted, true));

    for bad in [
        concat!("cd /ro", "ot/x"),
        concat!("\"/ho", "me/me\""),
        concat!("/wo", "rk/x"),
        concat!("https://py", "pi.org/simple"),
        concat!("a static.", "crates.io b"),
        concat!("http://mirr", "or.example:81/x"),
    ] {
        assert_finds(check_text(&format!("good\n{bad}")), "line 2: ");
    }
    assert_none(check_text(concat!("$HOME/wo", "rk/x a/ro", "ot/b https://docs.rs/x github.com/rust-lang")));

    let page = "# A `b`, c\n[x](y.md#z) `[code](no)` <https://a.b> [w](https://a.b)\n\n```\ncargo  x\n```\n";
    assert_eq!(local_links(page), ["y.md#z"]);
    assert!(anchors(page).contains("a-b-c"));
    assert_eq!(house::commands(page), ["cargo  x"]);
}
