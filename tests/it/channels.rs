//! Channels that no runner delivers, and the runners that there are.

use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    DeadLetterFilter, Durable, FailureClass, Guarantee, Options, Priority, RequestId, Status, Uuid,
};
use sqlx::Executor;

use crate::support::{
    LONG, Server, builder, count, eventually, eventually_rows, in_time, migrated, other_process,
    outcome_of, passing, post, rows,
};

const URL: &str = "http://127.0.0.1:9/";
const CHANNEL: &str = "emails";

/// A handle that only enqueues, into [`CHANNEL`], and sweeps every few seconds.
fn enqueuing(database: &TestDatabase) -> Durable {
    let handle = builder(database)
        .channel(CHANNEL)
        .retention(Duration::from_secs(60))
        .runner(false);
    handle.build().unwrap()
}

fn for_at_most(age: Duration) -> Options {
    Options::default().retry(RetryPolicy::exponential().max_age(age))
}

/// Makes it look as if the channel had no runner for an hour, once that was noticed.
async fn without_a_runner_for_long(database: &TestDatabase) {
    eventually_rows(database, "undelivered_channels", 1).await;
    let earlier = "UPDATE requeuest.undelivered_channels SET since = now() - interval '1 hour'";
    database.pool().execute(earlier).await.unwrap();
}

async fn set(database: &TestDatabase, id: RequestId, columns: &str) {
    let set = format!("UPDATE requeuest.mq_msgs SET {columns} WHERE id = $1");
    let set = sqlx::query(&set).bind(Uuid::from(id));
    let set = set.execute(database.pool()).await.unwrap();
    assert_eq!(set.rows_affected(), 1);
}

#[tokio::test]
async fn an_awaited_request_that_no_runner_delivers_ends_after_its_max_age() {
    let database = migrated().await;
    let durable = enqueuing(&database);
    let waiting = tokio::spawn({
        let request = post(URL, "x").with(for_at_most(Duration::from_millis(100)));
        let durable = durable.clone();
        async move { durable.await_response(request).await }
    });
    // Its time is over, but a runner may just be being replaced.
    let noted = "undelivered WHERE give_up_at < now()";
    eventually_rows(&database, noted, 1).await;
    passing(&database, Duration::from_secs(1)).await;
    assert_eq!(rows(&database, noted).await, 1);
    assert!(!waiting.is_finished());
    without_a_runner_for_long(&database).await;
    let error = in_time(waiting).await.unwrap().unwrap_err();
    assert!(error.is_discarded(), "{error:?}");
    assert_eq!(error.failure_class(), Some(FailureClass::NoRunner));
    assert_eq!(error.attempts(), Some(0));
    let text = error.to_string();
    assert!(
        text.contains(r#"no runner has delivered the channel "emails""#),
        "{text}"
    );
    assert!(text.contains("to http://127.0.0.1:9"), "{text}");
    // Nothing is left of it.
    for table in ["undelivered", "undelivered_channels", "mq_msgs"] {
        eventually_rows(&database, table, 0).await;
    }
}

#[tokio::test]
async fn a_fired_request_that_no_runner_delivers_becomes_a_dead_letter() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = enqueuing(&database);
    let request = |options| durable.fire(post(server.url("/"), "x").with(options));
    let short = Duration::from_millis(1);
    let over = request(for_at_most(short)).await.unwrap();
    let ordered = request(for_at_most(short).ordered("key")).await.unwrap();
    let kept = [
        for_at_most(Duration::from_secs(3600)),
        for_at_most(short).delay(Duration::from_secs(3600)),
        Options::default().retry(RetryPolicy::exponential().for_ever()),
        Options::default().retry(RetryPolicy::none()),
    ];
    let mut waiting = Vec::new();
    for options in kept {
        waiting.push(request(options).await.unwrap());
    }
    without_a_runner_for_long(&database).await;
    for id in [over, ordered] {
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
    }
    let filter = DeadLetterFilter::default().channel(CHANNEL);
    let letters = durable.dead_letters(&filter).await.unwrap();
    assert_eq!(letters.len(), 2);
    for letter in letters {
        assert_eq!(letter.error_class.as_deref(), Some("no_runner"));
        assert_eq!(letter.destination, Some(server.url("")));
        assert_eq!(letter.attempts, 0);
    }
    assert_eq!(server.count(), 0);
    let runner = builder(&database).channel(CHANNEL).build().unwrap();
    assert_eq!(in_time(runner.replay_all(&filter)).await.unwrap().len(), 2);
    for id in [waiting[0], waiting[2], waiting[3]] {
        assert_eq!(outcome_of(&runner, id).await.status(), Status::Completed);
    }
    server.wait_for(5).await;
    let delayed = durable.status(waiting[1]).await.unwrap();
    assert_eq!(delayed, Some(Status::Scheduled));
    for table in ["undelivered", "undelivered_channels"] {
        eventually_rows(&database, table, 0).await;
    }
}

#[tokio::test]
async fn requests_that_a_lost_runner_had_end_too() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = enqueuing(&database);
    let policy = RetryPolicy::constant(Duration::from_millis(500)).max_age(Duration::from_secs(1));
    let options = Options::default().retry(policy);
    let fire = |options: Options| durable.fire(post(server.url("/"), "x").with(options));
    // One attempt was made and answered, and then the runner stopped.
    let runner = builder(&database).channel(CHANNEL).build().unwrap();
    let answered = fire(options.clone()).await.unwrap();
    eventually("the attempt is recorded", || async {
        rows(&database, "attempts").await >= 1
    })
    .await;
    runner.shutdown(LONG).await.unwrap();
    let lapsed = "attempt_at = now() - interval '1 minute', claim_no = 1, attempts = 1";
    let claimed = fire(options.clone()).await.unwrap();
    set(&database, claimed, &format!("state = 'claimed', {lapsed}")).await;
    let once = options.clone().guarantee(Guarantee::AtMostOnce);
    let once = fire(once).await.unwrap();
    set(
        &database,
        once,
        &format!("state = 'sending_once', {lapsed}"),
    )
    .await;
    let behind = fire(options.clone().ordered("key")).await.unwrap();
    set(&database, behind, "state = 'behind'").await;
    let owned = fire(options).await.unwrap();
    let lease = "state = 'claimed', attempt_at = now() + interval '1 hour', attempts = 1";
    set(&database, owned, lease).await;

    without_a_runner_for_long(&database).await;
    let outcome = outcome_of(&durable, answered).await;
    assert_eq!(outcome.status(), Status::Discarded);
    assert_eq!(outcome.response().unwrap().status(), 503);
    for id in [claimed, behind] {
        let error = in_time(durable.response(id)).await.unwrap_err();
        assert_eq!(
            error.failure_class(),
            Some(FailureClass::NoRunner),
            "{error}"
        );
    }
    let error = in_time(durable.response(once)).await.unwrap_err();
    assert!(error.is_ambiguous(), "{error}");
    assert_eq!(durable.status(owned).await.unwrap(), Some(Status::Running));
}

#[tokio::test]
async fn a_retry_without_a_runner_counts_from_its_due_time_unless_a_caller_waits() {
    let database = migrated().await;
    let durable = enqueuing(&database);
    let request = || post(URL, "x").with(for_at_most(Duration::from_secs(1800)));
    let attempted = "attempts = 1, began_at = now() - interval '1 hour'";
    let fired = durable.fire(request()).await.unwrap();
    set(&database, fired, attempted).await;
    let awaited = durable.fire(request()).await.unwrap();
    let waiter = format!("{attempted}, waiter = gen_random_uuid()");
    set(&database, awaited, &waiter).await;
    eventually_rows(&database, "undelivered", 2).await;
    for (id, over) in [(fired, 0), (awaited, 1)] {
        let noted = format!("undelivered WHERE id = '{id}' AND give_up_at < now()");
        assert_eq!(rows(&database, &noted).await, over);
    }
}

#[tokio::test]
async fn requests_are_kept_while_a_runner_lives_or_after_it_came() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = enqueuing(&database);
    let short = || post(server.url("/"), "x").with(for_at_most(Duration::from_millis(1)));
    let first = durable.fire(short()).await.unwrap();
    eventually_rows(&database, "undelivered WHERE give_up_at < now()", 1).await;
    let runner = builder(&database).channel(CHANNEL).concurrency(1);
    let runner = runner.build().unwrap();
    // Its only slot is taken, and others wait longer than they may take.
    server.wait_for(1).await;
    let mut ids = vec![first];
    for _ in 0..5 {
        ids.push(durable.fire(short()).await.unwrap());
    }
    let noted = "INSERT INTO requeuest.undelivered_channels (channel_name, format, since)
                 VALUES ('emails', 1, now() - interval '1 hour')
                 ON CONFLICT (channel_name, format) DO UPDATE SET since = excluded.since";
    database.pool().execute(noted).await.unwrap();
    for table in ["undelivered", "undelivered_channels"] {
        eventually_rows(&database, table, 0).await;
    }
    gate.add_permits(ids.len());
    for id in ids {
        assert_eq!(outcome_of(&runner, id).await.status(), Status::Completed);
    }
}

#[tokio::test]
async fn a_runner_that_came_and_went_lets_the_channel_wait_anew() {
    let database = migrated().await;
    let durable = enqueuing(&database);
    let later = for_at_most(Duration::from_secs(3600));
    durable.fire(post(URL, "x").with(later)).await.unwrap();
    without_a_runner_for_long(&database).await;
    // Between two sweeps, so that none of them sees the runner.
    let runner = builder(&database).channel(CHANNEL).build().unwrap();
    eventually("the runner has announced itself", || async {
        !runner.runners().await.unwrap().is_empty()
    })
    .await;
    let long = "undelivered_channels WHERE since < now() - interval '30 minutes'";
    assert_eq!(rows(&database, long).await, 0);
}

#[tokio::test]
async fn many_requests_that_no_runner_delivers_are_read_once_and_end_in_batches() {
    let database = migrated().await;
    let durable = enqueuing(&database);
    let requests = 2500;
    let short = for_at_most(Duration::from_millis(1));
    let request = |priority| post(URL, "x").with(short.clone().priority(priority));
    let priorities = [Priority::High, Priority::Normal, Priority::Low];
    // Those of one statement are due at the same time.
    let many = (0..requests).map(|number| request(priorities[number % 3]));
    let ids = durable.fire_many(many).await;
    assert_eq!(ids.unwrap().len(), requests);
    let requests = requests as i64;
    eventually_rows(&database, "undelivered", requests).await;
    // Two that are committed after a sweep came by, one of them long after.
    let mut transaction = database.pool().begin().await.unwrap();
    let mut fire = async |priority| {
        let fired = durable.fire_in(&mut *transaction, request(priority));
        fired.await.unwrap()
    };
    let late = fire(Priority::High).await;
    let very_late = fire(Priority::Low).await;
    let begun = "UPDATE requeuest.mq_msgs SET attempt_at = now() - interval '9 minutes'
                 WHERE id = $1";
    let begun = sqlx::query(begun).bind(Uuid::from(very_late));
    begun.execute(&mut *transaction).await.unwrap();
    let unswept = "UPDATE requeuest.undelivered_channels
                   SET noted_until = 'infinity'";
    database.pool().execute(unswept).await.unwrap();
    let swept = "undelivered_channels WHERE noted_until < 'infinity'";
    eventually_rows(&database, swept, 1).await;
    transaction.commit().await.unwrap();
    let earlier = "UPDATE requeuest.undelivered_channels
                   SET reread_at = now() - interval '11 minutes'";
    database.pool().execute(earlier).await.unwrap();
    without_a_runner_for_long(&database).await;
    eventually_rows(
        &database,
        "outcomes_kept WHERE error_class = 'no_runner'",
        requests + 2,
    )
    .await;
    for id in [late, very_late] {
        let status = durable.status(id).await.unwrap();
        assert_eq!(status, Some(Status::Discarded));
    }
}

#[tokio::test]
async fn how_long_a_request_waits_for_a_runner_follows_from_its_policy() {
    let database = migrated().await;
    let durable = enqueuing(&database);
    let (second, day) = (Duration::from_secs(1), 86_400.0);
    for (policy, seconds) in [
        (RetryPolicy::awaited(), Some(300.0)),
        (RetryPolicy::fired(), Some(day)),
        (RetryPolicy::constant(second).max_age(second / 2), Some(0.5)),
        (
            RetryPolicy::constant(second)
                .max_age(second * 5)
                .max_attempts(1),
            Some(5.0),
        ),
        // Without a limit of time: a day, for any number of attempts.
        (RetryPolicy::none(), Some(day)),
        (RetryPolicy::schedule([second]), Some(day)),
        (RetryPolicy::exponential().max_attempts(3), Some(day)),
        (
            RetryPolicy::exponential().max_age(Duration::ZERO),
            Some(day),
        ),
        (RetryPolicy::exponential(), None),
        (RetryPolicy::constant(second).for_ever(), None),
    ] {
        // A header doesn't confuse it.
        let mut request = post(URL, "x").with(Options::default().retry(policy.clone()));
        let header = r#""max_age_ms":7,"max_attempts":7,"delays":"none","#
            .parse()
            .unwrap();
        request.headers_mut().insert("x", header);
        let id = durable.fire(request).await.unwrap();
        let found: Option<f64> = sqlx::query_scalar(
            "SELECT extract(epoch FROM requeuest.waits_at_most(head))::float8
             FROM requeuest.mq_payloads WHERE id = $1",
        )
        .bind(Uuid::from(id))
        .fetch_one(database.pool())
        .await
        .unwrap();
        assert_eq!(found, seconds, "{policy:?}");
    }
    let from_fn = RetryPolicy::from_fn(|_| None);
    let handle = builder(&database)
        .retry(from_fn)
        .runner(false)
        .build()
        .unwrap();
    let id = handle.fire(post(URL, "x")).await.unwrap();
    let age = format!(
        "SELECT extract(epoch FROM requeuest.waits_at_most(head))::bigint
         FROM requeuest.mq_payloads WHERE id = '{id}'"
    );
    assert_eq!(count(&database, &age).await, 86_400);
}

#[tokio::test]
async fn runners_are_listed_until_they_stop() {
    let database = migrated().await;
    let watching = other_process(&database).await;
    assert!(watching.runners().await.unwrap().is_empty());
    let one = builder(&database).deliver(["a", "b"]).build().unwrap();
    let all = builder(&database).deliver_all().build().unwrap();
    let listed = |wanted: usize| {
        let watching = &watching;
        async move {
            let what = format!("{wanted} runners");
            eventually(&what, || async {
                watching.runners().await.unwrap().len() == wanted
            })
            .await;
            watching.runners().await.unwrap()
        }
    };
    let runners = listed(2).await;
    let [one_listed, all_listed] = match &*runners {
        [one, all] if all.channels.is_none() => [one, all],
        [all, one] => [one, all],
        _ => unreachable!(),
    };
    let channels = one_listed.channels.as_deref().unwrap();
    assert_eq!(channels, ["a", "b"]);
    assert!(one_listed.delivers("a") && !one_listed.delivers("c"));
    assert!(all_listed.delivers("c"));
    for runner in &runners {
        assert_eq!(runner.version, env!("CARGO_PKG_VERSION"));
        assert_eq!(runner.pid, std::process::id());
        assert!(runner.started_at <= runner.seen_at);
    }
    assert_ne!(runners[0].id, runners[1].id);
    // A shutdown removes it before it returns.
    one.shutdown(LONG).await.unwrap();
    assert_eq!(watching.runners().await.unwrap().len(), 1);
    drop(all);
    listed(0).await;
    // One whose process died is not listed once it expired, and goes in the end.
    let died = "INSERT INTO requeuest.runners (id, formats, version, pid, expires_at)
                VALUES (gen_random_uuid(), '{1}', '0', 1, now() - interval '1 second')";
    database.pool().execute(died).await.unwrap();
    assert!(watching.runners().await.unwrap().is_empty());
    let _sweeping = enqueuing(&database);
    eventually_rows(&database, "runners", 0).await;
}

#[tokio::test]
async fn a_runner_says_again_and_again_that_it_is_alive() {
    let database = migrated().await;
    let lease = Duration::from_secs(1);
    let runner = builder(&database).lease(lease).build().unwrap();
    let seen = || async {
        runner
            .runners()
            .await
            .unwrap()
            .first()
            .map(|one| one.seen_at)
    };
    eventually("the runner is registered", || async {
        seen().await.is_some()
    })
    .await;
    // As if another process had removed it.
    database
        .pool()
        .execute("DELETE FROM requeuest.runners")
        .await
        .unwrap();
    eventually("it is registered again", || async {
        seen().await.is_some()
    })
    .await;
}
