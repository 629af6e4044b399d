//! A handle that requires encryption uses nothing that is stored readable, so that a role that may
//! write the tables can't put its own requests and responses there.

use std::time::Duration;

use requeuest::testkit::TestDatabase;
use requeuest::{DeadLetterFilter, Durable, Options, Status};
use sqlx::PgPool;

use super::{assert_unreadable, delivering, execute, look_again, parked, ring, there};
use crate::support::{
    Server, builder, eventually, in_time, migrated, other_process, outcome_of, post, quick,
};

const PLAIN: &str = "it is not encrypted, and this process requires encryption";

fn strict(database: &TestDatabase) -> Durable {
    let builder = builder(database).retry(quick()).encryption(ring(&["a"]));
    builder.require_encryption(true).build().unwrap()
}

#[tokio::test]
async fn a_request_that_is_not_encrypted_is_parked_and_not_counted() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let plain = other_process(&database).await;
    let inserted = plain.fire(post(server.url("/a"), "x")).await.unwrap();
    let sealed = there(&database, &["a"]).await;
    let replaced = sealed.fire(post(server.url("/b"), "x")).await.unwrap();
    let change = "UPDATE requeuest.mq_payloads p SET head = o.head, body = o.body
        FROM requeuest.mq_payloads o WHERE p.id = $1 AND o.id = $2";
    let keep = "CREATE TABLE requeuest.kept AS SELECT id, head, body FROM requeuest.mq_payloads";
    execute(&database, keep, &[]).await;
    execute(&database, change, &[replaced, inserted]).await;

    let durable = strict(&database);
    for id in [inserted, replaced] {
        assert_eq!(parked(&durable, id).await, PLAIN);
    }
    let own = durable.fire(post(server.url("/own"), "x")).await.unwrap();
    assert_eq!(outcome_of(&durable, own).await.status(), Status::Completed);
    assert_eq!(server.count(), 1);
    durable.shutdown(Duration::ZERO).await.unwrap();

    let mend = "UPDATE requeuest.mq_payloads p SET head = k.head, body = k.body
        FROM requeuest.kept k WHERE k.id = p.id";
    execute(&database, mend, &[]).await;
    let progress = there(&database, &["a"]).await.reencrypt().unwrap();
    progress.finish().await.unwrap();
    let durable = strict(&database);
    for id in [inserted, replaced] {
        eventually("it is sent", || async {
            look_again(&database).await;
            durable.status(id).await.unwrap() == Some(Status::Completed)
        })
        .await;
        assert_eq!(outcome_of(&durable, id).await.attempts(), 1);
    }
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn an_outcome_that_is_not_encrypted_is_unreadable() {
    let database = migrated().await;
    let server = Server::in_turn(&[200, 404, 200, 404]).await;
    let plain = builder(&database).build().unwrap();
    let fire = async |durable: &Durable| {
        let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
        outcome_of(durable, id).await;
        id
    };
    let before = [fire(&plain).await, fire(&plain).await];
    plain.shutdown(Duration::ZERO).await.unwrap();
    let durable = strict(&database);
    let sealed = [fire(&durable).await, fire(&durable).await];
    for id in before {
        assert_unreadable(durable.outcome(id).await, id, PLAIN);
        assert_unreadable(durable.response(id).await, id, PLAIN);
    }
    let change = "UPDATE requeuest.outcomes t SET head = o.head, body = o.body
        FROM requeuest.outcomes o WHERE t.id = $1 AND o.id = $2";
    for (sealed, before) in sealed.into_iter().zip(before) {
        durable.outcome(sealed).await.unwrap();
        execute(&database, change, &[sealed, before]).await;
        assert_unreadable(durable.outcome(sealed).await, sealed, PLAIN);
    }
}

#[tokio::test]
async fn a_text_of_an_error_is_encrypted_or_the_databases_own() {
    let database = migrated().await;
    let refused = crate::support::closed_port().await;
    let durable = strict(&database);
    let once = Options::default().retry(quick().max_attempts(1));
    let failing = post(format!("http://{refused}/"), "x").with(once);
    let failed = durable.fire(failing).await.unwrap();
    assert_eq!(
        outcome_of(&durable, failed).await.status(),
        Status::Discarded
    );
    let later = Options::default().delay(Duration::from_secs(3600));
    let replaced = later.clone().supersede("s");
    let replaced = post("http://a/", "x").with(replaced);
    let superseded = durable.fire(replaced.clone()).await.unwrap();
    durable.fire(replaced).await.unwrap();
    let late = later.deadline(Duration::from_secs(7200));
    let late = durable
        .fire(post("http://a/", "x").with(late))
        .await
        .unwrap();
    let passed = "UPDATE requeuest.mq_msgs SET deadline = now() WHERE id = $1";
    execute(&database, passed, &[late]).await;
    for id in [superseded, late] {
        outcome_of(&durable, id).await;
    }
    let forged = "UPDATE requeuest.outcomes SET error = 'all is well' WHERE id = $1";
    execute(&database, forged, &[failed]).await;
    assert_unreadable(durable.outcome(failed).await, failed, PLAIN);
    let letters = durable.dead_letters(&DeadLetterFilter::default()).await;
    let mut errors: Vec<_> = letters
        .unwrap()
        .into_iter()
        .map(|letter| letter.error.unwrap())
        .collect();
    errors.sort();
    assert_eq!(errors, [PLAIN, "its deadline passed"]);
}

#[tokio::test]
async fn a_key_that_is_not_encrypted_is_no_answer() {
    let database = migrated().await;
    let call = || post("http://a/", "x").with(Options::default().key("k"));
    let planted = other_process(&database).await.fire(call()).await.unwrap();
    let durable = strict(&database);
    let many = in_time(durable.fire_many([call()])).await;
    assert_unreadable(many, planted, PLAIN);
    assert_unreadable(in_time(durable.fire(call())).await, planted, PLAIN);
}

#[tokio::test]
async fn a_handle_that_requires_encryption_gives_nothing_readable_its_key() {
    let database = migrated().await;
    let plain = other_process(&database).await;
    plain.fire(post("http://a/", "x")).await.unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    let strict = Durable::builder(pool)
        .require_encryption(true)
        .encryption(ring(&["a"]))
        .runner(false)
        .build()
        .unwrap();
    let progress = strict.reencrypt().unwrap().finish().await.unwrap();
    assert_eq!((progress.done, progress.unreadable), (0, 1));
    let delivering = delivering(&database, &["a"]);
    let progress = delivering.reencrypt().unwrap().finish().await.unwrap();
    assert!(progress.unreadable == 0, "{progress:?}");
}

#[tokio::test]
async fn requiring_encryption_without_keys_is_an_error_of_the_builder() {
    let pool = PgPool::connect_lazy("postgres://localhost/unused").unwrap();
    let error = Durable::builder(pool)
        .require_encryption(true)
        .build()
        .unwrap_err();
    assert_eq!(error.field(), Some("require_encryption"));
}
