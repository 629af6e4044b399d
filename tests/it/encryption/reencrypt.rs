//! Changing the key of what is stored, and knowing when a key may go.

use std::time::Duration;

use requeuest::testkit::TestDatabase;
use requeuest::{
    DeadLetterFilter, Durable, KeyUsage, Options, Outcome, RequestId, Status, outcome_fn,
};
use sqlx::PgConnection;

use super::{delivering, ring, there};
use crate::support::{
    Server, builder, count, eventually, migrated, other_process, outcome_of, post, quick, reply,
    rows,
};

async fn refuse(_: &mut PgConnection, _: &Outcome) -> Result<(), std::io::Error> {
    Err(std::io::Error::other("refused"))
}

/// The ids of the requests of a handle: completed, a dead letter, and waiting with an early answer.
struct Stored {
    done: RequestId,
    dead: RequestId,
    waiting: RequestId,
}

/// Has a handle leave something in each table, and ends it.
async fn fill(database: &TestDatabase, handle: &Durable, server: &Server, key: &str) -> Stored {
    let subscription = handle
        .on_outcome("default", outcome_fn(refuse))
        .await
        .unwrap();
    let fire = async |path: &str, options: Options| {
        let request = post(server.url(path), format!("{key}{path}"));
        handle.fire(request.with(options)).await.unwrap()
    };
    let done = fire("/done", Options::default().key(key)).await;
    let dead = fire("/gone", Options::default()).await;
    let slow = quick()
        .base(Duration::from_secs(3600))
        .cap(Duration::from_secs(3600));
    let slow = slow.jitter(requeuest::retry::Jitter::None);
    let waiting = fire("/busy", Options::default().retry(slow)).await;
    assert_eq!(outcome_of(handle, done).await.status(), Status::Completed);
    assert_eq!(outcome_of(handle, dead).await.status(), Status::Discarded);
    let tried = format!("mq_payloads WHERE id = '{waiting}' AND response_head IS NOT NULL");
    eventually("an early answer is stored", || async {
        rows(database, &tried).await == 1
    })
    .await;
    let failed = format!("unhandled WHERE id IN ('{done}', '{dead}') AND error IS NOT NULL");
    eventually("handlers have failed", || async {
        rows(database, &failed).await == 2
    })
    .await;
    drop(subscription);
    handle.shutdown(Duration::from_secs(5)).await.unwrap();
    Stored {
        done,
        dead,
        waiting,
    }
}

async fn server() -> Server {
    Server::start(|_, seen| async move {
        match seen.uri.path() {
            "/busy" => reply(503, "later"),
            "/gone" => reply(404, "no"),
            _ => reply(200, seen.body),
        }
    })
    .await
}

async fn usage(durable: &Durable) -> Vec<KeyUsage> {
    durable.encryption_keys().await.unwrap()
}

fn ids(usage: &[KeyUsage]) -> Vec<Option<&str>> {
    usage.iter().map(|key| key.id.as_deref()).collect()
}

#[tokio::test]
async fn everything_is_encrypted_anew_and_the_old_key_may_go() {
    let database = migrated().await;
    let server = server().await;
    let first = fill(
        &database,
        &builder(&database).build().unwrap(),
        &server,
        "plain",
    )
    .await;
    let second = fill(&database, &delivering(&database, &["a"]), &server, "old").await;

    let rotating = there(&database, &["b", "a"]).await;
    let before = usage(&rotating).await;
    assert_eq!(ids(&before), [None, Some("a")]);
    for key in &before {
        assert_eq!((key.requests, key.outcomes), (2, 2), "{key:?}");
        assert!(key.attempts >= 1 && key.request_keys == 1, "{key:?}");
        assert_eq!(key.hand_overs, 2);
    }
    let stale: u64 = before.iter().map(KeyUsage::rows).sum();
    let mut work = rotating.reencrypt().unwrap();
    let begun = work.next().await.unwrap().unwrap();
    assert_eq!((begun.done, begun.remaining), (0, stale));
    let mut last = begun;
    while let Some(progress) = work.next().await.unwrap() {
        assert!(progress.remaining <= last.remaining && progress.done >= last.done);
        last = progress;
    }
    assert_eq!((last.done, last.remaining), (stale, 0));
    assert_eq!((last.unreadable, last.skipped), (0, 0));
    assert_eq!(
        ids(&usage(&other_process(&database).await).await),
        [Some("b")]
    );
    let again = rotating.reencrypt().unwrap().finish().await.unwrap();
    assert_eq!((again.done, again.remaining), (0, 0));

    // The old key has gone.
    let durable = delivering(&database, &["b"]);
    for (stored, key) in [(&first, "plain"), (&second, "old")] {
        let response = durable.response(stored.done).await.unwrap();
        assert_eq!(response.body(), &format!("{key}/done"));
        let attached = post(server.url("/done"), format!("{key}/done"));
        let attached = attached.with(Options::default().key(key));
        assert_eq!(durable.fire(attached).await.unwrap(), stored.done);
        assert_eq!(
            durable
                .outcome(stored.dead)
                .await
                .unwrap()
                .response()
                .unwrap()
                .body(),
            "no"
        );
        let due = format!(
            "WITH due AS (
                UPDATE requeuest.mq_msgs SET attempt_at = now() WHERE id = '{}' RETURNING 1
             ) SELECT count(*) FROM due",
            stored.waiting
        );
        assert_eq!(count(&database, &due).await, 1);
    }
    let sent = server.count();
    server.wait_for(sent + 2).await;
    let busy: Vec<_> = server.seen()[sent..]
        .iter()
        .map(|seen| seen.body.clone())
        .collect();
    assert!(
        busy.contains(&"plain/busy".into()) && busy.contains(&"old/busy".into()),
        "{busy:?}"
    );
    let replayed = durable
        .replay_all(&DeadLetterFilter::default())
        .await
        .unwrap();
    assert_eq!(replayed.len(), 2);
    let failed = durable.failed_hand_overs(None).await.unwrap();
    assert!(
        failed
            .iter()
            .any(|one| one.error.as_deref() == Some("refused")),
        "{failed:?}"
    );
}

#[tokio::test]
async fn an_interrupted_change_of_keys_is_continued_by_another_call() {
    let database = migrated().await;
    let old = there(&database, &["a"]).await;
    let requests = (0..1200).map(|number| post("http://a/", number.to_string()));
    old.fire_many(requests).await.unwrap();
    let rotating = there(&database, &["b", "a"]).await;
    let mut work = rotating.reencrypt().unwrap();
    work.next().await.unwrap();
    let first = work.next().await.unwrap().unwrap();
    assert_eq!((first.done, first.remaining), (500, 700));
    {
        let batch = std::pin::pin!(work.next());
        assert!(futures_util::poll!(batch).is_pending());
        // Dropped here.
    }
    drop(work);
    let another = there(&database, &["b", "a"]).await;
    let rest = another.reencrypt().unwrap().finish().await.unwrap();
    assert!(rest.done <= 700 && rest.unreadable == 0, "{rest:?}");
    eventually("all need the new key", || async {
        ids(&usage(&rotating).await) == [Some("b")]
    })
    .await;
    let onward = there(&database, &["c", "b"]).await;
    let all = onward.reencrypt().unwrap().finish().await.unwrap();
    assert_eq!((all.done, all.unreadable), (1200, 0));
}

#[tokio::test]
async fn what_cannot_be_read_stays_as_it_is() {
    let database = migrated().await;
    let server = server().await;
    let lost = there(&database, &["lost"])
        .await
        .fire(post(server.url("/done"), "x"))
        .await;
    let found = there(&database, &["a"])
        .await
        .fire(post(server.url("/done"), "y"))
        .await;
    let rotating = there(&database, &["b", "a"]).await;
    let progress = rotating.reencrypt().unwrap().finish().await.unwrap();
    assert_eq!((progress.done, progress.unreadable), (1, 1));
    assert_eq!(ids(&usage(&rotating).await), [Some("b"), Some("lost")]);
    let durable = builder(&database)
        .encryption(ring(&["b", "lost"]))
        .build()
        .unwrap();
    for id in [lost, found] {
        assert_eq!(
            outcome_of(&durable, id.unwrap()).await.status(),
            Status::Completed
        );
    }
    let error = other_process(&database).await.reencrypt().unwrap_err();
    assert_eq!(error.field(), Some("encryption"));
}

#[tokio::test]
async fn requests_are_sent_while_their_key_changes() {
    let database = migrated().await;
    let server = Server::echo().await;
    let old = there(&database, &["a"]).await;
    let body = |number: usize| format!("{number} {}", "x".repeat(100_000));
    let requests = (0..150).map(|number| post(server.url("/"), body(number)));
    let ids = old.fire_many(requests).await.unwrap();
    let rotating = there(&database, &["b", "a"]).await;
    // The database keeps up with as many at once.
    let durable = builder(&database)
        .concurrency(8)
        .encryption(ring(&["b", "a"]));
    let durable = durable.build().unwrap();
    while rows(&database, "mq_msgs").await > 0 {
        rotating.reencrypt().unwrap().finish().await.unwrap();
    }
    for (number, id) in ids.into_iter().enumerate() {
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(
            (outcome.status(), outcome.attempts()),
            (Status::Completed, 1)
        );
        assert_eq!(outcome.response().unwrap().body(), &body(number));
    }
    assert_eq!(server.count(), 150);
    let last = durable.reencrypt().unwrap().finish().await.unwrap();
    assert_eq!(last.unreadable, 0);
}
