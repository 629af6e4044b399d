//! Handlers that fail, hang, or do to their transaction what they should not.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use requeuest::{
    Durable, FailedHandOver, Options, Outcome, RequestId, Uuid, outcome_fn, outcome_fn_with,
};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, Executor, PgConnection, PgPool};
use tokio::sync::Semaphore;

use super::{BoxError, DONE, insert, with_table};
use crate::support::{
    Server, builder, count, eventually, eventually_rows, in_time, migrated, outcome_of, post, rows,
};

/// Sessions of the test's database whose transaction has not ended. The one that counts is active.
const OPEN: &str = "SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND backend_xid IS NOT NULL";

const TIMEOUT: Duration = Duration::from_millis(300);

async fn failed(durable: &Durable) -> Vec<FailedHandOver> {
    durable.failed_hand_overs(None).await.unwrap()
}

/// Waits until an outcome's handler has failed this often.
async fn failed_times(durable: &Durable, id: RequestId, times: u32) -> FailedHandOver {
    let found = Mutex::new(None);
    eventually("the handler fails", || async {
        let one = failed(durable).await.into_iter().find(|one| one.id == id);
        let enough = one.as_ref().is_some_and(|one| one.failures >= times);
        *found.lock().unwrap() = one;
        enough
    })
    .await;
    found.into_inner().unwrap().unwrap()
}

/// What a handler does to its transaction before it returns `Ok`.
#[derive(Clone, Copy, Debug)]
enum Fault {
    SwallowsAnError,
    SwallowsAnErrorAfterASavepoint,
    Commits,
    RollsBack,
    BeginsAnew,
    LeavesANestedTransaction,
    LosesItsSession,
    BreaksADeferredConstraint,
}

struct Faulty {
    fault: Fault,
    mended: AtomicBool,
    calls: AtomicUsize,
}

async fn faulty(
    state: &Arc<Faulty>,
    tx: &mut PgConnection,
    outcome: &Outcome,
) -> Result<(), sqlx::Error> {
    state.calls.fetch_add(1, Ordering::SeqCst);
    if state.mended.load(Ordering::SeqCst) {
        insert(tx, outcome.id(), outcome.status()).await;
        return Ok(());
    }
    if !matches!(state.fault, Fault::Commits | Fault::BeginsAnew) {
        insert(tx, outcome.id(), outcome.status()).await;
    }
    match state.fault {
        Fault::SwallowsAnError => {
            let _ = tx.execute("SELECT * FROM no_such_table").await;
        }
        Fault::SwallowsAnErrorAfterASavepoint => {
            tx.execute("SAVEPOINT mine").await?;
            let _ = tx.execute("SELECT 1 / 0").await;
        }
        Fault::Commits => {
            tx.execute("COMMIT").await?;
        }
        Fault::RollsBack => {
            tx.execute("ROLLBACK").await?;
        }
        Fault::BeginsAnew => {
            tx.execute("COMMIT; BEGIN; SELECT pg_current_xact_id()")
                .await?;
        }
        Fault::LeavesANestedTransaction => std::mem::forget(tx.begin().await?),
        Fault::LosesItsSession => {
            let _ = tx
                .execute("SELECT pg_terminate_backend(pg_backend_pid())")
                .await;
        }
        Fault::BreaksADeferredConstraint => {
            tx.execute("INSERT INTO later VALUES (1), (1)").await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_whose_transaction_cannot_commit_fails_with_a_backoff() {
    let faults = [
        (Fault::SwallowsAnError, "after a database error"),
        (
            Fault::SwallowsAnErrorAfterASavepoint,
            "after a database error",
        ),
        (Fault::Commits, "ended the transaction"),
        (Fault::RollsBack, "ended the transaction"),
        (Fault::BeginsAnew, "ended the transaction"),
        (
            Fault::LeavesANestedTransaction,
            "left a nested transaction open",
        ),
        (Fault::LosesItsSession, ""),
        (Fault::BreaksADeferredConstraint, "later_one_key"),
    ];
    let database = with_table().await;
    let later = "CREATE TABLE later (one int UNIQUE DEFERRABLE INITIALLY DEFERRED)";
    database.pool().execute(later).await.unwrap();
    let server = Server::always(200).await;
    let durable = builder(&database).deliver_all().build().unwrap();
    let mut cases = Vec::new();
    for (fault, error) in faults {
        let state = Arc::new(Faulty {
            fault,
            mended: AtomicBool::new(false),
            calls: AtomicUsize::new(0),
        });
        let channel = format!("{fault:?}");
        let handler = outcome_fn_with(Arc::clone(&state), faulty);
        durable
            .on_outcome(&*channel, handler)
            .await
            .unwrap()
            .detach();
        let options = Options::default().channel(&*channel);
        let request = post(server.url("/"), "x").with(options);
        let id = durable.fire(request).await.unwrap();
        cases.push((id, channel, error, state));
    }
    for (id, channel, error, state) in &cases {
        let once = failed_times(&durable, *id, 2).await;
        assert!(once.error.as_ref().unwrap().contains(error), "{once:?}");
        assert_eq!(&once.channel, channel);
        assert!(!once.parked && !once.unreadable, "{once:?}");
        assert!(
            once.since.elapsed().unwrap() < Duration::from_secs(60),
            "{once:?}"
        );
        // The next call would be the fifth, after 7 seconds.
        assert!(state.calls.load(Ordering::SeqCst) <= 4, "{channel}");
    }
    assert_eq!(count(&database, DONE).await, 0);
    for (_, channel, _, state) in &cases {
        state.mended.store(true, Ordering::SeqCst);
        durable.retry_hand_overs(&**channel).await.unwrap();
    }
    eventually_rows(&database, "unhandled", 0).await;
    assert_eq!(count(&database, DONE).await, cases.len() as i64);
    assert!(failed(&durable).await.is_empty());
    eventually("no session is left in a transaction", || async {
        count(&database, OPEN).await == 0
    })
    .await;
}

/// How a handler hangs.
#[derive(Clone, Copy, Debug)]
enum Hang {
    Pending,
    InAStatement,
    OnALock,
}

struct Hanging {
    hang: Hang,
    poison: Mutex<HashSet<RequestId>>,
}

async fn hanging(
    state: &Arc<Hanging>,
    tx: &mut PgConnection,
    outcome: &Outcome,
) -> Result<(), sqlx::Error> {
    insert(tx, outcome.id(), outcome.status()).await;
    if !state.poison.lock().unwrap().contains(&outcome.id()) {
        return Ok(());
    }
    match state.hang {
        Hang::Pending => std::future::pending().await,
        Hang::InAStatement => {
            tx.execute("SELECT pg_sleep(600)").await?;
        }
        Hang::OnALock => {
            tx.execute("LOCK TABLE locked").await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_never_returns_fails_and_leaves_the_others_alone() {
    let database = with_table().await;
    database
        .pool()
        .execute("CREATE TABLE locked ()")
        .await
        .unwrap();
    let holder = PgPool::connect(database.url()).await.unwrap();
    let mut holding = holder.begin().await.unwrap();
    holding.execute("LOCK TABLE locked").await.unwrap();
    let holder: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
        .fetch_one(&mut *holding)
        .await
        .unwrap();
    let server = Server::always(200).await;
    let durable = builder(&database)
        .deliver_all()
        .handler_concurrency(1)
        .handler_timeout(TIMEOUT)
        .build()
        .unwrap();
    let mut hung = Vec::new();
    for hang in [Hang::Pending, Hang::InAStatement, Hang::OnALock] {
        let state = Arc::new(Hanging {
            hang,
            poison: Mutex::default(),
        });
        let channel = format!("{hang:?}");
        // Outcomes are kept from now on. The poison is the first one, and known before a call.
        let handler = || outcome_fn_with(Arc::clone(&state), hanging);
        drop(durable.on_outcome(&*channel, handler()).await.unwrap());
        let mut ids = Vec::new();
        for _ in 0..10 {
            let options = Options::default().channel(&*channel);
            let request = post(server.url("/"), "x").with(options);
            ids.push(durable.fire(request).await.unwrap());
        }
        for id in &ids {
            outcome_of(&durable, *id).await;
        }
        state.poison.lock().unwrap().insert(ids[0]);
        durable
            .on_outcome(&*channel, handler())
            .await
            .unwrap()
            .detach();
        hung.push(ids[0]);
    }
    for id in &hung {
        let failed = failed_times(&durable, *id, 1).await;
        let error = failed.error.unwrap();
        assert_eq!(error, "the handler did not return within 300ms");
    }
    eventually("the others are handled", || async {
        count(&database, DONE).await == 27
    })
    .await;
    assert_eq!(rows(&database, "unhandled").await, 3);
    // Parked here, so that no further call is under way.
    let park = "UPDATE requeuest.unhandled SET due_at = 'infinity'";
    database.pool().execute(park).await.unwrap();
    let vacuum_waits_for = format!(
        "SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND pid NOT IN ({holder}, pg_backend_pid())
            AND backend_type = 'client backend'
            AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)"
    );
    eventually("nothing holds vacuum back", || async {
        count(&database, &vacuum_waits_for).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_blocks_its_thread_holds_no_transaction() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let durable = builder(&database)
        .handler_timeout(TIMEOUT)
        .max_handler_failures(1)
        .build()
        .unwrap();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let handler = outcome_fn_with(
        Mutex::new(released),
        async |released: &Mutex<std::sync::mpsc::Receiver<()>>,
               tx: &mut PgConnection,
               outcome: &Outcome| {
            insert(tx, outcome.id(), outcome.status()).await;
            // Other tasks of the thread must not wait too.
            tokio::task::block_in_place(|| {
                let _ = released.lock().unwrap().recv();
            });
            Ok::<_, sqlx::Error>(())
        },
    );
    let _subscription = durable.on_outcome("default", handler).await.unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    assert!(failed_times(&durable, id, 1).await.parked);
    eventually("the transaction has ended", || async {
        count(&database, OPEN).await == 0
    })
    .await;
    drop(release);
    assert_eq!(count(&database, DONE).await, 0);
    assert_eq!(rows(&database, "unhandled").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_handlers_of_two_processes_are_counted_together() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let process = async || {
        let pool = PgPool::connect(database.url()).await.unwrap();
        let durable = Durable::builder(pool).handler_timeout(TIMEOUT);
        durable.max_handler_failures(3).build().unwrap()
    };
    let (one, other) = (process().await, process().await);
    let calls = Arc::new(AtomicUsize::new(0));
    for durable in [&one, &other] {
        let handler = outcome_fn_with(
            Arc::clone(&calls),
            async |calls: &Arc<AtomicUsize>, _: &mut PgConnection, _: &Outcome| {
                calls.fetch_add(1, Ordering::SeqCst);
                std::future::pending::<Result<(), sqlx::Error>>().await
            },
        );
        durable
            .on_outcome("default", handler)
            .await
            .unwrap()
            .detach();
    }
    let id = one.fire(post(server.url("/"), "x")).await.unwrap();
    let parked = failed_times(&one, id, 3).await;
    assert!(parked.parked);
    eventually("each call is counted as one failure", || async {
        let failures = failed(&one).await[0].failures;
        failures as usize == calls.load(Ordering::SeqCst)
    })
    .await;
}

#[derive(Default)]
struct Peak {
    now: AtomicUsize,
    most: AtomicUsize,
    /// The outcomes that a call has at this moment.
    handled: Mutex<HashSet<RequestId>>,
}

async fn gated(
    state: &(Arc<Peak>, Arc<Semaphore>),
    tx: &mut PgConnection,
    outcome: &Outcome,
) -> Result<(), BoxError> {
    let (peak, gate) = state;
    assert!(
        peak.handled.lock().unwrap().insert(outcome.id()),
        "twice at once"
    );
    let now = peak.now.fetch_add(1, Ordering::SeqCst) + 1;
    peak.most.fetch_max(now, Ordering::SeqCst);
    gate.acquire().await?.forget();
    insert(tx, outcome.id(), outcome.status()).await;
    peak.now.fetch_sub(1, Ordering::SeqCst);
    peak.handled.lock().unwrap().remove(&outcome.id());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_work_on_several_outcomes_and_each_on_its_own() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let durable = builder(&database).handler_concurrency(3).build().unwrap();
    let state = (Arc::<Peak>::default(), Arc::new(Semaphore::new(0)));
    let handler = outcome_fn_with(state.clone(), gated);
    let _subscription = durable.on_outcome("default", handler).await.unwrap();
    for _ in 0..9 {
        durable.fire(post(server.url("/"), "x")).await.unwrap();
    }
    let (peak, gate) = state;
    eventually("three are handled at once", || async {
        peak.now.load(Ordering::SeqCst) == 3
    })
    .await;
    // Six wait, although they are due.
    eventually_rows(&database, "unhandled WHERE due_at <= now()", 9).await;
    gate.add_permits(9);
    eventually("all are handled", || async {
        count(&database, DONE).await == 9
    })
    .await;
    assert_eq!(peak.most.load(Ordering::SeqCst), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_that_want_a_second_connection_do_not_starve_a_small_pool() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let small = PgPoolOptions::new()
        .max_connections(2)
        .connect(database.url())
        .await
        .unwrap();
    let durable = Durable::builder(small.clone())
        .handler_concurrency(100)
        .build()
        .unwrap();
    let handler = outcome_fn_with(
        small,
        async |pool: &PgPool, tx: &mut PgConnection, outcome: &Outcome| {
            sqlx::query("SELECT 1").execute(pool).await?;
            insert(tx, outcome.id(), outcome.status()).await;
            Ok::<_, sqlx::Error>(())
        },
    );
    let _subscription = durable.on_outcome("default", handler).await.unwrap();
    for _ in 0..20 {
        durable.fire(post(server.url("/"), "x")).await.unwrap();
    }
    eventually("all are handled", || async {
        count(&database, DONE).await == 20
    })
    .await;
    assert!(failed(&durable).await.is_empty());
}

async fn fails_while_broken(
    (broken, calls): &(Arc<AtomicBool>, Arc<Mutex<Vec<RequestId>>>),
    tx: &mut PgConnection,
    outcome: &Outcome,
) -> Result<(), BoxError> {
    calls.lock().unwrap().push(outcome.id());
    if broken.load(Ordering::SeqCst) {
        return Err("no luck at https://user:hunter2@ledger/hunter2".into());
    }
    insert(tx, outcome.id(), outcome.status()).await;
    Ok(())
}

#[tokio::test]
async fn an_outcome_is_parked_after_enough_failures_until_an_operator_acts() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let durable = builder(&database).max_handler_failures(1).build().unwrap();
    let broken = Arc::new(AtomicBool::new(true));
    let calls = Arc::<Mutex<Vec<RequestId>>>::default();
    let handler = outcome_fn_with(
        (Arc::clone(&broken), Arc::clone(&calls)),
        fails_while_broken,
    );
    let _subscription = durable.on_outcome("default", handler).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..4 {
        let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
        assert!(failed_times(&durable, id, 1).await.parked);
        ids.push(id);
    }
    let listed = failed(&durable).await;
    assert_eq!(listed.iter().map(|one| one.id).collect::<Vec<_>>(), ids);
    assert_eq!(
        listed[0].error.as_deref(),
        Some("no luck at https://ledger")
    );
    assert_eq!(listed[0].channel, "default");
    let after = durable.failed_hand_overs(Some(ids[2])).await.unwrap();
    assert_eq!(after.len(), 1);
    let channels = durable.handled_channels().await.unwrap();
    assert_eq!((channels[0].waiting, channels[0].parked), (0, 4));

    broken.store(false, Ordering::SeqCst);
    assert!(!durable.retry_hand_over(Uuid::nil().into()).await.unwrap());
    assert!(durable.retry_hand_over(ids[1]).await.unwrap());
    eventually_rows(&database, "unhandled", 3).await;
    assert!(!durable.retry_hand_over(ids[1]).await.unwrap());
    assert!(durable.forget_hand_over(ids[2]).await.unwrap());
    assert!(!durable.forget_hand_over(ids[2]).await.unwrap());
    // The outcome itself stays.
    outcome_of(&durable, ids[2]).await;
    assert_eq!(durable.retry_hand_overs("another").await.unwrap(), 0);
    assert_eq!(durable.retry_hand_overs("default").await.unwrap(), 2);
    eventually_rows(&database, "unhandled", 0).await;
    assert_eq!(count(&database, DONE).await, 3);
    let error = durable.retry_hand_overs("").await.unwrap_err();
    assert_eq!(error.field(), Some("channel"));
    // Each of the three was called once before it was parked, and once after.
    assert_eq!(calls.lock().unwrap().len(), 7);
}

#[tokio::test]
async fn more_parked_outcomes_than_a_page_are_retried() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    let handler = outcome_fn(async |_: &mut PgConnection, _: &Outcome| Ok::<_, BoxError>(()));
    drop(durable.on_outcome("many", handler).await.unwrap());
    let park = "INSERT INTO requeuest.unhandled (id, channel_name, slot, due_at, failures)
        SELECT gen_random_uuid(), CASE n % 2 WHEN 0 THEN 'many' ELSE 'other' END, 0, 'infinity', 9
        FROM generate_series(1, 4500) n";
    database.pool().execute(park).await.unwrap();
    assert_eq!(failed(&durable).await.len(), 100);
    assert_eq!(durable.retry_hand_overs("many").await.unwrap(), 2250);
    assert_eq!(
        rows(&database, "unhandled WHERE due_at <= now()").await,
        2250
    );
}

#[tokio::test]
async fn a_channel_whose_handler_is_gone_is_visible() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    assert!(durable.handled_channels().await.unwrap().is_empty());
    let handler = || outcome_fn(async |_: &mut PgConnection, _: &Outcome| Ok::<_, sqlx::Error>(()));
    let subscription = durable.on_outcome("default", handler()).await.unwrap();
    let of = async |durable: &Durable| durable.handled_channels().await.unwrap().remove(0);
    let channel = of(&durable).await;
    assert_eq!((&*channel.channel, channel.has_handler), ("default", true));
    assert!(channel.last_seen.unwrap() < Duration::from_secs(60));
    let age = "UPDATE requeuest.handler_heartbeats SET seen_at = now() - interval '3 min'";

    // A process with a handler keeps the channel alive.
    database.pool().execute(age).await.unwrap();
    eventually("the handler is seen again", || async {
        of(&durable).await.has_handler
    })
    .await;

    drop(subscription);
    database.pool().execute(age).await.unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    outcome_of(&durable, id).await;
    let channel = of(&durable).await;
    assert!(!channel.has_handler, "{channel:?}");
    assert_eq!(channel.waiting, 1);
    let _subscription = durable.on_outcome("default", handler()).await.unwrap();
    assert!(of(&durable).await.has_handler);
    eventually("nothing waits", || async {
        of(&durable).await.waiting == 0
    })
    .await;
    durable.unsubscribe_outcomes("default").await.unwrap();
    assert!(durable.handled_channels().await.unwrap().is_empty());
    assert_eq!(rows(&database, "handler_heartbeats").await, 0);
}

#[tokio::test]
async fn a_subscription_ends_while_its_handler_works() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let state = (Arc::<Peak>::default(), Arc::new(Semaphore::new(0)));
    let handler = outcome_fn_with(state.clone(), gated);
    let subscription = durable.on_outcome("default", handler).await.unwrap();
    durable.fire(post(server.url("/"), "x")).await.unwrap();
    let (peak, gate) = state;
    eventually("the handler works", || async {
        peak.now.load(Ordering::SeqCst) == 1
    })
    .await;
    drop(subscription);
    in_time(durable.unsubscribe_outcomes("default"))
        .await
        .unwrap();
    assert_eq!(rows(&database, "unhandled").await, 1);
    gate.add_permits(1);
    eventually("the call ends as usual", || async {
        count(&database, DONE).await == 1
    })
    .await;
    eventually_rows(&database, "unhandled", 0).await;
}
