//! The background runner: sqlxmq's, on this crate's SQL, under a supervisor.
//!
//! The stock runner's delay after errors grows without bound, so a supervisor probes the database
//! and replaces the runner once the database is back. The stock keep-alive of each job is off: one
//! task renews all leases.
//!
//! A poll that is cut off continues in the database, and claims requests for no process. So a
//! runner isn't just dropped: its [`RunnerPool`] waits until the runner has received all claims.

mod dispatch;
pub(crate) mod polls;
pub(crate) mod presence;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use sqlxmq::{JobRunnerHandle, JobRunnerOptions};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};

use self::presence::Presence;
use crate::engine::DRAIN_POLL;
use crate::engine::attempt::Driver;
use crate::engine::supervise::supervise;
use crate::engine::telemetry::OwnCondition;
use crate::error::Error;
use crate::store::runner_pool::RunnerPool;

const PROBE_INTERVAL: Duration = Duration::from_secs(2);
const START_RETRY_MIN: Duration = Duration::from_millis(100);
const START_RETRY_MAX: Duration = Duration::from_secs(2);
const SETTLED_POLL: Duration = Duration::from_millis(10);
/// Longer than the pause between two tries to settle.
const SETTLED_TIMEOUT: Duration = Duration::from_secs(3);
/// Longer than a poll may take in the database.
const STOP_TIMEOUT: Duration = Duration::from_secs(12);
/// A condition is over if no runner was replaced for this long.
const CALM: Duration = Duration::from_secs(60);
/// As long as sqlx waits for a connection that it closes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps the runner running. Dropping it stops the claiming, not the attempts in flight.
#[derive(Debug)]
pub(crate) struct RunnerGuard {
    driver: Arc<Driver>,
    supervisor: JoinHandle<()>,
    aborted: Arc<AtomicBool>,
}

impl RunnerGuard {
    pub(crate) fn start(driver: &Arc<Driver>) -> Self {
        driver.lifecycle.begin_claiming();
        // Counted from here on, so that a shutdown right after this waits for the runner.
        let counted = driver.lifecycle.count_runner();
        let (panics, runs) = (Arc::clone(&driver.panics), Arc::clone(driver));
        let keep_running = move || keep_running(Arc::clone(&runs), counted.clone());
        let aborted = Arc::new(AtomicBool::new(false));
        let ended_by_abort = Arc::clone(&aborted);
        let supervisor = driver.spawn(async move {
            supervise(panics, "runner", keep_running).await;
            // The claiming may have ended because of an abort that is still on its way.
            if ended_by_abort.load(Ordering::Acquire) {
                std::future::pending::<()>().await;
            }
        });
        Self {
            driver: Arc::clone(driver),
            supervisor,
            aborted,
        }
    }

    /// Stops the claiming. Requests that a poll brings from now on go back at once.
    pub(crate) fn stop(&self) {
        self.driver.lifecycle.end_claiming();
    }

    /// Stops the claiming, and gives the requests back that are held for waiting callers.
    pub(crate) fn release(&self) {
        self.driver.lifecycle.release();
    }

    /// As [`release`](Self::release), without waiting for the last poll. Its requests still go
    /// back.
    pub(crate) fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        self.release();
        self.supervisor.abort();
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.supervisor.is_finished()
    }

    /// Ready once the claiming has ended and its last requests are known. An error says that it was
    /// aborted, panicked, or ended with its runtime. Must not be polled again after that.
    pub(crate) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), JoinError>> {
        Pin::new(&mut self.supervisor).poll(cx)
    }

    /// Waits, on any executor, until no runner claims and everything that was claimed is settled or
    /// given back.
    pub(crate) fn drained(&self) -> impl Future<Output = Result<(), Error>> + use<> {
        let driver = Arc::clone(&self.driver);
        self.driver.run(async move {
            driver.lifecycle.runners_ended().await;
            while !driver.leases.is_empty() {
                tokio::time::sleep(DRAIN_POLL).await;
            }
            Ok(())
        })
    }

    pub(crate) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }
}

impl Drop for RunnerGuard {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Keeps a runner running until the claiming is to end. Holds the driver until then, so that claims
/// can still be given back.
async fn keep_running(driver: Arc<Driver>, _counted: watch::Receiver<()>) {
    if unless_ended(&driver, driver.transport.known())
        .await
        .is_none()
    {
        return;
    }
    let mut database = Database {
        driver: &driver,
        unreachable: OwnCondition::default(),
        replaced: None,
        presence: Presence::new(&driver),
    };
    while let Some(runner) = unless_ended(&driver, start(&driver)).await {
        if database.replaced.is_none() {
            tracing::info!(
                schema = driver.store.config().schema,
                channels = ?driver.config.deliver,
                "the runner has started"
            );
        }
        let mut runner = StopOnDrop::new(runner, &driver);
        if unless_ended(&driver, runner.fails(&mut database))
            .await
            .is_none()
        {
            runner.stop().await;
            tracing::info!("the runner has stopped");
            return;
        }
        // Its stop isn't awaited: its connections may hang. Claims that it still brings are as
        // valid as those of the new runner.
        drop(runner);
        if unless_ended(&driver, database.up()).await.is_none() {
            return;
        }
    }
}

/// The result of the work, or `None` if the claiming is to end first.
async fn unless_ended<T>(driver: &Driver, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = driver.lifecycle.claiming_ends() => None,
        done = work => Some(done),
    }
}

/// sqlxmq's runner, with a pool of its own.
struct Runner {
    handle: JobRunnerHandle,
    pool: Arc<RunnerPool>,
    _counted: watch::Receiver<()>,
}

impl Runner {
    /// Returns when the database stops answering, or when it answers but sqlxmq has stopped
    /// polling: its connection may be black-holed, or its error backoff may have grown too long.
    async fn fails(&self, database: &mut Database<'_>) {
        let driver = database.driver;
        let mut before: Option<u64> = None;
        while database.probe().await {
            database.presence.announce().await;
            if before == Some(self.pool.used()) && self.has_room(driver) {
                database.note_replaced("it has stopped polling");
                return;
            }
            if !self.pool.wait_for_poll().await {
                database.note_replaced("its polls get no answer");
                return;
            }
            before = self.has_room(driver).then(|| self.pool.used());
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
    }

    /// With as many requests as it may hold, the runner doesn't poll.
    fn has_room(&self, driver: &Driver) -> bool {
        self.handle.num_running_jobs() < driver.config.concurrency
    }

    /// Ends the polling, as soon as all claims have arrived.
    async fn stop(mut self, driver: &Driver) {
        // While its connection is held here, the runner doesn't poll.
        let held = tokio::select! {
            held = tokio::time::timeout(STOP_TIMEOUT, self.pool.hold_polls()) => held.ok(),
            // There is nothing to wait for: earlier claims are left to their leases.
            () = down(driver) => None,
        };
        // Returns after a poll that has just ended has handed its claims over.
        self.handle.stop().await;
        if let Some(connection) = held {
            drop(connection);
            self.pool.close(CLOSE_TIMEOUT).await;
        }
    }
}

/// Stops a runner in a task of its own, also if the supervisor is aborted: a poll that is cut off
/// would leave its claims to their leases.
struct StopOnDrop {
    runner: Option<Runner>,
    driver: Arc<Driver>,
}

impl StopOnDrop {
    fn new(runner: Runner, driver: &Arc<Driver>) -> Self {
        Self {
            runner: Some(runner),
            driver: Arc::clone(driver),
        }
    }

    async fn fails(&self, database: &mut Database<'_>) {
        if let Some(runner) = &self.runner {
            runner.fails(database).await;
        }
    }

    /// Waits until the runner has stopped.
    async fn stop(&mut self) {
        if let Some(stopping) = self.begin_stop() {
            let _ = stopping.await;
        }
    }

    fn begin_stop(&mut self) -> Option<JoinHandle<()>> {
        let runner = self.runner.take()?;
        let driver = Arc::clone(&self.driver);
        Some(self.driver.spawn(async move { runner.stop(&driver).await }))
    }
}

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.begin_stop();
    }
}

/// Starts a runner, however long the database or its schema takes to appear.
async fn start(driver: &Arc<Driver>) -> Runner {
    let mut pause = START_RETRY_MIN;
    let mut failing = OwnCondition::default();
    loop {
        let problem = match driver.store.verify().await {
            Ok(()) => {
                let pool = driver.polls.open(&driver.store, &driver.slots.gate);
                match options(driver, &pool).run().await {
                    Ok(handle) => {
                        return Runner {
                            handle,
                            pool,
                            _counted: driver.lifecycle.count_runner(),
                        };
                    }
                    Err(error) => Error::from(error),
                }
            }
            Err(error) => error,
        };
        if failing.begins() {
            tracing::warn!(error = ?problem, "the runner can't start yet");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(START_RETRY_MAX);
        driver.store.reconnect();
    }
}

fn options(driver: &Arc<Driver>, pool: &RunnerPool) -> JobRunnerOptions {
    let config = &driver.config;
    // Weak, or the runner that the driver owns would own the driver.
    let weak = Arc::downgrade(driver);
    let mut options = JobRunnerOptions::new(pool.for_sqlxmq(), move |current| {
        // A panic here would end the runner silently: it only hands over. What it dropped is left
        // to its lease.
        if let Some(driver) = weak.upgrade() {
            let take = || dispatch::take(&driver, current);
            driver.panics.catch_now("dispatch", take);
        }
    });
    // The runner polls again below the first number, and then holds up to the second. Requests
    // beyond the slots wait for one in this process, so that each poll brings many.
    options
        .set_concurrency(
            config.concurrency,
            config.concurrency + config.concurrency / 2,
        )
        .set_keep_alive(false);
    if let Some(channels) = &config.deliver {
        let channels: Vec<&str> = channels.iter().map(|channel| &**channel).collect();
        options.set_channel_names(&channels);
    }
    options
}

/// Waits until the database doesn't answer.
async fn down(driver: &Driver) {
    while driver.store.probe().await.is_ok() {
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}

/// The database, as the supervisor's probes see it.
struct Database<'a> {
    driver: &'a Driver,
    unreachable: OwnCondition,
    /// When a runner was replaced last.
    replaced: Option<Instant>,
    presence: Presence,
}

impl Database<'_> {
    /// A new runner meets the same condition, which then lasts until no runner was replaced for a
    /// while.
    fn note_replaced(&mut self, reason: &str) {
        let lasts = self.replaced.is_some_and(|at| at.elapsed() < CALM);
        self.replaced = Some(Instant::now());
        if lasts {
            tracing::debug!(reason, "the runner is replaced again");
        } else {
            tracing::warn!(reason, "the runner is replaced");
        }
    }

    async fn probe(&mut self) -> bool {
        match self.driver.store.probe().await {
            Ok(()) => {
                if self.unreachable.ends() {
                    tracing::info!("the database answers again");
                }
                true
            }
            Err(error) => {
                if self.unreachable.begins() {
                    tracing::warn!(%error, "the database doesn't answer");
                }
                false
            }
        }
    }

    /// Waits until the database answers again and the results that were kept for it are settled. A
    /// poll before that could claim their requests, whose leases have run out.
    async fn up(&mut self) {
        loop {
            // The passwords may have changed in the meantime.
            self.driver.store.reconnect();
            if self.probe().await {
                break;
            }
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
        let leases = &self.driver.leases;
        let unsettled = leases.unsettled();
        let settled = async {
            while unsettled.iter().any(|lease| leases.holds(lease)) {
                tokio::time::sleep(SETTLED_POLL).await;
            }
        };
        // A result that the database keeps refusing must not hold up the others.
        let _ = tokio::time::timeout(SETTLED_TIMEOUT, settled).await;
    }
}
