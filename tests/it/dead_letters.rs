//! Dead letters: listing, replaying, resolving, reconciling and purging them.

mod fired;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use requeuest::testkit::TestDatabase;
use requeuest::{
    DeadLetter, DeadLetterFilter, Durable, DurableBuilder, Guarantee, Options, Outcome, Request,
    RequestId, Resolution, Status, Uuid, outcome_fn_with,
};
use sqlx::{Executor, PgConnection};

use crate::support::{
    Server, builder, eventually, eventually_rows, in_time, migrated, outcome_of, post, quick,
    reply, rows,
};

fn post_with_secret(url: impl AsRef<str>, body: &'static str) -> Request {
    let mut request = post(url, body);
    let secret = http::HeaderValue::from_static("hunter2");
    request.headers_mut().insert("authorization", secret);
    request
}

/// Discards a request after one failed attempt.
fn single_attempt(database: &TestDatabase) -> DurableBuilder {
    builder(database).retry(quick().max_attempts(1))
}

/// A server that answers with 503 until the flag is set.
async fn failing_server() -> (Server, Arc<AtomicBool>) {
    let recovered = Arc::new(AtomicBool::new(false));
    let has_recovered = Arc::clone(&recovered);
    let server = Server::start(move |_, seen| {
        let status = if has_recovered.load(Ordering::SeqCst) {
            200
        } else {
            503
        };
        async move { reply(status, seen.body) }
    })
    .await;
    (server, recovered)
}

/// A server that never answers requests that arrive before the flag is set.
async fn mute_server() -> (Server, Arc<AtomicBool>) {
    let answers = Arc::new(AtomicBool::new(false));
    let answering = Arc::clone(&answers);
    let server = Server::start(move |_, seen| {
        let answering = answering.load(Ordering::SeqCst);
        async move {
            if !answering {
                std::future::pending::<()>().await;
            }
            reply(200, seen.body)
        }
    })
    .await;
    (server, answers)
}

/// Fires the request and waits until it ends with this status.
async fn ends(durable: &Durable, request: Request, status: Status) -> RequestId {
    let id = in_time(durable.fire(request)).await.unwrap();
    let outcome = outcome_of(durable, id).await;
    assert_eq!(outcome.status(), status);
    id
}

/// Fires an at-most-once request that ends as ambiguous.
async fn ambiguous(durable: &Durable, url: &str, options: Options) -> RequestId {
    let options = options
        .guarantee(Guarantee::AtMostOnce)
        .attempt_timeout(Duration::from_millis(300));
    let request = post_with_secret(url, "x").with(options);
    ends(durable, request, Status::Ambiguous).await
}

async fn all_dead_letters(durable: &Durable) -> Vec<DeadLetter> {
    let all = DeadLetterFilter::default();
    durable.dead_letters(&all).await.unwrap()
}

fn ids(letters: &[DeadLetter]) -> Vec<RequestId> {
    letters.iter().map(|letter| letter.id).collect()
}

#[tokio::test]
async fn dead_letters_are_listed_without_secrets() {
    let database = migrated().await;
    let (server, _) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let url = format!("http://user:hunter2@{}/p?q=hunter2", server.addr);
    let plain = ends(&durable, post_with_secret(&url, "x"), Status::Discarded).await;
    let ordered = post_with_secret(server.url("/"), "x").with(Options::default().ordered("a|b"));
    let ordered = ends(&durable, ordered, Status::Discarded).await;

    let letters = all_dead_letters(&durable).await;
    assert_eq!(ids(&letters), [plain, ordered]);
    assert_eq!(
        letters[0].destination.as_deref(),
        Some(&*format!("http://{}", server.addr))
    );
    assert_eq!(letters[0].method.as_deref(), Some("POST"));
    assert_eq!(letters[0].http_status, Some(503));
    let error = letters[0].error.as_deref();
    assert_eq!(error, Some("answered with 503 Service Unavailable"));
    assert_eq!(
        (letters[0].attempts, letters[0].status),
        (1, Status::Discarded)
    );
    assert_eq!(letters[0].ordering_key, None);
    assert_eq!(letters[1].ordering_key.as_deref(), Some("a|b"));
    assert!(letters[0].created_at <= letters[0].finished_at);
    assert!(!format!("{letters:?}").contains("hunter2"), "{letters:?}");
}

#[tokio::test]
async fn filters_select_by_channel_destination_status_and_time() {
    let database = migrated().await;
    let (server, _) = failing_server().await;
    let (silent, _) = mute_server().await;
    let durable = single_attempt(&database).deliver_all().build().unwrap();
    let here = ends(&durable, post(server.url("/"), "x"), Status::Discarded).await;
    let other = post(server.url("/"), "x").with(Options::default().channel("other"));
    let other = ends(&durable, other, Status::Discarded).await;
    let ambiguous_id = ambiguous(&durable, &silent.url("/"), Options::default()).await;
    sqlx::query(
        "UPDATE requeuest.outcomes SET finished_at = now() - INTERVAL '1 day' WHERE id = $1",
    )
    .bind(Uuid::from(other))
    .execute(database.pool())
    .await
    .unwrap();

    let hour = Duration::from_secs(3600);
    let filter = DeadLetterFilter::default;
    let letters = all_dead_letters(&durable).await;
    for (filter, wanted) in [
        (filter(), vec![other, here, ambiguous_id]),
        (filter().channel("other"), vec![other]),
        (filter().destination(server.url("")), vec![other, here]),
        (filter().destination("https://example.com"), vec![]),
        (filter().status(Status::Ambiguous), vec![ambiguous_id]),
        (filter().finished_within(hour), vec![here, ambiguous_id]),
        (filter().finished_before(hour), vec![other]),
        (filter().limit(2), vec![other, here]),
        (filter().limit(2).after(&letters[1]), vec![ambiguous_id]),
        (
            filter().after(&letters[0]).destination(server.url("")),
            vec![here],
        ),
        (
            filter().channel("other").destination(server.url("")),
            vec![other],
        ),
        (
            filter().channel("other").destination(silent.url("")),
            vec![],
        ),
        (
            filter()
                .channel("default")
                .destination(silent.url(""))
                .status(Status::Ambiguous)
                .finished_within(hour),
            vec![ambiguous_id],
        ),
        (filter().channel("other").finished_within(hour), vec![]),
    ] {
        let letters = durable.dead_letters(&filter).await.unwrap();
        assert_eq!(ids(&letters), wanted, "{filter:?}");
        let counted = durable.dead_letter_count(&filter).await.unwrap();
        assert_eq!(counted, wanted.len() as u64, "{filter:?}");
    }
    let error = durable.dead_letters(&filter().limit(0)).await.unwrap_err();
    assert_eq!(error.field(), Some("limit"));
    let error = durable
        .purge_dead_letters(&filter().channel(""))
        .await
        .unwrap_err();
    assert_eq!(error.field(), Some("channel"));
}

#[tokio::test]
async fn stored_destinations_include_default_ports() {
    let database = migrated().await;
    for (url, destination) in [
        ("https://A.example/x", "https://a.example:443"),
        ("http://u:p@a.example:8080?x", "http://a.example:8080"),
        ("http://[::1]/", "http://[::1]:80"),
    ] {
        let head = format!(r#"{{"method":"GET","url":"{url}","version":"HTTP/1.1"}}"#);
        let found: String = sqlx::query_scalar("SELECT requeuest.request_destination($1)")
            .bind(head)
            .fetch_one(database.pool())
            .await
            .unwrap();
        assert_eq!(found, destination);
    }
}

#[tokio::test]
async fn a_replay_sends_the_same_content_once_under_a_new_id() {
    let database = migrated().await;
    let (server, recovered) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let keyed =
        || post_with_secret(server.url("/"), "hello").with(Options::default().key("invoice-42"));
    let old = ends(&durable, keyed(), Status::Discarded).await;
    recovered.store(true, Ordering::SeqCst);

    let new = in_time(durable.replay(old)).await.unwrap();
    assert!(new > old);
    let response = in_time(durable.response(new)).await.unwrap();
    assert_eq!(response.text().unwrap(), "hello");
    let seen = server.seen();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0], seen[1]);
    assert!(seen[0].headers.contains_key("idempotency-key"));

    // The key belongs to the new request now. The old request is no dead letter any more.
    assert_eq!(durable.fire(keyed()).await.unwrap(), new);
    assert_eq!(durable.status(old).await.unwrap(), Some(Status::Discarded));
    assert!(all_dead_letters(&durable).await.is_empty());
    let error = durable.replay(old).await.unwrap_err();
    assert!(error.is_wrong_state(), "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&new.to_string()) && text.contains(&old.to_string()),
        "{text}"
    );
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn only_one_of_many_concurrent_replays_succeeds() {
    let database = migrated().await;
    let (server, recovered) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let id = ends(&durable, post(server.url("/"), "x"), Status::Discarded).await;
    recovered.store(true, Ordering::SeqCst);
    let replays = (0..8).map(|_| durable.replay(id));
    let replays = in_time(join_all(replays)).await;
    let (done, refused): (Vec<_>, Vec<_>) = replays.into_iter().partition(Result::is_ok);
    assert_eq!((done.len(), refused.len()), (1, 7));
    for refused in refused {
        let error = refused.unwrap_err();
        assert!(error.is_wrong_state(), "{error:?}");
    }
}

#[tokio::test]
async fn only_dead_letters_can_be_replayed_resolved_or_purged() {
    let database = migrated().await;
    let (server, recovered) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let unknown = RequestId::from(Uuid::nil());
    assert!(durable.replay(unknown).await.unwrap_err().is_unknown_id());
    let error = durable.resolve(unknown, Resolution::Sent).await;
    assert!(error.unwrap_err().is_unknown_id());

    let discarded = ends(&durable, post(server.url("/"), "x"), Status::Discarded).await;
    let error = durable.resolve(discarded, Resolution::NotSent).await;
    let error = error.unwrap_err();
    assert!(error.is_wrong_state());
    assert!(
        error.to_string().contains("to send it again, replay it"),
        "{error}"
    );
    recovered.store(true, Ordering::SeqCst);
    let completed = ends(&durable, post(server.url("/"), "x"), Status::Completed).await;
    let later =
        post(server.url("/"), "x").with(Options::default().delay(Duration::from_secs(3600)));
    let waiting = durable.fire(later).await.unwrap();
    for (id, status) in [(completed, Status::Completed), (waiting, Status::Scheduled)] {
        let error = durable.replay(id).await.unwrap_err();
        assert!(error.is_wrong_state(), "{error}");
        assert!(error.to_string().contains(status.as_str()), "{error}");
        assert!(error.to_string().contains("can be replayed"), "{error}");
        let error = durable.resolve(id, Resolution::Sent).await.unwrap_err();
        assert!(error.is_wrong_state(), "{error}");
        assert!(error.to_string().contains("can be resolved"), "{error}");
        assert_eq!(durable.status(id).await.unwrap(), Some(status));
    }
    let all = DeadLetterFilter::default();
    assert_eq!(durable.purge_dead_letters(&all).await.unwrap(), 1);
    assert_eq!(durable.status(discarded).await.unwrap(), None);
    assert_eq!(
        durable.status(waiting).await.unwrap(),
        Some(Status::Scheduled)
    );
}

#[tokio::test]
async fn replay_all_replays_every_match_even_if_it_fails_again() {
    let database = migrated().await;
    let (server, _) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let fired = (0..105).map(|_| durable.fire(post(server.url("/"), "x")));
    for id in in_time(join_all(fired)).await {
        outcome_of(&durable, id.unwrap()).await;
    }
    let filter = DeadLetterFilter::default().destination(server.url(""));
    let two = in_time(durable.replay_all(&filter.clone().limit(2))).await;
    assert_eq!(two.unwrap().len(), 2);
    let again = in_time(durable.replay_all(&filter)).await.unwrap();
    assert!(again.len() >= 103 && again.len() <= 105, "{}", again.len());
    for id in again {
        outcome_of(&durable, id).await;
    }
    assert_eq!(
        in_time(durable.purge_dead_letters(&filter)).await.unwrap(),
        105
    );
    for table in ["mq_msgs", "mq_payloads", "outcomes_kept"] {
        assert_eq!(rows(&database, table).await, 0, "{table}");
    }
}

/// Halts a key by its first request. The second request of the key waits behind it.
async fn halted(durable: &Durable, server: &Server) -> (RequestId, RequestId) {
    let options = || Options::default().ordered("key").halt_on_discard();
    let first = post(server.url("/"), "first").with(options());
    let first = ends(durable, first, Status::Discarded).await;
    let second = post(server.url("/"), "second").with(options());
    let second = durable.fire(second).await.unwrap();
    let halted = durable.halted().await.unwrap();
    assert_eq!(halted.len(), 1);
    assert_eq!((&*halted[0].channel, &*halted[0].key), ("default", "key"));
    assert_eq!(halted[0].id, first);
    (first, second)
}

#[tokio::test]
async fn a_replay_takes_its_old_place_in_a_halted_key() {
    let database = migrated().await;
    let (server, recovered) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let (first, second) = halted(&durable, &server).await;
    recovered.store(true, Ordering::SeqCst);
    durable.replay(first).await.unwrap();
    in_time(durable.response(second)).await.unwrap();
    assert_eq!(server.bodies(), ["first", "first", "second"]);
    assert!(durable.halted().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_resumed_key_moves_on_and_keeps_its_dead_letter() {
    let database = migrated().await;
    let (server, recovered) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let (first, second) = halted(&durable, &server).await;
    recovered.store(true, Ordering::SeqCst);
    assert!(!durable.resume("default", "another").await.unwrap());
    assert!(durable.resume("default", "key").await.unwrap());
    assert!(!durable.resume("default", "key").await.unwrap());
    in_time(durable.response(second)).await.unwrap();
    assert_eq!(server.bodies(), ["first", "second"]);
    let new = durable.replay(first).await.unwrap();
    in_time(durable.response(new)).await.unwrap();
    assert_eq!(server.bodies(), ["first", "second", "first"]);
    let error = durable.resume("", "key").await.unwrap_err();
    assert_eq!(error.field(), Some("channel"));
}

#[tokio::test]
async fn purging_the_dead_letter_that_halts_a_key_resumes_it() {
    let database = migrated().await;
    let (server, recovered) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let (first, second) = halted(&durable, &server).await;
    recovered.store(true, Ordering::SeqCst);
    let all = DeadLetterFilter::default();
    assert_eq!(durable.purge_dead_letters(&all).await.unwrap(), 1);
    in_time(durable.response(second)).await.unwrap();
    assert_eq!(durable.status(first).await.unwrap(), None);
    assert_eq!(server.bodies(), ["first", "second"]);
}

#[tokio::test]
async fn an_ordered_replay_waits_for_a_transaction_with_its_key() {
    let database = migrated().await;
    let (server, recovered) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let ordered = || post(server.url("/"), "x").with(Options::default().ordered("key"));
    let old = ends(&durable, ordered(), Status::Discarded).await;
    recovered.store(true, Ordering::SeqCst);
    let mut transaction = database.pool().begin().await.unwrap();
    let before = durable.fire_in(&mut *transaction, ordered()).await.unwrap();
    let replaying = tokio::spawn({
        let durable = durable.clone();
        async move { durable.replay(old).await }
    });
    // Other requests are not held up in the meantime.
    ends(&durable, post(server.url("/"), "y"), Status::Completed).await;
    assert!(!replaying.is_finished());
    transaction.commit().await.unwrap();
    let new = in_time(replaying).await.unwrap().unwrap();
    in_time(durable.response(new)).await.unwrap();
    assert_eq!(
        durable.status(before).await.unwrap(),
        Some(Status::Completed)
    );
}

#[tokio::test]
async fn a_request_resolved_as_sent_completes_without_a_response() {
    let database = migrated().await;
    let (server, answers) = mute_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let options = Options::default().ordered("key").halt_on_discard();
    let id = ambiguous(&durable, &server.url("/"), options).await;
    let next = post(server.url("/"), "next").with(Options::default().ordered("key"));
    let next = durable.fire(next).await.unwrap();
    answers.store(true, Ordering::SeqCst);
    durable.resolve(id, Resolution::Sent).await.unwrap();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
    let error = durable.response(id).await.unwrap_err();
    assert!(error.is_response_unknown(), "{error}");
    assert_eq!(error.request_id(), Some(id));
    // The ordering key moves on.
    in_time(durable.response(next)).await.unwrap();
    assert_eq!(server.bodies(), ["x", "next"]);
    let again = durable.resolve(id, Resolution::NotSent).await.unwrap_err();
    assert!(again.is_wrong_state(), "{again}");
    assert!(all_dead_letters(&durable).await.is_empty());
}

#[tokio::test]
async fn a_request_resolved_as_not_sent_is_resent_under_its_id() {
    let database = migrated().await;
    let (server, answers) = mute_server().await;
    // The policy allows one attempt. The attempt that did not arrive doesn't count.
    let durable = single_attempt(&database).build().unwrap();
    let id = ambiguous(&durable, &server.url("/"), Options::default()).await;
    answers.store(true, Ordering::SeqCst);
    durable.resolve(id, Resolution::NotSent).await.unwrap();
    assert_eq!(in_time(durable.response(id)).await.unwrap().status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_request_resolved_as_not_sent_keeps_its_place_in_its_key() {
    let database = migrated().await;
    let (server, answers) = mute_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let options = Options::default().ordered("key").halt_on_discard();
    let id = ambiguous(&durable, &server.url("/"), options).await;
    let next = post(server.url("/"), "next").with(Options::default().ordered("key"));
    let next = durable.fire(next).await.unwrap();
    answers.store(true, Ordering::SeqCst);
    durable.resolve(id, Resolution::NotSent).await.unwrap();
    in_time(durable.response(next)).await.unwrap();
    assert_eq!(server.bodies(), ["x", "x", "next"]);
}

type Record = Arc<Mutex<Vec<(RequestId, Status)>>>;

#[tokio::test]
async fn handlers_get_the_outcome_of_a_resolution() {
    let database = migrated().await;
    let (server, answers) = mute_server().await;
    let durable = single_attempt(&database).build().unwrap();
    let handled = Record::default();
    let _listener = durable
        .on_outcome(
            "default",
            outcome_fn_with(
                Arc::clone(&handled),
                async |record: &Record, _: &mut PgConnection, outcome: &Outcome| {
                    let handled = (outcome.id(), outcome.status());
                    record.lock().unwrap().push(handled);
                    Ok::<_, sqlx::Error>(())
                },
            ),
        )
        .await
        .unwrap();
    let sent = ambiguous(&durable, &server.url("/"), Options::default()).await;
    let lost = ambiguous(&durable, &server.url("/"), Options::default()).await;
    answers.store(true, Ordering::SeqCst);
    durable.resolve(sent, Resolution::Sent).await.unwrap();
    durable.resolve(lost, Resolution::NotSent).await.unwrap();
    eventually("both requests have completed", || async {
        let handled = handled.lock().unwrap();
        [sent, lost]
            .iter()
            .all(|id| handled.contains(&(*id, Status::Completed)))
    })
    .await;
}

#[tokio::test]
async fn a_reconcile_hook_resolves_ambiguous_requests() {
    let database = migrated().await;
    let (server, answers) = mute_server().await;
    let asked = Arc::new(Mutex::new(Vec::new()));
    let ask = {
        let (asked, answers) = (Arc::clone(&asked), Arc::clone(&answers));
        move |letter: DeadLetter, request: Request| {
            let (asked, answers) = (Arc::clone(&asked), Arc::clone(&answers));
            async move {
                asked.lock().unwrap().push((letter.id, request.clone()));
                if request.url().ends_with("/arrived") {
                    return Ok(Some(Resolution::Sent));
                }
                answers.store(true, Ordering::SeqCst);
                Ok(Some(Resolution::NotSent))
            }
        }
    };
    let durable = single_attempt(&database).reconcile(ask).build().unwrap();
    let arrived = ambiguous(&durable, &server.url("/arrived"), Options::default()).await;
    eventually("the request that arrived has completed", || async {
        durable.status(arrived).await.unwrap() == Some(Status::Completed)
    })
    .await;
    let error = durable.response(arrived).await.unwrap_err();
    assert!(error.is_response_unknown(), "{error}");
    let lost = ambiguous(&durable, &server.url("/lost"), Options::default()).await;
    eventually("the lost request has completed", || async {
        durable.status(lost).await.unwrap() == Some(Status::Completed)
    })
    .await;
    assert_eq!(in_time(durable.response(lost)).await.unwrap().status(), 200);
    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[0].0, arrived);
    assert_eq!(asked[0].1.headers()["authorization"], "hunter2");
    assert_eq!(asked[0].1.body().map(|body| &body[..]), Some(&b"x"[..]));
}

#[tokio::test]
async fn two_processes_never_reconcile_a_request_concurrently() {
    let database = migrated().await;
    let (server, _) = mute_server().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let handle = || {
        let asked = Arc::clone(&asked);
        let ask = move |_: DeadLetter, _: Request| {
            asked.fetch_add(1, Ordering::SeqCst);
            async { Err("the receiver does not answer".into()) }
        };
        single_attempt(&database).reconcile(ask).build().unwrap()
    };
    let (one, _other) = (handle(), handle());
    let id = ambiguous(&one, &server.url("/"), Options::default()).await;
    eventually("the hook was called", || async {
        asked.load(Ordering::SeqCst) > 0
    })
    .await;
    // The next call is delayed.
    let delayed = "outcomes_kept WHERE reconciles = 1
                   AND reconcile_at < now() + INTERVAL '10 seconds'";
    eventually_rows(&database, delayed, 1).await;
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert_eq!(one.status(id).await.unwrap(), Some(Status::Ambiguous));
}

#[tokio::test]
async fn a_count_reads_no_more_dead_letters_than_its_limit() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    let all = DeadLetterFilter::default();
    assert_eq!(durable.dead_letter_count(&all).await.unwrap(), 0);
    let fill = "INSERT INTO requeuest.outcomes
                    (slot, id, channel_name, channel_args, status, attempts, created_at,
                     finished_at)
                SELECT -1, gen_random_uuid(), 'c', 'g', 'discarded', 1, now(), now()
                FROM generate_series(1, 12000)";
    sqlx::query(fill).execute(database.pool()).await.unwrap();
    assert_eq!(durable.dead_letter_count(&all).await.unwrap(), 10_000);
    let few = all.clone().limit(7);
    assert_eq!(durable.dead_letter_count(&few).await.unwrap(), 7);
    let error = durable.dead_letter_count(&all.channel("")).await;
    assert_eq!(error.unwrap_err().field(), Some("channel"));
}

/// Adds dead letters of one channel and destination, with their payloads. The last one that ended
/// can't be changed.
async fn dead_letters_of_which_the_last_is_stuck(database: &TestDatabase, number: i32) {
    let fill = format!(
        "WITH letters AS (
            INSERT INTO requeuest.outcomes (
                slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
                destination
            )
            SELECT
                -1, gen_random_uuid(), 'c', '0000|d|http://a.example:80', 'discarded', 1, now(),
                now() - i * interval '1 second', 'http://a.example:80'
            FROM generate_series(0, {number} - 1) i
            RETURNING id
         )
         INSERT INTO requeuest.mq_payloads (id, name, head)
         SELECT id, 'requeuest', '{{}}' FROM letters"
    );
    let stuck = "CREATE FUNCTION stuck() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF OLD.id = (
                SELECT id FROM requeuest.outcomes_kept ORDER BY finished_at DESC LIMIT 1
            ) THEN
                RAISE 'stuck';
            END IF;
            RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
        END $$;
        CREATE TRIGGER stuck BEFORE UPDATE OR DELETE ON requeuest.mq_payloads
        FOR EACH ROW EXECUTE FUNCTION stuck()";
    database.pool().execute(&*fill).await.unwrap();
    database.pool().execute(stuck).await.unwrap();
}

#[tokio::test]
async fn a_replay_that_fails_later_says_what_it_has_replayed() {
    let database = migrated().await;
    dead_letters_of_which_the_last_is_stuck(&database, 250).await;
    let durable = builder(&database).runner(false).build().unwrap();
    let all = DeadLetterFilter::default();
    let error = in_time(durable.replay_all(&all)).await.unwrap_err();
    assert!(error.is_database(), "{error:?}");
    assert_eq!(error.replayed().len(), 200);
    let text = error.to_string();
    assert!(
        text.contains("stuck") && text.contains("200 were replayed"),
        "{text}"
    );
    for id in [error.replayed()[0], error.replayed()[199]] {
        assert_eq!(durable.status(id).await.unwrap(), Some(Status::Available));
    }
    assert_eq!(rows(&database, "mq_msgs").await, 200);
    assert_eq!(durable.dead_letter_count(&all).await.unwrap(), 50);
    // Nothing was done before this one failed.
    let again = in_time(durable.replay_all(&all)).await.unwrap_err();
    assert!(again.replayed().is_empty() && !again.to_string().contains("before"));
}

#[tokio::test]
async fn a_purge_that_fails_later_says_how_many_it_has_deleted() {
    let database = migrated().await;
    dead_letters_of_which_the_last_is_stuck(&database, 1200).await;
    let durable = builder(&database).runner(false).build().unwrap();
    let all = DeadLetterFilter::default().destination("http://a.example");
    let error = in_time(durable.purge_dead_letters(&all)).await.unwrap_err();
    assert!(error.is_database(), "{error:?}");
    assert_eq!(error.purged(), 1000);
    assert!(error.to_string().contains("1000 were deleted"), "{error}");
    assert_eq!(durable.dead_letter_count(&all).await.unwrap(), 200);
}

#[tokio::test]
async fn a_replayed_request_keeps_its_destination() {
    let database = migrated().await;
    let (server, _) = failing_server().await;
    let durable = single_attempt(&database).build().unwrap();
    for options in [
        Options::default(),
        Options::default().ordered("key"),
        Options::default().ordered("halted").halt_on_discard(),
        Options::default().limit_key("tenant-7"),
        Options::default().limit_key("tenant-7").ordered("key"),
    ] {
        let request = post(server.url("/"), "x").with(options);
        let id = ends(&durable, request, Status::Discarded).await;
        let filter = DeadLetterFilter::default().destination(server.url(""));
        for _ in 0..2 {
            let letters = durable.dead_letters(&filter).await.unwrap();
            assert_eq!(letters.len(), 1);
            assert_eq!(letters[0].destination, Some(server.url("")));
            let again = durable.replay(letters[0].id).await.unwrap();
            outcome_of(&durable, again).await;
        }
        let error = durable.response(id).await;
        assert_eq!(error.unwrap().status(), 503);
        assert_eq!(durable.purge_dead_letters(&filter).await.unwrap(), 1);
    }
}
