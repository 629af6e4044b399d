//! The connection pool of one runner.
//!
//! sqlxmq doesn't tell whether it is polling. Its runner has a pool of its own with two
//! connections, of which its listener keeps one: holding the other one proves that no poll is under
//! way, and that the claims of earlier polls have arrived.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};

use super::{Store, db};

/// Postgres ends a poll that takes longer.
const POLL_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct RunnerPool {
    pool: PgPool,
    used: Arc<AtomicU64>,
}

/// The connection that a runner would poll with.
#[derive(Debug)]
pub(crate) struct PollConnection {
    _connection: PoolConnection<Postgres>,
}

impl Store {
    /// A pool for one runner. Must be called within a tokio runtime.
    pub(crate) fn runner_pool(&self) -> RunnerPool {
        let used = Arc::default();
        RunnerPool {
            pool: self.db().runner_pool(&used),
            used,
        }
    }
}

impl RunnerPool {
    /// The pool itself, for sqlxmq.
    pub(crate) fn for_sqlxmq(&self) -> &PgPool {
        &self.pool
    }

    /// How often a connection was taken. The number changes with each poll.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Waits until no poll is under way, and keeps the next one waiting until the result is
    /// dropped. `None` if no connection can be made; then the runner has none either.
    pub(crate) async fn hold_polls(&self) -> Option<PollConnection> {
        loop {
            match self.pool.acquire().await {
                // A poll may take longer than sqlx waits for its connection.
                Err(sqlx::Error::PoolTimedOut) => {}
                connection => {
                    return connection.ok().map(|connection| PollConnection {
                        _connection: connection,
                    });
                }
            }
        }
    }

    /// Waits for the poll under way, if there is one. `false` if the poll hangs or no connection
    /// can be made.
    pub(crate) async fn wait_for_poll(&self) -> bool {
        let held = tokio::time::timeout(POLL_TIMEOUT, self.hold_polls()).await;
        // The connection is returned at once: the next poll needs it.
        held.is_ok_and(|held| held.is_some())
    }

    /// Closes the pool, waiting up to `within`.
    pub(crate) async fn close(&self, within: Duration) {
        db::close(&self.pool, within).await;
    }
}
