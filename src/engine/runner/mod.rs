//! The background runner: sqlxmq's, on this crate's SQL, under a supervisor.
//!
//! The stock runner's delay after errors grows without bound, so a supervisor probes the database and replaces the runner when
//! it is back. Its per-job keep-alive is off: [`lease`] renews all claims at once.

pub(crate) mod claim;
pub(crate) mod dispatch;
pub(crate) mod lease;
pub(crate) mod settle;
pub(crate) mod sweep;

use std::sync::{Arc, Weak};
use std::time::Duration;

use sqlxmq::{JobRunnerHandle, JobRunnerOptions};
use tokio::task::JoinHandle;

use crate::engine::Engine;
use crate::store::inspect;

const PROBE_INTERVAL: Duration = Duration::from_secs(2);
const START_RETRY_MIN: Duration = Duration::from_millis(100);
const START_RETRY_MAX: Duration = Duration::from_secs(2);

/// Keeps the runner running; dropping it stops the claiming, not the attempts in flight.
#[derive(Debug)]
pub(crate) struct RunnerGuard {
    engine: Weak<Engine>,
    supervisor: JoinHandle<()>,
}

impl RunnerGuard {
    pub(crate) fn start(engine: &Arc<Engine>) -> Self {
        engine.set_running(true);
        Self {
            engine: Arc::downgrade(engine),
            supervisor: engine.spawn(supervise(Arc::clone(engine))),
        }
    }

    /// Stops the claiming.
    pub(crate) fn stop(&self) {
        self.supervisor.abort();
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

/// Ends with the engine's shutdown, and the runner with it, whoever keeps the guard.
async fn supervise(engine: Arc<Engine>) {
    tokio::select! {
        () = engine.closing() => {}
        () = keep_running(&engine) => {}
    }
}

async fn keep_running(engine: &Arc<Engine>) {
    engine.transport_known().await;
    loop {
        // Dropping the handle stops the runner's polling; what it claimed goes on.
        let _runner = start(engine).await;
        while probe(engine).await {
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
        // Down: the passwords may have changed in the meantime.
        engine.reconnect();
        while !probe(engine).await {
            tokio::time::sleep(PROBE_INTERVAL).await;
            engine.reconnect();
        }
        log::info!("the database is back, the runner starts anew");
    }
}

/// Starts the runner, however long the database or its schema takes to appear.
async fn start(engine: &Arc<Engine>) -> JobRunnerHandle {
    let config = engine.config();
    let mut pause = START_RETRY_MIN;
    loop {
        let problem = match engine.shared().verify().await {
            Ok(()) => {
                // Weak, or the runner that the engine owns would own the engine.
                let weak = Arc::downgrade(engine);
                let mut options =
                    JobRunnerOptions::new(engine.shared().db.pool(), move |current| {
                        // A panic here would end the runner silently: it only hands over.
                        if let Some(engine) = weak.upgrade() {
                            engine.spawn(dispatch::run(Arc::clone(&engine), current));
                        }
                    });
                // The first is when the runner asks for more, the second how much it then holds: what is beyond the
                // slots waits for one here, so that each poll brings many.
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
                match options.run().await {
                    Ok(runner) => return runner,
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
