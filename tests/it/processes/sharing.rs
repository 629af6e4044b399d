//! Many processes on one queue.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::try_join_all;

use super::{Arrivals, Me, Member, echo_server, is_long, named_builder, say};
use crate::support::{in_time, migrated, plays, post, rows};

const PROCESSES: usize = 8;

#[tokio::test]
async fn eight_processes_deliver_each_request_once_and_none_starves() {
    let requests = if is_long() { 20_000 } else { 3_000 };
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let server = echo_server(&arrivals, Duration::from_millis(10)).await;
    let mut members: Vec<Member> = (0..PROCESSES)
        .map(|n| {
            let (name, url) = (format!("{n}"), server.url("/"));
            Member::start(
                module_path!(),
                "deliver_until_killed",
                &name,
                &database,
                &url,
            )
        })
        .collect();
    for member in &mut members {
        member.says("ready").await;
    }
    let source = named_builder(database.pool(), "source")
        .runner(false)
        .build()
        .unwrap();
    for batch in 0..requests / 500 {
        let fires = (0..500).map(|n| source.fire(post(server.url("/"), format!("{batch}/{n}"))));
        in_time(try_join_all(fires)).await.unwrap();
    }
    // The whole may take as long as it needs, but each step of progress has a deadline.
    let mut done = 0;
    while done < requests {
        let before = done;
        let progress = async {
            while done == before {
                done = rows(&database, "outcomes WHERE status = 'completed'").await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        in_time(progress).await;
    }
    for member in &mut members {
        member.kill().await;
    }

    let by_number = arrivals.by_number();
    assert_eq!(by_number.len(), requests as usize);
    assert_eq!(
        arrivals.all().len(),
        requests as usize,
        "some were delivered twice"
    );
    let mut shares: BTreeMap<String, usize> = BTreeMap::new();
    for arrival in arrivals.all() {
        *shares.entry(arrival.sender).or_default() += 1;
    }
    println!(
        "duplicates among {PROCESSES} processes: 0 of {requests} requests; delivered by each: {:?}",
        shares.values().collect::<Vec<_>>()
    );
    assert_eq!(shares.len(), PROCESSES);
    // An even share would be an eighth; each process must have at least a fiftieth.
    assert!(
        shares.values().all(|share| share * 50 >= requests as usize),
        "{shares:?}"
    );
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn deliver_until_killed() {
    if !plays("deliver_until_killed") {
        return;
    }
    let me = Me::new();
    let durable = me.handle().concurrency(16).build().unwrap();
    // Ready once a runner has a connection to listen on.
    let listening = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND query ILIKE 'listen%'";
    in_time(async {
        while sqlx::query_scalar::<_, i64>(listening)
            .fetch_one(&me.pool)
            .await
            .unwrap()
            == 0
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    say("ready");
    std::future::pending::<()>().await;
    drop(durable);
}
