//! The network between this process and Postgres, and between it and the receiver.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use requeuest::testkit::{self, TestDatabase};
use requeuest::{Durable, Options, Status};
use sqlx::PgPool;
use sqlx::postgres::{PgPoolOptions, PgSslMode};

use super::{LEASE, call, check_ledger, echo_server, load, short_lease_builder};
use crate::proxy::{Manner, Proxy};
use crate::support::{LONG, Server, eventually, in_time, migrated, passing, post, reply, rows};

/// The time after which a statement without an answer fails, plus some seconds for a busy machine.
const RECOVERY: Duration = Duration::from_secs(10 + 8);

/// The address of the database's server.
pub(crate) fn address(database: &TestDatabase) -> SocketAddr {
    let options = database.options();
    let address = format!("{}:{}", options.get_host(), options.get_port());
    std::net::ToSocketAddrs::to_socket_addrs(&address)
        .unwrap()
        .next()
        .unwrap()
}

/// An application's pool whose connections go through the proxy.
pub(crate) fn pool_through(proxy: &Proxy, database: &TestDatabase) -> PgPool {
    let options = database
        .options()
        .host(&proxy.addr.ip().to_string())
        .port(proxy.addr.port())
        .ssl_mode(PgSslMode::Disable);
    PgPoolOptions::new()
        .acquire_timeout(Duration::from_secs(5))
        .connect_lazy_with(options)
}

pub(super) struct Through {
    pub(super) database: TestDatabase,
    pub(super) proxy: Proxy,
    pub(super) pool: PgPool,
}

pub(super) async fn through_a_proxy() -> Through {
    let database = migrated().await;
    let proxy = Proxy::postgres(address(&database)).await;
    let pool = pool_through(&proxy, &database);
    Through {
        database,
        proxy,
        pool,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_network_to_postgres_loses_nothing() {
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let server = echo_server().await;
    let durable = short_lease_builder(&pool).build().unwrap();
    let manners = [
        Manner::Delay(Duration::from_millis(3)),
        Manner::CutRequest(3000),
        Manner::CutAnswer(3000),
        Manner::ResetAnswer(5000),
        Manner::Pass,
    ];
    let url = server.url("/");
    let calling = load(&durable, &url, 8, 20);
    tokio::pin!(calling);
    let mut turns = manners.iter().cycle();
    let mut resets = 0;
    let ledger = loop {
        proxy.treat(*turns.next().unwrap());
        tokio::select! {
            ledger = &mut calling => break ledger,
            () = tokio::time::sleep(Duration::from_millis(300)) => resets += proxy.reset(),
        }
    };
    proxy.treat(Manner::Pass);
    assert!(resets > 0);
    // Checks over a good network: some proxied connections will still be cut.
    let direct = short_lease_builder(database.pool())
        .runner(false)
        .build()
        .unwrap();
    check_ledger("resets and cuts to Postgres", &direct, &server, ledger).await;
}

#[tokio::test]
async fn vanished_connections_delay_callers_by_a_timeout_at_most() {
    let Through { proxy, pool, .. } = through_a_proxy().await;
    let server = echo_server().await;
    let durable = short_lease_builder(&pool).build().unwrap();
    let url = server.url("/");
    let mut calling = Box::pin(load(&durable, &url, 8, 30));
    let mut hole = None;
    let told = loop {
        tokio::select! {
            told = &mut calling => break told,
            () = server.wait_for(30), if hole.is_none() => {
                proxy.black_hole();
                proxy.treat(Manner::Pass);
                hole = Some(Instant::now());
            }
        }
    };
    let took = hole.expect("the load was too small").elapsed();
    println!("all callers finished within {took:?} of a black hole");
    assert!(took < RECOVERY, "took {took:?}");
    // A runner whose connections have not vanished delivers the rest.
    drop(calling);
    drop(durable);
    let other = short_lease_builder(&pool).build().unwrap();
    check_ledger("vanished connections", &other, &server, told).await;
}

#[tokio::test]
async fn a_runner_that_loses_its_connections_mid_poll_is_replaced() {
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let server = echo_server().await;
    let _durable = short_lease_builder(&pool).build().unwrap();
    let enqueue_only = short_lease_builder(database.pool())
        .runner(false)
        .build()
        .unwrap();
    let request = post(server.url("/"), "before");
    let id = enqueue_only.fire(request).await.unwrap();
    testkit::outcome(&enqueue_only, id, LONG).await.unwrap();
    proxy.black_hole();
    proxy.treat(Manner::Pass);
    let request = post(server.url("/"), "after");
    let id = enqueue_only.fire(request).await.unwrap();
    let outcome = testkit::outcome(&enqueue_only, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Completed);
}

#[tokio::test]
async fn an_unacknowledged_insert_is_sent_once() {
    let Through { proxy, pool, .. } = through_a_proxy().await;
    let server = echo_server().await;
    let durable = short_lease_builder(&pool).build().unwrap();
    let mut ledger = super::Ledger::new();
    for number in 0..10 {
        // Every other time the answer to the repeated insert is lost, too.
        proxy.lose_answers_to("INSERT INTO mq_msgs", 1 + number % 2);
        let name = number.to_string();
        let told = in_time(call(&durable, &server.url("/"), &name, number % 4 < 2)).await;
        assert!(!matches!(
            told,
            super::Told::Refused | super::Told::Unknown(_)
        ));
        ledger.insert(name, told);
    }
    assert_eq!(proxy.lost(), 15);
    let twice = check_ledger(
        "lost acknowledgements of inserts",
        &durable,
        &server,
        ledger,
    )
    .await;
    assert_eq!(twice, 0);
}

#[tokio::test]
async fn an_unacknowledged_ordered_insert_is_sent_once() {
    let Through { proxy, pool, .. } = through_a_proxy().await;
    let server = echo_server().await;
    let durable = short_lease_builder(&pool).build().unwrap();
    durable
        .status("00000000-0000-7000-8000-000000000000".parse().unwrap())
        .await
        .unwrap();
    proxy.lose_answers_to(".enqueue(", 1);
    let request = post(server.url("/"), "one").with(Options::default().ordered("key"));
    let id = in_time(durable.fire(request)).await.unwrap();
    assert_eq!(proxy.lost(), 1);
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn unacknowledged_settle_wakes_waiters_and_resends_nothing() {
    let Through { proxy, pool, .. } = through_a_proxy().await;
    let server = echo_server().await;
    let durable = short_lease_builder(&pool).build().unwrap();
    let mut ledger = super::Ledger::new();
    for number in 0..10 {
        proxy.lose_answers_to("INSERT INTO outcomes", 1);
        let name = number.to_string();
        let told = in_time(call(&durable, &server.url("/"), &name, number < 8)).await;
        eventually("the answer to the settle is lost", || async {
            proxy.lost() > number
        })
        .await;
        ledger.insert(name, told);
    }
    let twice = check_ledger(
        "lost acknowledgements of settles",
        &durable,
        &server,
        ledger,
    )
    .await;
    assert_eq!(twice, 0);
}

#[tokio::test]
async fn an_unacknowledged_failed_attempt_is_retried_once() {
    let Through { proxy, pool, .. } = through_a_proxy().await;
    let server = Server::in_turn(&[503, 200]).await;
    let durable = short_lease_builder(&pool).build().unwrap();
    proxy.lose_answers_to("INSERT INTO attempts", 1);
    // The request is held for this process, which doesn't know that: the lease has to run out.
    let response = in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(proxy.lost(), 1);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn an_unacknowledged_renewal_sends_nothing_twice() {
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    // Longer than the shortest lease: a lost renewal costs a third of the lease, and a busy machine
    // costs more.
    let lease = 3 * LEASE;
    let (server, gate) = Server::held(200).await;
    let durable = short_lease_builder(&pool).lease(lease).build().unwrap();
    let waiting = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move { durable.await_response(post(&url, "x")).await }
    });
    server.wait_for(1).await;
    let _other = short_lease_builder(database.pool())
        .lease(lease)
        .build()
        .unwrap();
    proxy.lose_answers_to("FOR UPDATE OF m SKIP LOCKED", 3);
    eventually("renewals are lost", || async { proxy.lost() == 3 }).await;
    passing(&database, lease).await;
    gate.add_permits(10);
    let response = in_time(waiting).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 1);
    assert_eq!(rows(&database, "mq_msgs").await, 0);
}

#[tokio::test]
async fn an_unacknowledged_claim_is_repeated_after_its_lease() {
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let server = echo_server().await;
    let enqueue_only = short_lease_builder(database.pool())
        .runner(false)
        .build()
        .unwrap();
    let id = enqueue_only.fire(post(server.url("/"), "x")).await.unwrap();
    proxy.lose_answers_to("mq_poll", 1);
    let durable = short_lease_builder(&pool).build().unwrap();
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(proxy.lost(), 1);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn waiters_wake_when_the_listening_connection_goes_silent() {
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let (server, gate) = Server::held(200).await;
    let runner = short_lease_builder(database.pool()).build().unwrap();
    let elsewhere = short_lease_builder(&pool).runner(false).build().unwrap();
    let id = runner.fire(post(server.url("/"), "x")).await.unwrap();
    let waiting = tokio::spawn({
        let elsewhere = elsewhere.clone();
        async move { elsewhere.response(id).await }
    });
    server.wait_for(1).await;
    let mut silenced = 0;
    eventually("a connection listens", || {
        silenced += proxy.black_hole_those_that_said("LISTEN");
        std::future::ready(silenced > 0)
    })
    .await;
    let released = Instant::now();
    gate.add_permits(1);
    in_time(waiting).await.unwrap().unwrap();
    // Without notifications the waiter asks every second.
    assert!(
        released.elapsed() < Duration::from_secs(5),
        "took {:?}",
        released.elapsed()
    );
}

/// Sends requests over a network to the receiver that at first has this fault and then has none.
/// Returns how many requests were delivered more than once.
async fn with_fault(fault: &str, manner: Manner) -> (usize, Server) {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move {
        // Long enough to be cut in the middle.
        let mut response = reply(200, seen.body);
        response
            .headers_mut()
            .insert("padding", "x".repeat(500).parse().unwrap());
        response
    })
    .await;
    let proxy = Proxy::start(server.addr).await;
    proxy.treat(manner);
    let durable: Durable = short_lease_builder(database.pool())
        .attempt_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let url = proxy.url("/");
    let calling = load(&durable, &url, 4, 5);
    tokio::pin!(calling);
    let ledger = tokio::select! {
        ledger = &mut calling => ledger,
        () = eventually("four connections break", || async { proxy.broken() >= 4 }) => {
            proxy.treat(Manner::Pass);
            calling.await
        }
    };
    let twice = check_ledger(fault, &durable, &server, ledger).await;
    (twice, server)
}

#[tokio::test]
async fn a_slow_network_to_the_receiver_sends_nothing_twice() {
    let delay = Manner::Delay(Duration::from_millis(10));
    let (twice, server) = with_fault("a slow network to the receiver", delay).await;
    assert_eq!((twice, server.count()), (0, 20));
}

#[tokio::test]
async fn requests_cut_in_transit_arrive_with_a_later_attempt() {
    let (twice, server) = with_fault("requests cut on their way", Manner::CutRequest(60)).await;
    assert_eq!((twice, server.count()), (0, 20));
}

#[tokio::test]
async fn requests_whose_responses_are_cut_are_retried() {
    // The receiver got these requests, and gets them again.
    let (twice, _) = with_fault("answers cut on their way", Manner::CutAnswer(300)).await;
    assert!(twice >= 1);
}

#[tokio::test]
async fn requests_whose_responses_are_reset_are_retried() {
    let (twice, _) = with_fault("answers lost to a reset", Manner::ResetAnswer(300)).await;
    assert!(twice >= 1);
}

#[tokio::test]
async fn requests_that_vanish_arrive_with_a_later_attempt() {
    let (twice, server) = with_fault("requests that vanish", Manner::BlackHole).await;
    assert_eq!((twice, server.count()), (0, 20));
}
