//! The connection pool of one runner.
//!
//! sqlxmq doesn't tell whether it is polling. Its runner has a pool of its own with two
//! connections, of which its listener keeps one: holding the other one proves that no poll is under
//! way, and that the claims of earlier polls have arrived.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};

use super::{Store, db};

/// Postgres ends a poll that takes longer.
const POLL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection that isn't polling may take to be had: it is pinged first.
const PING_GRACE: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(crate) struct RunnerPool {
    pool: PgPool,
    uses: Arc<Uses>,
}

/// How often a connection was taken, and when the last one was.
#[derive(Debug, Default)]
pub(super) struct Uses(Mutex<(u64, Option<Instant>)>);

impl Uses {
    pub(super) fn note(&self) {
        let mut uses = self.lock();
        uses.0 += 1;
        uses.1 = Some(Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, (u64, Option<Instant>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connection that a runner would poll with.
#[derive(Debug)]
pub(crate) struct PollConnection {
    _connection: PoolConnection<Postgres>,
}

/// The room of this process for requests of the destinations that it knows, as a poll is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Room {
    /// A JSON object with a number for each destination, or empty.
    pub(crate) json: String,
    /// When deferred requests will have room, if that is before a poll would be due.
    pub(crate) soon: Option<Duration>,
}

/// Asked before each poll.
pub(crate) type RoomNow = Arc<dyn Fn() -> Room + Send + Sync>;

impl Store {
    /// A pool for one runner. Must be called within a tokio runtime.
    pub(crate) fn runner_pool(&self, room: RoomNow) -> RunnerPool {
        let uses = Arc::default();
        RunnerPool {
            pool: self.db().runner_pool(&uses, room),
            uses,
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
        self.uses.lock().0
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
        // A poll that began longer ago has ended in the database: its connection vanished, and its
        // answer won't come.
        let last = self.uses.lock().1;
        let since = last.map_or(Duration::ZERO, |last| last.elapsed());
        let within = POLL_TIMEOUT.saturating_sub(since).max(PING_GRACE);
        let held = tokio::time::timeout(within, self.hold_polls()).await;
        // The connection is returned at once: the next poll needs it.
        held.is_ok_and(|held| held.is_some())
    }

    /// Closes the pool, waiting up to `within`.
    pub(crate) async fn close(&self, within: Duration) {
        db::close(&self.pool, within).await;
    }
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;
    use crate::store::tests::store;
    use crate::testkit::Postgres;

    #[tokio::test]
    async fn a_poll_is_not_waited_for_once_the_database_has_ended_it() {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        let pool = store(&database).runner_pool(Arc::new(Room::default));
        assert!(pool.wait_for_poll().await);
        let before = pool.used();
        // As a runner's listener does, and a poll whose connection vanishes.
        let _listener = pool.for_sqlxmq().acquire().await.unwrap();
        let _poll = pool.for_sqlxmq().acquire().await.unwrap();
        assert!(pool.used() > before);
        let began = Instant::now();
        pool.uses.lock().1 = began.checked_sub(POLL_TIMEOUT);
        assert!(!pool.wait_for_poll().await);
        let took = began.elapsed();
        assert!((PING_GRACE..POLL_TIMEOUT).contains(&took), "{took:?}");
    }
}
