//! Processes whose clocks are wrong.
#![cfg(target_os = "linux")]

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use requeuest::{Durable, Options, RequestId};
use tokio::sync::Semaphore;

use super::{Arrivals, LEASE, Me, Member, SLACK, named_builder, ordered, say};
use crate::support::{Server, in_time, migrated, plays, post, reply, rows};

const DELAY: Duration = Duration::from_secs(2);
const DAY: i64 = 24 * 60 * 60;

/// Compiles the library that moves the clock of the process that preloads it.
fn compile(directory: &std::path::Path) -> String {
    let (source, library) = (directory.join("skew.c"), directory.join("skew.so"));
    std::fs::write(&source, include_str!("skew.c")).unwrap();
    // Rust links with `cc`, too.
    let compiled = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status();
    assert!(compiled.expect("there is no C compiler `cc`").success());
    library.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_wrong_application_clock_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let library = compile(directory.path());
    for skew in [DAY, -DAY] {
        with_skew(skew, &library).await;
    }
}

async fn with_skew(skew: i64, library: &str) {
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let gate = Arc::new(Semaphore::new(0));
    let server = Server::start({
        let (arrivals, gate) = (arrivals.clone(), Arc::clone(&gate));
        move |number, seen| {
            let arrival = arrivals.note(&seen);
            let gate = Arc::clone(&gate);
            async move {
                match &*arrival.number {
                    "long" => gate.acquire().await.unwrap().forget(),
                    // Retried soon, not a day early or late.
                    "again" if number < 3 => return reply(503, ""),
                    _ => {}
                }
                reply(200, seen.body)
            }
        }
    })
    .await;
    let skewed = skew.to_string();
    let environment = [("LD_PRELOAD", library), ("REQUEUEST_TEST_SKEW", &*skewed)];
    let (module, url) = (module_path!(), server.url("/"));
    let mut member = Member::start_with(
        module,
        "live_with_a_wrong_clock",
        "skewed",
        &database,
        &url,
        &environment,
    );
    member.says("ready").await;
    // A runner with the right clock competes: the database's clock decides for both.
    let right: Durable = named_builder(database.pool(), "right")
        .lease(LEASE)
        .build()
        .unwrap();
    let clock: i64 = told(&member, "clock").parse().unwrap();
    let wrong = clock - seconds();
    assert!(
        (wrong - skew).abs() < 60,
        "its clock is wrong by {wrong} s, and not by {skew} s"
    );

    member.says("answered").await;
    let id: RequestId = told(&member, "delayed").parse().unwrap();
    in_time(right.response(id)).await.unwrap();
    // Neither early nor late by the database's clock, which sets the outcome's times.
    let waited: f64 = sqlx::query_scalar(
        "SELECT extract(epoch FROM finished_at - created_at)::float8 FROM requeuest.outcomes o
         WHERE o.id = $1",
    )
    .bind(uuid::Uuid::from(id))
    .fetch_one(database.pool())
    .await
    .unwrap();
    assert!(
        waited >= DELAY.as_secs_f64(),
        "delivered {waited} s after its insert"
    );
    assert!(
        waited < (DELAY + SLACK).as_secs_f64(),
        "delivered {waited} s after its insert"
    );
    // The attempt has lasted for more than two leases: they were renewed despite the wrong clock.
    assert_eq!(arrivals.by_number()["long"].len(), 1);
    gate.add_permits(1);
    member.says("long").await;
    let off = "outcomes WHERE created_at NOT BETWEEN now() - interval '1 hour' AND now()
                   OR finished_at NOT BETWEEN created_at AND now()";
    assert_eq!(rows(&database, off).await, 0);
    let first: Vec<String> = arrivals
        .all()
        .into_iter()
        .map(|arrival| arrival.number)
        .collect();
    let keyed: Vec<_> = first
        .iter()
        .filter(|number| number.starts_with("key"))
        .collect();
    assert_eq!(keyed, ["key/0", "key/1", "key/2"]);
}

/// The value that the process printed after this word.
fn told(member: &Member, word: &str) -> String {
    let lines = member.lines.borrow();
    let value = lines
        .iter()
        .find_map(|line| line.strip_prefix(&format!("{word} ")));
    value.unwrap().to_owned()
}

fn seconds() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap().as_secs() as i64
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn live_with_a_wrong_clock() {
    if !plays("live_with_a_wrong_clock") {
        return;
    }
    let me = Me::new();
    let durable = me.handle().lease(LEASE).build().unwrap();
    say(&format!("clock {}", seconds()));
    let long = tokio::spawn({
        let (durable, request) = (durable.clone(), post(&me.url, "long"));
        async move { durable.await_response(request).await.unwrap() }
    });
    let delayed = post(&me.url, "delayed").with(Options::default().delay(DELAY));
    say(&format!("delayed {}", durable.fire(delayed).await.unwrap()));
    say("ready");
    for n in 0..3 {
        durable
            .fire(ordered(&me.url, &format!("key/{n}"), "key"))
            .await
            .unwrap();
    }
    durable
        .await_response(post(&me.url, "again"))
        .await
        .unwrap();
    durable.await_response(post(&me.url, "soon")).await.unwrap();
    say("answered");
    long.await.unwrap();
    say("long");
    std::future::pending::<()>().await;
}
