//! Channels that an operator has paused.

use std::time::Duration;

use requeuest::admin::Hold;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, DurableBuilder, FailureClass, Options, RequestId, Status};
use sqlx::{Executor, PgPool};

use crate::support::{
    Server, builder, builder_on, count, eventually_rows, in_time, migrated, other_process,
    outcome_of, passing, post, rows,
};

const CHANNEL: &str = "emails";

/// Stands in for another process that delivers the channel.
async fn delivering(database: &TestDatabase) -> DurableBuilder {
    let pool = PgPool::connect(database.url()).await.unwrap();
    builder_on(&pool)
        .channel(CHANNEL)
        .retry(RetryPolicy::constant(Duration::from_millis(100)))
}

fn on_channel() -> Options {
    Options::default().channel(CHANNEL)
}

async fn hold(durable: &Durable, id: RequestId) -> Option<Hold> {
    durable.admin().request(id).await.unwrap()?.hold
}

/// Fires requests until one is not sent because of the pause. Returns that one.
async fn until_paused(durable: &Durable, server: &Server) -> RequestId {
    for _ in 0..3000 {
        let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
        loop {
            match durable.admin().request(id).await.unwrap().unwrap() {
                found if found.status == Status::Completed => break,
                found => {
                    if matches!(found.hold, Some(Hold::ChannelPaused(_))) {
                        return id;
                    }
                }
            }
        }
    }
    panic!("requests are still sent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_process_begins_an_attempt_of_a_paused_channel_until_it_is_resumed() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let one = delivering(&database).await.build().unwrap();
    let all = delivering(&database).await.deliver_all().build().unwrap();
    let operator = other_process(&database).await;
    for durable in [&one, &all] {
        let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
        outcome_of(durable, id).await;
    }
    let admin = operator.admin().by("ann").because("a wrong template");
    assert!(admin.pause_channel(CHANNEL).await.unwrap());
    assert!(!admin.pause_channel(CHANNEL).await.unwrap());
    // A poll that begins now claims none.
    let queued = post(server.url("/queued"), "x").with(on_channel());
    let queued = operator.fire(queued).await.unwrap();
    let waiting = [
        until_paused(&one, &server).await,
        until_paused(&all, &server).await,
    ];
    let before = server.count();
    for durable in [&one, &all] {
        durable.fire(post(server.url("/"), "x")).await.unwrap();
    }
    // Other channels don't wait.
    passing(&database, Duration::from_secs(2)).await;
    let other = post(server.url("/other"), "x").with(Options::default().channel("other"));
    let other = all.fire(other).await.unwrap();
    outcome_of(&all, other).await;
    assert_eq!(server.count(), before + 1);
    let Some(Hold::ChannelPaused(paused)) = hold(&operator, queued).await else {
        panic!("it has another reason");
    };
    assert_eq!((&*paused.channel, &*paused.by), (CHANNEL, "ann"));
    assert_eq!(paused.reason.as_deref(), Some("a wrong template"));
    let listed = admin.paused_channels().await.unwrap();
    assert_eq!(listed, [paused]);

    assert!(admin.resume_channel(CHANNEL).await.unwrap());
    assert!(!admin.resume_channel(CHANNEL).await.unwrap());
    for id in waiting.into_iter().chain([queued]) {
        assert_eq!(outcome_of(&operator, id).await.status(), Status::Completed);
    }
    eventually_rows(&database, "mq_msgs", 0).await;
    // Nothing was sent twice.
    let completed = rows(&database, "outcomes").await;
    assert_eq!(completed as usize, server.count() + 1, "with the clock's");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_that_a_process_holds_wait_for_the_channel_too() {
    let database = migrated().await;
    let server = Server::start(|_, _| async { crate::support::reply(503, "") }).await;
    let durable = delivering(&database).await.build().unwrap();
    let calling = durable.clone();
    let request = post(server.url("/"), "x");
    let waiting = tokio::spawn(async move { calling.await_response(request).await });
    server.wait_for(3).await;
    let operator = other_process(&database).await;
    operator.admin().pause_channel(CHANNEL).await.unwrap();
    let paused = "mq_msgs WHERE state = 'waiting' AND attempts > 0";
    eventually_rows(&database, paused, 1).await;
    let before = server.count();
    passing(&database, Duration::from_secs(2)).await;
    assert_eq!(server.count(), before);
    assert!(!waiting.is_finished());
    operator.admin().resume_channel(CHANNEL).await.unwrap();
    server.wait_for(before + 3).await;
    waiting.abort();
}

#[tokio::test]
async fn a_caller_of_a_paused_channel_waits_as_long_as_it_would_for_a_response() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = delivering(&database).await.build().unwrap();
    let admin = durable.admin();
    admin.pause_channel(CHANNEL).await.unwrap();
    let short = RetryPolicy::exponential().max_age(Duration::from_millis(300));
    let request = post(server.url("/"), "x").with(Options::default().retry(short));
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert_eq!(error.failure_class(), Some(FailureClass::Deferred));
    assert!(error.to_string().contains("channel was paused"), "{error}");
    let deadline = Options::default().deadline(Duration::from_millis(300));
    let request = post(server.url("/"), "x").with(deadline);
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert_eq!(error.failure_class(), Some(FailureClass::Deadline));

    // One that has the time gets its response.
    let calling = durable.clone();
    let request = post(server.url("/"), "x");
    let waiting = tokio::spawn(async move { calling.await_response(request).await });
    eventually_rows(&database, "mq_msgs", 1).await;
    assert_eq!(server.count(), 0);
    admin.resume_channel(CHANNEL).await.unwrap();
    assert_eq!(in_time(waiting).await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn a_pause_outlives_its_process_and_no_request_is_given_up_without_a_runner() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let first = delivering(&database).await.runner(false).build().unwrap();
    first.admin().pause_channel(CHANNEL).await.unwrap();
    let short = RetryPolicy::exponential().max_age(Duration::from_millis(1));
    let short = || post(server.url("/"), "x").with(on_channel().retry(short.clone()));
    let id = first.fire(short()).await.unwrap();
    let ordered = short().with(on_channel().ordered("key"));
    let ordered = first.fire(ordered).await.unwrap();
    first.shutdown(Duration::ZERO).await.unwrap();

    // It sweeps every few seconds, and would note a channel without a runner.
    let other = builder(&database)
        .channel("other")
        .retention(Duration::from_secs(60))
        .build()
        .unwrap();
    let noted = post(server.url("/"), "x").with(Options::default().channel("unknown"));
    other.fire(noted).await.unwrap();
    eventually_rows(&database, "undelivered_channels", 1).await;
    let noted = format!("undelivered_channels WHERE channel_name = '{CHANNEL}'");
    assert_eq!(rows(&database, &noted).await, 0);
    let runner = delivering(&database).await.build().unwrap();
    passing(&database, Duration::from_secs(1)).await;
    let reason = hold(&runner, id).await.unwrap().to_string();
    assert!(reason.contains("paused the channel `emails`"), "{reason}");
    assert_eq!(server.count(), 0);
    // One that was noted earlier is not given up either.
    let noted = format!(
        "INSERT INTO requeuest.undelivered_channels (channel_name, format, since)
         VALUES ('{CHANNEL}', 1, now() - interval '1 hour')"
    );
    database.pool().execute(&*noted).await.unwrap();
    let noted = format!("undelivered_channels WHERE channel_name = '{CHANNEL}'");
    eventually_rows(&database, &noted, 0).await;
    assert_eq!(runner.status(id).await.unwrap(), Some(Status::Available));

    // If it is resumed while there is no runner, the time of its requests begins anew.
    runner.shutdown(Duration::ZERO).await.unwrap();
    let long_ago = "UPDATE requeuest.mq_msgs SET attempt_at = now() - interval '1 day'";
    database.pool().execute(long_ago).await.unwrap();
    other.admin().resume_channel(CHANNEL).await.unwrap();
    let counted = "SELECT count(*) FROM requeuest.due_requests(
            'emails', 1::smallint, '-infinity', now(), 10
         ) d JOIN requeuest.paused_channels c ON d.since = c.resumed_at";
    assert_eq!(count(&database, counted).await, 2);
    let runner = delivering(&database).await.build().unwrap();
    for id in [id, ordered] {
        assert_eq!(outcome_of(&runner, id).await.status(), Status::Completed);
    }
}

#[tokio::test]
async fn a_channel_that_no_handle_takes_and_an_author_that_is_no_line_are_refused() {
    let database = migrated().await;
    let admin = other_process(&database).await.admin();
    for channel in ["", "a\0b", &"x".repeat(300)] {
        for result in [
            admin.pause_channel(channel).await,
            admin.resume_channel(channel).await,
        ] {
            let error = result.unwrap_err();
            assert!(error.is_request(), "{error:?}");
            assert_eq!(error.field(), Some("channel"), "{error}");
        }
    }
    let unnamed = admin.clone().by("");
    let error = unnamed.pause_channel(CHANNEL).await.unwrap_err();
    assert_eq!(error.field(), Some("actor"), "{error}");
    let unclear = admin.clone().because("two\nlines");
    let error = unclear.pause_channel(CHANNEL).await.unwrap_err();
    assert_eq!(error.field(), Some("reason"), "{error}");
    assert_eq!(rows(&database, "paused_channels").await, 0);
    assert_eq!(rows(&database, "changes").await, 0);

    let many = "INSERT INTO requeuest.paused_channels (channel_name, actor)
                SELECT 'c' || i, 'x' FROM generate_series(1, 1000) i";
    database.pool().execute(many).await.unwrap();
    let error = admin.pause_channel(CHANNEL).await.unwrap_err();
    assert!(error.to_string().contains("1000 channels"), "{error}");
    // Resuming one makes room.
    assert!(admin.resume_channel("c1").await.unwrap());
    assert!(admin.pause_channel(CHANNEL).await.unwrap());
    let paused = admin.paused_channels().await.unwrap();
    assert_eq!(paused.len(), 1000);
}
