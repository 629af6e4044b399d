//! The same calls on every runtime, and without one: the crate needs tokio, its callers don't.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, Once};
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use http::StatusCode;
use requeuest::testkit::{Postgres, TestDatabase};
use requeuest::{Channels, Client, Durable, RequestId, Status};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::{LONG, Server, count, eventually, in_time, migrated, post, reply, rows};

/// A database and a server on their own tokio runtime, which the callers under test don't use.
struct Elsewhere {
    database: TestDatabase,
    server: Server,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // This may be dropped inside a runtime, where waiting for another one would panic.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn elsewhere() -> Elsewhere {
    // On its own thread, because the caller may be inside a runtime.
    thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (database, server) = runtime.block_on(async {
            let postgres = Postgres::shared().await.unwrap();
            let server = Server::start(|_, seen| async move { reply(200, seen.body) }).await;
            (postgres.database().await.unwrap(), server)
        });
        Elsewhere {
            database,
            server,
            runtime: Some(runtime),
        }
    })
    .join()
    .unwrap()
}

/// Waits for a future with the standard library only.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    let deadline = Instant::now() + 2 * LONG;
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "took too long");
        thread::park_timeout(left);
    }
}

/// Runs a test, and fails it if any thread panics about a missing runtime. A background thread's
/// panic would not fail the test by itself.
fn without_complaints(test: impl FnOnce(Elsewhere)) {
    static INSTALLED: Once = Once::new();
    static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());
    INSTALLED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let payload = panic.payload();
            let text = payload
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| payload.downcast_ref::<&str>().copied())
                .unwrap_or_default();
            if text.contains("reactor") || text.contains("Tokio") {
                COMPLAINTS.lock().unwrap().push(panic.to_string());
            }
            before(panic);
        }));
    });
    test(elsewhere());
    assert_eq!(COMPLAINTS.lock().unwrap().as_slice(), [""; 0]);
}

/// Makes every call that a handle has, on the runtime that polls this, with a pool on that runtime.
async fn every_call(elsewhere: &Elsewhere) {
    let pool = PgPoolOptions::new()
        .max_connections(2)
        .connect_with(elsewhere.database.options())
        .await
        .unwrap();
    requeuest::migrate(&pool).await.unwrap();
    requeuest::migrate(&pool).await.unwrap();
    let durable = Durable::new(pool.clone());
    let post = |body: &'static str| post(elsewhere.server.url("/"), body);

    let awaited = durable.await_response(post("awaited")).await.unwrap();
    assert_eq!(awaited.text().unwrap(), "awaited");

    let fired = durable.fire(post("fired")).await.unwrap();
    let response = durable.response(fired).await.unwrap();
    assert_eq!(response.text().unwrap(), "fired");
    assert_eq!(
        durable.status(fired).await.unwrap(),
        Some(Status::Completed)
    );

    let on_pool = durable.fire_in(&pool, post("on the pool")).await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    let committed = durable
        .fire_in(&mut *transaction, post("in a transaction"))
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    let rolled_back = durable
        .fire_in(&mut *transaction, post("never"))
        .await
        .unwrap();
    transaction.rollback().await.unwrap();
    for (id, body) in [(on_pool, "on the pool"), (committed, "in a transaction")] {
        assert_eq!(durable.response(id).await.unwrap().text().unwrap(), body);
    }
    let unknown = durable.response(rolled_back).await.unwrap_err();
    assert!(unknown.is_unknown_id(), "{unknown}");
    assert_eq!(durable.status(rolled_back).await.unwrap(), None);

    let clone = durable.clone();
    durable.shutdown(Duration::from_secs(5)).await.unwrap();
    let closed = clone.fire(post("late")).await.unwrap_err();
    assert!(closed.is_closed(), "{closed}");
    drop((durable, clone));

    // A handle that is dropped without a shutdown, with its runner on and a request in flight.
    let second = Durable::new(pool.clone());
    let id: RequestId = second.fire(post("as it is")).await.unwrap();
    drop(second);
    let third = Durable::new(pool.clone());
    let response = third.response(id).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    drop(third);

    let mut client = Client::new(pool.clone(), Channels::All).await.unwrap();
    let mut listener = client.take_listener().unwrap();
    let request = post("spawned");
    let response = client.spawn_returning("older", &request).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "spawned");
    listener.abort();
    assert!((&mut listener).await.unwrap_err().is_cancelled());
    listener.stop().await.unwrap();
    drop(client);
    pool.close().await;
}

#[test]
fn every_call_works_on_async_std() {
    without_complaints(|elsewhere| async_std::task::block_on(every_call(&elsewhere)));
}

#[test]
fn every_call_works_in_a_task_of_async_std() {
    without_complaints(|elsewhere| {
        let task = async_std::task::spawn(async move { every_call(&elsewhere).await });
        async_std::task::block_on(task);
    });
}

#[test]
fn every_call_works_in_an_actix_system() {
    without_complaints(|elsewhere| actix_rt::System::new().block_on(every_call(&elsewhere)));
}

#[test]
fn every_call_works_in_an_actix_arbiter() {
    without_complaints(|elsewhere| {
        actix_rt::System::new().block_on(async move {
            let (done, finished) = tokio::sync::oneshot::channel();
            let arbiter = actix_rt::Arbiter::new();
            arbiter.spawn(async move {
                every_call(&elsewhere).await;
                let _ = done.send(());
            });
            finished.await.expect("the arbiter's task failed");
            arbiter.stop();
            arbiter.join().unwrap();
        });
    });
}

#[test]
fn every_call_works_on_a_single_thread_of_tokio() {
    without_complaints(|elsewhere| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(every_call(&elsewhere));
    });
}

#[test]
fn every_call_works_on_a_thread_without_a_runtime() {
    without_complaints(|elsewhere| block_on(every_call(&elsewhere)));
}

#[test]
fn an_aborted_listener_is_cancelled_however_soon_its_runner_ends() {
    // No database answers, so the runner ends as soon as its thread hears of it.
    let nowhere = PgConnectOptions::new().host("127.0.0.1").port(1);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                block_on(async {
                    for _ in 0..50 {
                        let pool = PgPoolOptions::new().connect_lazy_with(nowhere.clone());
                        let mut client = Client::new(pool, Channels::All).await.unwrap();
                        let mut listener = client.take_listener().unwrap();
                        listener.abort();
                        let ended = (&mut listener).await;
                        assert!(ended.is_err_and(|error| error.is_cancelled()));
                    }
                });
            });
        }
    });
}

#[test]
fn a_response_after_the_last_handle_is_dropped_is_stored() {
    without_complaints(|elsewhere| {
        let runtime = elsewhere.runtime.as_ref().unwrap();
        let (server, answer) = runtime.block_on(Server::held(200));
        answer.add_permits(1);
        // The handle has its own runtime, which ends with it.
        block_on(async {
            let pool = PgPoolOptions::new().connect_lazy_with(elsewhere.database.options());
            requeuest::migrate(&pool).await.unwrap();
            let durable = Durable::new(pool);
            let post = || post(server.url("/"), "x");
            // After this request, the handle sends at once.
            durable.await_response(post()).await.unwrap();
            durable.fire(post()).await.unwrap();
        });
        runtime.block_on(async {
            server.wait_for(2).await;
            eventually("the runner has ended", || async {
                let polls = "SELECT count(*) FROM pg_stat_activity
                             WHERE query LIKE '%mq_poll%' AND datname = current_database()
                                 AND pid <> pg_backend_pid()";
                count(&elsewhere.database, polls).await == 0
            })
            .await;
            answer.add_permits(1);
            eventually("its outcome is stored", || async {
                rows(&elsewhere.database, "outcomes WHERE status = 'completed'").await == 2
            })
            .await;
        });
        assert_eq!(server.count(), 2);
    });
}

#[test]
fn a_handle_works_on_other_runtimes_and_outlives_its_own() {
    without_complaints(|elsewhere| {
        let home = tokio::runtime::Runtime::new().unwrap();
        let durable = home.block_on(async {
            let pool = PgPoolOptions::new().connect_lazy_with(elsewhere.database.options());
            requeuest::migrate(&pool).await.unwrap();
            Durable::new(pool)
        });
        let ask = |durable: Durable| {
            let request = http::Request::get(elsewhere.server.url("/")).body("");
            async move { durable.await_response(request.unwrap()).await }
        };
        let answers = [
            block_on(ask(durable.clone())),
            async_std::task::block_on(ask(durable.clone())),
            actix_rt::System::new().block_on(ask(durable.clone())),
        ];
        for answer in answers {
            assert_eq!(answer.unwrap().status(), StatusCode::OK);
        }
        drop(home);
        let error = block_on(ask(durable)).unwrap_err();
        assert!(error.is_closed(), "{error}");
    });
}

#[test]
fn a_runtime_ending_during_an_insert_leaves_it_indeterminate() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let home = tokio::runtime::Runtime::new().unwrap();
    let (database, durable, lock) = runtime.block_on(async {
        let database = migrated().await;
        let mut lock = database.pool().begin().await.unwrap();
        sqlx::query("LOCK TABLE requeuest.mq_msgs")
            .execute(&mut *lock)
            .await
            .unwrap();
        let options = database.options();
        let durable = home.spawn(async move {
            let pool = PgPoolOptions::new().connect_lazy_with(options);
            Durable::builder(pool).runner(false).build().unwrap()
        });
        (database, durable.await.unwrap(), lock)
    });
    let firing = runtime.spawn(async move { durable.fire(post("http://127.0.0.1:9/", "x")).await });
    runtime.block_on(async {
        let waits = "SELECT count(*) FROM pg_locks
                     WHERE NOT granted AND relation = 'requeuest.mq_msgs'::regclass
                         AND database = (
                             SELECT oid FROM pg_database WHERE datname = current_database()
                         )";
        eventually("the insert waits", || async {
            count(&database, waits).await > 0
        })
        .await;
    });
    home.shutdown_background();
    let error = runtime.block_on(in_time(firing)).unwrap().unwrap_err();
    assert!(error.is_indeterminate(), "{error:?}");
    assert!(error.request_id().is_some());
    runtime.block_on(async { lock.rollback().await.unwrap() });
}
