//! Crashes, broken connections and other processes. What happens under each fault is written down in `docs/faults.md`.

mod database;
mod network;
mod receiver;

use std::collections::HashMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use requeuest::retry::RetryPolicy;
use requeuest::testkit::{self, Postgres, StopMode};
use requeuest::{Durable, DurableBuilder, Options, Request, RequestId, Status};
use sqlx::PgPool;
use tokio::task::JoinSet;

use crate::support::{LONG, Server, count, eventually, in_time, migrated, part, plays, reply};

/// The shortest that there is, so that take-overs are quick.
const LEASE: Duration = Duration::from_secs(1);

/// Whether the faults are to last.
fn is_long() -> bool {
    std::env::var_os("REQUEUEST_LONG_FAULTS").is_some()
}

fn post(url: &str) -> Request {
    http::Request::post(url)
        .body("x")
        .unwrap()
        .try_into()
        .unwrap()
}

fn builder(pool: &PgPool) -> DurableBuilder {
    Durable::builder(pool.clone()).lease(LEASE).retry(
        RetryPolicy::exponential()
            .base(Duration::from_millis(1))
            .cap(Duration::from_millis(50)),
    )
}

fn post_body(url: &str, body: &str) -> Request {
    let request = http::Request::post(url).body(body.to_owned()).unwrap();
    request.try_into().unwrap()
}

/// A server that echoes.
async fn echo_server() -> Server {
    Server::start(|_, seen| async move { reply(200, seen.body) }).await
}

/// What a caller was told of its request.
enum Told {
    Accepted(RequestId),
    Answered(RequestId),
    /// It may have been accepted, or not.
    Unknown(RequestId),
    Refused,
}

/// What callers were told, by the request's body, which is its name.
type Ledger = HashMap<String, Told>;

/// Callers side by side, each of whom awaits and fires requests in turn. What they are told is either true or an error of the database.
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
    let request = post_body(url, name);
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
            Told::Unknown(error.request_id().expect("an unknown one has an id"))
        } else {
            Told::Refused
        }
    })
}

/// Holds what callers were told against what the server and the database saw: everything accepted was delivered, everything awaited
/// can be fetched again, nothing refused was sent. Returns how many were delivered more than once, for the fault to explain.
async fn settle_accounts(fault: &str, durable: &Durable, server: &Server, ledger: Ledger) -> usize {
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
    // Both of its requests are being sent, one awaited and one fired.
    server.wait_for(2).await;
    child.kill().unwrap();
    child.wait().unwrap();
    gate.add_permits(100);

    let began = Instant::now();
    let durable = builder(database.pool()).build().unwrap();
    let outcomes = "select count(*) from requeuest.outcomes where status = 'completed'";
    eventually("both requests end", || async {
        count(&database, outcomes).await == 2
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
    let durable = builder(&pool).build().unwrap();
    durable.fire(post(&url)).await.unwrap();
    let _ = in_time(durable.await_response(post(&url))).await;
}

#[tokio::test]
async fn an_attempt_may_last_longer_than_its_lease() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = builder(database.pool()).build().unwrap();
    // Would take the request over, if the lease ran out.
    let _other = builder(database.pool()).build().unwrap();
    let waiting = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move { durable.await_response(post(&url)).await }
    });
    server.wait_for(1).await;
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
    let durable = builder(database.pool()).build().unwrap();
    let waiting = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move { durable.await_response(post(&url)).await }
    });
    server.wait_for(1).await;
    // As if another process had taken it over twice, and held it.
    sqlx::query("update requeuest.mq_msgs set claim_no = claim_no + 2, attempt_at = now() + interval '1 day'")
        .execute(database.pool())
        .await
        .unwrap();
    gate.add_permits(1);
    // The result comes, is refused and counted as nothing.
    let renewed = "select count(*) from requeuest.mq_msgs where claim_no = 3";
    eventually("the stale attempt is over", || async {
        gate.available_permits() == 0 && count(&database, renewed).await == 1
    })
    .await;
    assert_eq!(
        count(&database, "select count(*) from requeuest.outcomes").await,
        0
    );
    assert!(!waiting.is_finished());
    eventually("the stale result is counted", || async {
        testkit::stale_results(&durable) == 1
    })
    .await;
    // The other process gives it back; it is delivered, and the waiter gets that response.
    sqlx::query("update requeuest.mq_msgs set claim_no = claim_no + 1, attempt_at = now()")
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
    let durable = builder(database.pool()).build().unwrap();
    let waiting = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move { durable.await_response(post(&url)).await }
    });
    server.wait_for(1).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    gate.add_permits(100);
    let outcomes = "select count(*) from requeuest.outcomes where status = 'completed'";
    eventually("it ends", || async {
        count(&database, outcomes).await == 1
    })
    .await;
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn processes_on_one_queue_deliver_each_request_once() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let enqueue_only = builder(database.pool()).runner(false).build().unwrap();
    let mut ids = Vec::new();
    for _ in 0..300 {
        ids.push(enqueue_only.fire(post(&server.url("/"))).await.unwrap());
    }
    let runners: Vec<Durable> = (0..3)
        .map(|_| {
            builder(database.pool())
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
    let durable = builder(database.pool()).build().unwrap();
    let kill = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                where datname = current_database() and pid <> pg_backend_pid()
                    and query ~ 'input|mq_poll|SELECT 1' and random() < 0.3";
    let url = server.url("/");
    let calling = load(&durable, &url, 8, 50);
    tokio::pin!(calling);
    let mut killed = 0;
    let ledger = loop {
        tokio::select! {
            ledger = &mut calling => break ledger,
            () = tokio::time::sleep(Duration::from_millis(20)) => killed += count(&database, kill).await,
        }
    };
    assert!(killed > 0);
    // Asked through connections that nobody has ended.
    let other = builder(database.pool()).runner(false).build().unwrap();
    settle_accounts("terminated sessions", &other, &server, ledger).await;
}

#[tokio::test]
async fn a_restart_of_postgres_under_load_loses_nothing() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    let database = postgres.database().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    let server = Server::always(200).await;
    let durable = builder(database.pool()).build().unwrap();
    // Something waits in the queue, and callers go on while the server is down.
    let mut fired = Vec::new();
    for _ in 0..50 {
        fired.push(durable.fire(post(&server.url("/"))).await.unwrap());
    }
    let callers = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move {
            let mut refused = 0;
            for _ in 0..200 {
                if durable.await_response(post(&url)).await.is_err() {
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
    let delayed = post(&server.url("/after"));
    // The runner is back soon, not after a delay that grew: this goes through it alone.
    let enqueue_only = builder(database.pool()).runner(false).build().unwrap();
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
async fn a_shutdown_sends_nothing_twice_at_once() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = builder(database.pool()).build().unwrap();
    let once = post(&server.url("/once")).with(Options::default().retry(RetryPolicy::none()));
    let once = durable.fire(once).await.unwrap();
    let later = Options::default().retry(RetryPolicy::constant(Duration::from_secs(3600)));
    let later = durable
        .fire(post(&server.url("/later")).with(later))
        .await
        .unwrap();
    server.wait_for(2).await;
    in_time(durable.shutdown(Duration::from_millis(50)))
        .await
        .unwrap();

    // What was being sent counts as a failed attempt: its policy says what follows.
    let other = builder(database.pool()).build().unwrap();
    assert_eq!(other.status(once).await.unwrap(), Some(Status::Discarded));
    assert_eq!(other.status(later).await.unwrap(), Some(Status::Retryable));
    assert_eq!(server.count(), 2);
    gate.add_permits(100);
}

#[tokio::test]
async fn what_the_database_refuses_of_a_result_fails_alone() {
    let database = migrated().await;
    sqlx::query(
        "alter table requeuest.outcomes add constraint no_poison check (position('poison'::bytea in body) = 0)",
    )
    .execute(database.pool())
    .await
    .unwrap();
    let (server, gate) = Server::held(200).await;
    let durable = builder(database.pool()).build().unwrap();
    let mut callers = JoinSet::new();
    for number in 0..256 {
        let durable = durable.clone();
        let body = if number == 7 { "poison" } else { "good" };
        let request = http::Request::post(server.url("/")).body(body).unwrap();
        callers.spawn(async move { (body, durable.await_response(request).await) });
    }
    // All together, so that they are settled in few batches.
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
async fn what_the_database_refuses_of_a_request_fails_alone() {
    let database = migrated().await;
    sqlx::query(
        "alter table requeuest.mq_payloads add constraint no_poison check (position('poison'::bytea in body) = 0)",
    )
    .execute(database.pool())
    .await
    .unwrap();
    let server = Server::always(200).await;
    let durable = builder(database.pool()).build().unwrap();
    let mut callers = JoinSet::new();
    for number in 0..256 {
        let durable = durable.clone();
        let body = if number == 7 { "poison" } else { "good" };
        let request = http::Request::post(server.url("/")).body(body).unwrap();
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
    let completed = "select count(*) from requeuest.outcomes where status = 'completed'";
    eventually("the good ones end", || async {
        count(&database, completed).await == 255
    })
    .await;
    assert_eq!(server.count(), 255);
}
