//! A router that has nothing of the model, not even the right to read it; and one that has not the cluster's token.

use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use petek_proto::admin::v1::Link;

use crate::client::{ask, client, spec};
use crate::server::Etcd;
use crate::stage::{Launch, Stage, demo, until};

/// Who may read nothing that is not everybody's.
const NOBODY: u32 = 65_534;

/// Where the tests run as root, rights stop nobody: then it has to be another user.
fn as_stranger(command: &mut Command) {
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
}

/// Shuts a folder while a worker has it, and opens it again so that it can be removed.
struct Shut<'a>(&'a Path);

impl<'a> Shut<'a> {
    fn new(dir: &'a Path) -> Self {
        set_permissions(dir, Permissions::from_mode(0o000)).expect("shut a folder");
        Shut(dir)
    }
}

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        set_permissions(self.0, Permissions::from_mode(0o700)).expect("open a folder");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_cannot_read_the_model_serves_it() {
    let Some(etcd) = Etcd::shared("a_router_that_cannot_read_the_model_serves_it") else { return };
    let stage = Stage::new(etcd.endpoint());
    let model = stage.dir.path().join("model");
    std::fs::create_dir(&model).expect("make a folder");
    for file in std::fs::read_dir(demo()).expect("read the demo's folder") {
        let file = file.expect("read the demo's folder");
        std::fs::copy(file.path(), model.join(file.file_name())).expect("copy a file of the model");
    }
    let worker = stage.worker_of("w", &model).start();
    worker.ready().await;
    let _shut = Shut::new(&model);

    // Another user's process needs a binary and a folder of its own.
    let open = tempfile::tempdir().expect("make a folder");
    set_permissions(open.path(), Permissions::from_mode(0o777)).expect("open a folder to all");
    let binary = open.path().join("petek");
    std::fs::copy(env!("CARGO_BIN_EXE_petek"), &binary).expect("copy the binary");
    let mut reader = Command::new("cat");
    as_stranger(reader.arg(model.join("config.json")).stdout(Stdio::null()).stderr(Stdio::null()));
    assert!(!reader.status().expect("start cat").success(), "the router's user can read the model");

    let router = stage.router("r").moved(binary, open.path()).changed(as_stranger).start();
    router.reaches(&["w"]).await;
    let answer = ask(&client(&router).await, spec("I have a", 3, 16)).await;
    assert_eq!(answer.bytes().1.len(), 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_without_the_clusters_token_gets_nothing() {
    let Some(etcd) = Etcd::shared("a_router_without_the_clusters_token_gets_nothing") else { return };
    let stage = Stage::new(etcd.endpoint());
    let [right, wrong] = [("right", "sesame"), ("wrong", "barley")].map(|(name, token)| {
        let file = stage.dir.path().join(name);
        std::fs::write(&file, token).expect("write a file");
        file
    });
    let with = |launch: Launch, file: &Path| launch.words("--cluster-token-file").word(file);
    let _worker = with(stage.worker("w"), &right).start();
    let router = with(stage.router("r"), &right).start();
    router.reaches(&["w"]).await;
    ask(&client(&router).await, spec("I have a", 3, 4)).await.bytes();
    for launch in [with(stage.router("wrong"), &wrong), stage.router("without")] {
        let router = launch.start();
        let view = async || router.sees("w").await.and_then(|worker| worker.view).unwrap_or_default();
        until("the worker turns the router away", async || view().await.link() == Link::Refused).await;
        let why = view().await.link_error;
        assert!(why.contains("credentials"), "{why}");
        assert!(!router.is_ready().await);
        let refused = ask(&client(&router).await, spec("I have a", 3, 4)).await.refusal();
        assert_eq!(refused.reason, "NO_WORKER");
        assert!(!router.said().contains("barley"), "{}", router.said());
    }
}
