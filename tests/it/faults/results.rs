//! Results that wait for a database that takes none of them.

use std::sync::Arc;
use std::time::Duration;

use requeuest::{Durable, Options, RequestId};
use tokio::sync::Semaphore;

use super::network::{Through, through_a_proxy};
use crate::proxy::Manner;
use crate::support::{Server, builder, builder_on, eventually, migrated, outcome_of, post, reply};

const CONCURRENCY: usize = 4;
const ANSWER: usize = 256 * 1024;
/// As many answers as this fill the budget.
const FILL: usize = 4;
const REQUESTS: usize = 40;

/// Waits until a request that is enqueued now in another database, with this delay, has arrived.
pub async fn passing_elsewhere(time: Duration) {
    let database = migrated().await;
    let server = Server::always(200).await;
    let clock = builder(&database).build().unwrap();
    let delayed = post(server.url("/"), "").with(Options::default().delay(time));
    clock.fire(delayed).await.unwrap();
    server.wait_for(1).await;
}

/// Gives a large answer for each permit.
async fn large_answers(permits: usize) -> (Server, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(permits));
    let wait = Arc::clone(&gate);
    let server = Server::start(move |number, _| {
        let wait = Arc::clone(&wait);
        async move {
            wait.acquire().await.unwrap().forget();
            reply(200, vec![number as u8; ANSWER])
        }
    })
    .await;
    (server, gate)
}

/// Each response is kept as it was, and no request was sent again.
async fn check(durable: &Durable, server: &Server, ids: Vec<RequestId>) {
    let mut answers = Vec::new();
    for id in ids {
        let outcome = outcome_of(durable, id).await;
        let body = outcome.response().unwrap().body();
        assert_eq!(body.len(), ANSWER);
        answers.push(body[0] as usize);
    }
    answers.sort_unstable();
    assert!(answers.iter().copied().eq(0..REQUESTS), "{answers:?}");
    assert_eq!(server.count(), REQUESTS);
}

#[tokio::test]
async fn no_attempt_begins_while_too_many_results_are_refused() {
    let Through { proxy, pool, .. } = through_a_proxy().await;
    let (server, _gate) = large_answers(REQUESTS).await;
    let durable = builder_on(&pool)
        .concurrency(CONCURRENCY)
        .max_unsettled_bytes(FILL * ANSWER)
        .build()
        .unwrap();
    // The disk is full.
    proxy.refuse("INSERT INTO outcomes", "53100");
    let mut ids = Vec::new();
    for _ in 0..REQUESTS {
        ids.push(durable.fire(post(server.url("/"), "x")).await.unwrap());
    }
    server.wait_for(FILL).await;
    let refused = proxy.refused();
    eventually("further refusals", || async {
        proxy.refused() > refused + 3
    })
    .await;
    passing_elsewhere(Duration::from_secs(1)).await;
    // What fills the budget, and what was under way by then.
    let most = FILL + CONCURRENCY;
    let held = server.count();
    println!("{held} results of {ANSWER} bytes are held, at most {most} may be");
    assert!((FILL..=most).contains(&held), "{held} attempts were made");
    proxy.refuse_nothing();
    check(&durable, &server, ids).await;
}

#[tokio::test]
async fn no_attempt_begins_while_too_many_results_wait_in_an_outage() {
    let Through {
        proxy,
        pool,
        database,
    } = through_a_proxy().await;
    let (server, gate) = large_answers(0).await;
    let elsewhere = builder(&database).runner(false).build().unwrap();
    let mut ids = Vec::new();
    for _ in 0..REQUESTS {
        ids.push(elsewhere.fire(post(server.url("/"), "x")).await.unwrap());
    }
    let durable = builder_on(&pool)
        // A poll claims half as many again, and these wait here for their attempt.
        .concurrency(2 * CONCURRENCY)
        .max_share(1.0)
        .max_unsettled_bytes(FILL * ANSWER)
        .build()
        .unwrap();
    server.wait_for(2 * CONCURRENCY).await;
    proxy.black_hole();
    gate.add_permits(REQUESTS);
    passing_elsewhere(Duration::from_secs(2)).await;
    assert_eq!(server.count(), 2 * CONCURRENCY);
    proxy.treat(Manner::Pass);
    proxy.reset();
    check(&elsewhere, &server, ids).await;
    drop(durable);
}
