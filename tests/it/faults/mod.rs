//! Crashes, broken connections and other processes. `docs/faults.md` says what happens under each
//! fault.

mod crowds;
pub mod database;
pub(crate) mod network;
mod receiver;
mod refusals;
mod results;

use std::collections::HashMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use requeuest::retry::RetryPolicy;
use requeuest::testkit::{self, Postgres, StopMode};
use requeuest::{DestinationPolicy, Durable, DurableBuilder, Options, RequestId, Status};
use sqlx::PgPool;
use tokio::task::JoinSet;

use crate::support::{
    LONG, Server, builder_on, count, eventually, in_time, migrated, part, plays, post, quick,
    reply, rows,
};

/// The shortest lease allowed, so that another process soon takes over.
const LEASE: Duration = Duration::from_secs(1);

/// Whether to run the long form of each fault.
pub fn is_long() -> bool {
    std::env::var_os("REQUEUEST_LONG_FAULTS").is_some()
}

/// A builder with the shortest lease and quick retries.
fn short_lease_builder(pool: &PgPool) -> DurableBuilder {
    builder_on(pool).lease(LEASE).retry(quick())
}

/// A server that answers each request with its body.
async fn echo_server() -> Server {
    Server::start(|_, seen| async move { reply(200, seen.body) }).await
}

/// What a call returned.
enum Told {
    Accepted(RequestId),
    Answered(RequestId),
    /// The request may have been accepted or not.
    Unknown(RequestId),
    Refused,
}

/// What each call returned, by the request's name, which is its body.
type Ledger = HashMap<String, Told>;

/// Runs callers side by side, each of which awaits and fires requests in turn. Each call either
/// succeeds or fails with a database error.
async fn load(durable: &Durable, url: &str, callers: usize, each: usize) -> Ledger {
    let mut running = JoinSet::new();
    for caller in 0..callers {
        let (durable, url) = (durable.clone(), url.to_owned());
        running.spawn(async move {
            let mut told = Vec::new();
            for number in 0..each {
                let name = format!("{caller}/{number}");
                told.push((
                    name.clone(),
                    call(&durable, &url, &name, number % 2 == 0).await,
                ));
            }
            told
        });
    }
    let told = tokio::time::timeout(2 * LONG, running.join_all()).await;
    let told = told.expect("the callers took too long");
    told.into_iter().flatten().collect()
}

async fn call(durable: &Durable, url: &str, name: &str, awaited: bool) -> Told {
    let request = post(url, name.to_owned());
    let result = if awaited {
        durable.await_response(request).await.map(|response| {
            assert_eq!(response.text().unwrap(), name);
            Told::Answered(response.id())
        })
    } else {
        durable.fire(request).await.map(Told::Accepted)
    };
    result.unwrap_or_else(|error| {
        assert!(error.is_indeterminate() || error.is_database(), "{error:?}");
        if error.is_indeterminate() {
            Told::Unknown(
                error
                    .request_id()
                    .expect("an indeterminate error has an id"),
            )
        } else {
            Told::Refused
        }
    })
}

/// Compares what the calls returned with what the server and the database saw: every accepted
/// request was delivered, every awaited response can be fetched again, no refused request was sent.
/// Returns how many requests were delivered more than once; the fault must explain them.
async fn check_ledger(fault: &str, durable: &Durable, server: &Server, ledger: Ledger) -> usize {
    let total = ledger.len();
    let mut refused = 0;
    let mut expected = Vec::new();
    for (name, told) in ledger {
        let id = match told {
            Told::Accepted(id) | Told::Answered(id) => id,
            Told::Unknown(id) if durable.status(id).await.unwrap().is_some() => id,
            Told::Unknown(_) => {
                expected.push((name, false));
                continue;
            }
            Told::Refused => {
                refused += 1;
                expected.push((name, false));
                continue;
            }
        };
        let outcome = testkit::outcome(durable, id, LONG).await.unwrap();
        assert_eq!(outcome.status(), Status::Completed, "{name}");
        assert_eq!(outcome.into_result().unwrap().text().unwrap(), name);
        expected.push((name, true));
    }
    let mut deliveries: HashMap<String, usize> = HashMap::new();
    for seen in server.seen() {
        let name = String::from_utf8(seen.body.to_vec()).unwrap();
        *deliveries.entry(name).or_default() += 1;
    }
    for (name, delivered) in expected {
        assert_eq!(deliveries.contains_key(&name), delivered, "{name}");
    }
    let duplicates = deliveries.values().filter(|count| **count > 1).count();
    println!("duplicates under {fault}: {duplicates} of {total} requests ({refused} refused)");
    duplicates
}

#[tokio::test]
async fn a_killed_process_loses_nothing() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let mut child = part(module_path!(), "send_and_be_killed")
        .env("REQUEUEST_TEST_DATABASE", database.url())
        .env("REQUEUEST_TEST_SERVER", server.url("/"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Both requests of the process are in flight, one awaited and one fired.
    server.wait_for(2).await;
    child.kill().unwrap();
    child.wait().unwrap();
    gate.add_permits(100);

    let began = Instant::now();
    let durable = short_lease_builder(database.pool()).build().unwrap();
    eventually("both requests finish", || async {
        rows(&database, "outcomes WHERE status = 'completed'").await == 2
    })
    .await;
    assert!(
        began.elapsed() < LEASE + Duration::from_secs(5),
        "took {:?}",
        began.elapsed()
    );
    assert_eq!(server.count(), 4);
    drop(durable);
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn send_and_be_killed() {
    if !plays("send_and_be_killed") {
        return;
    }
    let pool = PgPool::connect(&std::env::var("REQUEUEST_TEST_DATABASE").unwrap())
        .await
        .unwrap();
    let url = std::env::var("REQUEUEST_TEST_SERVER").unwrap();
    let durable = short_lease_builder(&pool).build().unwrap();
    durable.fire(post(&url, "x")).await.unwrap();
    let _ = in_time(durable.await_response(post(&url, "x"))).await;
}

#[tokio::test]
async fn an_attempt_may_last_longer_than_its_lease() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    let waiting = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move { durable.await_response(post(&url, "x")).await }
    });
    server.wait_for(1).await;
    // Takes the request over if the lease runs out.
    let _other = short_lease_builder(database.pool()).build().unwrap();
    let began = Instant::now();
    eventually("three leases go by", || async {
        began.elapsed() > 3 * LEASE
    })
    .await;
    gate.add_permits(100);
    let response = in_time(waiting).await.unwrap().unwrap();
    assert_eq!(response.text().unwrap(), "x");
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_stale_result_changes_nothing() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    let waiting = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move { durable.await_response(post(&url, "x")).await }
    });
    server.wait_for(1).await;
    // As if another process had taken the request over twice, and held it.
    sqlx::query(
        "UPDATE requeuest.mq_msgs
         SET claim_no = claim_no + 2, attempt_at = now() + interval '1 day'",
    )
    .execute(database.pool())
    .await
    .unwrap();
    gate.add_permits(1);
    // The result arrives, is discarded and changes nothing.
    eventually("the stale attempt is over", || async {
        gate.available_permits() == 0 && rows(&database, "mq_msgs WHERE claim_no = 3").await == 1
    })
    .await;
    assert_eq!(rows(&database, "outcomes").await, 0);
    assert!(!waiting.is_finished());
    eventually("the stale result is counted", || async {
        testkit::stale_results(&durable) == 1
    })
    .await;
    // The other process releases the request. It is delivered, and the waiter gets that response.
    sqlx::query("UPDATE requeuest.mq_msgs SET claim_no = claim_no + 1, attempt_at = now()")
        .execute(database.pool())
        .await
        .unwrap();
    gate.add_permits(100);
    let response = in_time(waiting).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_caller_that_goes_away_cancels_nothing() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    let waiting = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move { durable.await_response(post(&url, "x")).await }
    });
    server.wait_for(1).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    gate.add_permits(100);
    eventually("the request finishes", || async {
        rows(&database, "outcomes WHERE status = 'completed'").await == 1
    })
    .await;
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn processes_on_one_queue_deliver_each_request_once() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let enqueue_only = short_lease_builder(database.pool())
        .runner(false)
        .build()
        .unwrap();
    let mut ids = Vec::new();
    for _ in 0..300 {
        ids.push(enqueue_only.fire(post(server.url("/"), "x")).await.unwrap());
    }
    let runners: Vec<Durable> = (0..3)
        .map(|_| {
            short_lease_builder(database.pool())
                .concurrency(8)
                .max_connections(2)
                .build()
                .unwrap()
        })
        .collect();
    for id in ids {
        let outcome = testkit::outcome(&enqueue_only, id, LONG).await.unwrap();
        assert_eq!(outcome.status(), Status::Completed);
    }
    assert_eq!(server.count(), 300);
    drop(runners);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_connections_lose_nothing() {
    let database = migrated().await;
    let server = echo_server().await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid()
                    AND query ~ 'input|mq_poll|SELECT 1' AND random() < 0.3";
    let url = server.url("/");
    let calling = load(&durable, &url, 8, 50);
    tokio::pin!(calling);
    let mut killed = 0;
    let ledger = loop {
        tokio::select! {
            ledger = &mut calling => break ledger,
            () = tokio::time::sleep(Duration::from_millis(20)) => {
                killed += count(&database, kill).await;
            }
        }
    };
    assert!(killed > 0);
    // Checks through connections that were not terminated.
    let other = short_lease_builder(database.pool())
        .runner(false)
        .build()
        .unwrap();
    check_ledger("terminated sessions", &other, &server, ledger).await;
}

#[tokio::test]
async fn a_restart_of_postgres_under_load_loses_nothing() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    let database = postgres.database().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    let server = Server::always(200).await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    // Requests wait in the queue, and callers keep calling while the server is down.
    let mut fired = Vec::new();
    for _ in 0..50 {
        fired.push(durable.fire(post(server.url("/"), "x")).await.unwrap());
    }
    let callers = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move {
            let mut refused = 0;
            for _ in 0..200 {
                if durable.await_response(post(&url, "x")).await.is_err() {
                    refused += 1;
                }
            }
            refused
        }
    });
    server.wait_for(60).await;
    postgres.stop(StopMode::Immediate).await.unwrap();
    postgres.resume().await.unwrap();
    let back = Instant::now();
    let delayed = post(server.url("/after"), "x");
    // The runner recovers soon, without a backoff that has grown: only the runner can send this
    // request.
    let enqueue_only = short_lease_builder(database.pool())
        .runner(false)
        .build()
        .unwrap();
    let id = loop {
        match enqueue_only.fire(&delayed).await {
            Ok(id) => break id,
            Err(_) => assert!(back.elapsed() < LONG, "the database never came back"),
        }
    };
    testkit::outcome(&enqueue_only, id, LONG).await.unwrap();
    assert!(
        back.elapsed() < Duration::from_secs(8),
        "took {:?}",
        back.elapsed()
    );
    in_time(callers).await.unwrap();
    for id in fired {
        let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
        assert_eq!(outcome.status(), Status::Completed);
    }
}

#[tokio::test]
async fn attempts_cut_off_by_shutdown_count_as_failed() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    let once = post(server.url("/once"), "x").with(Options::default().retry(RetryPolicy::none()));
    let once = durable.fire(once).await.unwrap();
    let later = Options::default().retry(RetryPolicy::constant(Duration::from_secs(3600)));
    let later = durable
        .fire(post(server.url("/later"), "x").with(later))
        .await
        .unwrap();
    server.wait_for(2).await;
    in_time(durable.shutdown(Duration::from_millis(50)))
        .await
        .unwrap();

    // The attempts in flight count as failed: the retry policy decides what follows.
    let other = short_lease_builder(database.pool()).build().unwrap();
    assert_eq!(other.status(once).await.unwrap(), Some(Status::Discarded));
    assert_eq!(other.status(later).await.unwrap(), Some(Status::Retryable));
    assert_eq!(server.count(), 2);
    gate.add_permits(100);
}

#[tokio::test]
async fn a_result_the_database_refuses_fails_alone() {
    let database = migrated().await;
    sqlx::query(
        "ALTER TABLE requeuest.outcomes
         ADD CONSTRAINT no_poison CHECK (position(\'poison\'::bytea IN body) = 0)",
    )
    .execute(database.pool())
    .await
    .unwrap();
    let (server, gate) = Server::held(200).await;
    let durable = short_lease_builder(database.pool())
        .max_share(1.0)
        .destination("127.0.0.1", DestinationPolicy::default())
        .build()
        .unwrap();
    let mut callers = JoinSet::new();
    for number in 0..256 {
        let durable = durable.clone();
        let body = if number == 7 { "poison" } else { "good" };
        let request = post(server.url("/"), body);
        callers.spawn(async move { (body, durable.await_response(request).await) });
    }
    // All at the same time, so that they are settled in few batches.
    server.wait_for(256).await;
    gate.add_permits(256);
    for (body, response) in in_time(callers.join_all()).await {
        match response {
            Ok(response) => assert_eq!((body, response.text().unwrap()), ("good", "good")),
            Err(error) => {
                assert_eq!(body, "poison", "{error}");
                assert!(error.is_response_too_large(), "{error}");
                assert_eq!(error.response_head().unwrap().0, 200);
            }
        }
    }
    assert_eq!(server.count(), 256);
}

#[tokio::test]
async fn a_request_the_database_refuses_fails_alone() {
    let database = migrated().await;
    sqlx::query(
        "ALTER TABLE requeuest.mq_payloads
         ADD CONSTRAINT no_poison CHECK (position(\'poison\'::bytea IN body) = 0)",
    )
    .execute(database.pool())
    .await
    .unwrap();
    let server = Server::always(200).await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    let mut callers = JoinSet::new();
    for number in 0..256 {
        let durable = durable.clone();
        let body = if number == 7 { "poison" } else { "good" };
        let request = post(server.url("/"), body);
        callers.spawn(async move { (body, durable.fire(request).await) });
    }
    for (body, fired) in in_time(callers.join_all()).await {
        match fired {
            Ok(_) => assert_eq!(body, "good"),
            Err(error) => {
                assert_eq!(body, "poison", "{error}");
                assert!(error.is_database(), "{error}");
            }
        }
    }
    server.wait_for(255).await;
    eventually("the good requests finish", || async {
        rows(&database, "outcomes WHERE status = 'completed'").await == 255
    })
    .await;
    assert_eq!(server.count(), 255);
}
