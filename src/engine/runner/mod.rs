//! The background runner: sqlxmq's, on this crate's SQL, under a supervisor.
//!
//! The stock runner's delay after errors grows without bound, so a supervisor probes the database and replaces the runner when
//! it is back. Its per-job keep-alive is off: [`lease`] renews all claims at once.
//!
//! A poll that is cut off goes on in the database, and leases what it finds to nobody. So a runner is not just dropped: [`polls`] waits
//! until it has got all that it will.

pub(crate) mod claim;
pub(crate) mod dispatch;
pub(crate) mod lease;
pub(crate) mod polls;
pub(crate) mod settle;
pub(crate) mod sweep;

use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use sqlxmq::{JobRunnerHandle, JobRunnerOptions};
use tokio::sync::watch;

use crate::engine::Engine;
use crate::store::{self, inspect};

use polls::PollingPool;

const PROBE_INTERVAL: Duration = Duration::from_secs(2);
const START_RETRY_MIN: Duration = Duration::from_millis(100);
const START_RETRY_MAX: Duration = Duration::from_secs(2);
const SETTLED_POLL: Duration = Duration::from_millis(10);
/// Longer than the pause between two tries to settle.
const SETTLED_TIMEOUT: Duration = Duration::from_secs(3);
/// A poll ends in the database before.
const STOP_TIMEOUT: Duration = Duration::from_secs(12);
/// As long as sqlx gives to a connection that it closes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps the runner running; dropping it stops the claiming, not the attempts in flight.
#[derive(Debug)]
pub(crate) struct RunnerGuard {
    engine: Weak<Engine>,
}

impl RunnerGuard {
    pub(crate) fn start(engine: &Arc<Engine>) -> Self {
        engine.set_running(true);
        // Counted from here on, so that a shutdown right after this waits for it.
        engine.spawn(supervise(Arc::clone(engine), engine.runner()));
        Self {
            engine: Arc::downgrade(engine),
        }
    }

    /// Has the claiming stopped. What a poll brings from now on goes back at once.
    pub(crate) fn stop(&self) {
        if let Some(engine) = self.engine.upgrade() {
            engine.set_running(false);
        }
    }
}

impl Drop for RunnerGuard {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Keeps a runner going until the claiming is to end. It has the engine until then, so that claims can still be given back.
async fn supervise(engine: Arc<Engine>, _counted: watch::Receiver<()>) {
    if unless_ended(&engine, engine.transport_known())
        .await
        .is_none()
    {
        return;
    }
    while let Some(runner) = unless_ended(&engine, start(&engine)).await {
        if unless_ended(&engine, runner.fails(&engine)).await.is_none() {
            return runner.stop(&engine).await;
        }
        // Not waited for: its connections may hang. Claims that it still brings are as good as those of the new one.
        let old = Arc::clone(&engine);
        engine.spawn(async move { runner.stop(&old).await });
        if unless_ended(&engine, up(&engine)).await.is_none() {
            return;
        }
        log::info!("the database is back, the runner starts anew");
    }
}

/// What the work brings, or `None` if the claiming is to end before.
async fn unless_ended<T>(engine: &Engine, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = engine.claiming_ends() => None,
        done = work => Some(done),
    }
}

/// sqlxmq's runner, and the pool that is its alone.
struct Runner {
    handle: JobRunnerHandle,
    pool: Arc<PollingPool>,
    _counted: watch::Receiver<()>,
}

impl Runner {
    /// Waits until the database doesn't answer, or there are no polls though it does: one may hang whose connection vanished without a
    /// sign, or they were refused until the pauses between them have grown long.
    async fn fails(&self, engine: &Engine) {
        let mut before: Option<u64> = None;
        while probe(engine).await {
            if before == Some(self.pool.used()) && self.has_room(engine) {
                log::warn!("the runner has not polled for {PROBE_INTERVAL:?}");
                return;
            }
            if !self.pool.has_polled().await {
                log::warn!("the runner's polls get no answer");
                return;
            }
            before = self.has_room(engine).then(|| self.pool.used());
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
    }

    /// With as many requests as it may hold it doesn't poll.
    fn has_room(&self, engine: &Engine) -> bool {
        self.handle.num_running_jobs() < engine.config().concurrency
    }

    /// Ends the polling, as soon as all that was claimed is here.
    async fn stop(mut self, engine: &Engine) {
        // While its connection is held here, it does not poll.
        let held = tokio::select! {
            held = tokio::time::timeout(STOP_TIMEOUT, self.pool.connection()) => held.ok(),
            // There is nothing to wait for: what was claimed before is left to its lease.
            () = down(engine) => None,
        };
        // Returns after a poll that has just ended has handed over what it brought.
        self.handle.stop().await;
        if let Some(connection) = held {
            drop(connection);
            store::close(self.pool.pool(), CLOSE_TIMEOUT).await;
        }
    }
}

/// Starts the runner, however long the database or its schema takes to appear.
async fn start(engine: &Arc<Engine>) -> Runner {
    let mut pause = START_RETRY_MIN;
    loop {
        let problem = match engine.shared().verify().await {
            Ok(()) => {
                let shared = engine.shared();
                let pool = shared.polls.open(&shared.db);
                match options(engine, pool.pool()).run().await {
                    Ok(handle) => {
                        return Runner {
                            handle,
                            pool,
                            _counted: engine.runner(),
                        };
                    }
                    Err(error) => crate::Error::from(error),
                }
            }
            Err(error) => error,
        };
        log::warn!("the runner can't start yet: {problem:?}");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(START_RETRY_MAX);
        engine.reconnect();
    }
}

fn options(engine: &Arc<Engine>, pool: &sqlx::PgPool) -> JobRunnerOptions {
    let config = engine.config();
    // Weak, or the runner that the engine owns would own the engine.
    let weak = Arc::downgrade(engine);
    let mut options = JobRunnerOptions::new(pool, move |current| {
        // A panic here would end the runner silently: it only hands over.
        if let Some(engine) = weak.upgrade() {
            dispatch::take(engine, current);
        }
    });
    // The first is when the runner asks for more, the second how much it then holds: what is beyond the slots waits for
    // one here, so that each poll brings many.
    options
        .set_concurrency(
            config.concurrency,
            config.concurrency + config.concurrency / 2,
        )
        .set_keep_alive(false);
    if let Some(channels) = &config.channels {
        let channels: Vec<&str> = channels.iter().map(|channel| &**channel).collect();
        options.set_channel_names(&channels);
    }
    options
}

/// Waits until the database doesn't answer.
async fn down(engine: &Engine) {
    while probe(engine).await {
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}

/// Waits until the database answers again and has taken the results that were kept for it: a poll before that could claim their
/// requests, whose leases are over.
async fn up(engine: &Engine) {
    loop {
        // The passwords may have changed in the meantime.
        engine.reconnect();
        if probe(engine).await {
            break;
        }
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
    let leases = &engine.shared().leases;
    let kept = leases.settling();
    let settled = async {
        while kept.iter().any(|lease| leases.holds(lease)) {
            tokio::time::sleep(SETTLED_POLL).await;
        }
    };
    // A result that the database goes on refusing must not hold up the others.
    let _ = tokio::time::timeout(SETTLED_TIMEOUT, settled).await;
}

async fn probe(engine: &Engine) -> bool {
    let probed = engine
        .shared()
        .db
        .run(|connection| Box::pin(async move { inspect::probe(connection).await }))
        .await;
    if let Err(error) = &probed {
        log::warn!("the database doesn't answer: {}", error.error);
    }
    probed.is_ok()
}
