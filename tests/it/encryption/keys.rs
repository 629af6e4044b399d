//! Callers' keys: a repeated call is the same request, whichever key encrypts.

use std::time::Duration;

use requeuest::migrate::DatabaseRole;
use requeuest::{Durable, Options, Request};

use super::{assert_unreadable, ring, there};
use crate::support::{Role, count, migrated, other_process, post, rows};

fn keyed(key: &str, body: &str) -> Request {
    post("http://a/hook", body.to_owned()).with(Options::default().key(key))
}

#[tokio::test]
async fn a_repeated_call_is_one_request_across_a_rotation() {
    let database = migrated().await;
    let plain = other_process(&database).await;
    let (old, both) = (
        there(&database, &["a"]).await,
        there(&database, &["b", "a"]).await,
    );
    let first = old.fire(keyed("k", "x")).await.unwrap();
    let from_before = plain.fire(keyed("l", "x")).await.unwrap();
    for again in [&old, &both] {
        assert_eq!(again.fire(keyed("k", "x")).await.unwrap(), first);
        assert_eq!(again.fire(keyed("l", "x")).await.unwrap(), from_before);
        let error = again.fire(keyed("k", "y")).await.unwrap_err();
        assert!(error.is_key_conflict(), "{error}");
        assert_eq!(error.request_id(), Some(first));
    }
    for without in [&plain, &there(&database, &["c"]).await] {
        assert_unreadable(without.fire(keyed("k", "x")).await, first, "key");
        let many = without.fire_many([keyed("k", "x"), keyed("m", "x")]).await;
        assert_unreadable(many, first, "key");
    }
    assert_eq!(rows(&database, "mq_msgs").await, 2);
    assert_eq!(rows(&database, "request_keys").await, 2);
}

#[tokio::test]
async fn many_repeated_calls_are_their_requests_across_a_rotation() {
    let database = migrated().await;
    let (old, both) = (
        there(&database, &["a"]).await,
        there(&database, &["b", "a"]).await,
    );
    let calls = |from: usize| (from..from + 20).map(|key| keyed(&key.to_string(), "x"));
    let first = old.fire_many(calls(0)).await.unwrap();
    let again = both.fire_many(calls(10)).await.unwrap();
    assert_eq!(again[..10], first[10..]);
    let twice = both
        .fire_many([keyed("new", "x"), keyed("new", "x")])
        .await
        .unwrap();
    assert_eq!(twice[0], twice[1]);
    assert_eq!(rows(&database, "mq_msgs").await, 31);
    let error = both
        .fire_many([keyed("1", "x"), keyed("2", "y")])
        .await
        .unwrap_err();
    assert!(error.is_key_conflict(), "{error}");
    assert_eq!(error.request_id(), Some(first[2]));
    assert_eq!(rows(&database, "mq_msgs").await, 31);
}

#[tokio::test]
async fn equal_calls_of_different_keys_have_nothing_in_common_in_the_database() {
    let database = migrated().await;
    let durable = there(&database, &["a"]).await;
    for key in ["k", "l"] {
        durable.fire(keyed(key, "x")).await.unwrap();
    }
    let parts = "SELECT count(DISTINCT substr(fingerprint, 4, 32)) FROM requeuest.request_keys";
    assert_eq!(count(&database, parts).await, 2);
}

#[tokio::test]
async fn a_role_that_only_enqueues_compares_encrypted_fingerprints_alone() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let old = there(&database, &["a"]).await;
    let sealed = old.fire(keyed("k", "x")).await.unwrap();
    let from_before = other_process(&database).await;
    let plain = from_before.fire(keyed("l", "x")).await.unwrap();

    let builder = Durable::builder(role.pool()).runner(false);
    let durable = builder.encryption(ring(&["b", "a"])).build().unwrap();
    assert_eq!(durable.fire(keyed("k", "x")).await.unwrap(), sealed);
    let error = durable.fire(keyed("l", "x")).await.unwrap_err();
    assert!(error.is_key_conflict(), "{error}");
    assert_eq!(error.request_id(), Some(plain));

    let rotating = there(&database, &["b", "a"]).await;
    rotating.reencrypt().unwrap().finish().await.unwrap();
    assert_eq!(durable.fire(keyed("l", "x")).await.unwrap(), plain);
    durable.shutdown(Duration::ZERO).await.unwrap();
    role.dropped().await;
}
