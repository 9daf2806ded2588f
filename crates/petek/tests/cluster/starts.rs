//! How processes come up: in any order, without an etcd, with the wrong word, on a port that is taken.

use std::process::Command;
use std::time::Duration;

use etcd_client::{ConnectOptions, Permission, PermissionType};
use rustix::process::Signal;

use crate::client::{ask, client, spec};
use crate::server::Etcd;
use crate::stage::{FREE, Launch, Process, Stage, demo, soon, until};

/// Lines of a log that warn of this.
fn warnings(process: &Process, of: &str) -> usize {
    process.said().lines().filter(|line| line.contains("WARN") && line.contains(of)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn any_order_of_starts_comes_to_the_same() {
    let Some(mut etcd) = Etcd::own("any_order_of_starts_comes_to_the_same", &[]) else { return };
    let endpoint = etcd.endpoint();
    for order in ["etcd worker router", "router etcd worker", "worker router etcd", "router worker etcd"] {
        etcd.kill();
        let stage = Stage::new(endpoint.clone());
        let (mut early, mut processes) = (Vec::new(), Vec::new());
        for what in order.split(' ') {
            let process = match what {
                "worker" => stage.worker("w").start(),
                "router" => stage.router("r").start(),
                _ => {
                    // Whoever is there already waits, is not ready, and has said what for.
                    for process in &processes {
                        let warns = async || warnings(process, &endpoint) == 1;
                        until("a warning that names etcd", warns).await;
                        assert!(!process.is_ready().await, "{}: {order}", process.name);
                        early.push(process.name.clone());
                    }
                    etcd.restart();
                    continue;
                }
            };
            processes.push(process);
        }
        for process in &processes {
            process.ready().await;
        }
        let router = processes.iter().find(|process| process.name == "r").expect("it was started");
        assert_eq!(ask(&client(router).await, spec("I have a", 1, 8)).await.bytes().1.len(), 8, "{order}");
        for process in &processes {
            let expected = usize::from(early.contains(&process.name));
            assert_eq!(warnings(process, &endpoint), expected, "{}: {order}", process.name);
        }
    }
}

/// [sglang#39016] Handlers stand before loading begins, and nothing is registered before it ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_ended_while_it_loads_leaves_no_record() {
    let Some(etcd) = Etcd::shared("a_worker_that_is_ended_while_it_loads_leaves_no_record") else { return };
    let stage = Stage::new(etcd.endpoint());
    let model = stage.dir.path().join("model");
    std::fs::create_dir(&model).expect("a folder");
    for file in std::fs::read_dir(demo()).expect("the demo's folder").map(|file| file.expect("a file")) {
        std::fs::copy(file.path(), model.join(file.file_name())).expect("copied");
    }
    // A pipe that nobody writes into: loading never ends.
    let pipe = model.join("tokenizer.json");
    std::fs::remove_file(&pipe).expect("removed");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("start mkfifo").success());
    let mut worker = stage.worker_of("w", &model).start();
    // It opens for whoever writes when somebody reads.
    let opening = tokio::task::spawn_blocking(move || std::fs::OpenOptions::new().write(true).open(pipe));
    let _held = soon("a worker that loads", opening).await.expect("it ran").expect("the pipe");
    assert!(stage.records().await.is_empty());
    worker.signal(Signal::TERM);
    let (code, said) = worker.ended().await;
    assert_eq!((code, stage.records().await.len()), (Some(0), 0), "{said}");
}

/// The one line that a person gets, and the code.
async fn check_ends(launch: Launch, code: i32, says: &[&str]) {
    let (ended, said) = launch.words("--log-filter error").start().ended().await;
    assert_eq!((ended, said.lines().count()), (Some(code), 1), "{said}");
    assert!(said.starts_with("petek: ") && says.iter().all(|word| said.contains(word)), "{says:?}: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_one_line_and_a_code() {
    let taken = std::net::TcpListener::bind(FREE).expect("a free port");
    let taken = taken.local_addr().map(|address| (taken, address.to_string())).expect("it has an address");
    let (_taken, address) = taken;
    // Nobody listens on port 1 of this machine, and no etcd is needed to see that a port is taken.
    let stage = Stage::new("127.0.0.1:1".into());
    let says = [&address[..], "in use", "; choose another address"];
    for flag in ["--listen", "--ops"] {
        let launch = Launch::new("worker", "w", stage.dir.path()).words("--etcd 127.0.0.1:1");
        let launch = launch.words(&format!("{flag} {address}"));
        let rest = if flag == "--listen" { "--ops" } else { "--listen" };
        check_ends(launch.words(&format!("{rest} {FREE} --model")).word(demo()), 4, &says).await;
    }
    for command in ["router", "up"] {
        for flag in ["--listen", "--admin", "--ops"] {
            let mut launch = Launch::new(command, "r", stage.dir.path());
            if command == "router" {
                launch = launch.words("--etcd 127.0.0.1:1");
            }
            for other in ["--listen", "--admin", "--ops"] {
                let address = if other == flag { &address } else { FREE };
                launch = launch.words(&format!("{other} {address}"));
            }
            check_ends(launch, 4, &says).await;
        }
    }
    // No etcd, and no wish to wait for one.
    let says = ["127.0.0.1:1", "refused"];
    check_ends(stage.router("r").words("--etcd-wait 0"), 4, &says).await;
    check_ends(stage.worker("w").words("--etcd-wait 0"), 4, &says).await;
    // One that waits for ever is ended by a signal, and well.
    for launch in [stage.router("r"), stage.worker("w")] {
        let mut process = launch.start();
        until("a warning that names etcd", async || warnings(&process, "127.0.0.1:1") == 1).await;
        process.signal(Signal::TERM);
        assert_eq!(process.ended().await.0, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_etcd_does_not_let_in_ends_at_once_however_long_it_may_wait() {
    let name = "whom_etcd_does_not_let_in_ends_at_once";
    let Some(mut etcd) = Etcd::own(name, &["--bcrypt-cost", "4"]) else { return };
    let endpoint = etcd.endpoint();
    let stage = Stage::new(endpoint.clone());
    let mut root = stage.etcd().await;
    for user in ["root", "petek", "stranger"] {
        root.user_add(user, "secret", None).await.expect("add a user");
        root.role_add(user).await.expect("add a role");
        root.user_grant_role(user, user).await.expect("grant a role");
    }
    let all = Permission::new(PermissionType::Readwrite, "/petek/v1/").with_prefix();
    root.role_grant_permission("petek", all).await.expect("grant a right");
    root.auth_enable().await.expect("turn authentication on");

    let as_user = |launch: Launch, user: &str, password: &str| {
        launch.words(&format!("--etcd-user {user}")).set("ETCD__PASSWORD", password)
    };
    for launch in [|stage: &Stage| stage.worker("w"), |stage: &Stage| stage.router("r")] {
        let says = [&endpoint[..]];
        check_ends(as_user(launch(&stage), "petek", "sesame"), 4, &says).await;
        check_ends(as_user(launch(&stage), "nobody", "secret"), 4, &says).await;
        check_ends(as_user(launch(&stage), "stranger", "secret"), 4, &says).await;
        check_ends(launch(&stage), 4, &says).await;
    }
    // Neither is it let in that came before etcd did.
    etcd.kill();
    let mut early = as_user(stage.worker("w"), "petek", "sesame").start();
    until("a warning that names etcd", async || warnings(&early, &endpoint) == 1).await;
    etcd.restart();
    let (code, said) = early.ended().await;
    assert_eq!(code, Some(4), "{said}");
    assert!(!said.contains("sesame"), "{said}");

    let worker = as_user(stage.worker("w"), "petek", "secret").start();
    let router = as_user(stage.router("r"), "petek", "secret").start();
    router.reaches(&["w"]).await;
    worker.ready().await;
    ask(&client(&router).await, spec("Let me in", 1, 4)).await.bytes();
    // It is who it says, and its record is where it should be.
    let options = ConnectOptions::new().with_user("root", "secret").with_timeout(Duration::from_secs(60));
    let mut root = etcd_client::Client::connect([&endpoint], Some(options)).await.expect("root may");
    let key = format!("/petek/v1/{}/workers/demo/w", stage.cluster);
    assert_eq!(root.get(key, None).await.expect("root reads").count(), 1);
}
