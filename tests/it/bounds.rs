//! Nothing grows without a bound: attempts, locks, old rows, memory.

use requeuest::Status;

use crate::support::{Server, builder, migrated, outcome_of, post, quick};

#[tokio::test]
async fn a_failing_request_keeps_its_first_and_last_attempts() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = builder(&database)
        .retry(quick().max_attempts(60))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Discarded, 60)
    );
    // The last attempt is part of the outcome.
    let numbers: Vec<i32> =
        sqlx::query_scalar("SELECT number FROM requeuest.attempts ORDER BY number")
            .fetch_all(database.pool())
            .await
            .unwrap();
    assert!(
        numbers.iter().copied().eq((1..=3).chain(40..=59)),
        "{numbers:?}"
    );
}
