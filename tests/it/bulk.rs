//! Many requests at once: all or none of them, in their order.

use requeuest::{Durable, Error, Options, Request, testkit};
use tokio::task::JoinSet;

use crate::support::{LONG, Server, count, eventually, in_time, migrated};

const UNFINISHED: &str = "select count(*) from requeuest.mq_msgs";

fn post(url: &str, body: impl Into<bytes::Bytes>, options: Options) -> Request {
    let request = http::Request::post(url).body(body.into()).unwrap();
    Request::try_from(request).unwrap().with(options)
}

#[tokio::test]
async fn many_requests_are_delivered_once_each() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let requests = (0..2500).map(|number: usize| {
        // One in a hundred goes by itself, as its key wants it.
        let options = match number % 100 {
            0 => Options::default().key(number.to_string()),
            _ => Options::default(),
        };
        post(&server.url("/"), number.to_string(), options)
    });
    let ids = in_time(durable.fire_many(requests)).await.unwrap();
    assert_eq!(ids.len(), 2500);
    for number in [0, 1, 999, 1000, 2499] {
        let outcome = testkit::outcome(&durable, ids[number], LONG).await.unwrap();
        assert_eq!(outcome.into_result().unwrap().status(), 200);
    }
    eventually("all have ended", || async {
        count(&database, UNFINISHED).await == 0
    })
    .await;
    let mut bodies: Vec<usize> = server
        .seen()
        .iter()
        .map(|seen| std::str::from_utf8(&seen.body).unwrap().parse().unwrap())
        .collect();
    bodies.sort_unstable();
    assert!(bodies.into_iter().eq(0..2500));
}

#[tokio::test]
async fn requests_of_a_key_keep_their_order() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let requests = (0..120).map(|number: usize| {
        let key = ["a", "b", "c"][number % 3];
        let options = Options::default().ordered(key);
        post(&server.url("/"), format!("{key}{number:03}"), options)
    });
    in_time(durable.fire_many(requests)).await.unwrap();
    server.wait_for(120).await;
    for key in ["a", "b", "c"] {
        let mut bodies = server.seen();
        bodies.retain(|seen| seen.body.starts_with(key.as_bytes()));
        assert_eq!(bodies.len(), 40);
        assert!(bodies.is_sorted_by_key(|seen| seen.body.clone()), "{key}");
    }
}

#[tokio::test]
async fn one_that_is_refused_keeps_all_from_being_persisted() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let url = "http://127.0.0.1:9/";
    let with_last = |last: Options| {
        let many = (0..1500).map(|_| post(url, "x", Options::default().ordered("k")));
        many.chain([post(url, "last", last)])
    };
    let invalid = Options::default().channel("");
    let error = in_time(durable.fire_many(with_last(invalid))).await;
    assert_eq!(error.unwrap_err().field(), Some("channel"));
    let elsewhere = || Options::default().ordered("k").channel("other");
    let error = in_time(durable.fire_many(with_last(elsewhere()))).await;
    assert!(error.unwrap_err().is_order_conflict());
    let few = [
        post(url, "x", Options::default().ordered("k")),
        post(url, "x", elsewhere()),
    ];
    let error = in_time(durable.fire_many(few)).await;
    assert!(error.unwrap_err().is_order_conflict());

    // What can't be made a request of is refused like it.
    let relative = http::Request::post("/relative").body("").unwrap();
    let error: Error = in_time(durable.fire_many([relative])).await.unwrap_err();
    assert_eq!(error.field(), Some("url"));
    assert!(
        durable
            .fire_many([] as [Request; 0])
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(count(&database, UNFINISHED).await, 0);
}

#[tokio::test]
async fn a_callers_transaction_has_all_of_them_or_none() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let requests = |body: &'static str| {
        let url = server.url("/");
        (0..1200).map(move |_| post(&url, body, Options::default()))
    };
    let mut transaction = database.pool().begin().await.unwrap();
    let lost = durable
        .fire_many_in(&mut transaction, requests("lost"))
        .await
        .unwrap();
    transaction.rollback().await.unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let ids = durable
        .fire_many_in(&mut transaction, requests("sent"))
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    assert_eq!((lost.len(), ids.len()), (1200, 1200));
    assert_eq!(durable.status(lost[0]).await.unwrap(), None);
    server.wait_for(1200).await;
    assert!(server.seen().iter().all(|seen| seen.body == "sent"));
}

#[tokio::test]
async fn dropped_before_its_end_it_leaves_nothing_behind() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let held = Options::default().ordered("held");
    let url = "http://127.0.0.1:9/";
    durable
        .fire_in(&mut *transaction, post(url, "x", held.clone()))
        .await
        .unwrap();
    // Waits for the key, with a thousand others written.
    let many = (0..1000).map(|_| post(url, "x", Options::default()));
    let many: Vec<_> = many.chain([post(url, "x", held)]).collect();
    let firing = tokio::spawn({
        let durable = durable.clone();
        async move { durable.fire_many(many).await }
    });
    let waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted
                   and database = (select oid from pg_database where datname = current_database())";
    eventually("it waits for the key", || async {
        count(&database, waiting).await == 1
    })
    .await;
    firing.abort();
    assert!(firing.await.unwrap_err().is_cancelled());
    transaction.commit().await.unwrap();
    eventually("its session is gone", || async {
        let idle = "select count(*) from pg_stat_activity where datname = current_database()
                    and state like 'idle in transaction%'";
        count(&database, waiting).await == 0 && count(&database, idle).await == 0
    })
    .await;
    assert_eq!(count(&database, UNFINISHED).await, 1);
}

#[tokio::test]
async fn two_with_the_same_keys_in_opposite_order_do_not_deadlock() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let mut firing = JoinSet::new();
    for round in 0..40 {
        let durable = durable.clone();
        firing.spawn(async move {
            let mut keys: Vec<usize> = (0..20).collect();
            if round % 2 == 0 {
                keys.reverse();
            }
            let requests = keys.into_iter().map(|key| {
                let options = Options::default().ordered(key.to_string());
                post("http://127.0.0.1:9/", "x", options)
            });
            durable.fire_many(requests).await
        });
    }
    for fired in in_time(firing.join_all()).await {
        fired.unwrap();
    }
    assert_eq!(count(&database, UNFINISHED).await, 800);
}
