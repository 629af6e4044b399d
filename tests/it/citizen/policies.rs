//! Policies and pauses that are set at run time: what they leave in the database.

use std::time::{Duration, Instant};

use requeuest::{DestinationPolicy, RateLimit};

use super::{attempts_of, fire, origin};
use crate::support::{Server, builder, eventually, migrated, other_process, post, rows};

/// How soon other processes follow, as documented.
const REACH: Duration = Duration::from_secs(2);

const MARKED: &str = "destinations WHERE limited";

#[tokio::test]
async fn a_destination_is_marked_as_limited_only_while_all_processes_share_a_limit() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let elsewhere = other_process(&database).await;
    let destination = elsewhere.destination(&origin(&server)).unwrap();
    let default = DestinationPolicy::default;
    for (policy, marked) in [
        (Some(default().max_concurrency_per_process(1)), 0),
        (Some(default().max_concurrency(1)), 1),
        (None, 0),
        (
            Some(default().rate(RateLimit::new(1, Duration::from_secs(1)))),
            1,
        ),
        (Some(default()), 0),
    ] {
        destination.set_policy(policy.clone()).await.unwrap();
        assert_eq!(rows(&database, MARKED).await, marked, "{policy:?}");
    }
    // A limit in the code of a process that sends marks it, too, but not against a policy that was
    // set at run time.
    let limited = builder(&database)
        .destination("*", default().max_concurrency(2))
        .build()
        .unwrap();
    let ids = fire(&limited, &server, 3).await;
    assert_eq!(attempts_of(&limited, &ids).await, [1; 3]);
    assert_eq!(rows(&database, MARKED).await, 0);
    destination.set_policy(None).await.unwrap();
    eventually("the limit of the code holds", || async {
        let ids = fire(&limited, &server, 1).await;
        attempts_of(&limited, &ids).await;
        rows(&database, MARKED).await == 1
    })
    .await;
}

#[tokio::test]
async fn a_mark_goes_with_the_policy_while_processes_send() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let elsewhere = other_process(&database).await;
    let destination = elsewhere.destination(&origin(&server)).unwrap();
    destination
        .set_policy(DestinationPolicy::default().max_concurrency(2))
        .await
        .unwrap();
    eventually("the limit is known", || async {
        let ids = fire(&durable, &server, 1).await;
        attempts_of(&durable, &ids).await;
        rows(&database, "destination_leases").await == 1
    })
    .await;
    destination.set_policy(None).await.unwrap();
    // The process asks for permits until it has read the change.
    let began = Instant::now();
    while began.elapsed() < REACH {
        let ids = fire(&durable, &server, 1).await;
        attempts_of(&durable, &ids).await;
    }
    assert_eq!(rows(&database, MARKED).await, 0);
}
