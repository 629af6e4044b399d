//! The only SQL of the crate, one operation a file, and the pool that it runs on.
//!
//! The pool is the crate's own, derived from the caller's connect options: leases don't starve behind the application's
//! queries, and callers that sit in a transaction can't block the engine that would let them go on. Its sessions are pinned to what
//! the statements were written for.
//!
//! Statements join rows by `id = ANY (ARRAY[x.id])`, sort by the other side's id and put `OFFSET 0` into an `EXISTS`, so that statistics made while the
//! queue was empty can't turn them into scans: the first migration says how.

pub(crate) mod bulk;
pub(crate) mod claim;
pub(crate) mod dead_letters;
pub(crate) mod enqueue;
pub(crate) mod hand_over;
pub(crate) mod inspect;
pub(crate) mod outcome;
pub(crate) mod settle;
mod warm;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool};

use self::warm::{Turn, Warm};

/// After this long without an answer a statement's connection is thrown away: sqlx sets no keepalive, so a black-holed
/// socket would hang for minutes.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// For what nobody waits for any more.
const SERVER_TIMEOUT: Duration = Duration::from_secs(30);
/// Large bodies take time; a network that is slower than this is of no use.
const BYTES_PER_MILLISECOND: u64 = 4 * 1024;
/// A connection that was used so lately is taken to be alive.
const TRUSTED_FOR: Duration = Duration::from_secs(1);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// The connection that is held for good while anyone waits: the waiters', which listens for outcomes.
const LISTENERS: u32 = 1;
/// The connections of a runner: it listens on one and polls with the other.
const RUNNER_CONNECTIONS: u32 = 2;
/// How often it is looked whether a pool's connections are closed.
const CLOSE_POLL: Duration = Duration::from_millis(5);

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The crate's own pool.
#[derive(Clone, Debug)]
pub(crate) struct Db {
    pool: PgPool,
    warm: Arc<Warm>,
    session: Session,
}

/// What the statements ask of their sessions.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) schema: String,
    pub(crate) lease: Duration,
    /// The largest body that a statement may move.
    pub(crate) max_body: usize,
}

/// Why a statement brought no result.
#[derive(Debug)]
pub(crate) struct DbError {
    pub(crate) error: sqlx::Error,
    /// The statement was sent and nothing was heard of it: it may have been committed.
    pub(crate) unknown: bool,
}

impl DbError {
    /// Whether the data itself is refused (SQLSTATE classes 22, 23 and 54), so that a part of a batch may still be good.
    pub(crate) fn is_data(&self) -> bool {
        self.error
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code)
            .is_some_and(|code| {
                ["22", "23", "54"]
                    .iter()
                    .any(|class| code.starts_with(class))
            })
    }
}

impl From<sqlx::Error> for DbError {
    fn from(error: sqlx::Error) -> Self {
        Self {
            unknown: is_unknown(&error),
            error,
        }
    }
}

impl From<DbError> for crate::Error {
    fn from(error: DbError) -> Self {
        error.error.into()
    }
}

impl Db {
    /// A pool that connects when it is first used, with `max_connections` for statements. Must be called within a tokio runtime.
    pub(crate) fn new(connect: &PgConnectOptions, session: Session, max_connections: u32) -> Self {
        let pool = pool_options(max_connections.saturating_add(LISTENERS))
            .connect_lazy_with(pinned(connect, &session));
        let warm = Arc::new(Warm::new(max_connections));
        Self {
            pool,
            warm,
            session,
        }
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// A pool for one runner, to be closed with it: its polls wait for nobody else's statements, and whoever has the connection that it
    /// polls with knows that it doesn't poll. `used` counts how often a connection is taken. Must be called within a tokio runtime.
    pub(crate) fn runner_pool(&self, used: &Arc<AtomicU64>) -> PgPool {
        // Here it is the database that watches the time: sqlxmq does not, and a poll that nobody waits for should not claim.
        let timeout = STATEMENT_TIMEOUT.as_millis().to_string();
        let connect = (*self.pool.connect_options()).clone();
        let (connected, taken) = (Arc::clone(used), Arc::clone(used));
        pool_options(RUNNER_CONNECTIONS)
            .after_connect(move |_, _| {
                connected.fetch_add(1, Ordering::Relaxed);
                Box::pin(async { Ok(()) })
            })
            .before_acquire(move |connection, meta| {
                taken.fetch_add(1, Ordering::Relaxed);
                answers(connection, meta.idle_for)
            })
            .connect_lazy_with(connect.options([("statement_timeout", timeout)]))
    }

    /// Closes the pool when the statements under way are over, and waits for that as long as is given.
    pub(crate) async fn close(&self, within: Duration) {
        // It is closed from here on, awaited or not: nothing comes to rest any more.
        drop(self.pool.close());
        self.warm.close();
        close(&self.pool, within).await;
    }

    /// Connections made from now on use these options: passwords rotate and servers move.
    pub(crate) fn reconnect_with(&self, connect: &PgConnectOptions) {
        self.pool
            .set_connect_options(pinned(connect, &self.session));
    }

    /// A connection for statements.
    pub(crate) async fn acquire(&self) -> Result<Turn<'_>, sqlx::Error> {
        self.warm.take(&self.pool).await
    }

    /// Runs statements on one connection, which is thrown away if no answer comes in time.
    pub(crate) async fn run<T: Send>(
        &self,
        statements: impl for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, sqlx::Error>>
        + Send,
    ) -> Result<T, DbError> {
        self.run_large(0, statements).await
    }

    /// Waits for a statement on a connection that its owner throws away after a failure.
    pub(crate) async fn within<T, E: From<sqlx::Error>>(
        &self,
        bytes: usize,
        statement: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        tokio::time::timeout(STATEMENT_TIMEOUT + moving(bytes), statement)
            .await
            .unwrap_or_else(|_elapsed| Err(timed_out().into()))
    }

    /// As [`run`](Self::run), with the time that it takes to move as many bytes as the statements may.
    pub(crate) async fn run_large<T: Send>(
        &self,
        bytes: usize,
        statements: impl for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, sqlx::Error>>
        + Send,
    ) -> Result<T, DbError> {
        let mut turn = self.acquire().await.map_err(|error| DbError {
            error,
            unknown: false,
        })?;
        let result = self
            .within(bytes, statements(&mut turn.connection))
            .await
            .map_err(DbError::from);
        match &result {
            Ok(_) => self.warm.keep(&self.pool, turn),
            Err(error) if error.unknown => drop(turn.connection.detach()),
            Err(_) => {}
        }
        result
    }
}

fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

fn moving(bytes: usize) -> Duration {
    Duration::from_millis(bytes as u64 / BYTES_PER_MILLISECOND)
}

fn pool_options(max_connections: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .before_acquire(|connection, meta| answers(connection, meta.idle_for))
}

/// A ping for every statement would be a round trip on the hot path; one that lay idle may have died unnoticed.
fn answers(
    connection: &mut PgConnection,
    idle_for: Duration,
) -> BoxFuture<'_, Result<bool, sqlx::Error>> {
    Box::pin(async move {
        if idle_for > TRUSTED_FOR {
            tokio::time::timeout(PING_TIMEOUT, connection.ping())
                .await
                .map_err(|_elapsed| timed_out())??;
        }
        Ok(true)
    })
}

/// Closes a pool, for as long as that may take. A connection that hangs in the network is left to its end.
pub(crate) async fn close(pool: &PgPool, within: Duration) {
    let closed = async {
        // sqlx may return too early: for each idle connection that it closes, it waits for one less of the others, and
        // those stay open when they come back.
        loop {
            pool.close().await;
            if pool.size() == 0 {
                break;
            }
            tokio::time::sleep(CLOSE_POLL).await;
        }
    };
    let _ = tokio::time::timeout(within, closed).await;
}

/// Whether the statement may have been committed all the same.
fn is_unknown(error: &sqlx::Error) -> bool {
    match error {
        // Refused, unless it is the session that ended (class 08, and 57P for an operator's shutdown): that may have been
        // after the commit.
        sqlx::Error::Database(error) => error
            .code()
            .is_some_and(|code| code.starts_with("08") || code.starts_with("57P")),
        sqlx::Error::Encode(_) => false,
        _ => true,
    }
}

/// The caller's options, with the settings that the statements were written for.
fn pinned(connect: &PgConnectOptions, session: &Session) -> PgConnectOptions {
    let lease = format!(r"{}\ milliseconds", session.lease.as_millis());
    let search_path = quoted(&session.schema);
    let timeout = SERVER_TIMEOUT + moving(session.max_body);
    let timeout = timeout.as_millis().to_string();
    connect.clone().options([
        ("search_path", search_path.as_str()),
        ("requeuest.lease", &lease),
        ("default_transaction_isolation", r"read\ committed"),
        ("default_transaction_read_only", "off"),
        ("lock_timeout", "5s"),
        ("statement_timeout", &timeout),
        ("idle_in_transaction_session_timeout", "30s"),
        ("jit", "off"),
        // A plan made while the tables were tiny is kept for the connection's life. Every access here is by an index,
        // so plans that are good for full tables are good for all, and needn't be made again.
        ("enable_seqscan", "off"),
        ("enable_hashjoin", "off"),
        ("enable_mergejoin", "off"),
        ("plan_cache_mode", "force_generic_plan"),
    ])
}

/// The schema's name as an SQL identifier. Names are checked when the handle is built.
pub(crate) fn quoted(schema: &str) -> String {
    format!("\"{schema}\"")
}

/// Postgres counts in milliseconds here; no duration of ours comes near the limit.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
