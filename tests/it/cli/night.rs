//! An operator's night, by command line alone.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncBufReadExt, BufReader};

use super::{on, start};
use crate::support::{Server, empty, eventually, in_time, other_process, post, reply};

const FAILED: usize = 500;

#[tokio::test]
async fn five_hundred_failed_requests_are_found_replayed_and_arrive_once() {
    let database = empty().await;
    on(&database, &["migrate"]).await.ok();
    let is_broken = Arc::new(AtomicBool::new(true));
    let broken = Arc::clone(&is_broken);
    let server = Server::start(move |_, seen| {
        let status = if broken.load(Ordering::Relaxed) {
            400
        } else {
            200
        };
        async move { reply(status, seen.body) }
    })
    .await;
    let _work = start(&database, &["work", "--all-channels"]);
    let application = other_process(&database).await;
    let url = server.url("/orders?token=hunter2");
    let requests = (0..FAILED).map(|number| post(&url, number.to_string()));
    application.fire_many(requests).await.unwrap();

    // What is wrong?
    eventually("all have failed", || async {
        let stats = on(&database, &["stats", "--json"]).await.json();
        stats["by_status"]["discarded"]["number"] == FAILED
    })
    .await;
    let stats = on(&database, &["stats"]).await.ok();
    assert!(
        stats.contains("discarded  500") && stats.contains("Runners"),
        "{stats}"
    );
    let list = ["list", "--status", "discarded", "--limit", "5", "--json"];
    let listed = on(&database, &list).await.json();
    let (first, destination) = (&listed["requests"][0], server.url(""));
    assert_eq!(
        (&first["destination"], &first["http_status"]),
        (&(&*destination).into(), &400.into())
    );
    let shown = on(&database, &["show", first["id"].as_str().unwrap()])
        .await
        .ok();
    assert!(
        shown.contains("400") && !shown.contains("hunter2"),
        "{shown}"
    );

    // The receiver is mended.
    is_broken.store(false, Ordering::Relaxed);
    let replay = [
        "replay",
        "--destination",
        &destination,
        "--rate",
        "250",
        "--reason",
        "mended",
    ];
    let refused = on(&database, &replay).await;
    assert_eq!(refused.code, Some(4), "{refused:?}");
    assert!(
        refused.out.contains("500 requests") && refused.err.contains("--yes"),
        "{refused:?}"
    );
    assert_eq!(server.count(), FAILED);

    let mut tail = start(&database, &["tail", "--json", "--every", "200ms"]);
    let mut changes = BufReader::new(tail.stdout.take().unwrap()).lines();
    let mut waiting = start(&database, &[&replay[..], &["--yes", "--wait"]].concat());
    server.wait_for(FAILED + 1).await;
    let change = in_time(changes.next_line())
        .await
        .unwrap()
        .expect("a change is seen");
    assert!(serde_json::from_str::<serde_json::Value>(&change).unwrap()["id"].is_string());
    // SIGKILL.
    waiting.kill().await.unwrap();
    assert!(
        server.count() < 2 * FAILED,
        "the operation has ended too early for this test"
    );

    let operations = on(&database, &["ops", "list", "--json"]).await.json();
    let operation = &operations["operations"][0];
    assert_eq!(
        (&operation["reason"], &operation["action"]),
        (&"mended".into(), &"replay".into())
    );
    let id = operation["id"].as_str().unwrap();
    let ended = on(&database, &["ops", "wait", id, "--json"]).await.json();
    assert_eq!(
        (&ended["state"], &ended["done"]),
        (&"finished".into(), &FAILED.into()),
        "{ended}"
    );
    server.wait_for(2 * FAILED).await;
    let again: HashSet<_> = server.bodies().split_off(FAILED).into_iter().collect();
    assert_eq!((again.len(), server.count()), (FAILED, 2 * FAILED));
    eventually("all are completed", || async {
        let stats = on(&database, &["stats", "--json"]).await.json();
        stats["by_status"]["completed"]["number"] == FAILED
    })
    .await;
}
