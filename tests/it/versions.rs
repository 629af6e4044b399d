//! Rows of a newer version, rows that a tool wrote by hand, and damaged rows. What this version
//! can't read it leaves alone: no such request is sent or given up, and no such outcome is handed
//! out or counted as handled. Nothing else waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    DeadLetterFilter, Durable, Error, Options, Outcome, RequestId, Resolution, Status, Uuid,
    outcome_fn_with,
};
use sqlx::{Executor, PgConnection};
use tokio::sync::Mutex;

use crate::support::{
    LONG, Server, builder, count, eventually, eventually_rows, execute, in_time, migrated,
    other_process, outcome_of, passing, post, quick, reply, rows,
};

const PARKED: &str = "mq_msgs WHERE state = 'parked'";

async fn text(database: &TestDatabase, id: RequestId, query: &str) -> String {
    sqlx::query_scalar(query)
        .bind(Uuid::from(id))
        .fetch_one(database.pool())
        .await
        .unwrap()
}

async fn head(database: &TestDatabase, id: RequestId) -> String {
    let head = "SELECT head FROM requeuest.mq_payloads WHERE id = $1";
    text(database, id, head).await
}

async fn set_head(database: &TestDatabase, id: RequestId, head: &str) {
    let set = "UPDATE requeuest.mq_payloads SET head = $2 WHERE id = $1";
    let set = sqlx::query(set).bind(Uuid::from(id)).bind(head);
    assert_eq!(
        set.execute(database.pool()).await.unwrap().rows_affected(),
        1
    );
}

/// Replaces a part of the stored head. Returns the head as it was.
async fn edit(database: &TestDatabase, id: RequestId, from: &str, to: &str) -> String {
    let before = head(database, id).await;
    assert!(before.contains(from), "{from} is not in {before}");
    set_head(database, id, &before.replacen(from, to, 1)).await;
    before
}

/// Has the next poll look at parked requests.
async fn look_again(database: &TestDatabase) {
    let due = "UPDATE requeuest.mq_msgs SET attempt_at = now() WHERE state = 'parked'";
    database.pool().execute(due).await.unwrap();
}

fn assert_unreadable<T: std::fmt::Debug>(result: Result<T, Error>, id: RequestId, part: &str) {
    let error = result.unwrap_err();
    assert!(error.is_unreadable(), "{error}");
    assert_eq!(error.request_id(), Some(id));
    assert!(
        error.to_string().contains(part),
        "{part} is not in: {error}"
    );
}

/// A part of a stored head, what replaces it, and a part of the reason.
const EDITS: [(&str, &str, &str); 16] = [
    ("{", r#"{"priority":1,"#, "unknown field `priority`"),
    (r#""headers":[["#, r#""headers":[["a","b","c"],["#, "column"),
    (
        r#""delivery":{"#,
        r#""delivery":{"hedge":true,"#,
        "unknown field `hedge`",
    ),
    (
        r#""retry":{"#,
        r#""retry":{"budget":1,"#,
        "unknown field `budget`",
    ),
    (
        r#""exponential":{"#,
        r#""fibonacci":{"#,
        "unknown variant `fibonacci`",
    ),
    (
        r#""base_ms""#,
        r#""ceiling":1,"base_ms""#,
        "unknown field `ceiling`",
    ),
    (
        r#""jitter":"full""#,
        r#""jitter":"wide""#,
        "unknown variant `wide`",
    ),
    (r#""factor":2"#, r#""factor":0"#, "retry"),
    (
        r#""delivery":{"#,
        r#""delivery":{"guarantee":"exactly_once","#,
        "`exactly_once`",
    ),
    (
        r#""delivery":{"#,
        r#""delivery":{"accept":["informational"],"#,
        "`informational`",
    ),
    (
        r#""timeout_ms":"#,
        r#""timeout_ms":"hunter2","x":"#,
        "column",
    ),
    ("HTTP/1.1", "HTTP/4", "version"),
    ("\"POST\"", "\"PO ST\"", "method"),
    ("http://", "hunter2://", "URL"),
    ("{", "{hunter2:", "not JSON"),
    (r#""delivery""#, r#""delivery"#, "not JSON"),
];

#[tokio::test]
async fn what_cannot_be_read_is_parked_and_sent_once_it_can_be_read() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let there = other_process(&database).await;
    let mut parked = Vec::new();
    for (from, to, reason) in EDITS {
        let mut request = post(server.url("/?token=hunter2"), reason);
        let secret = "hunter2".parse().unwrap();
        request.headers_mut().insert("authorization", secret);
        let id = there.fire(request).await.unwrap();
        parked.push((id, edit(&database, id, from, to).await, reason));
    }
    for (broken, reason) in [
        (
            "UPDATE requeuest.mq_payloads SET head = '' WHERE id = $1",
            "JSON",
        ),
        (
            "UPDATE requeuest.mq_payloads SET head = 'null' WHERE id = $1",
            "JSON",
        ),
        (
            "UPDATE requeuest.mq_payloads SET head = '[]' WHERE id = $1",
            "column",
        ),
        (
            "UPDATE requeuest.mq_payloads SET head = head || 'x' WHERE id = $1",
            "JSON",
        ),
        (
            "UPDATE requeuest.mq_payloads SET head = left(head, 60) WHERE id = $1",
            "JSON",
        ),
        (
            "UPDATE requeuest.mq_payloads SET name = 'job' WHERE id = $1",
            "name",
        ),
    ] {
        let id = there.fire(post(server.url("/"), broken)).await.unwrap();
        let before = head(&database, id).await;
        execute(&database, id, broken).await;
        parked.push((id, before, reason));
    }
    let good = there.fire(post(server.url("/"), "good")).await.unwrap();

    let durable = Durable::new(database.pool().clone());
    assert_eq!(outcome_of(&durable, good).await.status(), Status::Completed);
    // No poll looks at the requests again before they are listed.
    in_time(durable.shutdown(LONG)).await.unwrap();
    eventually_rows(&database, PARKED, parked.len() as i64).await;
    assert_eq!(rows(&database, "mq_msgs WHERE attempts > 0").await, 0);
    let listed = there.parked(None).await.unwrap();
    assert_eq!(listed.len(), parked.len());
    for (listed, (id, _, reason)) in listed.iter().zip(&parked) {
        assert_eq!(listed.id, *id);
        assert_eq!(listed.channel, "default");
        assert!(
            listed.reason.contains(reason),
            "{reason} is not in: {listed:?}"
        );
        assert!(!format!("{listed:?}").contains("hunter2"), "{listed:?}");
        assert_eq!(there.status(*id).await.unwrap(), Some(Status::Parked));
    }
    let page = there.parked(Some(listed[4].id)).await.unwrap();
    assert_eq!(page.len(), listed.len() - 5);
    assert_eq!(page[0].id, listed[5].id);
    assert_eq!(server.count(), 1);

    for (id, head, _) in &parked {
        set_head(&database, *id, head).await;
    }
    database
        .pool()
        .execute("UPDATE requeuest.mq_payloads SET name = 'requeuest'")
        .await
        .unwrap();
    let durable = Durable::new(database.pool().clone());
    for (id, _, _) in &parked {
        let outcome = outcome_of(&durable, *id).await;
        assert_eq!(outcome.status(), Status::Completed);
        assert_eq!(outcome.attempts(), 1);
    }
    assert_eq!(server.count(), parked.len() + 1);
    assert_eq!(there.parked(None).await.unwrap().len(), 0);
}

#[tokio::test]
async fn a_request_behind_a_parked_one_of_its_key_waits_for_it() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let there = other_process(&database).await;
    let fire = async |key: &str, body: &'static str| {
        let options = Options::default().ordered(key);
        let request = post(server.url("/"), body).with(options);
        there.fire(request).await.unwrap()
    };
    let first = fire("a", "1").await;
    let second = fire("a", "2").await;
    let other = fire("b", "3").await;
    let head = edit(&database, first, "{", r#"{"x":1,"#).await;
    let durable = Durable::new(database.pool().clone());
    outcome_of(&durable, other).await;
    eventually_rows(&database, PARKED, 1).await;
    for _ in 0..3 {
        look_again(&database).await;
        passing(&database, Duration::ZERO).await;
    }
    assert_eq!(server.bodies(), ["3"]);
    assert_eq!(there.status(second).await.unwrap(), Some(Status::Available));
    set_head(&database, first, &head).await;
    look_again(&database).await;
    outcome_of(&durable, second).await;
    assert_eq!(server.bodies(), ["3", "1", "2"]);
}

#[tokio::test]
async fn looks_at_a_parked_request_get_rarer_until_an_attempt_is_made() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let there = other_process(&database).await;
    let options = Options::default().retry(quick());
    let request = post(server.url("/"), "x").with(options);
    let id = there.fire(request).await.unwrap();
    let head = edit(&database, id, "{", r#"{"x":1,"#).await;
    let durable = Durable::new(database.pool().clone());
    // Seconds until the next look, once there has been another one.
    let next_look = async || {
        eventually_rows(&database, PARKED, 1).await;
        let due = "SELECT extract(epoch FROM attempt_at - now())::bigint FROM requeuest.mq_msgs";
        count(&database, due).await
    };
    assert!((0..=5).contains(&next_look().await));
    for (ago, least, most) in [("1 minute", 20, 120), ("1 day", 560, 600)] {
        let before = count(&database, "SELECT claim_no::bigint FROM requeuest.mq_msgs").await;
        let since = format!(
            "UPDATE requeuest.mq_payloads SET parked_since = now() - interval '{ago}' WHERE id = $1"
        );
        execute(&database, id, &since).await;
        look_again(&database).await;
        eventually("another look", || async {
            let looked = "SELECT coalesce(max(claim_no), 0)::bigint FROM requeuest.mq_msgs
                 WHERE state = 'parked'";
            rows(&database, PARKED).await == 1 && count(&database, looked).await > before
        })
        .await;
        let next = next_look().await;
        assert!((least..=most).contains(&next), "{ago}: {next}");
    }
    assert_eq!(rows(&database, "mq_msgs WHERE attempts = 0").await, 1);

    assert_eq!(server.count(), 0);
    set_head(&database, id, &head).await;
    look_again(&database).await;
    server.wait_for(2).await;
    edit(&database, id, "{", r#"{"x":1,"#).await;
    assert!((0..=5).contains(&next_look().await));
    let clear = "SELECT requeuest.mq_clear(ARRAY['default'])";
    database.pool().execute(clear).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Cancelled);
}

#[tokio::test]
async fn a_parked_request_is_cancelled_replaced_or_given_up_by_a_process_that_reads_it() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let there = other_process(&database).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        let request = post(server.url("/"), "old").with(Options::default().supersede("s"));
        let id = there.fire(request).await.unwrap();
        // Otherwise the next one would replace it before it is parked.
        execute(
            &database,
            id,
            "UPDATE requeuest.mq_msgs SET supersede_key = NULL WHERE id = $1",
        )
        .await;
        edit(&database, id, "{", r#"{"x":1,"#).await;
        ids.push(id);
    }
    let [cancelled, replaced, overdue] = ids[..] else {
        unreachable!();
    };
    let durable = Durable::new(database.pool().clone());
    let waiting = tokio::spawn({
        let there = there.clone();
        async move { there.outcome(cancelled).await }
    });
    eventually_rows(&database, PARKED, 3).await;

    assert!(durable.cancel(cancelled).await.unwrap());
    let outcome = in_time(waiting).await.unwrap().unwrap();
    assert_eq!(outcome.status(), Status::Cancelled);

    let replaceable = "UPDATE requeuest.mq_msgs SET supersede_key = 's' WHERE id = $1";
    execute(&database, replaced, replaceable).await;
    let newer = post(server.url("/"), "new").with(Options::default().supersede("s"));
    let newer = durable.fire(newer).await.unwrap();
    let error = there.response(replaced).await.unwrap_err();
    assert!(error.is_superseded(), "{error}");
    outcome_of(&durable, newer).await;

    let deadline = "UPDATE requeuest.mq_msgs SET deadline = now() WHERE id = $1";
    execute(&database, overdue, deadline).await;
    look_again(&database).await;
    passing(&database, Duration::ZERO).await;
    eventually_rows(&database, PARKED, 1).await;
    edit(&database, overdue, r#"{"x":1,"#, "{").await;
    look_again(&database).await;
    let outcome = outcome_of(&durable, overdue).await;
    assert_eq!(outcome.status(), Status::Discarded);
    assert_eq!(outcome.error(), Some("its deadline passed"));
    assert_eq!(server.bodies(), ["new"]);
}

#[tokio::test]
async fn a_request_whose_payload_is_gone_is_discarded() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let id = there.fire(post("http://127.0.0.1:9/", "x")).await.unwrap();
    let gone = "DELETE FROM requeuest.mq_payloads WHERE id = $1";
    execute(&database, id, gone).await;
    let durable = Durable::new(database.pool().clone());
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.status(), Status::Discarded);
    assert_eq!(outcome.error(), Some("its payload is gone"));
}

#[tokio::test]
async fn a_last_response_that_cannot_be_read_parks_nothing_and_is_kept() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200, 500]).await;
    let day = Duration::from_secs(24 * 60 * 60);
    let durable = builder(&database)
        .retry(RetryPolicy::constant(day))
        .build()
        .unwrap();
    let mut ids = Vec::new();
    for _ in 0..2 {
        ids.push(durable.fire(post(server.url("/"), "x")).await.unwrap());
    }
    eventually_rows(&database, "mq_payloads WHERE response_status = 503", 2).await;
    let newer = r#"UPDATE requeuest.mq_payloads SET response_head = '{"x":1}' WHERE id = $1"#;
    let due = "UPDATE requeuest.mq_msgs SET attempt_at = now() WHERE id = $1";
    for id in &ids {
        execute(&database, *id, newer).await;
    }
    execute(&database, ids[0], due).await;
    let outcome = outcome_of(&durable, ids[0]).await;
    assert_eq!(outcome.response().unwrap().status(), 200);

    let overdue = "UPDATE requeuest.mq_msgs SET deadline = now() WHERE id = $1";
    execute(&database, ids[1], overdue).await;
    eventually_rows(&database, "mq_msgs", 0).await;
    let kept = "SELECT head FROM requeuest.outcomes WHERE id = $1";
    assert_eq!(text(&database, ids[1], kept).await, r#"{"x":1}"#);
    assert_unreadable(durable.response(ids[1]).await, ids[1], "unknown field `x`");
}

/// Changes of a stored outcome, and a part of the error.
const OUTCOMES: [(&str, &str); 7] = [
    ("format = 2", "a newer version wrote it"),
    ("format = 0", "format"),
    ("status = 'expired'", "a newer version wrote it"),
    (
        "head = replace(head, '{', '{\"x\":1,')",
        "unknown field `x`",
    ),
    ("head = 'hunter2'", "not JSON"),
    ("head = NULL", "head"),
    ("http_status = 1000", "status"),
];

#[tokio::test]
async fn an_outcome_that_cannot_be_read_is_an_error_for_its_id_alone() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = Durable::new(database.pool().clone());
    for (change, part) in OUTCOMES {
        let id = durable
            .fire(post(server.url("/"), "hunter2"))
            .await
            .unwrap();
        outcome_of(&durable, id).await;
        let change = format!("UPDATE requeuest.outcomes SET {change} WHERE id = $1");
        execute(&database, id, &change).await;
        assert_unreadable(durable.outcome(id).await, id, part);
        assert_unreadable(durable.response(id).await, id, part);
        let error = durable.outcome(id).await.unwrap_err();
        assert!(
            !format!("{error} {error:?}").contains("hunter2"),
            "{error:?}"
        );
        let status = durable.status(id).await;
        if change.contains("'expired'") {
            assert_unreadable(status, id, part);
            assert_unreadable(durable.replay(id).await, id, part);
            assert_unreadable(durable.resolve(id, Resolution::Sent).await, id, part);
        } else {
            assert_eq!(status.unwrap(), Some(Status::Completed));
        }
        assert!(!durable.cancel(id).await.unwrap());
    }
}

#[tokio::test]
async fn waiters_of_readable_outcomes_get_them_beside_unreadable_ones() {
    let database = migrated().await;
    let server = Server::echo().await;
    let there = other_process(&database).await;
    let mut waiting = Vec::new();
    for (change, part) in [("1", ""), ("2", "a newer version wrote it")] {
        for _ in 0..3 {
            let id = there.fire(post(server.url("/"), change)).await.unwrap();
            let there = there.clone();
            let waiter = tokio::spawn(async move { there.outcome(id).await });
            waiting.push((id, part, waiter));
        }
    }
    eventually_rows(&database, "mq_msgs WHERE waiter IS NOT NULL", 6).await;
    // As a newer version finishes requests.
    database
        .pool()
        .execute(
            "WITH ended AS (
                 DELETE FROM requeuest.mq_msgs m USING requeuest.mq_payloads p
                 WHERE p.id = m.id AND p.body = '2' RETURNING m.*
             )
             INSERT INTO requeuest.outcomes
                 (slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
                  expires_at, format)
             SELECT 0, id, channel_name, channel_args, 'completed', 1, created_at, now(),
                 now() + interval '1 day', 2
             FROM ended",
        )
        .await
        .unwrap();
    let _runner = Durable::new(database.pool().clone());
    for (id, part, waiter) in waiting {
        let outcome = in_time(waiter).await.unwrap();
        if part.is_empty() {
            assert_eq!(outcome.unwrap().response().unwrap().status(), 200);
        } else {
            assert_unreadable(outcome, id, part);
        }
    }
    assert_eq!(server.bodies(), ["1"; 3]);
}

type Handled = Arc<Mutex<Vec<RequestId>>>;

async fn note(
    handled: &Handled,
    _: &mut PgConnection,
    outcome: &Outcome,
) -> Result<(), std::convert::Infallible> {
    handled.lock().await.push(outcome.id());
    Ok(())
}

#[tokio::test]
async fn a_handler_gets_an_outcome_once_it_can_be_read() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let handled = Handled::default();
    let handler = || outcome_fn_with(Arc::clone(&handled), note);
    drop(durable.on_outcome("default", handler()).await.unwrap());
    let mut ids = Vec::new();
    for _ in 0..5 {
        let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
        outcome_of(&durable, id).await;
        ids.push(id);
    }
    // The first ones are due first.
    let newer = "UPDATE requeuest.outcomes SET format = 2 WHERE id = $1";
    execute(&database, ids[0], newer).await;
    let status = "UPDATE requeuest.outcomes SET status = 'expired' WHERE id = $1";
    execute(&database, ids[1], status).await;
    let _subscription = durable.on_outcome("default", handler()).await.unwrap();
    let put_off = "unhandled
         WHERE failures = 0 AND error IS NULL AND parked_since IS NOT NULL AND due_at > now()";
    eventually_rows(&database, put_off, 2).await;
    eventually("the others are handled", || async {
        handled.lock().await.len() == 3 && rows(&database, "unhandled").await == 2
    })
    .await;
    assert!(!handled.lock().await.iter().any(|id| ids[..2].contains(id)));

    // Put off for as long as it has been known, up to five minutes.
    let long_ago = "UPDATE requeuest.unhandled
         SET parked_since = now() - interval '1 hour', due_at = now() WHERE id = $1";
    execute(&database, ids[0], long_ago).await;
    let later = "unhandled WHERE due_at > now() + interval '4 minutes'
         AND due_at < now() + interval '6 minutes'";
    eventually_rows(&database, later, 1).await;

    let readable = "UPDATE requeuest.outcomes SET format = 1, status = 'completed' WHERE id = $1";
    let due = "UPDATE requeuest.unhandled SET due_at = now() WHERE id = $1";
    for id in &ids[..2] {
        execute(&database, *id, readable).await;
        execute(&database, *id, due).await;
    }
    eventually_rows(&database, "unhandled", 0).await;
    let mut handled = handled.lock().await.clone();
    handled.sort_unstable();
    assert_eq!(handled, ids);
}

#[tokio::test]
async fn dead_letters_of_a_newer_version_are_left_alone() {
    let database = migrated().await;
    let failing = Arc::new(AtomicBool::new(true));
    let fails = Arc::clone(&failing);
    let server = Server::start(move |_, _| {
        let status = if fails.load(Ordering::SeqCst) {
            500
        } else {
            200
        };
        async move { reply(status, "") }
    })
    .await;
    let durable = builder(&database)
        .retry(RetryPolicy::none())
        .build()
        .unwrap();
    let mut ids = Vec::new();
    for _ in 0..4 {
        let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
        outcome_of(&durable, id).await;
        ids.push(id);
    }
    failing.store(false, Ordering::SeqCst);
    let newer = "UPDATE requeuest.outcomes SET format = 2 WHERE id = $1";
    execute(&database, ids[0], newer).await;
    let status = "UPDATE requeuest.outcomes SET status = 'expired' WHERE id = $1";
    execute(&database, ids[1], status).await;
    let all = DeadLetterFilter::default();
    let listed = durable.dead_letters(&all).await.unwrap();
    assert_eq!(listed.iter().map(|d| d.id).collect::<Vec<_>>(), ids[2..]);
    let one = DeadLetterFilter::default().limit(1);
    let again = durable.replay_all(&one).await.unwrap();
    assert_eq!(
        outcome_of(&durable, again[0]).await.status(),
        Status::Completed
    );
    assert_eq!(durable.purge_dead_letters(&all).await.unwrap(), 1);
    assert_eq!(rows(&database, "outcomes_kept").await, 2);
    durable.shutdown(LONG).await.unwrap();
}

/// All rows of the requests of two versions ahead, as text.
const AHEAD: &str = "
    SELECT concat_ws(' ',
        (SELECT string_agg(m::text, ' ' ORDER BY id) FROM requeuest.mq_msgs m WHERE format = 3),
        (
            SELECT string_agg(p::text, ' ' ORDER BY id) FROM requeuest.mq_payloads p
            WHERE id IN (SELECT id FROM requeuest.mq_msgs WHERE format = 3)
        ),
        (SELECT string_agg(o::text, ' ' ORDER BY id) FROM requeuest.outcomes o WHERE format = 3)
    )";

#[tokio::test]
async fn a_process_works_beside_a_schema_and_rows_two_versions_ahead() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let url = server.url("/");
    let enqueues = builder(&database).runner(false).build().unwrap();
    let ordered = || Options::default().ordered("key");
    let late = || Options::default().deadline(Duration::from_secs(60));
    // Rows of a newer version: their heads can be read, and must not be.
    for (options, body) in [
        (Options::default(), "plain"),
        (ordered(), "first of its key"),
        (late(), "overdue"),
        (Options::default().key("taken"), "keyed"),
        (Options::default(), "claimed"),
        (Options::default(), "ended"),
    ] {
        enqueues.fire(post(&url, body).with(options)).await.unwrap();
    }
    let newer = "
        ALTER TABLE requeuest.mq_msgs ADD COLUMN newer text DEFAULT 'x';
        ALTER TABLE requeuest.mq_payloads ADD COLUMN newer text DEFAULT 'x';
        ALTER TABLE requeuest.outcomes ADD COLUMN newer text DEFAULT 'x';
        INSERT INTO requeuest._sqlx_migrations
        SELECT version + ahead, description, installed_on, success, checksum, execution_time
        FROM (
            SELECT * FROM requeuest._sqlx_migrations ORDER BY version DESC LIMIT 1
        ) newest, generate_series(1, 2) ahead;
        UPDATE requeuest.mq_msgs SET format = 3;
        UPDATE requeuest.mq_msgs SET deadline = now() - interval '1 hour'
        WHERE deadline < now() + interval '1 hour';
        UPDATE requeuest.mq_msgs SET state = 'claimed', attempt_at = now() - interval '1 hour'
        WHERE id IN (SELECT id FROM requeuest.mq_payloads WHERE body = 'claimed');
        INSERT INTO requeuest.outcomes (
            slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
            expires_at, format
        )
        SELECT 0, m.id, m.channel_name, m.channel_args, 'postponed', 1, now(), now(),
            now() + interval '1 hour', 3
        FROM requeuest.mq_msgs m JOIN requeuest.mq_payloads p USING (id) WHERE p.body = 'ended';
        DELETE FROM requeuest.mq_msgs
        WHERE id IN (SELECT id FROM requeuest.mq_payloads WHERE body = 'ended')";
    database.pool().execute(newer).await.unwrap();
    let ahead = async || -> String {
        let rows = sqlx::query_scalar(AHEAD);
        rows.fetch_one(database.pool()).await.unwrap()
    };
    let before = ahead().await;
    assert!(before.contains("postponed"), "{before}");

    // An older process that starts now, as after a crash or a rollback.
    requeuest::migrate(database.pool()).await.unwrap();
    let durable = builder(&database).build().unwrap();
    let behind = durable.fire(post(&url, "behind").with(ordered())).await;
    let behind = behind.unwrap();
    let attached = post(&url, "keyed").with(Options::default().key("taken"));
    durable.fire(attached).await.unwrap();
    for number in 0..20 {
        let request = post(&url, format!("own {number}"));
        let response = in_time(durable.await_response(request)).await.unwrap();
        assert_eq!(response.status(), 200);
        let own = durable.fire(post(&url, format!("fired {number}"))).await;
        outcome_of(&durable, own.unwrap()).await;
    }
    let mut transaction = database.pool().begin().await.unwrap();
    let own = durable
        .fire_in(&mut *transaction, post(&url, "polled"))
        .await;
    transaction.commit().await.unwrap();
    outcome_of(&durable, own.unwrap()).await;
    assert_eq!(ahead().await, before);
    assert_eq!(server.count(), 41);
    // It waits for a request that this process can't send.
    assert_eq!(
        durable.status(behind).await.unwrap(),
        Some(Status::Available)
    );
}
