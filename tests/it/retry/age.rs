//! From when the age of a request counts, which limits its retries.

use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{DestinationPolicy, Options, RetryBudget, Status};

use crate::support::{
    LONG, Server, builder, eventually, eventually_rows, in_time, migrated, outcome_of, post, quick,
    reply, rows,
};

/// Lets a time pass for the unfinished requests, as far as these columns tell.
async fn pass(database: &TestDatabase, columns: &[&str]) {
    let set = columns.iter().map(|column| {
        let earlier = "- interval '30 hours'";
        format!("{column} = {column} {earlier}")
    });
    let set = set.collect::<Vec<_>>().join(", ");
    sqlx::query(&format!("UPDATE requeuest.mq_msgs SET {set}"))
        .execute(database.pool())
        .await
        .unwrap();
}

#[tokio::test]
async fn time_before_the_first_attempt_uses_up_no_retries() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let policy = quick().max_age(Duration::from_secs(24 * 60 * 60));
    let enqueuing = builder(&database).runner(false).build().unwrap();
    let options = || Options::default().retry(policy.clone());
    let ordered = || options().ordered("key");
    let delayed = post(server.url("/"), "delayed").with(options().delay(LONG));
    let delayed = enqueuing.fire(delayed).await.unwrap();
    // Its delay was longer than `max_age`, and is over.
    pass(&database, &["created_at"]).await;
    sqlx::query("UPDATE requeuest.mq_msgs SET attempt_at = clock_timestamp()")
        .execute(database.pool())
        .await
        .unwrap();
    let durable = builder(&database).build().unwrap();
    let outcome = outcome_of(&durable, delayed).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Completed, 3)
    );
    in_time(durable.shutdown(LONG)).await.unwrap();

    // These two waited for a runner, and the second one behind the first.
    let server = Server::in_turn(&[503, 503, 200, 503, 503, 200]).await;
    let mut ids = Vec::new();
    for body in ["first", "second"] {
        let request = post(server.url("/"), body).with(ordered());
        ids.push(enqueuing.fire(request).await.unwrap());
    }
    pass(&database, &["created_at", "attempt_at"]).await;
    let durable = builder(&database).build().unwrap();
    for id in ids {
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(
            (outcome.status(), outcome.attempts()),
            (Status::Completed, 3)
        );
    }
}

#[tokio::test]
async fn time_without_a_runner_uses_up_no_retries() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let policy = RetryPolicy::constant(Duration::from_millis(50)).max_age(60 * LONG);
    let first = builder(&database).build().unwrap();
    let request = post(server.url("/"), "x").with(Options::default().retry(policy));
    let id = first.fire(request).await.unwrap();
    server.wait_for(1).await;
    in_time(first.shutdown(LONG)).await.unwrap();
    let before = server.count();
    // The weekend.
    pass(&database, &["created_at", "began_at", "attempt_at"]).await;
    let second = builder(&database).build().unwrap();
    server.wait_for(before + 3).await;
    assert!(!second.status(id).await.unwrap().unwrap().is_terminal());
}

/// Nor does time for which a pause or a limit keeps the request back.
#[tokio::test]
async fn time_for_which_a_destination_takes_nothing_uses_up_no_retries() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let durable = builder(&database).build().unwrap();
    let destination = durable.destination(&server.url("")).unwrap();
    let policy = RetryPolicy::constant(Duration::from_secs(1)).max_age(60 * LONG);
    let request = post(server.url("/"), "x").with(Options::default().retry(policy));
    let id = durable.fire(request).await.unwrap();
    server.wait_for(1).await;
    destination.pause(None).await.unwrap();
    eventually_rows(&database, "mq_msgs WHERE state = 'deferred'", 1).await;
    pass(&database, &["created_at", "began_at", "attempt_at"]).await;
    destination.resume().await.unwrap();
    // No caller waits meanwhile.
    eventually_rows(&database, "mq_msgs", 0).await;
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Completed, 3)
    );
}

#[tokio::test]
async fn waiting_for_a_retry_budget_uses_up_no_retries() {
    let database = migrated().await;
    let server =
        Server::start(|number, _| async move { reply(if number < 14 { 503 } else { 200 }, "") })
            .await;
    let budget = RetryBudget::default()
        .share(0.01)
        .per_second(4)
        .window(Duration::from_secs(1));
    let policy =
        RetryPolicy::constant(Duration::from_millis(10)).max_age(Duration::from_millis(500));
    let durable = builder(&database)
        .retry(policy)
        .destination("*", DestinationPolicy::default().retry_budget(budget))
        .build()
        .unwrap();
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(durable.fire(post(server.url("/"), "x")).await.unwrap());
    }
    // Fourteen retries take two seconds and a half. No caller waits meanwhile.
    eventually_rows(&database, "mq_msgs", 0).await;
    for id in ids {
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(outcome.status(), Status::Completed, "{outcome:?}");
    }
}

/// The limit still holds for time that passes between attempts.
#[tokio::test]
async fn the_age_of_a_request_that_is_retried_is_limited() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let policy = RetryPolicy::constant(Duration::from_millis(50)).max_age(60 * LONG);
    let durable = builder(&database).build().unwrap();
    let request = post(server.url("/"), "x").with(Options::default().retry(policy));
    let id = durable.fire(request).await.unwrap();
    server.wait_for(2).await;
    eventually("the age of the request is over", || async {
        pass(&database, &["created_at", "began_at"]).await;
        rows(&database, "mq_msgs").await == 0
    })
    .await;
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
}
