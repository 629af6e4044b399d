//! Idle connections between one statement and the next.
//!
//! sqlx's pool pings each connection that comes back, which is a round trip for every statement,
//! and hands out the one that has been idle longest. Here the connection used last is reused at
//! once, and the pool only gets back connections that weren't used for a while.

use std::io::{Error as IoError, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::connect::Connector;
use super::db::{ACQUIRE_TIMEOUT, Obsolete, TRUSTED_FOR};

/// The pool closes connections that have grown old, and must see them for that.
const KEPT_FOR: Duration = Duration::from_secs(600);

/// The connections between the pool and the statements.
#[derive(Debug)]
pub(super) struct IdleConnections {
    /// The connection used last comes last.
    idle: Mutex<Vec<Idle>>,
    /// One permit for each of the pool's connections for statements, so that no statement waits in
    /// the pool for a connection that is idle here.
    permits: Semaphore,
    connector: Connector,
    obsolete: Arc<Obsolete>,
}

#[derive(Debug)]
struct Idle {
    connection: PoolConnection<Postgres>,
    since: Instant,
    /// When the connection last left the pool.
    left_pool: Instant,
}

/// A connection for statements. Dropping it returns the connection to the pool, which pings it;
/// [`IdleConnections::keep`] doesn't.
#[derive(Debug)]
pub(crate) struct Checkout<'a> {
    pub(super) connection: PoolConnection<Postgres>,
    left_pool: Instant,
    _permit: SemaphorePermit<'a>,
}

impl IdleConnections {
    pub(super) fn new(connections: u32, obsolete: Arc<Obsolete>) -> Self {
        Self {
            idle: Mutex::default(),
            permits: Semaphore::new(connections as usize),
            connector: Connector::default(),
            obsolete,
        }
    }

    /// A connection that is idle here, or one from the pool. `before` is called before the pool
    /// might make a new one.
    pub(super) async fn take(
        &self,
        pool: &PgPool,
        before: impl FnOnce(),
    ) -> Result<Checkout<'_>, sqlx::Error> {
        let permit = match self.permits.try_acquire() {
            Ok(permit) => permit,
            Err(_) => tokio::time::timeout(ACQUIRE_TIMEOUT, self.permits.acquire())
                .await
                .map_err(|_elapsed| all_busy())?
                .map_err(|_closed| sqlx::Error::PoolClosed)?,
        };
        let now = Instant::now();
        let latest = {
            let mut idle = self.lock();
            drop_expired(&mut idle, now);
            idle.pop()
        };
        let (connection, left_pool) = if let Some(latest) = latest {
            (latest.connection, latest.left_pool)
        } else {
            before();
            // Boxed, because most statements don't take the room of it.
            (Box::pin(self.connector.connect(pool)).await?, now)
        };
        Ok(Checkout {
            connection,
            left_pool,
            _permit: permit,
        })
    }

    /// Keeps a connection for the next statement. Must not be called after a failure, or while the
    /// session has state that other statements must not see.
    pub(super) fn keep(&self, pool: &PgPool, checkout: Checkout<'_>) {
        let now = Instant::now();
        let mut idle = self.lock();
        drop_expired(&mut idle, now);
        // Checked with the list locked, so that no connection is added after `close` cleared it.
        if !pool.is_closed()
            && now - checkout.left_pool < KEPT_FOR
            && !self.obsolete.covers(checkout.left_pool)
        {
            idle.push(Idle {
                connection: checkout.connection,
                since: now,
                left_pool: checkout.left_pool,
            });
        }
    }

    /// Closes all connections that are idle here. Those in use then must be covered by `obsolete`,
    /// so that none of them is kept.
    pub(super) fn discard(&self) {
        for idle in self.lock().drain(..) {
            drop(idle.connection.detach());
        }
    }

    /// Returns all connections to the pool, which was closed before.
    pub(super) fn close(&self) {
        self.permits.close();
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn all_busy() -> sqlx::Error {
    let text = format!(
        "all of the handle's connections were busy for {} s; raise DurableBuilder::max_connections",
        ACQUIRE_TIMEOUT.as_secs()
    );
    sqlx::Error::Io(IoError::new(ErrorKind::TimedOut, text))
}

fn drop_expired(idle: &mut Vec<Idle>, now: Instant) {
    let expired = idle.partition_point(|idle| now - idle.since > TRUSTED_FOR);
    idle.drain(..expired);
}

impl Drop for IdleConnections {
    fn drop(&mut self) {
        // Returning a connection to the pool needs a runtime, which may have ended.
        self.discard();
    }
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use sqlx::postgres::PgPoolOptions;

    use super::*;
    use crate::testkit::{Postgres, TestDatabase};

    async fn two_connections() -> (TestDatabase, PgPool, IdleConnections) {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .connect_lazy_with(database.options());
        let idle = IdleConnections::new(2, Arc::default());
        (database, pool, idle)
    }

    async fn session(checkout: &mut Checkout<'_>) -> i32 {
        sqlx::query_scalar("SELECT pg_backend_pid()")
            .fetch_one(&mut *checkout.connection)
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn the_connection_used_last_is_used_next_within_the_limit() {
        let (_database, pool, idle) = two_connections().await;
        let mut first = idle.take(&pool, || ()).await.unwrap();
        let mut second = idle.take(&pool, || ()).await.unwrap();
        let sessions = [session(&mut first).await, session(&mut second).await];
        assert!(
            tokio::time::timeout(Duration::from_millis(50), idle.take(&pool, || ()))
                .await
                .is_err()
        );
        idle.keep(&pool, second);
        idle.keep(&pool, first);
        for _ in 0..3 {
            let mut checkout = idle.take(&pool, || ()).await.unwrap();
            assert_eq!(session(&mut checkout).await, sessions[0]);
            idle.keep(&pool, checkout);
        }
        assert_eq!(pool.num_idle(), 0);
    }

    #[tokio::test]
    async fn expired_connections_go_back_to_the_pool_and_all_on_close() {
        let (_database, pool, idle) = two_connections().await;
        let checkout = idle.take(&pool, || ()).await.unwrap();
        idle.keep(&pool, checkout);
        for connection in &mut *idle.lock() {
            connection.since -= 2 * TRUSTED_FOR;
        }
        let before = Instant::now();
        let checkout = idle.take(&pool, || ()).await.unwrap();
        // The connection came from the pool, which pinged it.
        assert!(checkout.left_pool >= before);
        idle.keep(&pool, checkout);
        let under_way = idle.take(&pool, || ()).await.unwrap();
        let waiting = idle.take(&pool, || ()).await.unwrap();
        let closing = pool.close();
        idle.close();
        idle.keep(&pool, under_way);
        assert!(idle.lock().is_empty());
        drop(waiting);
        closing.await;
        assert!(matches!(
            idle.take(&pool, || ()).await,
            Err(sqlx::Error::PoolClosed)
        ));
    }
}
