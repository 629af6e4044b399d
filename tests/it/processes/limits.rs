//! What a process that dies leaves of the limits that all processes share.

use std::time::{Duration, Instant};

use requeuest::{DestinationPolicy, Options};

use super::{Me, Member, say};
use crate::support::{
    Server, builder, eventually_rows, in_time, migrated, outcome_of, plays, post,
};

const PERMITS: u32 = 4;
const LEASE: Duration = Duration::from_secs(2);

fn limited() -> DestinationPolicy {
    DestinationPolicy::default().max_concurrency(PERMITS)
}

#[tokio::test]
async fn permits_of_a_killed_process_are_back_within_the_lease() {
    let database = migrated().await;
    let (held, _held) = Server::held(200).await;
    let mut member = Member::start(
        module_path!(),
        "hold_permits_until_killed",
        "holder",
        &database,
        &held.url("/"),
    );
    member.says("ready").await;
    held.wait_for(PERMITS as usize).await;
    eventually_rows(&database, "destination_leases", 1).await;
    member.kill().await;
    let killed = Instant::now();
    // Another process delivers to the same destination, under another limit key's name.
    let durable = builder(&database)
        .lease(LEASE)
        .channel("other")
        .destination("key:shared", limited())
        .build()
        .unwrap();
    let server = Server::always(200).await;
    let request = post(server.url("/"), "").with(Options::default().limit_key("shared"));
    let id = durable.fire(request).await.unwrap();
    let outcome = in_time(outcome_of(&durable, id)).await;
    assert_eq!(outcome.attempts(), 1);
    // The permits expire with the lease. Then they are asked for five times a second, and a poll
    // comes at least once a second.
    let took = killed.elapsed();
    assert!(took < LEASE + Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn hold_permits_until_killed() {
    if !plays("hold_permits_until_killed") {
        return;
    }
    let me = Me::new();
    let durable = me
        .handle()
        .lease(LEASE)
        .destination("key:shared", limited())
        .build()
        .unwrap();
    say("ready");
    for _ in 0..2 * PERMITS {
        let request = post(&me.url, "").with(Options::default().limit_key("shared"));
        durable.fire(request).await.unwrap();
    }
    std::future::pending::<()>().await;
}
