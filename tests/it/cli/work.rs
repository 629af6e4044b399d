//! The runner of its own: what it delivers, what it tells a supervisor, and how it stops.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::{on, run, start};
use crate::support::{Server, eventually, in_time, migrated, other_process, post};

/// Starts `work`, and waits until it delivers. Returns where it listens too.
async fn working(database: &requeuest::testkit::TestDatabase, more: &[&str]) -> (Child, String) {
    let arguments = [&["work", "--all-channels", "--listen", "127.0.0.1:0"], more].concat();
    let mut child = start(database, &arguments);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let url = in_time(async {
        loop {
            let line = lines.next_line().await.unwrap().expect("it listens");
            if let Some((_, url)) = line.split_once("listening on ") {
                break url.to_owned();
            }
        }
    })
    .await;
    // A full pipe would stop the program.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    (child, url)
}

async fn status(url: &str) -> Option<u16> {
    Some(reqwest::get(url).await.ok()?.status().as_u16())
}

async fn signal(child: &Child, name: &str) {
    let pid = child.id().unwrap().to_string();
    let killed = Command::new("kill")
        .args([name, &pid])
        .status()
        .await
        .unwrap();
    assert!(killed.success());
}

#[tokio::test]
async fn work_delivers_and_tells_a_supervisor_until_it_is_asked_to_stop() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let (mut child, url) = working(&database, &[]).await;
    let there = other_process(&database).await;
    let id = there.fire(post(server.url("/"), "x")).await.unwrap();
    server.wait_for(1).await;
    assert_eq!(status(&format!("{url}/healthz")).await, Some(200));
    eventually("it is ready", || async {
        status(&format!("{url}/readyz")).await == Some(200)
    })
    .await;
    assert_eq!(status(&format!("{url}/other")).await, Some(404));
    let metrics = reqwest::get(format!("{url}/metrics")).await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(
        metrics.contains("# TYPE requeuest_attempts_in_flight gauge"),
        "{metrics}"
    );

    signal(&child, "-TERM").await;
    eventually("it is not ready any more", || async {
        status(&format!("{url}/readyz")).await == Some(503)
    })
    .await;
    // It waits for the attempt under way.
    assert!(child.try_wait().unwrap().is_none());
    gate.add_permits(1);
    assert_eq!(in_time(child.wait()).await.unwrap().code(), Some(0));
    let shown = on(&database, &["show", &id.to_string(), "--json"])
        .await
        .json();
    assert_eq!(
        (&shown["status"], &shown["attempts"]),
        (&"completed".into(), &1.into())
    );
}

#[tokio::test]
async fn work_stops_at_its_deadline_though_an_attempt_is_under_way() {
    let database = migrated().await;
    let (server, _gate) = Server::held(200).await;
    let (mut child, _) = working(&database, &["--grace", "200ms"]).await;
    let there = other_process(&database).await;
    there.fire(post(server.url("/"), "x")).await.unwrap();
    server.wait_for(1).await;
    signal(&child, "-INT").await;
    let ended = tokio::time::timeout(Duration::from_secs(10), child.wait()).await;
    assert!(ended.unwrap().unwrap().code().is_some());
}

#[tokio::test]
async fn work_says_what_keeps_it_from_starting() {
    let away = format!("postgres://{}/app", crate::support::closed_port().await);
    let refused = run(&["work", "--all-channels", "--url", &away])
        .await
        .refused(5);
    assert!(refused.contains("127.0.0.1"), "{refused}");
    let database = migrated().await;
    let taken = Server::always(200).await;
    let address = taken.addr.to_string();
    let refused = on(&database, &["work", "--channel", "c", "--listen", &address])
        .await
        .refused(1);
    assert!(refused.contains(&address), "{refused}");
    assert_eq!(on(&database, &["work"]).await.code, Some(2));
}

#[tokio::test]
async fn bench_measures_with_a_receiver_of_its_own() {
    let database = migrated().await;
    let arguments = ["bench", "-n", "50", "--concurrency", "8", "--json"];
    let measured = on(&database, &arguments).await.json();
    assert_eq!(measured["requests"], 50);
    for part in ["enqueue", "deliver"] {
        assert!(
            measured[part]["requests_per_second"].as_f64().unwrap() > 0.0,
            "{measured}"
        );
        assert!(measured[part]["p99"].as_f64() >= measured[part]["p50"].as_f64());
    }
}
