//! A worker is killed under load.

use tonic::Code;

use crate::client::{Running, ask, client, load, resumed, spec};
use crate::server::Etcd;
use crate::stage::{Stage, takes_work, until};

/// So many that none is through before its worker dies.
const TOKENS: u32 = 600;

/// Its streams end at once with what it takes to go on, those beside them and new requests notice nothing, and when it
/// is there again it gets work.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_costs_its_own_streams_alone_and_they_can_be_resumed() {
    let Some(etcd) = Etcd::shared("a_killed_worker_costs_its_own_streams_alone") else { return };
    let stage = Stage::new(etcd.endpoint());
    let [mut a, b] = ["a", "b"].map(|id| stage.worker(id).start());
    // Neither silence nor a ping tells the router: what ends a stream is that its connection breaks.
    let router = stage.router("router").set("ROUTER__LINK__SILENCE_MS_MAX", "600000");
    let router = router.set("ROUTER__LINK__PING_TIMEOUT_MS", "600000").start();
    router.reaches(&["a", "b"]).await;
    let client = client(&router).await;

    let running = load(&client, &["a", "b"], 2, TOKENS).await;
    a.kill();
    // At the very next moment: the router may not even know.
    let fresh: Vec<Running> =
        (0..8).map(|n| Running::start(&client, spec(&format!("After {n}"), n, 40))).collect();
    for answer in fresh {
        let answer = answer.ended().await;
        assert_eq!(answer.worker(), "b");
        answer.bytes();
    }

    let again: Vec<Running> = running.iter().map(|one| Running::start(&client, one.spec.clone())).collect();
    let (mut broken, mut whole) = (0, 0);
    for (one, unbroken) in running.into_iter().zip(again) {
        let asked = one.spec.clone();
        let answer = one.ended().await;
        let (on, is_whole) = (answer.worker().to_owned(), matches!(answer.end, Some(Ok(_))));
        let unbroken = unbroken.ended().await.bytes();
        if on == "b" || is_whole {
            whole += 1;
            assert_eq!(answer.bytes(), unbroken, "a neighbour of the dead");
            continue;
        }
        broken += 1;
        let why = answer.refusal();
        assert_eq!((why.code, &*why.reason, why.retry_ms), (Code::Unavailable, "WORKER_LOST", Some(0)));
        assert_eq!(why.number("output_tokens"), Some(answer.ids.len() as u64));
        assert!(why.message.contains("resumed_ids"), "it says how to go on: {}", why.message);

        let rest = ask(&client, resumed(&asked, &answer.ids)).await;
        assert_eq!(rest.worker(), "b");
        let Some(Ok(finished)) = &rest.end else { panic!("{rest:?}") };
        let usage = finished.usage.unwrap_or_default();
        assert_eq!(usage.completion_tokens, TOKENS, "resumed tokens count as output");
        let (text, ids, logprobs) = rest.bytes();
        let joined = (answer.text + &text, [answer.ids, ids].concat(), [answer.logprobs, logprobs].concat());
        assert_eq!(joined, unbroken, "what was got before and after is the unbroken answer");
    }
    assert!(broken >= 1 && whole >= 2, "{broken} answers broke and {whole} did not");

    // Under the same id, while the dead one's record may still stand.
    let before = b.status().await.epoch;
    let _again = stage.worker("a").start();
    until("the worker that came back is given work", async || {
        let seen = router.sees("a").await;
        seen.as_ref().is_some_and(takes_work)
    })
    .await;
    let running = load(&client, &["a", "b"], 1, 40).await;
    for one in running {
        one.ended().await.bytes();
    }
    assert_eq!(b.status().await.epoch, before, "the other one went on all the time");
    let records = stage.records().await;
    assert_eq!(records.keys().collect::<Vec<_>>(), ["a", "b"]);
}
