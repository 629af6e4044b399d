//! Requests that ended without success: listing, replaying, resolving, asking about and forgetting them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use requeuest::testkit::{self, TestDatabase};
use requeuest::{
    DeadLetter, DeadLetterFilter, Durable, DurableBuilder, Guarantee, Options, Request, RequestId,
    Resolution, Status, outcome_fn,
};

use crate::support::{LONG, Seen, Server, count, eventually, in_time, migrated, quick, reply};

fn post(url: &str, body: &'static str) -> Request {
    let request = http::Request::post(url)
        .header("authorization", "hunter2")
        .body(body)
        .unwrap();
    request.try_into().unwrap()
}

/// Gives a failing request up at once.
fn once(database: &TestDatabase) -> DurableBuilder {
    Durable::builder(database.pool().clone()).retry(quick().max_attempts(1))
}

/// A server that fails until it is told not to.
async fn failing() -> (Server, Arc<AtomicBool>) {
    let well = Arc::new(AtomicBool::new(false));
    let is_well = Arc::clone(&well);
    let server = Server::start(move |_, seen| {
        let status = if is_well.load(Ordering::SeqCst) {
            200
        } else {
            503
        };
        async move { reply(status, seen.body) }
    })
    .await;
    (server, well)
}

/// A server that gets requests and never answers, until it is told to.
async fn mute() -> (Server, Arc<AtomicBool>) {
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

async fn ends(durable: &Durable, request: Request, status: Status) -> RequestId {
    let id = in_time(durable.fire(request)).await.unwrap();
    let outcome = testkit::outcome(durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), status);
    id
}

/// May have been sent, as far as anybody knows.
async fn ambiguous(durable: &Durable, url: &str, options: Options) -> RequestId {
    let options = options
        .guarantee(Guarantee::AtMostOnce)
        .attempt_timeout(Duration::from_millis(300));
    ends(durable, post(url, "x").with(options), Status::Ambiguous).await
}

fn ids(kept: &[DeadLetter]) -> Vec<RequestId> {
    kept.iter().map(|kept| kept.id).collect()
}

fn bodies(seen: &[Seen]) -> Vec<String> {
    seen.iter()
        .map(|seen| String::from_utf8_lossy(&seen.body).into_owned())
        .collect()
}

#[tokio::test]
async fn what_was_given_up_is_listed_without_its_secrets() {
    let database = migrated().await;
    let (server, _) = failing().await;
    let durable = once(&database).build().unwrap();
    let url = format!("http://user:hunter2@{}/p?q=hunter2", server.addr);
    let plain = ends(&durable, post(&url, "x"), Status::Discarded).await;
    let ordered = post(&server.url("/"), "x").with(Options::default().ordered("a|b"));
    let ordered = ends(&durable, ordered, Status::Discarded).await;

    let kept = durable
        .dead_letters(&DeadLetterFilter::default())
        .await
        .unwrap();
    assert_eq!(ids(&kept), [plain, ordered]);
    assert_eq!(
        kept[0].destination.as_deref(),
        Some(&*format!("http://{}", server.addr))
    );
    assert_eq!(kept[0].method.as_deref(), Some("POST"));
    assert_eq!(kept[0].http_status, Some(503));
    assert_eq!((kept[0].attempts, kept[0].status), (1, Status::Discarded));
    assert_eq!(kept[0].ordering_key, None);
    assert_eq!(kept[1].ordering_key.as_deref(), Some("a|b"));
    assert!(kept[0].created_at <= kept[0].finished_at);
    assert!(!format!("{kept:?}").contains("hunter2"), "{kept:?}");
}

#[tokio::test]
async fn a_filter_picks_by_channel_destination_status_and_time() {
    let database = migrated().await;
    let (server, _) = failing().await;
    let (silent, _) = mute().await;
    let durable = once(&database).deliver_all().build().unwrap();
    let here = ends(&durable, post(&server.url("/"), "x"), Status::Discarded).await;
    let other = post(&server.url("/"), "x").with(Options::default().channel("other"));
    let other = ends(&durable, other, Status::Discarded).await;
    let unsure = ambiguous(&durable, &silent.url("/"), Options::default()).await;
    sqlx::query(
        "update requeuest.outcomes set finished_at = now() - interval '1 day' where id = $1",
    )
    .bind(requeuest::Uuid::from(other))
    .execute(database.pool())
    .await
    .unwrap();

    let hour = Duration::from_secs(3600);
    let filter = DeadLetterFilter::default;
    for (filter, wanted) in [
        (filter(), vec![here, other, unsure]),
        (filter().channel("other"), vec![other]),
        (filter().destination(server.url("")), vec![here, other]),
        (filter().destination("https://example.com"), vec![]),
        (filter().status(Status::Ambiguous), vec![unsure]),
        (filter().finished_within(hour), vec![here, unsure]),
        (filter().finished_before(hour), vec![other]),
        (filter().limit(2), vec![here, other]),
        (filter().limit(2).after(other), vec![unsure]),
    ] {
        let kept = durable.dead_letters(&filter).await.unwrap();
        assert_eq!(ids(&kept), wanted, "{filter:?}");
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
async fn stored_destinations_are_compared_with_their_default_ports() {
    let database = migrated().await;
    for (url, destination) in [
        ("https://A.example/x", "https://a.example:443"),
        ("http://u:p@a.example:8080?x", "http://a.example:8080"),
        ("http://[::1]/", "http://[::1]:80"),
    ] {
        let head = format!(r#"{{"method":"GET","url":"{url}","version":"HTTP/1.1"}}"#);
        let found: String = sqlx::query_scalar("select requeuest.request_destination($1)")
            .bind(head)
            .fetch_one(database.pool())
            .await
            .unwrap();
        assert_eq!(found, destination);
    }
}

#[tokio::test]
async fn a_replay_is_a_new_request_with_the_same_content_and_happens_once() {
    let database = migrated().await;
    let (server, well) = failing().await;
    let durable = once(&database).build().unwrap();
    let keyed = || post(&server.url("/"), "hello").with(Options::default().key("invoice-42"));
    let old = ends(&durable, keyed(), Status::Discarded).await;
    well.store(true, Ordering::SeqCst);

    let new = in_time(durable.replay(old)).await.unwrap();
    assert!(new > old);
    let response = in_time(durable.response(new)).await.unwrap();
    assert_eq!(response.text().unwrap(), "hello");
    let seen = server.seen();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0], seen[1]);
    assert!(seen[0].headers.contains_key("idempotency-key"));

    // The key leads to the new one, and the old one is history.
    assert_eq!(durable.fire(keyed()).await.unwrap(), new);
    assert_eq!(durable.status(old).await.unwrap(), Some(Status::Discarded));
    assert!(
        durable
            .dead_letters(&DeadLetterFilter::default())
            .await
            .unwrap()
            .is_empty()
    );
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
async fn only_one_of_many_replays_at_once_succeeds() {
    let database = migrated().await;
    let (server, well) = failing().await;
    let durable = once(&database).build().unwrap();
    let id = ends(&durable, post(&server.url("/"), "x"), Status::Discarded).await;
    well.store(true, Ordering::SeqCst);
    let replays = (0..8).map(|_| durable.replay(id));
    let replays = in_time(futures_util::future::join_all(replays)).await;
    let (done, refused): (Vec<_>, Vec<_>) = replays.into_iter().partition(Result::is_ok);
    assert_eq!((done.len(), refused.len()), (1, 7));
    for refused in refused {
        let error = refused.unwrap_err();
        assert!(error.is_wrong_state(), "{error:?}");
    }
}

#[tokio::test]
async fn what_is_not_kept_is_refused_and_left_as_it_is() {
    let database = migrated().await;
    let (server, well) = failing().await;
    let durable = once(&database).build().unwrap();
    let unknown = RequestId::from(requeuest::Uuid::nil());
    assert!(durable.replay(unknown).await.unwrap_err().is_unknown_id());
    let error = durable.resolve(unknown, Resolution::Sent).await;
    assert!(error.unwrap_err().is_unknown_id());

    let discarded = ends(&durable, post(&server.url("/"), "x"), Status::Discarded).await;
    let error = durable.resolve(discarded, Resolution::NotSent).await;
    assert!(error.unwrap_err().is_wrong_state());
    well.store(true, Ordering::SeqCst);
    let completed = ends(&durable, post(&server.url("/"), "x"), Status::Completed).await;
    let later =
        post(&server.url("/"), "x").with(Options::default().delay(Duration::from_secs(3600)));
    let waiting = durable.fire(later).await.unwrap();
    for (id, status) in [(completed, Status::Completed), (waiting, Status::Scheduled)] {
        let error = durable.replay(id).await.unwrap_err();
        assert!(error.is_wrong_state(), "{error}");
        assert!(error.to_string().contains(status.as_str()), "{error}");
        let error = durable.resolve(id, Resolution::Sent).await.unwrap_err();
        assert!(error.is_wrong_state(), "{error}");
        assert_eq!(durable.status(id).await.unwrap(), Some(status));
    }
    assert_eq!(
        durable
            .purge_dead_letters(&DeadLetterFilter::default())
            .await
            .unwrap(),
        1
    );
    assert_eq!(durable.status(discarded).await.unwrap(), None);
    assert_eq!(
        durable.status(waiting).await.unwrap(),
        Some(Status::Scheduled)
    );
}

#[tokio::test]
async fn all_that_match_are_replayed_even_if_they_fail_again() {
    let database = migrated().await;
    let (server, _) = failing().await;
    let durable = once(&database).build().unwrap();
    let fired = (0..105).map(|_| durable.fire(post(&server.url("/"), "x")));
    for id in in_time(futures_util::future::join_all(fired)).await {
        testkit::outcome(&durable, id.unwrap(), LONG).await.unwrap();
    }
    let filter = DeadLetterFilter::default().destination(server.url(""));
    let two = in_time(durable.replay_all(&filter.clone().limit(2))).await;
    assert_eq!(two.unwrap().len(), 2);
    let again = in_time(durable.replay_all(&filter)).await.unwrap();
    assert!(again.len() >= 103 && again.len() <= 105, "{}", again.len());
    for id in again {
        testkit::outcome(&durable, id, LONG).await.unwrap();
    }
    assert_eq!(
        in_time(durable.purge_dead_letters(&filter)).await.unwrap(),
        105
    );
    for table in ["mq_msgs", "mq_payloads", "outcomes_kept"] {
        let query = format!("select count(*) from requeuest.{table}");
        assert_eq!(count(&database, &query).await, 0, "{table}");
    }
}

/// The first request of a key halts it, the second one waits behind it.
async fn halted(durable: &Durable, server: &Server) -> (RequestId, RequestId) {
    let options = || Options::default().ordered("key").halt_on_discard();
    let first = post(&server.url("/"), "first").with(options());
    let first = ends(durable, first, Status::Discarded).await;
    let second = post(&server.url("/"), "second").with(options());
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
    let (server, well) = failing().await;
    let durable = once(&database).build().unwrap();
    let (first, second) = halted(&durable, &server).await;
    well.store(true, Ordering::SeqCst);
    durable.replay(first).await.unwrap();
    in_time(durable.response(second)).await.unwrap();
    assert_eq!(bodies(&server.seen()), ["first", "first", "second"]);
    assert!(durable.halted().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_halted_key_goes_on_when_it_is_resumed_and_its_blocker_stays_kept() {
    let database = migrated().await;
    let (server, well) = failing().await;
    let durable = once(&database).build().unwrap();
    let (first, second) = halted(&durable, &server).await;
    well.store(true, Ordering::SeqCst);
    assert!(!durable.resume("default", "another").await.unwrap());
    assert!(durable.resume("default", "key").await.unwrap());
    assert!(!durable.resume("default", "key").await.unwrap());
    in_time(durable.response(second)).await.unwrap();
    assert_eq!(bodies(&server.seen()), ["first", "second"]);
    let new = durable.replay(first).await.unwrap();
    in_time(durable.response(new)).await.unwrap();
    assert_eq!(bodies(&server.seen()), ["first", "second", "first"]);
    let error = durable.resume("", "key").await.unwrap_err();
    assert_eq!(error.field(), Some("channel"));
}

#[tokio::test]
async fn purging_what_halts_a_key_lets_it_go_on() {
    let database = migrated().await;
    let (server, well) = failing().await;
    let durable = once(&database).build().unwrap();
    let (first, second) = halted(&durable, &server).await;
    well.store(true, Ordering::SeqCst);
    assert_eq!(
        durable
            .purge_dead_letters(&DeadLetterFilter::default())
            .await
            .unwrap(),
        1
    );
    in_time(durable.response(second)).await.unwrap();
    assert_eq!(durable.status(first).await.unwrap(), None);
    assert_eq!(bodies(&server.seen()), ["first", "second"]);
}

#[tokio::test]
async fn an_ordered_replay_waits_for_a_transaction_that_has_its_key() {
    let database = migrated().await;
    let (server, well) = failing().await;
    let durable = once(&database).build().unwrap();
    let ordered = || post(&server.url("/"), "x").with(Options::default().ordered("key"));
    let old = ends(&durable, ordered(), Status::Discarded).await;
    well.store(true, Ordering::SeqCst);
    let mut transaction = database.pool().begin().await.unwrap();
    let before = durable.fire_in(&mut *transaction, ordered()).await.unwrap();
    let replaying = tokio::spawn({
        let durable = durable.clone();
        async move { durable.replay(old).await }
    });
    // Others are not held up in the meantime.
    ends(&durable, post(&server.url("/"), "y"), Status::Completed).await;
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
async fn resolved_as_sent_it_is_completed_without_a_response() {
    let database = migrated().await;
    let (server, answers) = mute().await;
    let durable = once(&database).build().unwrap();
    let options = Options::default().ordered("key").halt_on_discard();
    let id = ambiguous(&durable, &server.url("/"), options).await;
    let next = post(&server.url("/"), "next").with(Options::default().ordered("key"));
    let next = durable.fire(next).await.unwrap();
    answers.store(true, Ordering::SeqCst);
    durable.resolve(id, Resolution::Sent).await.unwrap();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
    let error = durable.response(id).await.unwrap_err();
    assert!(error.is_response_unknown(), "{error}");
    assert_eq!(error.request_id(), Some(id));
    // Its key goes on.
    in_time(durable.response(next)).await.unwrap();
    assert_eq!(bodies(&server.seen()), ["x", "next"]);
    let again = durable.resolve(id, Resolution::NotSent).await.unwrap_err();
    assert!(again.is_wrong_state(), "{again}");
    assert!(
        durable
            .dead_letters(&DeadLetterFilter::default())
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn resolved_as_not_sent_it_goes_out_again_under_its_id() {
    let database = migrated().await;
    let (server, answers) = mute().await;
    // Its policy allows one attempt, and the one that did not arrive is none.
    let durable = once(&database).build().unwrap();
    let id = ambiguous(&durable, &server.url("/"), Options::default()).await;
    answers.store(true, Ordering::SeqCst);
    durable.resolve(id, Resolution::NotSent).await.unwrap();
    assert_eq!(in_time(durable.response(id)).await.unwrap().status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn resolved_as_not_sent_it_keeps_its_place_in_a_halted_key() {
    let database = migrated().await;
    let (server, answers) = mute().await;
    let durable = once(&database).build().unwrap();
    let options = Options::default().ordered("key").halt_on_discard();
    let id = ambiguous(&durable, &server.url("/"), options).await;
    let next = post(&server.url("/"), "next").with(Options::default().ordered("key"));
    let next = durable.fire(next).await.unwrap();
    answers.store(true, Ordering::SeqCst);
    durable.resolve(id, Resolution::NotSent).await.unwrap();
    in_time(durable.response(next)).await.unwrap();
    assert_eq!(bodies(&server.seen()), ["x", "x", "next"]);
}

#[tokio::test]
async fn a_handler_gets_the_end_that_a_resolution_makes() {
    let database = migrated().await;
    let (server, answers) = mute().await;
    let durable = once(&database).build().unwrap();
    let handled = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&handled);
    let _listener = durable
        .on_outcome(
            "default",
            outcome_fn(move |_, outcome| {
                record
                    .lock()
                    .unwrap()
                    .push((outcome.id(), outcome.status()));
                Box::pin(async { Ok(()) })
            }),
        )
        .await
        .unwrap();
    let sent = ambiguous(&durable, &server.url("/"), Options::default()).await;
    let lost = ambiguous(&durable, &server.url("/"), Options::default()).await;
    answers.store(true, Ordering::SeqCst);
    durable.resolve(sent, Resolution::Sent).await.unwrap();
    durable.resolve(lost, Resolution::NotSent).await.unwrap();
    eventually("both ends", || async {
        let handled = handled.lock().unwrap();
        [sent, lost]
            .iter()
            .all(|id| handled.contains(&(*id, Status::Completed)))
    })
    .await;
}

#[tokio::test]
async fn a_reconcile_hook_finds_out_what_became_of_a_request() {
    let database = migrated().await;
    let (server, answers) = mute().await;
    let asked = Arc::new(Mutex::new(Vec::new()));
    let ask = {
        let (asked, answers) = (Arc::clone(&asked), Arc::clone(&answers));
        move |kept: DeadLetter, request: Request| {
            let (asked, answers) = (Arc::clone(&asked), Arc::clone(&answers));
            async move {
                asked.lock().unwrap().push((kept.id, request.clone()));
                if request.url().ends_with("/arrived") {
                    return Ok(Some(Resolution::Sent));
                }
                answers.store(true, Ordering::SeqCst);
                Ok(Some(Resolution::NotSent))
            }
        }
    };
    let durable = once(&database).reconcile(ask).build().unwrap();
    let arrived = ambiguous(&durable, &server.url("/arrived"), Options::default()).await;
    eventually("the end of the one that arrived", || async {
        durable.status(arrived).await.unwrap() == Some(Status::Completed)
    })
    .await;
    let error = durable.response(arrived).await.unwrap_err();
    assert!(error.is_response_unknown(), "{error}");
    let lost = ambiguous(&durable, &server.url("/lost"), Options::default()).await;
    eventually("the end of the one that was lost", || async {
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
async fn two_processes_never_ask_about_a_request_at_once() {
    let database = migrated().await;
    let (server, _) = mute().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let handle = || {
        let asked = Arc::clone(&asked);
        let ask = move |_: DeadLetter, _: Request| {
            asked.fetch_add(1, Ordering::SeqCst);
            async { Err("nobody is there".into()) }
        };
        once(&database).reconcile(ask).build().unwrap()
    };
    let (one, _other) = (handle(), handle());
    let id = ambiguous(&one, &server.url("/"), Options::default()).await;
    eventually("a question", || async { asked.load(Ordering::SeqCst) > 0 }).await;
    eventually("a pause before the next", || async {
        let query = "select count(*) from requeuest.outcomes_kept
            where reconciles = 1 and reconcile_at < now() + interval '10 seconds'";
        count(&database, query).await == 1
    })
    .await;
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert_eq!(one.status(id).await.unwrap(), Some(Status::Ambiguous));
}
