//! The crate's own connection pool.
//!
//! The pool is derived from the caller's connect options, so leases don't starve behind the
//! application's queries, and callers inside a transaction can't block the engine that would let
//! them continue. Its sessions are pinned to the settings that the statements were written for.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool};

use super::connect::located;
use super::idle::{Checkout, IdleConnections};
use super::runner_pool::Uses;
use super::{millis, quoted};
use crate::error::{Error, Kind};

/// A statement without an answer for this long loses its connection. sqlx sets no keepalive, so a
/// black-holed socket would otherwise hang for minutes.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Postgres ends statements after this time, for those that no process waits for any more.
const SERVER_TIMEOUT: Duration = Duration::from_secs(30);
/// Large bodies get extra time; a slower network than this is of no use.
const BYTES_PER_MILLISECOND: u64 = 4 * 1024;
/// A connection used this recently is not pinged before reuse.
pub(super) const TRUSTED_FOR: Duration = Duration::from_secs(1);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
pub(super) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// The connection that listens for outcomes while any caller waits.
const LISTENERS: u32 = 1;
/// A runner listens on one connection and polls with the other.
const RUNNER_CONNECTIONS: u32 = 2;
/// The formats of requests that this version can read, as an array of Postgres. A poll claims no
/// others.
const FORMATS: &str = "{1}";
const CLOSE_POLL: Duration = Duration::from_millis(5);

/// What the statements need of their sessions.
#[derive(Clone, Debug)]
pub(super) struct Session {
    pub(super) schema: String,
    pub(super) lease: Duration,
    pub(super) dead_letter_retention: Option<Duration>,
    /// The largest body that a statement may move, in bytes.
    pub(super) max_body: usize,
}

#[derive(Clone, Debug)]
pub(super) struct Db {
    pool: PgPool,
    idle: Arc<IdleConnections>,
    session: Session,
}

/// Why an operation of the store failed.
#[derive(Debug)]
pub(crate) struct StoreError {
    operation: &'static str,
    pub(super) error: sqlx::Error,
    /// The statement was sent and no answer came: it may have been committed.
    unknown: bool,
}

impl StoreError {
    /// A failure of a statement that was sent.
    pub(super) fn new(operation: &'static str, error: sqlx::Error) -> Self {
        Self {
            operation,
            unknown: is_unknown(&error),
            error,
        }
    }

    /// Whether the statement may have been committed.
    pub(crate) fn is_unknown(&self) -> bool {
        self.unknown
    }

    /// The same failure, of a statement that may have been committed earlier.
    pub(crate) fn or_unknown(self) -> Self {
        Self {
            unknown: true,
            ..self
        }
    }

    /// Whether the database refused the data (SQLSTATE classes 22, 23 and 54), so that a part of
    /// the batch may still be good.
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

    /// The caller's error for a commit whose outcome is unknown.
    pub(crate) fn into_indeterminate(self) -> Error {
        Error::new(Kind::Indeterminate(Some(self.error)))
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, self.error)
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        error.error.into()
    }
}

impl Db {
    /// A pool that connects on first use, with `max_connections` for statements. Must be called
    /// within a tokio runtime.
    pub(super) fn new(connect: &PgConnectOptions, session: Session, max_connections: u32) -> Self {
        let pool = pool_options(max_connections.saturating_add(LISTENERS))
            .connect_lazy_with(pinned(connect, &session));
        Self {
            pool,
            idle: Arc::new(IdleConnections::new(max_connections)),
            session,
        }
    }

    pub(super) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// A pool for one runner, closed together with it. Its polls don't wait for other statements,
    /// and holding its second connection proves that no poll is under way. `uses` notes when a
    /// connection is taken. Must be called within a tokio runtime.
    pub(super) fn runner_pool(&self, uses: &Arc<Uses>) -> PgPool {
        // Postgres watches the time here, because sqlxmq doesn't: an abandoned poll must not claim.
        let timeout = STATEMENT_TIMEOUT.as_millis().to_string();
        let connect = (*self.pool.connect_options()).clone();
        let (connected, taken) = (Arc::clone(uses), Arc::clone(uses));
        pool_options(RUNNER_CONNECTIONS)
            .after_connect(move |_, _| {
                connected.note();
                Box::pin(async { Ok(()) })
            })
            .before_acquire(move |connection, meta| {
                taken.note();
                Box::pin(answers(connection, meta.idle_for))
            })
            .connect_lazy_with(connect.options([("statement_timeout", timeout)]))
    }

    /// Closes the pool once the statements under way are done, and waits up to `within` for them.
    pub(super) async fn close(&self, within: Duration) {
        // The pool is closed from here on, awaited or not: no connection becomes idle any more.
        drop(self.pool.close());
        self.idle.close();
        close(&self.pool, within).await;
    }

    /// New connections use these options: passwords rotate and servers move.
    pub(super) fn reconnect_with(&self, connect: &PgConnectOptions) {
        self.pool
            .set_connect_options(pinned(connect, &self.session));
    }

    /// A connection for statements.
    pub(super) async fn acquire(&self) -> Result<Checkout<'_>, sqlx::Error> {
        self.idle.take(&self.pool).await
    }

    /// Runs an operation's statements on one connection, and discards the connection if no answer
    /// comes in time. `bytes` is how much the statements may move.
    pub(super) async fn run<T>(
        &self,
        operation: &'static str,
        bytes: usize,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        let mut checkout = self.acquire().await.map_err(|error| StoreError {
            operation,
            error,
            unknown: false,
        })?;
        // Boxed, so that callers' futures don't take the room of sqlx's.
        let statements = Box::pin(statements(&mut checkout.connection));
        let result = within(bytes, statements).await;
        match result {
            Ok(result) => {
                self.idle.keep(&self.pool, checkout);
                Ok(result)
            }
            Err(error) => {
                let error = located(error, &self.pool.connect_options());
                let error = StoreError::new(operation, error);
                if error.unknown {
                    drop(checkout.connection.detach());
                }
                Err(error)
            }
        }
    }
}

/// Waits for a statement that may move this many bytes. The caller discards the connection after a
/// failure.
pub(super) async fn within<T, E: From<sqlx::Error>>(
    bytes: usize,
    statement: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::time::timeout(STATEMENT_TIMEOUT + transfer_time(bytes), statement)
        .await
        .unwrap_or_else(|_elapsed| Err(timed_out().into()))
}

fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

fn transfer_time(bytes: usize) -> Duration {
    Duration::from_millis(bytes as u64 / BYTES_PER_MILLISECOND)
}

fn pool_options(max_connections: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .before_acquire(|connection, meta| Box::pin(answers(connection, meta.idle_for)))
}

/// Pings a connection that was idle, because it may have died unnoticed. A ping before every
/// statement would be a round trip on the hot path.
async fn answers(connection: &mut PgConnection, idle_for: Duration) -> Result<bool, sqlx::Error> {
    if idle_for > TRUSTED_FOR {
        tokio::time::timeout(PING_TIMEOUT, connection.ping())
            .await
            .map_err(|_elapsed| timed_out())??;
    }
    Ok(true)
}

/// Closes a pool, waiting up to `within`. A connection that hangs in the network is left alone.
pub(super) async fn close(pool: &PgPool, within: Duration) {
    let closed = async {
        // sqlx may return too early: for each idle connection that it closes, it waits for one
        // fewer of the others, and those stay open when they come back.
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

/// Whether the statement may have been committed despite the error.
fn is_unknown(error: &sqlx::Error) -> bool {
    match error {
        // Postgres refused the statement. The exceptions are errors that end the session (class 08,
        // and 57P for an operator's shutdown), which may follow a commit.
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
    // In a unit of its own: Postgres 14 reads no interval of so many milliseconds.
    let dead_letter_retention = session
        .dead_letter_retention
        .map_or_else(String::new, |retention| millis(retention).to_string());
    let search_path = quoted(&session.schema);
    let timeout = SERVER_TIMEOUT + transfer_time(session.max_body);
    let timeout = timeout.as_millis().to_string();
    connect.clone().options([
        ("search_path", search_path.as_str()),
        ("requeuest.lease", &lease),
        ("requeuest.formats", FORMATS),
        ("requeuest.dead_letter_retention", &dead_letter_retention),
        ("default_transaction_isolation", r"read\ committed"),
        ("default_transaction_read_only", "off"),
        ("lock_timeout", "5s"),
        ("statement_timeout", &timeout),
        ("idle_in_transaction_session_timeout", "30s"),
        ("jit", "off"),
        // A plan made while the tables were tiny is kept for the life of the connection. Every
        // access here is by an index, so a plan that is good for full tables is good for all.
        ("enable_seqscan", "off"),
        ("enable_hashjoin", "off"),
        ("enable_mergejoin", "off"),
        ("plan_cache_mode", "force_generic_plan"),
    ])
}
