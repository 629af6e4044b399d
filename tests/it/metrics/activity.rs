//! The activity of the last hour and day.

use std::time::Duration;

use requeuest::admin::{Activity, ActivityPoint, Window};
use requeuest::migrate::DatabaseRole;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, Options, Status};
use sqlx::Executor;

use crate::support::{
    LONG, Role, Server, builder, closed_port, count, eventually_rows, in_time, migrated,
    other_process, outcome_of, post, quick, reply, rows,
};

async fn activity(database: &TestDatabase, window: Window) -> Activity {
    let admin = other_process(database).await.admin();
    admin.activity(window).await.unwrap()
}

/// A process adds its counts when it shuts down.
async fn shut_down(durable: Durable) {
    in_time(durable.shutdown(LONG)).await.unwrap();
}

fn sum(points: &[ActivityPoint], number: impl Fn(&ActivityPoint) -> u64) -> u64 {
    points.iter().map(number).sum()
}

/// The numbers of all points: enqueued, attempts, failed attempts, completed, discarded, cancelled,
/// ambiguous.
fn sums(points: &[ActivityPoint]) -> [u64; 7] {
    [
        sum(points, |point| point.enqueued),
        sum(points, |point| point.attempts),
        sum(points, |point| point.failed_attempts),
        sum(points, |point| point.completed),
        sum(points, |point| point.discarded),
        sum(points, |point| point.cancelled),
        sum(points, |point| point.ambiguous),
    ]
}

#[tokio::test]
async fn activity_counts_requests_attempts_and_outcomes_by_channel() {
    let database = migrated().await;
    let server = Server::in_turn(&[500, 200]).await;
    let slow = Server::start(|_, _| async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        reply(200, "")
    })
    .await;
    let closed = closed_port().await;
    let empty = activity(&database, Window::Hour).await;
    assert_eq!((empty.points.len(), empty.channels.len()), (60, 0));
    assert_eq!(empty.points[59].latency_p50, None);

    let durable = builder(&database)
        .deliver_all()
        .retry(quick())
        .build()
        .unwrap();
    let on = |channel: &str| Options::default().channel(channel);
    // Fails once, and is answered then.
    let repeated = post(server.url("/"), "x").with(on("a"));
    let repeated = durable.fire(repeated).await.unwrap();
    assert_eq!(outcome_of(&durable, repeated).await.attempts(), 2);
    let answered = durable.await_response(post(slow.url("/"), "x").with(on("a")));
    assert_eq!(in_time(answered).await.unwrap().status(), 200);
    // Is given up.
    let once = on("b").retry(RetryPolicy::none());
    let dead = post(format!("http://{closed}/"), "x").with(once);
    let dead = durable.fire(dead).await.unwrap();
    assert_eq!(outcome_of(&durable, dead).await.status(), Status::Discarded);
    // Are cancelled, and one was in a transaction.
    let later = || post(server.url("/"), "x").with(on("b").delay(LONG));
    let many = durable.fire_many([later(), later()]).await.unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let keyed = later().with(on("b").delay(LONG).key("key"));
    let with_key = durable.fire_in(&mut *transaction, keyed.clone()).await;
    // This is the same request.
    let again = durable.fire_in(&mut *transaction, keyed).await;
    assert_eq!(with_key.as_ref().unwrap(), &again.unwrap());
    transaction.commit().await.unwrap();
    assert!(durable.cancel(many[0]).await.unwrap());
    assert!(!durable.cancel(many[0]).await.unwrap());
    assert!(durable.cancel(with_key.unwrap()).await.unwrap());
    shut_down(durable).await;

    for window in [Window::Hour, Window::Day] {
        let activity = activity(&database, window).await;
        assert_eq!(activity.window, window);
        assert_eq!(
            sums(&activity.points),
            [6, 4, 2, 2, 1, 2, 0],
            "{activity:?}"
        );
        let steps = activity.points.windows(2);
        let mut steps = steps.map(|two| two[1].at.duration_since(two[0].at).unwrap());
        assert!(steps.all(|step| step == window.step()));
        let of = |channel: &str| {
            let mut channels = activity.channels.iter();
            let found = channels.find(|it| it.channel.as_deref() == Some(channel));
            &found.unwrap().points
        };
        assert_eq!(sums(of("a")), [2, 3, 1, 2, 0, 0, 0]);
        assert_eq!(sums(of("b")), [4, 1, 1, 0, 1, 2, 0]);
        // The slower one of two.
        let longest = of("a").iter().filter_map(|point| point.latency_p95).max();
        let longest = longest.unwrap();
        assert!(longest > Duration::from_millis(150), "{longest:?}");
        assert!(longest < Duration::from_secs(20), "{longest:?}");
    }
}

#[tokio::test]
async fn processes_add_up_and_only_so_many_channels_are_apart() {
    let database = migrated().await;
    for process in 0..2 {
        let durable = builder(&database).runner(false).build().unwrap();
        let requests = (0..120).map(|number| {
            let channel = format!("{}", process * 60 + number);
            let options = Options::default().channel(channel);
            post("http://localhost:1/", "x").with(options)
        });
        durable.fire_many(requests).await.unwrap();
        shut_down(durable).await;
    }
    let most = "SELECT max(n) FROM (
        SELECT count(*) AS n FROM requeuest.activity GROUP BY minutes, began_at
    ) steps";
    assert!(count(&database, most).await <= 101);
    let activity = activity(&database, Window::Day).await;
    assert_eq!(sum(&activity.points, |point| point.enqueued), 240);
    let others = activity.channels.last().unwrap();
    assert_eq!(others.channel, None);
    let others = sum(&others.points, |point| point.enqueued);
    assert!(others >= 40, "{others}");
}

/// A day of a hundred channels, some of the day before it, and the step that may have begun when it
/// is read.
const FILL: &str = "
    INSERT INTO requeuest.activity
    SELECT
        s.minutes, date_bin(s.minutes * interval '1 minute', now(), '2000-01-01 UTC')
            - n * s.minutes * interval '1 minute', 'channel ' || c,
        1, 1, 0, 1, 0, 0, 0, array_fill(1::bigint, ARRAY[28])
    FROM (VALUES (1, 150), (10, 160)) AS s(minutes, number), generate_series(-1, s.number) AS n,
        generate_series(1, 100) AS c";

#[tokio::test]
async fn a_full_day_is_read_whole_and_older_rows_are_swept() {
    let database = migrated().await;
    database.pool().execute(FILL).await.unwrap();
    database
        .pool()
        .execute("ANALYZE requeuest.activity")
        .await
        .unwrap();
    let durable = builder(&database)
        .retention(Duration::from_secs(60))
        .build()
        .unwrap();
    eventually_rows(
        &database,
        "activity WHERE began_at < now() - '26 hours'::interval",
        0,
    )
    .await;
    let old_minutes = "activity WHERE minutes = 1 AND began_at < now() - '122 min'::interval";
    eventually_rows(&database, old_minutes, 0).await;
    assert!(rows(&database, "activity").await > 20_000);
    for window in [Window::Hour, Window::Day] {
        let activity = durable.admin().activity(window).await.unwrap();
        assert_eq!(activity.channels.len(), 100);
        for point in &activity.points {
            assert_eq!((point.enqueued, point.completed), (100, 100), "{point:?}");
        }
    }
    shut_down(durable).await;
}

#[tokio::test]
async fn a_role_that_enqueues_counts_too_and_can_break_no_other_count() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let web = Durable::builder(role.pool()).runner(false).build().unwrap();
    let request = || post("http://localhost:1/", "x");
    web.fire(request()).await.unwrap();
    web.fire(request()).await.unwrap();
    shut_down(web).await;
    let forged = "SELECT requeuest.note_activity(
        ARRAY['default', NULL, repeat('x', 56)], array_fill(9223372036854775807, ARRAY[3]),
        ARRAY[-1, NULL], '{}', NULL, NULL, NULL, NULL, array_fill(9223372036854775807, ARRAY[9])
    )";
    for _ in 0..3 {
        role.pool().execute(forged).await.unwrap();
    }
    let reader = Role::named(&database, "reader").await;
    reader.plays(DatabaseRole::ReadOnly).await;
    let durable = builder(&database).runner(false).build().unwrap();
    durable.fire(request()).await.unwrap();
    shut_down(durable).await;

    let support = Durable::builder(reader.pool())
        .runner(false)
        .build()
        .unwrap();
    let activity = support.admin().activity(Window::Day).await.unwrap();
    let of_default = &activity.channels[0];
    assert_eq!(of_default.channel.as_deref(), Some("default"));
    let forged = 3 * 1_000_000_000;
    let enqueued = sum(&of_default.points, |point| point.enqueued);
    assert_eq!(enqueued, 3 + forged);
    assert_eq!(sum(&of_default.points, |point| point.attempts), 0);
    assert_eq!(activity.channels.len(), 2);
    shut_down(support).await;
    role.dropped().await;
    reader.dropped().await;
}
