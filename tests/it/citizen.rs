//! Limits, pauses and breakers of destinations, and what slow ones leave to the others.

mod disabling;
mod fairness;
mod leases;
mod memory;
mod policies;
mod proxies;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use requeuest::guard::Guard;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    AutoDisable, CircuitBreaker, DestinationEventKind, DestinationPolicy, DestinationState,
    Durable, DurableBuilder, RateLimit, RequestId, RetryBudget, Status,
};

use crate::support::{
    LONG, Server, builder, eventually, eventually_rows, in_time, migrated, other_process,
    outcome_of, passing, post, reply, rows,
};

fn origin(server: &Server) -> String {
    format!("http://{}", server.addr)
}

/// Fires so many requests, and returns their ids.
async fn fire(durable: &Durable, server: &Server, number: usize) -> Vec<RequestId> {
    let requests = (0..number).map(|number| post(server.url("/"), number.to_string()));
    let mut ids = Vec::new();
    for request in requests {
        ids.push(durable.fire(request).await.unwrap());
    }
    ids
}

/// The number of attempts of each request, once all have ended well.
async fn attempts_of(durable: &Durable, ids: &[RequestId]) -> Vec<u32> {
    let mut attempts = Vec::new();
    for id in ids {
        let outcome = outcome_of(durable, *id).await;
        assert_eq!(outcome.status(), Status::Completed, "{outcome:?}");
        attempts.push(outcome.attempts());
    }
    attempts
}

fn quick_retries(database: &TestDatabase) -> DurableBuilder {
    builder(database).retry(RetryPolicy::constant(Duration::from_millis(50)))
}

/// Answers with 200 after a while, and counts how many requests it has at the same time.
async fn counting(most: Arc<AtomicUsize>, pause: Duration) -> Server {
    let now = Arc::new(AtomicUsize::new(0));
    Server::start(move |_, _| {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        async move {
            let count = now.fetch_add(1, Ordering::SeqCst) + 1;
            most.fetch_max(count, Ordering::SeqCst);
            tokio::time::sleep(pause).await;
            now.fetch_sub(1, Ordering::SeqCst);
            reply(200, "")
        }
    })
    .await
}

#[tokio::test]
async fn receivers_that_hang_leave_room_for_those_that_answer() {
    let database = migrated().await;
    let (first, _first) = Server::held(200).await;
    let (second, _second) = Server::held(200).await;
    let good = Server::always(200).await;
    let durable = builder(&database).concurrency(32).build().unwrap();
    for server in [&first, &second] {
        let requests = (0..50).map(|number| post(server.url("/"), number.to_string()));
        durable.fire_many(requests).await.unwrap();
        server.wait_for(1).await;
    }
    eventually_rows(&database, "mq_msgs WHERE state = 'waiting'", 0).await;
    for _ in 0..5 {
        let began = Instant::now();
        let response = in_time(durable.await_response(post(good.url("/"), "")))
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    assert!(first.count() + second.count() < 32);
}

#[tokio::test]
async fn a_paused_destination_gets_nothing_from_any_process_until_it_is_resumed() {
    let database = migrated().await;
    let (server, other) = (Server::always(200).await, Server::always(200).await);
    let durable = builder(&database).build().unwrap();
    let elsewhere = other_process(&database).await;
    let destination = elsewhere.destination(&origin(&server)).unwrap();
    destination.pause(None).await.unwrap();
    assert_eq!(
        destination.status().await.unwrap().state,
        DestinationState::Paused
    );
    // Until the change has reached the process that delivers, its requests may still go out.
    eventually("the pause is known", || async {
        let before = server.count();
        fire(&durable, &server, 1).await;
        fire(&durable, &other, 1).await;
        eventually_rows(
            &database,
            "mq_msgs WHERE state NOT IN ('deferred', 'waiting')",
            0,
        )
        .await;
        server.count() == before && rows(&database, "mq_msgs WHERE state = 'deferred'").await > 0
    })
    .await;
    let before = server.count();
    let ids = fire(&durable, &server, 20).await;
    eventually_rows(&database, "mq_msgs WHERE state <> 'deferred'", 0).await;
    assert_eq!(server.count(), before);
    assert_eq!(
        durable.status(ids[0]).await.unwrap(),
        Some(Status::Deferred)
    );
    destination.resume().await.unwrap();
    assert_eq!(attempts_of(&durable, &ids).await, [1; 20]);
    assert_eq!(
        destination.status().await.unwrap().state,
        DestinationState::Open
    );
}

#[tokio::test]
async fn a_disabled_destination_keeps_its_requests_until_it_is_enabled() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let destination = durable.destination(&origin(&server)).unwrap();
    destination.disable("the customer has left").await.unwrap();
    let ids = fire(&durable, &server, 3).await;
    let status = destination.status().await.unwrap();
    assert_eq!(status.state, DestinationState::Disabled);
    assert_eq!(status.reason.as_deref(), Some("the customer has left"));
    eventually_rows(&database, "mq_msgs WHERE state = 'deferred'", 3).await;
    assert_eq!(server.count(), 0);
    destination.enable().await.unwrap();
    assert_eq!(attempts_of(&durable, &ids).await, [1; 3]);
    let error = destination.enable().await.unwrap_err();
    assert!(error.is_unknown_destination(), "{error}");
}

#[tokio::test]
async fn a_retry_after_pauses_the_destination_for_all_requests() {
    let database = migrated().await;
    let answered: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let times = Arc::clone(&answered);
    let server = Server::start(move |number, _| {
        times.lock().unwrap().push(Instant::now());
        async move {
            let mut response: Response<Full<Bytes>> =
                reply(if number == 0 { 429 } else { 200 }, "");
            response
                .headers_mut()
                .insert("retry-after", "2".parse().unwrap());
            response
        }
    })
    .await;
    let durable = quick_retries(&database).build().unwrap();
    let first = fire(&durable, &server, 1).await;
    server.wait_for(1).await;
    let destination = durable.destination(&origin(&server)).unwrap();
    eventually("the pause is known", || async {
        destination.status().await.unwrap().state == DestinationState::Throttled
    })
    .await;
    let later = fire(&durable, &server, 5).await;
    assert_eq!(attempts_of(&durable, &later).await, [1; 5]);
    assert_eq!(attempts_of(&durable, &first).await, [2]);
    let times = answered.lock().unwrap().clone();
    assert!(
        times[1..]
            .iter()
            .all(|at| *at - times[0] >= Duration::from_millis(1900))
    );
}

#[tokio::test]
async fn a_concurrency_limit_holds_over_all_processes() {
    let database = migrated().await;
    let most = Arc::new(AtomicUsize::new(0));
    let server = counting(Arc::clone(&most), Duration::from_millis(20)).await;
    let policy = DestinationPolicy::default().max_concurrency(3);
    let limited = || {
        let builder = builder(&database).destination(origin(&server), policy.clone());
        builder.build().unwrap()
    };
    let handles = [limited(), limited()];
    let mut ids = Vec::new();
    for _ in 0..20 {
        for durable in &handles {
            ids.extend(fire(durable, &server, 1).await);
        }
    }
    assert_eq!(attempts_of(&handles[0], &ids).await, [1; 40]);
    assert!(most.load(Ordering::SeqCst) <= 3, "{most:?}");
}

#[tokio::test]
async fn a_process_that_uses_all_permits_gives_a_part_of_them_to_another() {
    let database = migrated().await;
    let server = counting(Arc::default(), Duration::from_millis(20)).await;
    let process = |channel: &str| {
        let limits = DestinationPolicy::default().max_concurrency(4);
        let builder = builder(&database).channel(channel);
        builder.destination("127.0.0.1", limits).build().unwrap()
    };
    let busy = process("busy");
    let requests = (0..1000).map(|_| post(server.url("/"), ""));
    busy.fire_many(requests).await.unwrap();
    server.wait_for(50).await;
    let other = process("other");
    for _ in 0..5 {
        in_time(other.await_response(post(server.url("/"), "")))
            .await
            .unwrap();
    }
    assert!(rows(&database, "mq_msgs WHERE channel_name = 'busy'").await > 0);
}

#[tokio::test]
async fn a_shutdown_gives_permits_back_at_once() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let limited = || {
        builder(&database)
            .lease(Duration::from_secs(300))
            .destination("*", DestinationPolicy::default().max_concurrency(1))
            .build()
            .unwrap()
    };
    for _ in 0..2 {
        let durable = limited();
        let ids = fire(&durable, &server, 1).await;
        assert_eq!(attempts_of(&durable, &ids).await, [1]);
        durable.shutdown(LONG).await.unwrap();
        assert_eq!(rows(&database, "destination_leases").await, 0);
    }
}

#[tokio::test]
async fn a_rate_limit_holds_over_all_processes() {
    let database = migrated().await;
    let arrived: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let times = Arc::clone(&arrived);
    let server = Server::start(move |_, _| {
        times.lock().unwrap().push(Instant::now());
        async { reply(200, "") }
    })
    .await;
    let limit = RateLimit::new(20, Duration::from_secs(1)).burst(5);
    let policy = DestinationPolicy::default().rate(limit);
    let limited = || {
        let builder = builder(&database).destination(origin(&server), policy.clone());
        builder.build().unwrap()
    };
    let handles = [limited(), limited()];
    let mut ids = Vec::new();
    for durable in &handles {
        let requests = (0..20).map(|number| post(server.url("/"), number.to_string()));
        ids.extend(durable.fire_many(requests).await.unwrap());
    }
    assert_eq!(attempts_of(&handles[0], &ids).await, [1; 40]);
    let times = arrived.lock().unwrap().clone();
    // A bucket of 5, 20 a second, and a lump of 2 unspent in each of the processes.
    for (first, at) in times.iter().enumerate() {
        let within = times[first..]
            .iter()
            .filter(|other| **other - *at < Duration::from_secs(1))
            .count();
        assert!(within <= 5 + 20 + 2 * 2, "{within}");
    }
}

#[tokio::test]
async fn a_limited_destination_that_was_quiet_is_asked_at_once() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let limits = DestinationPolicy::default()
        .max_concurrency(10)
        .rate(RateLimit::new(100, Duration::from_secs(1)));
    let durable = builder(&database)
        .destination("127.0.0.1", limits)
        .build()
        .unwrap();
    let mut took = Vec::new();
    for _ in 0..4 {
        // What was leased for the last request has expired or been given back.
        passing(&database, Duration::from_millis(1200)).await;
        let began = Instant::now();
        in_time(durable.await_response(post(server.url("/"), "")))
            .await
            .unwrap();
        took.push(began.elapsed());
    }
    // Without a word to the runner, all but the first would wait for its next regular poll.
    took.sort_unstable();
    assert!(took[2] < Duration::from_millis(250), "{took:?}");
}

#[tokio::test]
async fn an_open_breaker_keeps_requests_back_and_closes_after_probes() {
    let database = migrated().await;
    let broken = Arc::new(AtomicUsize::new(1));
    let failing = Arc::clone(&broken);
    let server = Server::start(move |_, _| {
        let status = if failing.load(Ordering::SeqCst) == 1 {
            500
        } else {
            200
        };
        async move { reply(status, "") }
    })
    .await;
    let breaker = CircuitBreaker::default()
        .window(Duration::from_secs(60))
        .min_attempts(5)
        .open_for(Duration::from_secs(1))
        .successes(1);
    let events: Arc<Mutex<Vec<DestinationEventKind>>> = Arc::default();
    let seen = Arc::clone(&events);
    let durable = quick_retries(&database)
        .destination("*", DestinationPolicy::default().circuit_breaker(breaker))
        .on_destination_event(move |event| seen.lock().unwrap().push(event.kind.clone()))
        .build()
        .unwrap();
    let ids = fire(&durable, &server, 10).await;
    let has = |kind: DestinationEventKind| {
        let events = Arc::clone(&events);
        async move { events.lock().unwrap().contains(&kind) }
    };
    eventually("it opens", || has(DestinationEventKind::Opened)).await;
    eventually("it half-opens", || has(DestinationEventKind::HalfOpen)).await;
    broken.store(0, Ordering::SeqCst);
    attempts_of(&durable, &ids).await;
    eventually("it closes", || has(DestinationEventKind::Closed)).await;
}

#[tokio::test]
async fn a_receiver_that_is_gone_is_disabled_with_the_webhooks_preset() {
    let database = migrated().await;
    let server = Server::always(410).await;
    let guard = Guard::new().allow("127.0.0.1");
    let durable = builder(&database).webhooks().guard(guard);
    let durable = durable.build().unwrap();
    let first = fire(&durable, &server, 1).await;
    let destination = durable.destination(&origin(&server)).unwrap();
    eventually("it is disabled", || async {
        destination.status().await.unwrap().state == DestinationState::Disabled
    })
    .await;
    let outcome = outcome_of(&durable, first[0]).await;
    assert_eq!(outcome.status(), Status::Discarded);
    fire(&durable, &server, 1).await;
    eventually_rows(&database, "mq_msgs WHERE state = 'deferred'", 1).await;
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn bad_policies_and_names_are_refused_by_name_and_change_nothing() {
    let database = migrated().await;
    let minute = Duration::from_secs(60);
    let default = DestinationPolicy::default;
    for (policy, field) in [
        (default().max_concurrency(0), "max_concurrency"),
        (
            default().max_concurrency_per_process(0),
            "max_concurrency_per_process",
        ),
        (default().rate(RateLimit::new(0, minute)), "rate.count"),
        (
            default().rate(RateLimit::new(1, minute).burst(0)),
            "rate.burst",
        ),
        (
            default().circuit_breaker(CircuitBreaker::default().window(Duration::from_secs(1))),
            "circuit_breaker.window",
        ),
        (
            default().auto_disable(AutoDisable::after(Duration::ZERO)),
            "auto_disable.after",
        ),
    ] {
        let refused = builder(&database).destination("*", policy.clone()).build();
        assert_eq!(refused.unwrap_err().field(), Some(field));
        let durable = builder(&database).runner(false).build().unwrap();
        let destination = durable.destination("tenant-7").unwrap();
        let refused = destination.set_policy(policy).await;
        assert_eq!(refused.unwrap_err().field(), Some(field));
    }
    for share in [0.0, 1.1, f64::NAN] {
        let refused = builder(&database).max_share(share).build();
        assert_eq!(refused.unwrap_err().field(), Some("max_share"));
    }
    let twice = builder(&database)
        .destination("a.example", default())
        .destination("A.example", default())
        .build();
    assert_eq!(twice.unwrap_err().field(), Some("destination"));
    let durable = builder(&database).runner(false).build().unwrap();
    for name in [
        "",
        "https://user:hunter2@a.example",
        "https://a.example/hunter2",
    ] {
        let error = durable.destination(name).unwrap_err();
        assert_eq!(error.field(), Some("destination"));
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
    for unknown in ["https://a.example", "tenant-7"] {
        let destination = durable.destination(unknown).unwrap();
        for result in [
            destination.resume().await,
            destination.enable().await,
            destination.reset().await,
        ] {
            assert!(result.unwrap_err().is_unknown_destination());
        }
    }
    assert_eq!(rows(&database, "destinations").await, 0);
}

#[tokio::test]
async fn a_policy_set_at_run_time_reaches_the_processes_that_deliver() {
    let database = migrated().await;
    let most = Arc::new(AtomicUsize::new(0));
    let server = counting(Arc::clone(&most), Duration::from_millis(20)).await;
    let durable = builder(&database).build().unwrap();
    // The process looks at destinations once it has sent something.
    let ids = fire(&durable, &server, 1).await;
    attempts_of(&durable, &ids).await;
    let elsewhere = other_process(&database).await;
    let destination = elsewhere.destination(&origin(&server)).unwrap();
    destination
        .set_policy(DestinationPolicy::default().max_concurrency(2))
        .await
        .unwrap();
    eventually("the limit is known", || async {
        most.store(0, Ordering::SeqCst);
        let requests = (0..20).map(|_| post(server.url("/"), ""));
        let ids = durable.fire_many(requests).await.unwrap();
        attempts_of(&durable, &ids).await;
        most.load(Ordering::SeqCst) <= 2
    })
    .await;
    assert_eq!(
        destination.status().await.unwrap().state,
        DestinationState::Limited
    );
}

#[tokio::test]
async fn retries_beyond_the_budget_go_out_at_its_pace() {
    let database = migrated().await;
    let arrived: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let times = Arc::clone(&arrived);
    let server = Server::start(move |_, _| {
        times.lock().unwrap().push(Instant::now());
        async { reply(500, "") }
    })
    .await;
    // In any second 5 retries, and one more for each of 20 first attempts times a twentieth.
    let budget = RetryBudget::default()
        .share(0.05)
        .per_second(5)
        .window(Duration::from_secs(1));
    let durable = builder(&database)
        .retry(RetryPolicy::constant(Duration::from_millis(10)))
        .destination("*", DestinationPolicy::default().retry_budget(budget))
        .build()
        .unwrap();
    let ids = fire(&durable, &server, 20).await;
    // Without the budget, all of them were sent again a hundred times a second.
    server.wait_for(40).await;
    let times = arrived.lock().unwrap().clone();
    let took = times[39] - times[19];
    assert!(took > Duration::from_secs(2), "{took:?}");
    for id in ids {
        durable.cancel(id).await.unwrap();
    }
}
