//! Operations whose processes die.

use std::time::Duration;

use requeuest::admin::{Action, NewOperation, OperationState, RequestFilter};
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, Options};

use crate::processes::{Me, Member, say};
use crate::support::{
    Server, builder, count, eventually, eventually_rows, eventually_some, migrated, other_process,
    plays, post, quick, rows,
};

const CHANNEL: &str = "emails";
const LETTERS: usize = 300;
const RATE: f64 = 200.0;

/// Makes this many dead letters in [`CHANNEL`]. No runner of it is left.
pub(super) async fn dead_letters(database: &TestDatabase, number: usize) {
    let server = Server::always(500).await;
    let durable = builder(database).channel(CHANNEL).build().unwrap();
    let once = || Options::default().retry(quick().max_attempts(1));
    let requests = (0..number).map(|_| post(server.url("/"), "x").with(once()));
    durable.fire_many(requests).await.unwrap();
    eventually_rows(database, "outcomes_kept", number as i64).await;
    durable.shutdown(Duration::from_secs(5)).await.unwrap();
}

/// A process that has a runner of another channel.
fn elsewhere(durable: requeuest::DurableBuilder) -> Durable {
    durable.channel("elsewhere").build().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operation_continues_where_it_was_when_its_process_is_killed_and_keeps_its_rate() {
    let database = migrated().await;
    dead_letters(&database, LETTERS).await;
    let operator = other_process(&database).await;
    let admin = operator.admin().by("ann").because("mended");
    let replay = NewOperation::new(Action::Replay, RequestFilter::new().channel(CHANNEL));
    let id = admin.start(&replay.rate(RATE)).await.unwrap();
    let operation = async || admin.operation(id).await.unwrap().unwrap();
    assert!(!operation().await.is_driven);
    drop(operator);

    let url = "http://127.0.0.1:9/";
    let mut process = Member::start(module_path!(), "driver", "d", &database, url);
    process.says("ready").await;
    eventually("some are replayed", || async { operation().await.done > 0 }).await;
    process.kill().await;
    let done = operation().await;
    assert_eq!(done.state, OperationState::Running);
    assert!(done.done < LETTERS as u64, "{done:?}");

    let driver = elsewhere(builder(&database));
    let finished = eventually_some("its end", || async {
        let now = operation().await;
        (now.state == OperationState::Finished).then_some(now)
    })
    .await;
    assert!(finished.is_driven);
    let counts = (
        finished.done,
        finished.skipped,
        finished.failed,
        finished.looked,
    );
    assert_eq!(counts, (LETTERS as u64, 0, 0, LETTERS as u64));
    assert!(finished.finished_at.unwrap() > finished.started_at);
    // Each once.
    assert_eq!(rows(&database, "outcomes_kept").await, 0);
    let replayed = "SELECT count(DISTINCT o.replayed_as) FROM requeuest.outcomes o
                    JOIN requeuest.mq_msgs m ON m.id = o.replayed_as";
    assert_eq!(count(&database, replayed).await, LETTERS as i64);
    assert_eq!(rows(&database, "mq_msgs").await, LETTERS as i64);
    // The record has each of them, with who and why.
    let recorded = "SELECT sum(json_array_length(detail -> 'requests'))::bigint
                    FROM requeuest.changes WHERE action = 'replay' AND operation IS NOT NULL
                        AND actor = 'ann' AND reason = 'mended'";
    assert_eq!(count(&database, recorded).await, LETTERS as i64);
    // No second had more than the rate allows, and a chunk.
    let most = "SELECT max(s.number)::bigint FROM (
            SELECT sum(json_array_length(c.detail -> 'requests')) OVER (
                ORDER BY c.at RANGE BETWEEN CURRENT ROW AND '1 second' FOLLOWING
            ) AS number
            FROM requeuest.changes c WHERE c.action = 'replay'
        ) s";
    let most = count(&database, most).await;
    assert!(most <= (RATE * 1.25) as i64, "{most} in a second");
    driver.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
#[ignore = "the process of a test"]
async fn driver() {
    if !plays("driver") {
        return;
    }
    let durable = elsewhere(Me::new().handle());
    say("ready");
    std::future::pending::<()>().await;
    drop(durable);
}
