//! An outage of Postgres, and the recovery from it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use requeuest::testkit::{Postgres, StopMode};
use requeuest::{Options, Status};
use tokio::sync::Semaphore;

use super::{Arrivals, LEASE, is_long, named_builder};
use crate::support::{Server, eventually, in_time, post, reply};

/// The promised recovery time. sqlxmq's own backoff alone would exceed it after an outage of a
/// minute.
const RECOVERY: Duration = Duration::from_secs(5);
/// Added on a busy machine.
const SLACK: Duration = Duration::from_secs(3);

#[tokio::test]
async fn work_resumes_soon_after_a_postgres_outage() {
    let outage = Duration::from_secs(if is_long() { 60 } else { 5 });
    let postgres = Postgres::builder().private().start().await.unwrap();
    let database = postgres.database().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    let arrivals = Arrivals::default();
    let gate = Arc::new(Semaphore::new(0));
    let server = Server::start({
        let (arrivals, gate) = (arrivals.clone(), Arc::clone(&gate));
        move |_, seen| {
            arrivals.note(&seen);
            let gate = Arc::clone(&gate);
            async move {
                gate.acquire().await.unwrap().forget();
                reply(200, seen.body)
            }
        }
    })
    .await;
    let url = server.url("/");
    let durable = named_builder(database.pool(), "runner")
        .lease(LEASE)
        .build()
        .unwrap();
    let source = named_builder(database.pool(), "source")
        .runner(false)
        .build()
        .unwrap();

    // Two attempts are in flight when Postgres stops, and are answered during the outage. A request
    // falls due during the outage.
    let fired = durable.fire(post(&url, "fired")).await.unwrap();
    let awaited = tokio::spawn({
        let (durable, request) = (durable.clone(), post(&url, "awaited"));
        async move { durable.await_response(request).await }
    });
    server.wait_for(2).await;
    let due = Options::default().delay(Duration::from_secs(2));
    let delayed = source.fire(post(&url, "delayed").with(due)).await.unwrap();
    postgres.stop(StopMode::Immediate).await.unwrap();
    gate.add_permits(1000);
    tokio::time::sleep(outage).await;
    assert!(durable.fire(post(&url, "refused")).await.is_err());
    assert!(
        !awaited.is_finished(),
        "a response was handed out before it was stored"
    );
    postgres.resume().await.unwrap();

    let back = Instant::now();
    let settled = async { in_time(awaited).await.unwrap().unwrap() };
    let delivered = async {
        eventually("the due request is delivered", || async {
            source
                .status(delayed)
                .await
                .is_ok_and(|status| status == Some(Status::Completed))
        })
        .await;
        back.elapsed()
    };
    let claimed = async {
        // Only the runner can send this request.
        let id = loop {
            match source.fire(post(&url, "new")).await {
                Ok(id) => break id,
                Err(error) => assert!(back.elapsed() < RECOVERY + SLACK, "{error}"),
            }
        };
        in_time(source.response(id)).await.unwrap();
        back.elapsed()
    };
    let answered = async {
        let response = settled.await;
        assert_eq!(response.text().unwrap(), "awaited");
        back.elapsed()
    };
    let (answered, delivered, claimed) = tokio::join!(answered, delivered, claimed);
    in_time(durable.response(fired)).await.unwrap();
    let by_number = arrivals.by_number();
    let duplicates: usize = by_number.values().map(|sent| sent.len() - 1).sum();
    println!(
        "recovery from {outage:?} without Postgres: a kept result settled after {answered:?}, \
         a due request delivered after {delivered:?}, a new request after {claimed:?}; \
         duplicates: {duplicates} of {} requests",
        by_number.len()
    );
    for took in [answered, delivered, claimed] {
        assert!(took < RECOVERY + SLACK, "took {took:?}");
    }
    // The failed call's request was not sent, or the error was indeterminate and it was sent once.
    assert!(by_number.get("refused").is_none_or(|sent| sent.len() == 1));
}
