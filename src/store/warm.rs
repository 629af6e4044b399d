//! Connections on their way from one statement to the next.
//!
//! sqlx's pool asks each connection that comes back whether it is alive, which is a round trip for every statement, and hands out the one
//! that has rested longest. Here the last one is used again at once, and the pool gets only what was not used for a while.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{ACQUIRE_TIMEOUT, TRUSTED_FOR};

/// The pool closes connections that have grown old, and has to see them for that.
const KEPT_FOR: Duration = Duration::from_secs(600);

/// What lies between the pool and the statements.
#[derive(Debug)]
pub(super) struct Warm {
    /// The last one used comes last.
    resting: Mutex<Vec<Resting>>,
    /// As many as the pool has connections for statements, so that nobody waits in the pool for what rests here.
    turns: Semaphore,
}

#[derive(Debug)]
struct Resting {
    connection: PoolConnection<Postgres>,
    since: Instant,
    /// When the pool had it last.
    taken: Instant,
}

/// A connection for statements. Dropped, it goes back to the pool, which makes sure of it; see [`Warm::keep`].
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    pub(crate) connection: PoolConnection<Postgres>,
    taken: Instant,
    _permit: SemaphorePermit<'a>,
}

impl Warm {
    pub(super) fn new(connections: u32) -> Self {
        Self {
            resting: Mutex::default(),
            turns: Semaphore::new(connections as usize),
        }
    }

    pub(super) async fn take(&self, pool: &PgPool) -> Result<Turn<'_>, sqlx::Error> {
        let permit = match self.turns.try_acquire() {
            Ok(permit) => permit,
            Err(_) => tokio::time::timeout(ACQUIRE_TIMEOUT, self.turns.acquire())
                .await
                .map_err(|_elapsed| sqlx::Error::PoolTimedOut)?
                .map_err(|_closed| sqlx::Error::PoolClosed)?,
        };
        let now = Instant::now();
        let warm = {
            let mut resting = self.lock();
            drop_cold(&mut resting, now);
            resting.pop()
        };
        let (connection, taken) = match warm {
            Some(warm) => (warm.connection, warm.taken),
            None => (pool.acquire().await?, now),
        };
        Ok(Turn {
            connection,
            taken,
            _permit: permit,
        })
    }

    /// Keeps a connection for the next statement. Not after a failure, or while its session has anything that is not to be seen by others.
    pub(super) fn keep(&self, pool: &PgPool, turn: Turn<'_>) {
        let now = Instant::now();
        let mut resting = self.lock();
        drop_cold(&mut resting, now);
        // With the list locked, so that none comes after it was emptied for good.
        if !pool.is_closed() && now - turn.taken < KEPT_FOR {
            resting.push(Resting {
                connection: turn.connection,
                since: now,
                taken: turn.taken,
            });
        }
    }

    /// Gives all back to the pool, which has been closed.
    pub(super) fn close(&self) {
        self.turns.close();
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Resting>> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn drop_cold(resting: &mut Vec<Resting>, now: Instant) {
    let cold = resting.partition_point(|resting| now - resting.since > TRUSTED_FOR);
    resting.drain(..cold);
}

impl Drop for Warm {
    fn drop(&mut self) {
        // Going back to the pool takes a runtime, which may be over.
        for resting in self.lock().drain(..) {
            drop(resting.connection.detach());
        }
    }
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use sqlx::postgres::PgPoolOptions;

    use super::*;
    use crate::testkit::{Postgres, TestDatabase};

    async fn two_connections() -> (TestDatabase, PgPool, Warm) {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .connect_lazy_with(database.options());
        let warm = Warm::new(2);
        (database, pool, warm)
    }

    async fn session(turn: &mut Turn<'_>) -> i32 {
        sqlx::query_scalar("SELECT pg_backend_pid()")
            .fetch_one(&mut *turn.connection)
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn the_connection_used_last_is_used_next_and_no_more_than_are_allowed() {
        let (_database, pool, warm) = two_connections().await;
        let mut first = warm.take(&pool).await.unwrap();
        let mut second = warm.take(&pool).await.unwrap();
        let sessions = [session(&mut first).await, session(&mut second).await];
        assert!(
            tokio::time::timeout(Duration::from_millis(50), warm.take(&pool))
                .await
                .is_err()
        );
        warm.keep(&pool, second);
        warm.keep(&pool, first);
        for _ in 0..3 {
            let mut turn = warm.take(&pool).await.unwrap();
            assert_eq!(session(&mut turn).await, sessions[0]);
            warm.keep(&pool, turn);
        }
        assert_eq!(pool.num_idle(), 0);
    }

    #[tokio::test]
    async fn what_has_rested_goes_back_to_the_pool_and_all_does_when_it_is_closed() {
        let (_database, pool, warm) = two_connections().await;
        let turn = warm.take(&pool).await.unwrap();
        warm.keep(&pool, turn);
        for resting in &mut *warm.lock() {
            resting.since -= 2 * TRUSTED_FOR;
        }
        let before = Instant::now();
        let turn = warm.take(&pool).await.unwrap();
        // It comes from the pool, which made sure of it.
        assert!(turn.taken >= before);
        warm.keep(&pool, turn);
        let under_way = warm.take(&pool).await.unwrap();
        let waiting = warm.take(&pool).await.unwrap();
        let closing = pool.close();
        warm.close();
        warm.keep(&pool, under_way);
        assert!(warm.lock().is_empty());
        drop(waiting);
        closing.await;
        assert!(matches!(
            warm.take(&pool).await,
            Err(sqlx::Error::PoolClosed)
        ));
    }
}
