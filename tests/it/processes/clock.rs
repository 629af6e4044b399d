//! Processes whose clocks are wrong.
#![cfg(target_os = "linux")]

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant, SystemTime};

use requeuest::{DestinationPolicy, DestinationState, Durable, Options, RequestId};
use tokio::sync::Semaphore;

use super::{Arrivals, LEASE, Me, Member, SLACK, named_builder, ordered, say};
use crate::support::{
    Server, eventually, in_time, migrated, outcome_of, passing, plays, post, reply, rows,
};

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

const PAUSE: Duration = Duration::from_secs(5);
/// How soon processes follow a change.
const REACH: Duration = Duration::from_secs(2);

/// The limit that processes with clocks a day apart share.
fn shared_limit() -> DestinationPolicy {
    DestinationPolicy::default().max_concurrency(2)
}

#[tokio::test]
async fn limits_and_pauses_are_shared_by_processes_whose_clocks_are_a_day_apart() {
    let directory = tempfile::tempdir().unwrap();
    let library = compile(directory.path());
    tokio::join!(share_with(DAY, &library), share_with(-DAY, &library));
}

async fn share_with(skew: i64, library: &str) {
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let server = Server::start({
        let (arrivals, most) = (arrivals.clone(), Arc::clone(&most));
        move |_, seen| {
            arrivals.note(&seen);
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            async move {
                most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                tokio::time::sleep(Duration::from_millis(20)).await;
                now.fetch_sub(1, SeqCst);
                reply(200, "")
            }
        }
    })
    .await;
    let skewed = skew.to_string();
    let environment = [("LD_PRELOAD", library), ("REQUEUEST_TEST_SKEW", &*skewed)];
    let mut member = Member::start_with(
        module_path!(),
        "share_with_a_wrong_clock",
        "skewed",
        &database,
        &server.url("/"),
        &environment,
    );
    let right = named_builder(database.pool(), "right")
        .destination("127.0.0.1", shared_limit())
        .build()
        .unwrap();
    member.says("ready").await;
    let fire = |number: String| right.fire(post(server.url("/"), number));
    for number in 0..10 {
        fire(format!("right/{number}")).await.unwrap();
    }
    member.says("sent").await;
    assert!(most.load(SeqCst) <= 2, "{most:?} at a time");
    let senders = |prefix: &str| {
        let all = arrivals.all();
        all.iter()
            .filter(|arrival| arrival.number.starts_with(prefix))
            .count()
    };
    assert_eq!((senders("right/"), senders("skewed/")), (10, 10));

    // The process with the wrong clock pauses the destination until a time of its own clock.
    member.says("paused").await;
    let destination = right.destination(&server.url("")).unwrap();
    let status = destination.status().await.unwrap();
    assert_eq!(status.state, DestinationState::Paused);
    let left = status.until.unwrap().duration_since(SystemTime::now());
    let left = left.unwrap();
    assert!(left <= PAUSE, "paused for {left:?}");
    let ends = Instant::now() + left;
    // This process knows by then. Both send again when the pause ends.
    passing(&database, REACH).await;
    let late = fire("late".to_owned()).await.unwrap();
    outcome_of(&right, late).await;
    member.says("sent again").await;
    let arrived = |number: &str| arrivals.by_number()[number][0].at;
    for at in [arrived("late"), arrived("again")] {
        assert!(
            at > ends - Duration::from_millis(50),
            "{:?} early",
            ends - at
        );
        assert!(at < ends + SLACK, "{:?} late", at - ends);
    }
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn share_with_a_wrong_clock() {
    if !plays("share_with_a_wrong_clock") {
        return;
    }
    let me = Me::new();
    let durable = me
        .handle()
        .destination("127.0.0.1", shared_limit())
        .build()
        .unwrap();
    say("ready");
    for number in 0..10 {
        let request = post(&me.url, format!("skewed/{number}"));
        durable.fire(request).await.unwrap();
    }
    // Those of the other process, too.
    eventually("all requests have ended", || async {
        let ended = "SELECT count(*) FROM requeuest.outcomes";
        let ended: i64 = sqlx::query_scalar(ended).fetch_one(&me.pool).await.unwrap();
        ended == 20
    })
    .await;
    say("sent");
    let origin = me.url.trim_end_matches('/');
    let destination = durable.destination(origin).unwrap();
    destination.pause(SystemTime::now() + PAUSE).await.unwrap();
    say("paused");
    // Due once the other process knows, which could send it, too.
    let again = post(&me.url, "again").with(Options::default().delay(REACH));
    durable.await_response(again).await.unwrap();
    say("sent again");
    std::future::pending::<()>().await;
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
