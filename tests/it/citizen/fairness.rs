//! What destinations that are limited, that hang or that are closed cost the others, and what each
//! attempt says of its own destination.

use std::time::{Duration, Instant};

use requeuest::retry::RetryPolicy;
use requeuest::{
    AutoDisable, CircuitBreaker, DestinationPolicy, DestinationState, FailureClass, Options,
    RateLimit, Uuid,
};

use super::disabling::pass;
use super::{attempts_of, fire, origin};
use crate::support::{
    LONG, Server, builder, eventually, in_time, migrated, other_process, outcome_of, post, quick,
};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_backlog_of_a_limited_destination_delays_no_other() {
    let database = migrated().await;
    let (server, good) = (Server::always(200).await, Server::always(200).await);
    let limit = RateLimit::new(100, 60 * SECOND).burst(20);
    let durable = builder(&database)
        .destination(
            "key:partner",
            DestinationPolicy::default().rate(limit.clone()),
        )
        .destination(
            "key:fast",
            DestinationPolicy::default().rate(RateLimit::new(5, SECOND)),
        )
        .build()
        .unwrap();
    let ids = fire(&durable, &good, 5).await;
    attempts_of(&durable, &ids).await;
    let elsewhere = other_process(&database).await;
    for key in ["partner", "fast"] {
        let keyed = |_| post(server.url("/"), "").with(Options::default().limit_key(key));
        elsewhere.fire_many((0..1000).map(keyed)).await.unwrap();
        let before = server.count();
        server.wait_for(before + 1).await;
        for _ in 0..5 {
            let fired = Instant::now();
            let id = elsewhere.fire(post(good.url("/"), "")).await.unwrap();
            outcome_of(&durable, id).await;
            assert!(fired.elapsed() < 3 * SECOND, "{key}: {:?}", fired.elapsed());
        }
    }
}

#[tokio::test]
async fn many_destinations_that_hang_leave_a_slot_of_a_few() {
    let database = migrated().await;
    let (hung, _hung) = Server::held(200).await;
    let good = Server::always(200).await;
    let durable = builder(&database).concurrency(6).build().unwrap();
    let ids = fire(&durable, &good, 5).await;
    attempts_of(&durable, &ids).await;
    let elsewhere = other_process(&database).await;
    let requests = (0..50).map(|number| {
        let options = Options::default().limit_key(format!("hung-{number}"));
        post(hung.url("/"), "").with(options)
    });
    elsewhere.fire_many(requests).await.unwrap();
    hung.wait_for(5).await;
    for _ in 0..5 {
        in_time(durable.await_response(post(good.url("/"), "")))
            .await
            .unwrap();
    }
    assert_eq!(hung.count(), 5);
}

#[tokio::test]
async fn a_process_that_starts_sends_nothing_to_a_closed_destination() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let elsewhere = other_process(&database).await;
    let destination = elsewhere.destination(&origin(&server)).unwrap();
    destination.disable("the customer has left").await.unwrap();
    for _ in 0..5 {
        // A program that makes one call.
        let durable = builder(&database).build().unwrap();
        fire(&durable, &server, 1).await;
        durable.shutdown(LONG).await.unwrap();
    }
    assert_eq!(server.count(), 0);
    let delivering = builder(&database).build().unwrap();
    destination.enable().await.unwrap();
    server.wait_for(5).await;
    delivering.shutdown(LONG).await.unwrap();
    assert_eq!(server.count(), 5);
}

#[tokio::test]
async fn a_caller_of_a_closed_destination_gets_an_error_after_its_max_age() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let destination = durable.destination(&origin(&server)).unwrap();
    destination.disable("the customer has left").await.unwrap();
    let policy = RetryPolicy::exponential().max_age(2 * SECOND);
    let request = || post(server.url("/"), "").with(Options::default().retry(policy.clone()));
    let fired = durable.fire(request()).await.unwrap();
    let error = in_time(durable.await_response(request()))
        .await
        .unwrap_err();
    assert_eq!(error.failure_class(), Some(FailureClass::Deferred));
    // No caller waits for this one, so that time doesn't count.
    destination.enable().await.unwrap();
    assert_eq!(attempts_of(&durable, &[fired]).await, [1]);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn an_answer_that_throttles_is_a_failure_unless_it_is_429() {
    for (status, disabled) in [(502, true), (429, false)] {
        let database = migrated().await;
        let server = Server::always(status).await;
        let hour = 3600 * SECOND;
        let policy = DestinationPolicy::webhooks()
            .throttle_for(Duration::from_millis(1))
            .auto_disable(
                AutoDisable::after(4 * hour)
                    .at_least_apart(hour)
                    .failures(2),
            );
        let durable = builder(&database)
            .webhooks()
            .guard(None)
            .retry(quick().max_attempts(1))
            .destination("*", policy)
            .build()
            .unwrap();
        let destination = durable.destination(&origin(&server)).unwrap();
        for _ in 0..2 {
            let reported = destination.status().await.unwrap().failures;
            let id = fire(&durable, &server, 1).await[0];
            outcome_of(&durable, id).await;
            eventually("the answer is reported", || async {
                let status = destination.status().await.unwrap();
                status.failures > reported
                    || status.state == DestinationState::Disabled
                    || !disabled
            })
            .await;
            pass(&database, 5 * hour).await;
        }
        let state = destination.status().await.unwrap().state;
        assert_eq!(state == DestinationState::Disabled, disabled, "{status}");
    }
}

#[tokio::test]
async fn an_attempt_from_before_the_breaker_opened_is_no_probe() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let failing = Server::always(500).await;
    let breaker = CircuitBreaker::default()
        .min_attempts(5)
        .open_for(SECOND)
        .successes(1);
    let durable = builder(&database)
        .retry(quick().max_attempts(1))
        .destination("*", DestinationPolicy::default().circuit_breaker(breaker))
        .build()
        .unwrap();
    let to =
        |server: &Server| post(server.url("/"), "").with(Options::default().limit_key("shared"));
    let slow = durable.fire(to(&server)).await.unwrap();
    server.wait_for(1).await;
    for _ in 0..6 {
        durable.fire(to(&failing)).await.unwrap();
    }
    let destination = durable.destination("shared").unwrap();
    eventually("it opens", || async {
        destination.status().await.unwrap().state == DestinationState::CircuitOpen
    })
    .await;
    let waiting = "SELECT id FROM requeuest.mq_msgs WHERE state IN ('waiting', 'deferred')";
    let waiting: Vec<Uuid> = sqlx::query_scalar(waiting)
        .fetch_all(database.pool())
        .await
        .unwrap();
    for id in waiting {
        durable.cancel(id.into()).await.unwrap();
    }
    eventually("it is half open", || async {
        destination.status().await.unwrap().state == DestinationState::HalfOpen
    })
    .await;
    answer.add_permits(1);
    outcome_of(&durable, slow).await;
    // A report of this probe comes after one of the slow attempt.
    let probe = durable.fire(to(&failing)).await.unwrap();
    outcome_of(&durable, probe).await;
    eventually("the probe opens it again", || async {
        destination.status().await.unwrap().state == DestinationState::CircuitOpen
    })
    .await;
}
