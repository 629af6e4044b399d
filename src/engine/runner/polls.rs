//! Whether a runner polls just now.
//!
//! sqlxmq doesn't tell. But a runner has a pool of its own with two connections, of which its listener has one for good: whoever has the
//! other one knows that no poll is under way, and that what earlier ones claimed has come.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};

use crate::store::Db;

/// A poll that takes longer is ended by the database.
const POLL_TIMEOUT: Duration = Duration::from_secs(10);
/// From the moment that a poll's connection is free, to the one that its claims are known: another thread may be just about to.
const HANDOVER: Duration = Duration::from_millis(50);

/// The pool of one runner.
#[derive(Debug)]
pub(crate) struct PollingPool {
    pool: PgPool,
    used: Arc<AtomicU64>,
}

impl PollingPool {
    pub(super) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// How often a connection was taken: changes with each poll.
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Waits until no poll is under way. `None` if the connection, which no poll has either, can't be made.
    pub(super) async fn connection(&self) -> Option<PoolConnection<Postgres>> {
        loop {
            match self.pool.acquire().await {
                // The poll lasts longer than one waits for a connection.
                Err(sqlx::Error::PoolTimedOut) => {}
                connection => return connection.ok(),
            }
        }
    }

    /// Waits for the poll that is under way, if there is one. `false` if it hangs, or there is no connection to be had.
    pub(super) async fn has_polled(&self) -> bool {
        let connection = tokio::time::timeout(POLL_TIMEOUT, self.connection()).await;
        // Given back at once: the next poll needs it.
        connection.is_ok_and(|connection| connection.is_some())
    }
}

/// The pools of all runners of a handle: one that is being replaced may still poll.
#[derive(Debug, Default)]
pub(crate) struct Polls {
    pools: Mutex<Vec<Weak<PollingPool>>>,
}

impl Polls {
    /// Must be called within a tokio runtime.
    pub(super) fn open(&self, db: &Db) -> Arc<PollingPool> {
        let used = Arc::default();
        let pool = Arc::new(PollingPool {
            pool: db.runner_pool(&used),
            used,
        });
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(&pool));
        pool
    }

    /// Waits until all that was claimed before is known here.
    pub(super) async fn wait_out(&self) {
        let pools: Vec<_> = {
            let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
            pools.iter().filter_map(Weak::upgrade).collect()
        };
        for pool in pools {
            pool.has_polled().await;
        }
        tokio::time::sleep(HANDOVER).await;
    }
}
