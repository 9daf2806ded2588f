//! The rules of the house as pure checks: text and cargo's metadata in, findings out. A finding is one line that
//! says what is wrong and where. `tests/house.rs` runs them over the repository, and over faults made up to see
//! each of them fail.

use std::collections::{BTreeMap, BTreeSet};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};
use serde::Deserialize;

/// What a test calls that cannot run for want of something: the run's summary repeats the line, and on CI the
/// test fails.
///
/// # Panics
/// Where `CI` is set.
pub fn skip(test: &str, wanting: &str) {
    let is_ci = std::env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
    assert!(!is_ci, "{test}: on CI nothing may be skipped, but {wanting} is missing");
    eprintln!("SKIPPED: {test}, for want of {wanting}");
}

/// The part of `cargo metadata` that the checks read.
#[derive(Deserialize, Clone)]
pub struct Metadata {
    /// All packages, ours and others'.
    pub packages: Vec<Package>,
    /// Ids of our own.
    pub workspace_members: BTreeSet<String>,
    /// Who really uses whom, features and platform decided.
    pub resolve: Resolve,
}

/// One package of [`Metadata`].
#[derive(Deserialize, Clone)]
#[expect(missing_docs, reason = "cargo's own names")]
pub struct Package {
    pub id: String,
    pub name: String,
    pub version: String,
    pub license: Option<String>,
    pub manifest_path: String,
}

/// The resolved graph of [`Metadata`].
#[derive(Deserialize, Clone)]
#[expect(missing_docs, reason = "cargo's own names")]
pub struct Resolve {
    pub nodes: Vec<Node>,
}

/// One package in [`Resolve`].
#[derive(Deserialize, Clone)]
#[expect(missing_docs, reason = "cargo's own names")]
pub struct Node {
    pub id: String,
    pub deps: Vec<Dependency>,
    pub features: Vec<String>,
}

/// One use of a package by another.
#[derive(Deserialize, Clone)]
#[expect(missing_docs, reason = "cargo's own names")]
pub struct Dependency {
    pub pkg: String,
    pub dep_kinds: Vec<DependencyKind>,
}

/// How a package is used: `None` normally, else "dev" or "build".
#[derive(Deserialize, Clone)]
#[expect(missing_docs, reason = "cargo's own names")]
pub struct DependencyKind {
    pub kind: Option<String>,
}

impl Metadata {
    /// Our packages.
    pub fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| self.workspace_members.contains(&package.id))
    }

    /// The package of an id.
    ///
    /// # Panics
    /// If cargo's own lists do not fit together.
    pub fn package(&self, id: &str) -> &Package {
        self.packages.iter().find(|package| package.id == id).expect("each id in the graph has a package")
    }

    /// What a package uses when it is built for its users: normal and build dependencies, not those of its tests.
    pub fn uses(&self, id: &str) -> impl Iterator<Item = &Package> {
        let node = self.resolve.nodes.iter().filter(move |node| node.id == id);
        let is_real =
            |dep: &&Dependency| dep.dep_kinds.iter().any(|kind| kind.kind.as_deref() != Some("dev"));
        node.flat_map(|node| &node.deps).filter(is_real).map(|dep| self.package(&dep.pkg))
    }

    /// All that is built for a package, itself included.
    pub fn tree(&self, id: &str) -> BTreeSet<&str> {
        let mut seen = BTreeSet::new();
        let mut open = vec![self.package(id)];
        while let Some(package) = open.pop() {
            if seen.insert(package.id.as_str()) {
                open.extend(self.uses(&package.id));
            }
        }
        seen
    }
}

/// One row of the table of crates in `docs/ARCHITECTURE.md`.
#[derive(Debug, PartialEq)]
pub struct CrateRow {
    /// The package's name.
    pub name: String,
    /// Which of our crates it may use. `None`: all of them.
    pub may_use: Option<BTreeSet<String>>,
    /// Heavy crates of others. Only the rows that name one may use it directly. `None`: any.
    pub weight: Option<BTreeSet<String>>,
    /// False: the row says "not built yet", and the crate need not exist.
    pub is_built: bool,
}

/// Reads the table of crates: the one whose first column is headed "crate", then duty, what it may use of ours,
/// outside weight, state. An entry of ours is a name without `petek-`; "all" and "–" mean what they say.
pub fn crate_table(page: &str) -> Result<Vec<CrateRow>, String> {
    let tables = tables(page);
    let table = tables.iter().find(|table| table[0].first().is_some_and(|head| head == "crate"));
    let table = table.ok_or("no table whose first column is headed `crate`")?;
    let list = |cell: &str, prefix: &str| -> Option<BTreeSet<String>> {
        let items = cell.split(',').map(str::trim).filter(|item| !matches!(*item, "" | "–"));
        (cell != "all").then(|| items.map(|item| format!("{prefix}{item}")).collect())
    };
    let row = |cells: &Vec<String>| match cells.as_slice() {
        [name, _duty, ours, weight, state] => Ok(CrateRow {
            name: name.clone(),
            may_use: list(ours, "petek-"),
            weight: list(weight, ""),
            is_built: !state.contains("not built yet"),
        }),
        _ => Err(format!("a row of {} columns, not 5: {cells:?}", cells.len())),
    };
    table[1..].iter().map(row).collect()
}

/// Holds the workspace against the table of crates.
pub fn check_crate_table(rows: &[CrateRow], metadata: &Metadata) -> Vec<String> {
    let mut findings = Vec::new();
    let heavy: BTreeSet<&String> = rows.iter().filter_map(|row| row.weight.as_ref()).flatten().collect();
    let ours: BTreeSet<&str> = metadata.members().map(|package| package.name.as_str()).collect();
    for row in rows.iter().filter(|row| row.is_built && !ours.contains(row.name.as_str())) {
        findings.push(format!("{} stands in the table and is not in the workspace", row.name));
    }
    for member in metadata.members() {
        let Some(row) = rows.iter().find(|row| row.name == member.name) else {
            findings.push(format!("{} has no row in the table", member.name));
            continue;
        };
        if !row.is_built {
            findings.push(format!("{} is there, and its row says \"not built yet\"", row.name));
        }
        for used in metadata.uses(&member.id) {
            let is_ours = ours.contains(used.name.as_str());
            let lacks =
                |list: &Option<BTreeSet<String>>| list.as_ref().is_some_and(|l| !l.contains(&used.name));
            if is_ours && lacks(&row.may_use) {
                findings.push(format!("{} may not use {}", row.name, used.name));
            }
            if !is_ours && heavy.contains(&used.name) && lacks(&row.weight) {
                findings.push(format!("{} may not use {}: its row does not list it", row.name, used.name));
            }
        }
    }
    findings
}

/// Holds what is built for one crate against a package that must not be in it. A crate that does not exist yet
/// is judged by those that its row of the table lets it use.
pub fn check_not_in_tree(of: &str, banned: &str, rows: &[CrateRow], metadata: &Metadata) -> Vec<String> {
    let Some(row) = rows.iter().find(|row| row.name == of) else {
        return vec![format!("{of} has no row in the table")];
    };
    let may_use = row.may_use.clone().unwrap_or_default();
    let mut findings: Vec<String> = metadata
        .members()
        .filter(|member| member.name == of || may_use.contains(&member.name))
        .filter(|member| metadata.tree(&member.id).iter().any(|id| metadata.package(id).name == banned))
        .map(|member| format!("{banned} is built into {}", member.name))
        .collect();
    if row.weight.as_ref().is_none_or(|weight| weight.contains(banned)) {
        findings.push(format!("the row of {of} allows {banned}"));
    }
    findings
}

/// candle serves as the oracle on the CPU; our binary opens the GPU's libraries at run time by itself.
pub fn check_candle_features(metadata: &Metadata) -> Vec<String> {
    const BANNED: [&str; 6] = ["cuda", "cudnn", "nccl", "metal", "mkl", "accelerate"];
    let mut findings = Vec::new();
    for node in &metadata.resolve.nodes {
        let package = metadata.package(&node.id);
        if package.name.starts_with("candle") {
            let banned = node.features.iter().filter(|feature| BANNED.contains(&feature.as_str()));
            findings.extend(
                banned.map(|feature| format!("{} is built with its feature {feature}", package.name)),
            );
        }
    }
    findings
}

/// The licences that a dependency may have; of several joined by OR, one is enough.
const LICENCES: [&str; 12] = [
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unicode-DFS-2016",
    "Zlib",
];

/// Holds one licence expression against the list. `Err` says why not.
pub fn check_licence(expression: &str) -> Result<(), String> {
    // LAX: some crates still write "MIT/Apache-2.0" for OR.
    let parsed = spdx::Expression::parse_mode(expression, spdx::ParseMode::LAX)
        .map_err(|error| format!("`{expression}` is no licence expression: {}", error.reason))?;
    let is_listed = |req: &spdx::LicenseReq| {
        req.license.id().is_some_and(|id| LICENCES.contains(&id.name)) && req.addition.is_none()
    };
    if parsed.evaluate(is_listed) { Ok(()) } else { Err(format!("`{expression}` is not on the list")) }
}

/// Holds the licences of all packages against the list.
pub fn check_licences(metadata: &Metadata) -> Vec<String> {
    let check = |package: &Package| match &package.license {
        Some(licence) => check_licence(licence),
        None => Err("it names no licence".into()),
    };
    let packages = metadata.packages.iter();
    packages.filter_map(|p| Some(format!("{} {}: {}", p.name, p.version, check(p).err()?))).collect()
}

/// Holds the version of a package against the least that is safe.
pub fn check_version(name: &str, least: [u64; 3], metadata: &Metadata) -> Vec<String> {
    let versions: Vec<&str> =
        metadata.packages.iter().filter(|package| package.name == name).map(|p| p.version.as_str()).collect();
    if versions.is_empty() {
        return vec![format!("{name} is not there: has the check outlived it?")];
    }
    let is_old = |version: &&&str| {
        let numbers: Vec<u64> = version.split(['.', '-', '+']).map_while(|part| part.parse().ok()).collect();
        numbers.as_slice() < least.as_slice()
    };
    versions
        .iter()
        .filter(is_old)
        .map(|version| format!("{name} {version} is older than {least:?}"))
        .collect()
}

/// Holds a crate's manifest and sources against the workspace's lints: taken over whole, and `unsafe` allowed to
/// one crate alone.
pub fn check_lints(manifest: &str, sources: &[(String, String)], may_be_unsafe: bool) -> Vec<String> {
    let mut findings = Vec::new();
    let lints = manifest.split("\n[").find_map(|table| table.strip_prefix("lints]"));
    if !lints.is_some_and(|table| table.lines().any(|line| line.replace(' ', "") == "workspace=true")) {
        findings.push("its manifest lacks `[lints] workspace = true`".into());
    }
    for (path, source) in sources {
        let lifts = |word: &str| source.contains(&format!("{word}(unsafe_code"));
        if !may_be_unsafe && ["allow", "expect", "warn"].iter().any(|word| lifts(word)) {
            findings.push(format!("{path} lifts the ban on unsafe code"));
        }
    }
    findings
}

/// Reads `cargo tree --prefix none --format '{p}|{f}'`: for each package of others, the sets of features with
/// which it is built.
pub fn features(tree: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut features: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in tree.lines() {
        let line = line.strip_suffix(" (*)").unwrap_or(line);
        let Some((package, set)) = line.split_once('|') else { continue };
        let is_ours = package.contains(" (/") || package.contains(":\\");
        if !is_ours {
            features.entry(package.into()).or_default().insert(set.into());
        }
    }
    features
}

/// Holds the packages of the binary against the same packages in the build of all tests: one that is not built with
/// just these features there too, cargo builds again. (Further variants that the tests alone want cost the binary
/// nothing.)
pub fn check_features(
    binary: &BTreeMap<String, BTreeSet<String>>,
    tests: &BTreeMap<String, BTreeSet<String>>,
) -> Vec<String> {
    let none = BTreeSet::new();
    let differ =
        binary.iter().filter(|(package, sets)| !sets.is_subset(tests.get(*package).unwrap_or(&none)));
    differ
        .map(|(package, sets)| {
            let other = tests.get(package).unwrap_or(&none);
            format!("{package} is built twice: with {sets:?} for the binary, with {other:?} for the tests")
        })
        .collect()
}

/// Finds what belongs to one machine or network: absolute paths of homes and work folders, and hosts of package
/// registries. (The needles are put together so that this file does not hold them.)
pub fn check_text(text: &str) -> Vec<String> {
    const PATHS: [&str; 4] =
        [concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/wo", "rk/"), concat!("/Us", "ers/")];
    const HOSTS: [&str; 9] = [
        concat!("static.", "crates.io"),
        concat!("index.", "crates.io"),
        concat!("py", "pi.org"),
        concat!("python", "hosted.org"),
        concat!("registry.", "npmjs"),
        concat!("npmjs", ".com"),
        concat!("proxy.", "golang"),
        concat!("sum.", "golang"),
        concat!("repo.", "maven"),
    ];
    const IN_A_HOST: [&str; 5] = ["mirror", "proxy", "nexus", "artifactory", "registry"];

    let mut findings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let mut found = |what: &str| findings.push(format!("line {}: {what}", number + 1));
        for path in PATHS {
            // `a/work/b` and `$HOME/work/b` are no absolute paths.
            let is_start =
                |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-/~$})*".contains(c));
            if line.match_indices(path).any(|(at, _)| is_start(at)) {
                found(&format!("the absolute path {path}"));
            }
        }
        for host in HOSTS.iter().filter(|host| line.contains(**host)) {
            found(&format!("the host {host}"));
        }
        for (at, separator) in line.match_indices("://") {
            let rest = &line[at + separator.len()..];
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || ".-@_".contains(c)));
            let host = &rest[..end.unwrap_or(rest.len())];
            if IN_A_HOST.iter().any(|word| host.contains(word)) {
                found(&format!("the host {host}"));
            }
        }
    }
    findings
}

/// The links of a page into the repository: what `[text](path#heading)` points at, as written.
pub fn local_links(page: &str) -> Vec<String> {
    let is_local = |link: &str| !link.contains("://") && !link.starts_with("mailto:");
    let links = Parser::new_ext(page, Options::ENABLE_TABLES).filter_map(|event| match event {
        Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => Some(dest_url.to_string()),
        _ => None,
    });
    links.filter(|link| is_local(link)).collect()
}

/// The anchors of a page's headings, made as GitHub makes them.
pub fn anchors(page: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut heading: Option<String> = None;
    for event in Parser::new(page) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(text) | Event::Code(text) => {
                heading.iter_mut().for_each(|heading| heading.push_str(&text))
            }
            Event::End(TagEnd::Heading(_)) => anchors.extend(heading.take().map(|heading| {
                let kept = heading.to_lowercase();
                let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
                kept.map(|c| if c == ' ' { '-' } else { c }).collect::<String>()
            })),
            _ => {}
        }
    }
    anchors
}

/// The commands of a page: the lines of its code blocks.
pub fn commands(page: &str) -> Vec<String> {
    let mut is_code = false;
    let mut commands = Vec::new();
    for event in Parser::new(page) {
        match event {
            Event::Start(Tag::CodeBlock(_)) => is_code = true,
            Event::End(TagEnd::CodeBlock) => is_code = false,
            Event::Text(text) if is_code => commands.extend(text.lines().map(|line| line.trim().to_string())),
            _ => {}
        }
    }
    commands
}

/// All tables of a page: rows of cells, the heading first, as plain text.
fn tables(page: &str) -> Vec<Vec<Vec<String>>> {
    let mut tables: Vec<Vec<Vec<String>>> = Vec::new();
    let mut in_cell = false;
    for event in Parser::new_ext(page, Options::ENABLE_TABLES) {
        let row = tables.last_mut();
        match event {
            Event::Start(Tag::Table(_)) => tables.push(Vec::new()),
            Event::Start(Tag::TableHead | Tag::TableRow) => {
                row.expect("a row is in a table").push(Vec::new())
            }
            Event::Start(Tag::TableCell) => {
                in_cell = true;
                row.and_then(|table| table.last_mut()).expect("a cell is in a row").push(String::new());
            }
            Event::End(TagEnd::TableCell) => in_cell = false,
            Event::Text(text) | Event::Code(text) if in_cell => {
                let cell = row.and_then(|table| table.last_mut()?.last_mut());
                cell.expect("text is in a cell").push_str(&text);
            }
            _ => {}
        }
    }
    tables
}
