//! Many callers that wait: for one key, or for a database that is silent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use requeuest::{Error, Options, Request, RequestId};
use tokio::task::JoinSet;
use tower::{Layer, ServiceExt};

use super::network::{Through, through_a_proxy};
use crate::proxy::Manner;
use crate::support::{
    Server, builder, builder_on, eventually, hyper_client, in_time, migrated, other_process,
    passing, post, rows,
};

const URL: &str = "http://127.0.0.1:9/";

/// A request with this text as its key of one of the options.
fn with_key(field: &str, key: &str) -> Request {
    let options = Options::default();
    post(URL, "x").with(match field {
        "key" => options.key(key),
        "ordered" => options.ordered(key),
        _ => options.supersede(key),
    })
}

const FIELDS: [&str; 3] = ["key", "ordered", "supersede"];

#[tokio::test]
async fn a_key_that_the_callers_own_transaction_holds_is_an_error() {
    let database = migrated().await;
    let wait = Duration::from_millis(300);
    let durable = builder(&database).runner(false).max_key_wait(wait);
    let durable = durable.build().unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    for field in FIELDS {
        let request = with_key(field, "k-1");
        durable.fire_in(&mut *transaction, request).await.unwrap();
    }
    let assert_busy = |call: &str, error: &Error, field: &str, key: &str| {
        assert!(error.is_key_busy(), "{call}: {error:?}");
        assert!(!error.is_indeterminate() && !error.is_database(), "{call}");
        assert_eq!(error.field(), Some(field), "{call}");
        let text = error.to_string();
        assert!(text.contains("use fire_in in it"), "{call}: {text}");
        assert!(text.contains(key), "{call}: {text}");
    };
    for field in FIELDS {
        let began = Instant::now();
        let layered = durable.layer().layer(hyper_client());
        let options = with_key(field, "k-1").options().clone();
        let http = http::Request::post(URL).extension(options);
        let (fired, awaited, called) = in_time(Box::pin(async {
            tokio::join!(
                durable.fire(with_key(field, "k-1")),
                durable.await_response(with_key(field, "k-1")),
                layered.oneshot(http.body("x".to_owned()).unwrap()),
            )
        }))
        .await;
        assert!(began.elapsed() > wait);
        for (call, error) in [
            ("fire", fired.unwrap_err()),
            ("await_response", awaited.unwrap_err()),
            ("layer", called.unwrap_err()),
        ] {
            assert_busy(call, &error, field, r#""k-1" of channel "default""#);
        }
    }
    let (one, many) = in_time(Box::pin(async {
        tokio::join!(
            durable.fire_many([with_key("ordered", "k-1")]),
            durable.fire_many([post(URL, "x"), with_key("key", "k-1")]),
        )
    }))
    .await;
    assert_busy("one", &one.unwrap_err(), "ordered", r#""k-1" of channel"#);
    assert_busy(
        "many",
        &many.unwrap_err(),
        "key",
        "a key of one of the requests",
    );
    assert_eq!(rows(&database, "mq_payloads").await, 0);
    transaction.rollback().await.unwrap();
    for field in FIELDS {
        in_time(durable.fire(with_key(field, "k-1"))).await.unwrap();
    }
    assert_eq!(rows(&database, "mq_payloads").await, 3);
}

#[tokio::test]
async fn no_wait_for_a_key_is_possible_and_an_endless_one_is_refused() {
    let database = migrated().await;
    let durable = builder(&database)
        .runner(false)
        .max_key_wait(Duration::ZERO);
    let durable = durable.build().unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let held = durable
        .fire_in(&mut *transaction, with_key("key", "k"))
        .await;
    let error = in_time(durable.fire(with_key("key", "k")))
        .await
        .unwrap_err();
    assert!(error.is_key_busy(), "{error:?}");
    in_time(durable.fire(with_key("key", "l"))).await.unwrap();
    transaction.commit().await.unwrap();
    let attached = in_time(durable.fire(with_key("key", "k"))).await;
    assert_eq!(attached.unwrap(), held.unwrap());
    let endless = builder(&database).max_key_wait(Duration::MAX);
    assert_eq!(endless.build().unwrap_err().field(), Some("max_key_wait"));
}

/// Callers of a key that a transaction holds ask the database rarely, whatever their number, and
/// all of them continue once it has committed, also those in other processes.
async fn crowd_behind(field: &'static str) {
    const CALLERS: usize = 300;
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let durable = builder_on(&pool).runner(false);
    let durable = durable.build().unwrap();
    let other = other_process(&database).await;
    let mut transaction = database.pool().begin().await.unwrap();
    let held = durable
        .fire_in(&mut *transaction, with_key(field, "k"))
        .await;
    let held = held.unwrap();
    proxy.count(".enqueue(");
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let durable = durable.clone();
        callers.spawn(async move { durable.fire(with_key(field, "k")).await });
    }
    let elsewhere: JoinSet<_> = (0..3)
        .map(|_| {
            let other = other.clone();
            async move { other.fire(with_key(field, "k")).await }
        })
        .collect();
    // They come at the same moment, so each of them asks once before it joins the queue.
    eventually("all have asked", || async { proxy.counted() >= CALLERS }).await;
    passing(&database, Duration::from_millis(200)).await;
    let before = proxy.counted();
    let began = Instant::now();
    passing(&database, Duration::from_secs(1)).await;
    // The one that asks pauses for 50 ms at least, once it has waited for a while.
    let (asked, most) = (
        proxy.counted() - before,
        10 + began.elapsed().as_millis() / 50,
    );
    assert!(
        (1..=most as usize).contains(&asked),
        "{field}: asked {asked} times"
    );
    // Other requests find a connection.
    in_time(durable.fire(with_key(field, "other")))
        .await
        .unwrap();
    assert!(callers.try_join_next().is_none());
    let before = proxy.counted();
    transaction.commit().await.unwrap();
    let mut ids: Vec<RequestId> = in_time(callers.join_all())
        .await
        .into_iter()
        .chain(in_time(elsewhere.join_all()).await)
        .map(Result::unwrap)
        .collect();
    let asked = proxy.counted() - before;
    assert!(asked <= 2 * CALLERS + 50, "{field}: asked {asked} times");
    ids.push(held);
    ids.sort_unstable();
    ids.dedup();
    let distinct = if field == "key" { 1 } else { CALLERS + 3 + 1 };
    assert_eq!(ids.len(), distinct, "{field}");
}

#[tokio::test]
async fn callers_of_a_busy_key_wait_in_memory_and_then_attach() {
    crowd_behind("key").await;
}

#[tokio::test]
async fn callers_of_a_busy_ordering_key_wait_in_memory_and_then_take_turns() {
    crowd_behind("ordered").await;
}

/// Counts itself while it is in memory.
struct Counted {
    data: Vec<u8>,
    _alive: Arc<()>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

#[tokio::test]
async fn callers_that_leave_while_postgres_is_silent_leave_little_behind() {
    const MIB: usize = 1024 * 1024;
    const CALLERS: usize = 150;
    const QUEUED: usize = 32;
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let server = Server::always(200).await;
    let durable = builder_on(&pool).max_queued_bytes(QUEUED * MIB);
    let durable = durable.build().unwrap();
    let request = |body: Bytes| post(server.url("/"), body);
    in_time(durable.await_response(request("first".into())))
        .await
        .unwrap();
    proxy.black_hole();
    let bodies = Arc::new(());
    let calls = join_all((0..CALLERS).map(|_| {
        let body = Counted {
            data: vec![0; MIB - 4096],
            _alive: Arc::clone(&bodies),
        };
        let call = durable.await_response(request(Bytes::from_owner(body)));
        tokio::time::timeout(Duration::from_millis(200), call)
    }));
    let ended = in_time(calls).await;
    let refused = ended
        .iter()
        .flatten()
        .map(|call| call.as_ref().unwrap_err());
    let refused: Vec<_> = refused.collect();
    assert!(refused.iter().all(|error| error.is_overloaded()));
    assert!(refused.len() >= CALLERS - QUEUED, "{}", refused.len());
    let kept = Arc::strong_count(&bodies) - 1;
    assert!(kept <= QUEUED, "{kept} bodies in memory");

    proxy.treat(Manner::Pass);
    proxy.reset();
    // Only what was being written may have been persisted: two batches of 8 MiB.
    eventually("the bodies are gone", || async {
        Arc::strong_count(&bodies) == 1 && rows(&database, "mq_msgs").await == 0
    })
    .await;
    in_time(durable.await_response(request("last".into())))
        .await
        .unwrap();
    let sent = server.count() - 2;
    assert!(sent <= 16, "{sent} abandoned requests were sent");
}
