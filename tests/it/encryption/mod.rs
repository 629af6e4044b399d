//! Encryption at rest: nothing of requests and responses can be read in the database, whatever has
//! no key waits for a process that has it, and rows that were moved or changed are not used.

mod canary;
mod keys;
mod moved;
mod reencrypt;
mod required;

use std::time::Duration;

use http::Request;
use requeuest::encryption::{Key, Keyring};
use requeuest::testkit::TestDatabase;
use requeuest::{
    DeadLetterFilter, Durable, Error, Options, Outcome, RequestId, Status, Uuid, outcome_fn_with,
};
use sqlx::{Executor, PgConnection, PgPool};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use crate::support::{
    Seen, Server, builder, eventually, eventually_some, in_time, migrated, other_process,
    outcome_of, post, quick, reply, rows,
};

/// A key whose bytes follow from its id.
pub fn key(id: &str) -> Key {
    let bytes: Vec<u8> = id.bytes().cycle().zip(0..32).map(|(a, b)| a ^ b).collect();
    Key::new(id, bytes).unwrap()
}

/// A ring with the keys of these ids.
pub fn ring(ids: &[&str]) -> Keyring {
    let mut keys = ids.iter().map(|id| key(id));
    let first = Keyring::new(keys.next().unwrap());
    keys.fold(first, Keyring::and_read)
}

/// Stands in for another process with these keys, which only enqueues and looks.
pub async fn there(database: &TestDatabase, ids: &[&str]) -> Durable {
    let pool = PgPool::connect(database.url()).await.unwrap();
    let builder = Durable::builder(pool).runner(false).encryption(ring(ids));
    builder.build().unwrap()
}

/// A handle with a runner and these keys.
pub fn delivering(database: &TestDatabase, ids: &[&str]) -> Durable {
    let builder = builder(database).retry(quick()).encryption(ring(ids));
    builder.build().unwrap()
}

/// Polls look at parked requests and outcomes again at once.
pub async fn look_again(database: &TestDatabase) {
    let statements = "UPDATE requeuest.mq_msgs SET attempt_at = now() WHERE state = 'parked';
        UPDATE requeuest.unhandled SET due_at = now() WHERE parked_since IS NOT NULL";
    database.pool().execute(statements).await.unwrap();
}

/// Waits until this request is listed as parked, and returns the reason. While a poll looks at the
/// request again, it isn't listed.
pub async fn parked(durable: &Durable, id: RequestId) -> String {
    eventually_some("the request is parked", || async {
        let listed = durable.parked(None).await.unwrap();
        let request = listed.into_iter().find(|request| request.id == id);
        request.map(|request| request.reason)
    })
    .await
}

pub fn assert_unreadable<T: std::fmt::Debug>(result: Result<T, Error>, id: RequestId, part: &str) {
    let error = result.unwrap_err();
    assert!(error.is_unreadable(), "{error}");
    assert_eq!(error.request_id(), Some(id));
    assert!(error.to_string().contains(part), "{error}");
}

#[tokio::test]
async fn an_encrypted_request_is_sent_as_it_was_given_and_its_answer_found_again() {
    let database = migrated().await;
    let server = Server::start(|number, seen| async move {
        if number % 3 < 2 {
            return reply(503, "later");
        }
        let mut answer = reply(200, seen.body);
        answer
            .headers_mut()
            .append("x-answer", "a".parse().unwrap());
        answer
            .headers_mut()
            .append("x-answer", "b".parse().unwrap());
        answer
    })
    .await;
    let durable = delivering(&database, &["a", "b"]);
    let elsewhere = there(&database, &["b", "a"]).await;
    let large = vec![b'x'; 300_000];
    for body in [None, Some(Vec::new()), Some(b"small".to_vec()), Some(large)] {
        for sent_by_poll in [false, true] {
            let request = Request::builder()
                .method(if body.is_some() { "PUT" } else { "GET" })
                .uri(server.url("/a?b=c%20d"))
                .header("x-many", "1")
                .header("x-many", "2")
                .header(
                    "x-bytes",
                    http::HeaderValue::from_bytes(b"\xe4\xff").unwrap(),
                );
            let request = request.body(reqwest::Body::from(body.clone().unwrap_or_default()));
            let mut request =
                requeuest::Request::try_from(reqwest::Request::try_from(request.unwrap()).unwrap())
                    .unwrap();
            if body.is_none() {
                let url = server.url("/a?b=c%20d").parse().unwrap();
                request = requeuest::Request::get(url, request.headers().clone());
            }
            let before = server.count();
            let id = if sent_by_poll {
                let id = elsewhere.fire(request).await.unwrap();
                outcome_of(&durable, id).await;
                id
            } else {
                in_time(durable.await_response(request)).await.unwrap().id()
            };
            let seen = &server.seen()[before..];
            assert_eq!(seen.len(), 3);
            for seen in seen {
                assert_eq!(seen.uri, "/a?b=c%20d");
                assert_eq!(seen.body, body.clone().unwrap_or_default());
                assert_eq!(seen.headers.get_all("x-many").iter().count(), 2);
                assert_eq!(seen.headers["x-bytes"].as_bytes(), b"\xe4\xff");
            }
            for handle in [&durable, &elsewhere] {
                let response = handle.response(id).await.unwrap();
                assert_eq!(response.body(), &body.clone().unwrap_or_default());
                assert_eq!(response.headers().get_all("x-answer").iter().count(), 2);
            }
        }
    }
}

#[tokio::test]
async fn a_request_waits_parked_for_a_process_with_its_key() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let ids = [
        there(&database, &["a"])
            .await
            .fire(post(server.url("/"), "x"))
            .await
            .unwrap(),
        there(&database, &["a"])
            .await
            .fire(post(server.url("/"), vec![b'x'; 100_000]))
            .await
            .unwrap(),
    ];
    let without = builder(&database).build().unwrap();
    for id in ids {
        assert!(
            parked(&without, id)
                .await
                .contains("this process has no keys")
        );
    }
    without.shutdown(Duration::ZERO).await.unwrap();

    let other = delivering(&database, &["b"]);
    for id in ids {
        eventually("the reason names the key", || async {
            look_again(&database).await;
            parked(&other, id)
                .await
                .ends_with("a key that this process does not have: `a`")
        })
        .await;
    }
    other.shutdown(Duration::ZERO).await.unwrap();

    let bytes = Key::new("a", (100..132).collect::<Vec<u8>>()).unwrap();
    let impostor = builder(&database)
        .encryption(Keyring::new(bytes))
        .build()
        .unwrap();
    for id in ids {
        eventually("the key has other bytes", || async {
            look_again(&database).await;
            parked(&impostor, id)
                .await
                .contains("can't be decrypted with the key `a`")
        })
        .await;
    }
    impostor.shutdown(Duration::ZERO).await.unwrap();
    assert_eq!(server.count(), 0);

    let durable = delivering(&database, &["a"]);
    eventually("all are sent", || async {
        look_again(&database).await;
        rows(&database, "mq_msgs").await == 0
    })
    .await;
    for id in ids {
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(
            (outcome.status(), outcome.attempts()),
            (Status::Completed, 1)
        );
    }
    assert_eq!(server.count(), 2);
}

type Ids = UnboundedSender<RequestId>;

async fn tell(ids: &Ids, _: &mut PgConnection, outcome: &Outcome) -> Result<(), std::io::Error> {
    assert_eq!(outcome.response().unwrap().body(), "answer");
    ids.send(outcome.id()).map_err(std::io::Error::other)
}

#[tokio::test]
async fn an_outcome_waits_for_a_handler_with_its_key_and_is_unreadable_without() {
    let database = migrated().await;
    let server = Server::start(|_, _| async { reply(200, "answer") }).await;
    let keyless = builder(&database).runner(false).build().unwrap();
    let (sender, mut ids) = unbounded_channel();
    let handler = || outcome_fn_with(sender.clone(), tell);
    let useless = keyless.on_outcome("default", handler()).await.unwrap();
    let durable = delivering(&database, &["a"]);
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    outcome_of(&durable, id).await;

    for without in [keyless.clone(), other_process(&database).await] {
        assert_unreadable(without.response(id).await, id, "this process has no keys");
        assert_unreadable(without.outcome(id).await, id, "this process has no keys");
        assert_eq!(without.status(id).await.unwrap(), Some(Status::Completed));
    }
    let other = there(&database, &["b"]).await;
    assert_unreadable(other.response(id).await, id, "`a`");
    eventually("the outcome is put off", || async {
        let failed = keyless.failed_hand_overs(None).await.unwrap();
        failed
            .iter()
            .any(|one| one.id == id && one.unreadable && one.failures == 0)
    })
    .await;
    assert!(ids.try_recv().is_err());
    drop(useless);

    let _subscription = durable.on_outcome("default", handler()).await.unwrap();
    eventually("the outcome is handed over", || async {
        look_again(&database).await;
        !ids.is_empty()
    })
    .await;
    assert_eq!(ids.recv().await, Some(id));
    crate::support::eventually_rows(&database, "unhandled", 0).await;
}

#[tokio::test]
async fn rows_from_before_encryption_stay_readable() {
    let database = migrated().await;
    let server = Server::echo().await;
    let plain = other_process(&database).await;
    let done = plain.fire(post(server.url("/"), "done")).await.unwrap();
    let without = builder(&database).build().unwrap();
    outcome_of(&without, done).await;
    without.shutdown(Duration::ZERO).await.unwrap();
    let waiting = plain.fire(post(server.url("/"), "waiting")).await.unwrap();

    let durable = delivering(&database, &["a"]);
    for (id, body) in [(done, "done"), (waiting, "waiting")] {
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(outcome.response().unwrap().body(), body);
    }
    assert_eq!(
        rows(&database, "outcomes WHERE head LIKE '{\"sealed\":%'").await,
        1
    );
}

#[tokio::test]
async fn a_dead_letter_is_listed_and_replayed_by_a_process_with_its_key() {
    let database = migrated().await;
    let server = Server::in_turn(&[404, 404, 200]).await;
    let durable = delivering(&database, &["b", "a"]);
    let mut letters = Vec::new();
    for ids in [&["a"][..], &["b"]] {
        let request = post(server.url("/hook"), vec![b'x'; 100_000]);
        let request = request.with(Options::default().ordered(ids[0]).halt_on_discard());
        let id = there(&database, ids).await.fire(request).await.unwrap();
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
        letters.push(id);
    }
    let keyless = other_process(&database).await;
    assert_unreadable(keyless.replay(letters[0]).await, letters[0], "has no keys");
    assert!(
        keyless
            .replay_all(&DeadLetterFilter::default())
            .await
            .unwrap()
            .is_empty()
    );
    let listed = keyless
        .dead_letters(&DeadLetterFilter::default())
        .await
        .unwrap();
    assert_eq!(
        listed.iter().map(|letter| letter.id).collect::<Vec<_>>(),
        letters
    );
    for letter in &listed {
        let origin = format!("http://{}", server.addr);
        assert_eq!(letter.destination.as_deref(), Some(&*origin));
        assert_eq!(letter.method.as_deref(), Some("POST"));
        assert_eq!(letter.http_status, Some(404));
    }

    let again = durable
        .replay_all(&DeadLetterFilter::default())
        .await
        .unwrap();
    assert_eq!(again.len(), 2);
    for id in again {
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    }
    let seen = server.seen();
    let (first, replayed) = seen.split_at(2);
    for first in first {
        // They may arrive in the other order.
        let is_same =
            |seen: &&Seen| seen.headers["idempotency-key"] == first.headers["idempotency-key"];
        let replayed = replayed.iter().find(is_same).unwrap();
        assert_eq!(first.uri, replayed.uri);
        assert_eq!(first.body, replayed.body);
    }
}

#[tokio::test]
async fn processes_with_and_without_the_key_work_side_by_side() {
    let database = migrated().await;
    let server = Server::echo().await;
    let keyed = delivering(&database, &["a"]);
    let keyless = builder(&database).build().unwrap();
    let (with, without) = (
        there(&database, &["a"]).await,
        other_process(&database).await,
    );
    let mut ids = Vec::new();
    for number in 0..10 {
        for enqueuing in [&with, &without, &keyed, &keyless] {
            let request = post(server.url("/"), number.to_string());
            ids.push((enqueuing.fire(request).await.unwrap(), number));
        }
    }
    eventually("all are sent", || async {
        look_again(&database).await;
        rows(&database, "mq_msgs").await == 0
    })
    .await;
    for (id, number) in ids {
        let outcome = outcome_of(&keyed, id).await;
        assert_eq!(
            (outcome.status(), outcome.attempts()),
            (Status::Completed, 1)
        );
        assert_eq!(outcome.response().unwrap().body(), &number.to_string());
    }
    assert_eq!(server.count(), 40);
}

#[tokio::test]
async fn two_keys_with_one_id_are_an_error_of_the_builder() {
    let pool = PgPool::connect_lazy("postgres://localhost/unused").unwrap();
    let keys = Keyring::new(key("a")).and_read(key("b")).and_read(key("a"));
    let error = Durable::builder(pool).encryption(keys).build().unwrap_err();
    assert_eq!(error.field(), Some("encryption"));
    assert!(error.to_string().contains("`a`"), "{error}");
}

pub async fn execute(database: &TestDatabase, statement: &str, ids: &[RequestId]) {
    let mut query = sqlx::query(statement);
    for id in ids {
        query = query.bind(Uuid::from(*id));
    }
    let done = query.execute(database.pool()).await.unwrap();
    assert!(done.rows_affected() > 0, "{statement}");
}
