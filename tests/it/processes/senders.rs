//! Processes that are killed, stopped, or exit without a shutdown.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use requeuest::retry::RetryPolicy;
use requeuest::{Options, RequestId, Status};
use sqlx::PgPool;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{
    Arrivals, LEASE, Me, Member, SLACK, TAKE_OVER, completed, echo_server, is_long, median_and_max,
    named_builder, ordered, say,
};
use crate::support::{Server, eventually, in_time, migrated, passing, plays, post, reply, rows};

/// As many processes as two cores can drive.
const AT_ONCE: usize = 8;

/// A killed process, and what it had been told.
struct Remains {
    name: String,
    killed: Instant,
    /// The ids and numbers of the requests that it was told are persisted.
    accepted: Vec<(String, String)>,
    answered: Vec<(String, String)>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn senders_killed_at_random_moments_lose_nothing() {
    let rounds_to_go = if is_long() { 400 } else { 100 };
    let database = Arc::new(migrated().await);
    let arrivals = Arrivals::default();
    let server = echo_server(&arrivals, Duration::from_millis(20)).await;
    // The survivors have the default lease: a lease of theirs must not run out during the test.
    let survivors: Vec<_> = ["survivor-a", "survivor-b"]
        .map(|name| {
            named_builder(database.pool(), name)
                .deliver_all()
                .build()
                .unwrap()
        })
        .into();

    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let mut rounds = JoinSet::new();
    for round in 0..rounds_to_go {
        let (database, url) = (Arc::clone(&database), server.url("/"));
        let slots = Arc::clone(&slots);
        rounds.spawn(async move {
            let _slot = slots.acquire().await.unwrap();
            let name = format!("{round}");
            let part = "send_until_killed";
            let mut member = Member::start(module_path!(), part, &name, &database, &url);
            member.says("ready").await;
            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..400))).await;
            let killed = member.kill().await;
            let words = member.all_lines().await;
            let told = |what: &str| {
                let told = words.iter().filter_map(|line| line.strip_prefix(what));
                let told = told.filter_map(|told| told.split_once(' '));
                told.map(|(id, number)| (id.to_owned(), number.to_owned()))
                    .collect()
            };
            Remains {
                name,
                killed,
                accepted: told("accepted "),
                answered: told("answered "),
            }
        });
    }
    let remains = tokio::time::timeout(Duration::from_secs(300), rounds.join_all());
    let remains = remains.await.expect("the rounds took too long");
    eventually("nothing is left in the queue", || async {
        rows(&database, "mq_msgs").await == 0
    })
    .await;

    let outcomes = completed(&database).await;
    assert_eq!(rows(&database, "outcomes").await, outcomes.len() as i64);
    let by_number = arrivals.by_number();
    let numbers: HashSet<&String> = outcomes.values().collect();
    assert_eq!(
        numbers.len(),
        outcomes.len(),
        "a number was persisted twice"
    );
    assert_eq!(numbers, by_number.keys().collect());
    for (id, number) in remains
        .iter()
        .flat_map(|r| r.accepted.iter().chain(&r.answered))
    {
        assert_eq!(outcomes.get(id), Some(number));
    }
    // The responses that the killed callers awaited can be fetched.
    let awaited = outcomes
        .iter()
        .filter(|(_, number)| number.contains("/wait/"));
    let answers = join_all(awaited.map(|(id, number)| {
        let survivor = &survivors[0];
        async move {
            let response = survivor.response(id.parse::<RequestId>().unwrap()).await;
            assert_eq!(response.unwrap().text().unwrap(), *number);
        }
    }));
    let awaited = in_time(answers).await.len();

    assert_no_gap_and_no_swap(&arrivals);
    let killed: HashMap<&str, Instant> = remains.iter().map(|r| (&*r.name, r.killed)).collect();
    let mut took = Vec::new();
    let mut duplicates = 0;
    for sent in by_number.values() {
        duplicates += sent.len() - 1;
        for (before, after) in sent.iter().zip(&sent[1..]) {
            // Only a killed process leaves requests to be sent again.
            let killed = killed
                .get(&*before.sender)
                .unwrap_or_else(|| panic!("{sent:?}"));
            took.extend(after.at.checked_duration_since(*killed));
        }
    }
    let (median, max) = median_and_max(took);
    println!(
        "duplicates under SIGKILL: {duplicates} of {} requests in {rounds_to_go} rounds, \
         {awaited} of them awaited; taken over after {median:?} (median), {max:?} (max)",
        outcomes.len()
    );
    assert!(duplicates > 0, "no process was killed while sending");
    assert!(median <= LEASE + TAKE_OVER, "took {median:?}");
    assert!(max <= LEASE + TAKE_OVER + SLACK, "took {max:?}");
}

/// Checks that each attempt of an ordering key repeats the request before it or sends the next one.
fn assert_no_gap_and_no_swap(arrivals: &Arrivals) {
    let mut last: HashMap<String, usize> = HashMap::new();
    for arrival in arrivals.all() {
        let Some((key, place)) = arrival.number.split_once("/key/") else {
            continue;
        };
        let place: usize = place.parse().unwrap();
        match last.insert(key.to_owned(), place) {
            None => assert_eq!(place, 0, "{arrival:?}"),
            Some(before) => assert!(
                place == before || place == before + 1,
                "{before}, {arrival:?}"
            ),
        }
    }
    assert!(!last.is_empty());
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn send_until_killed() {
    if !plays("send_until_killed") {
        return;
    }
    let me = Me::new();
    // Its own channel: the survivors take its requests over, not another process that is about to
    // be killed.
    let durable = me.handle().channel(&*me.name).lease(LEASE).build().unwrap();
    // Connects first, so that the process is killed at work and not while it starts.
    let unknown = RequestId::from(uuid::Uuid::now_v7());
    assert_eq!(durable.status(unknown).await.unwrap(), None);
    say("ready");
    let pause = Duration::from_millis(20);
    let fires = async {
        for n in 0.. {
            let number = format!("{}/fire/{n}", me.name);
            let id = durable.fire(post(&me.url, number.clone())).await.unwrap();
            say(&format!("accepted {id} {number}"));
            tokio::time::sleep(pause).await;
        }
    };
    let waits = async {
        for n in 0.. {
            let number = format!("{}/wait/{n}", me.name);
            let response = durable
                .await_response(post(&me.url, number.clone()))
                .await
                .unwrap();
            say(&format!("answered {} {number}", response.id()));
        }
    };
    let keys = async {
        for n in 0.. {
            let number = format!("{}/key/{n}", me.name);
            let id = durable
                .fire(ordered(&me.url, &number, &me.name))
                .await
                .unwrap();
            say(&format!("accepted {id} {number}"));
            tokio::time::sleep(pause).await;
        }
    };
    tokio::join!(fires, waits, keys);
}

#[tokio::test]
async fn a_process_stopped_beyond_its_lease_changes_nothing() {
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let (stale, fresh) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let server = Server::start({
        let (arrivals, stale, fresh) = (arrivals.clone(), Arc::clone(&stale), Arc::clone(&fresh));
        move |_, seen| {
            let arrival = arrivals.note(&seen);
            let (stale, fresh) = (Arc::clone(&stale), Arc::clone(&fresh));
            async move {
                if arrival.sender == "stopped" {
                    stale.acquire().await.unwrap().forget();
                    return reply(200, "stale");
                }
                if arrival.number == "late" {
                    fresh.acquire().await.unwrap().forget();
                }
                reply(200, "fresh")
            }
        }
    })
    .await;
    let part = "await_two";
    let mut member = Member::start(module_path!(), part, "stopped", &database, &server.url("/"));
    server.wait_for(2).await;
    member.signal("STOP").await;
    let stopped = Instant::now();
    let survivor = named_builder(database.pool(), "survivor").build().unwrap();
    server.wait_for(4).await;
    println!(
        "a stopped process's requests were taken over after {:?}",
        stopped.elapsed()
    );
    let finished = "outcomes WHERE channel_name = 'default'";
    eventually("one of the requests finishes", || async {
        rows(&database, finished).await == 1
    })
    .await;
    let outcome = || async {
        let row = "SELECT o::text FROM requeuest.outcomes o WHERE channel_name = 'default'";
        let row: String = sqlx::query_scalar(row)
            .fetch_one(database.pool())
            .await
            .unwrap();
        row
    };
    let before = outcome().await;

    // In the meantime the survivor has finished one request and is still sending the second one.
    // The stopped process now gets the responses to both of its own attempts, which are stale.
    stale.add_permits(2);
    member.signal("CONT").await;
    member.says("early: fresh").await;
    passing(&database, LEASE + Duration::from_millis(500)).await;
    assert_eq!(rows(&database, finished).await, 1);
    assert_eq!(outcome().await, before);
    assert!(
        !member
            .lines
            .borrow()
            .iter()
            .any(|line| line.starts_with("late"))
    );

    fresh.add_permits(1);
    member.says("late: fresh").await;
    assert_eq!(server.count(), 4);
    assert!(!member.has_said("late: stale"));
    drop(survivor);
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn await_two() {
    if !plays("await_two") {
        return;
    }
    let me = Me::new();
    let durable = me.handle().lease(LEASE).build().unwrap();
    let one = |number: &'static str| {
        let (durable, url) = (durable.clone(), me.url.clone());
        async move {
            let response = durable.await_response(post(&url, number)).await.unwrap();
            say(&format!("{number}: {}", response.text().unwrap()));
        }
    };
    tokio::join!(one("early"), one("late"));
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_crash_during_the_last_allowed_attempt_ends_the_request() {
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let server = Server::start({
        let arrivals = arrivals.clone();
        move |_, seen| {
            let arrival = arrivals.note(&seen);
            let attempts = arrivals.by_number()[&arrival.number].len();
            async move {
                if arrival.number.starts_with("two") && attempts == 1 {
                    return reply(503, "not yet");
                }
                std::future::pending().await
            }
        }
    })
    .await;
    let part = "make_the_last_attempts";
    let mut member = Member::start(module_path!(), part, "killed", &database, &server.url("/"));
    // Two requests have one attempt each, two others have two each.
    server.wait_for(6).await;
    let killed = member.kill().await;
    let survivor = named_builder(database.pool(), "survivor").build().unwrap();
    eventually("all requests are discarded", || async {
        rows(&database, "outcomes WHERE status = 'discarded'").await == 4
    })
    .await;
    assert!(killed.elapsed() <= LEASE + TAKE_OVER + SLACK);
    assert_eq!(rows(&database, "mq_msgs").await, 0);
    assert_eq!(server.count(), 6, "{:?}", arrivals.all());

    // Dead letters keep their payloads, which tell the requests apart.
    let payloads = "SELECT id::text, convert_from(body, 'UTF8') FROM requeuest.mq_payloads";
    let payloads: Vec<(String, String)> = sqlx::query_as(payloads)
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(payloads.len(), 4);
    for (id, number) in payloads {
        let id: RequestId = id.parse().unwrap();
        assert_eq!(survivor.status(id).await.unwrap(), Some(Status::Discarded));
        let response = survivor.response(id).await;
        if number.starts_with("two") {
            assert_eq!(response.unwrap().status(), 503);
        } else {
            assert!(response.unwrap_err().is_discarded());
        }
    }
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn make_the_last_attempts() {
    if !plays("make_the_last_attempts") {
        return;
    }
    let me = Me::new();
    let durable = me.handle().lease(LEASE).build().unwrap();
    let request = |number: &'static str, attempts| {
        let policy = RetryPolicy::exponential().base(Duration::from_millis(1));
        post(&me.url, number).with(Options::default().retry(policy.max_attempts(attempts)))
    };
    durable.fire(request("one, fired", 1)).await.unwrap();
    durable.fire(request("two, fired", 2)).await.unwrap();
    let _ = tokio::join!(
        durable.await_response(request("one, awaited", 1)),
        durable.await_response(request("two, awaited", 2)),
    );
}

#[tokio::test]
async fn a_process_that_exits_without_a_shutdown_loses_nothing() {
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let server = echo_server(&arrivals, Duration::from_millis(300)).await;
    let part = "exit_midway";
    let mut member = Member::start(module_path!(), part, "gone", &database, &server.url("/"));
    let status = in_time(member.child.wait()).await.unwrap();
    assert_eq!(status.code(), Some(7));
    let left = rows(&database, "mq_msgs").await;
    assert!(left > 0, "there was nothing to lose");

    let _survivor = named_builder(database.pool(), "survivor").build().unwrap();
    eventually("nothing is left in the queue", || async {
        rows(&database, "mq_msgs").await == 0
    })
    .await;
    let outcomes = completed(&database).await;
    let numbers: HashSet<String> = outcomes.into_values().collect();
    assert_eq!(numbers.len(), 60);
    let by_number = arrivals.by_number();
    assert_eq!(numbers, by_number.keys().cloned().collect());
    let duplicates: usize = by_number.values().map(|sent| sent.len() - 1).sum();
    assert!(by_number.values().all(|sent| sent.len() <= 2));
    println!("duplicates under exit: {duplicates} of 60 requests, {left} of them unfinished");
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn exit_midway() {
    if !plays("exit_midway") {
        return;
    }
    let me = Me::new();
    let durable = me.handle().lease(LEASE).build().unwrap();
    for n in 0..20 {
        let (durable, url) = (durable.clone(), me.url.clone());
        tokio::spawn(async move {
            let _ = durable
                .await_response(post(&url, format!("wait/{n}")))
                .await;
        });
    }
    for n in 0..20 {
        let fired = post(&me.url, format!("fire/{n}"));
        let next = ordered(&me.url, &format!("key/{n}"), "key");
        let (fired, next) = tokio::join!(durable.fire(fired), durable.fire(next));
        fired.unwrap();
        next.unwrap();
    }
    in_time(all_persisted(&me.pool)).await;
    // No destructor runs.
    std::process::exit(7);
}

async fn all_persisted(pool: &PgPool) {
    let all = "SELECT (SELECT count(*) FROM requeuest.mq_msgs)
                   + (SELECT count(*) FROM requeuest.outcomes)";
    loop {
        let persisted: i64 = sqlx::query_scalar(all).fetch_one(pool).await.unwrap();
        if persisted == 60 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
