//! How processes share the permits and tokens of a limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use requeuest::testkit::TestDatabase;
use requeuest::{DestinationPolicy, Durable};

use super::counting;
use crate::support::{Server, builder, in_time, migrated, post, rows};

fn limited(database: &TestDatabase, channel: &str, permits: u32) -> Durable {
    let limits = DestinationPolicy::default().max_concurrency(permits);
    let builder = builder(database).channel(channel);
    builder.destination("127.0.0.1", limits).build().unwrap()
}

/// Keeps a process busy with requests to the server.
async fn busy(database: &TestDatabase, server: &Server, channel: &str, permits: u32) -> Durable {
    let durable = limited(database, channel, permits);
    let requests = (0..2000).map(|_| post(server.url("/"), ""));
    durable.fire_many(requests).await.unwrap();
    durable
}

#[tokio::test]
async fn a_single_permit_goes_from_process_to_process_by_turns() {
    let database = migrated().await;
    let most = Arc::new(AtomicUsize::new(0));
    let server = counting(Arc::clone(&most), Duration::from_millis(20)).await;
    let _busy = busy(&database, &server, "busy", 1).await;
    server.wait_for(20).await;
    let other = limited(&database, "other", 1);
    for _ in 0..2 {
        let before = server.count();
        in_time(other.await_response(post(server.url("/"), "")))
            .await
            .unwrap();
        // The busy process has its turn again.
        server.wait_for(before + 10).await;
    }
    assert_eq!(most.load(Ordering::SeqCst), 1);
    assert!(rows(&database, "mq_msgs WHERE channel_name = 'busy'").await > 0);
}

#[tokio::test]
async fn two_permits_are_shared_by_three_processes() {
    let database = migrated().await;
    let most = Arc::new(AtomicUsize::new(0));
    let server = counting(Arc::clone(&most), Duration::from_millis(20)).await;
    let _first = busy(&database, &server, "first", 2).await;
    server.wait_for(20).await;
    let _second = busy(&database, &server, "second", 2).await;
    let third = limited(&database, "third", 2);
    for _ in 0..2 {
        in_time(third.await_response(post(server.url("/"), "")))
            .await
            .unwrap();
    }
    assert!(most.load(Ordering::SeqCst) <= 2);
    for channel in ["first", "second"] {
        let left = rows(
            &database,
            &format!("mq_msgs WHERE channel_name = '{channel}'"),
        )
        .await;
        assert!(left > 0, "{channel}");
    }
}

#[tokio::test]
async fn a_stored_rate_that_allows_nothing_fails_no_lease() {
    let database = migrated().await;
    let leased: Vec<(String, i32, i64)> = sqlx::query_as(
        "SELECT destination, tokens, wait_ms FROM requeuest.lease_destinations(
             gen_random_uuid(), '{good,negative,rare,zero}', '{NULL,NULL,-1,0}', '{0,0,0,0}',
             '{1,1,1,1}', '{10,-1,5e-17,0}', '{5,5,0,5}', '{2,2,2,2}', interval '1 minute')",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    let day = 24 * 3600 * 1000;
    let expected = [
        ("good", 2, 0),
        ("negative", 0, day),
        ("rare", 0, day),
        ("zero", 0, day),
    ];
    let leased: Vec<_> = leased
        .iter()
        .map(|(name, tokens, wait)| (&**name, *tokens, *wait))
        .collect();
    assert_eq!(leased, expected);
}
