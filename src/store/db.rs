//! The crate's own connection pool.
//!
//! The pool is derived from the caller's connect options, so leases don't starve behind the
//! application's queries, and callers inside a transaction can't block the engine that would let
//! them continue. Its sessions are pinned to the settings that the statements were written for.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnectionMetadata;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Executor, PgConnection, PgPool, Row};
use uuid::Uuid;

use super::connect::located;
use super::idle::{Checkout, IdleConnections};
use super::runner_pool::{Room, RoomNow, Uses};
use super::{millis, quoted};
use crate::error::{Error, Kind, database_text, has_sqlstate, shared};

/// A statement without an answer for this long loses its connection. sqlx sets no keepalive, so a
/// black-holed socket would otherwise hang for minutes.
pub(crate) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Postgres ends statements after so many times that, for those that no process waits for any more.
const SERVER_TIMEOUTS: u32 = 3;
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
pub(super) const FORMATS: &str = "{1}";
const CLOSE_POLL: Duration = Duration::from_millis(5);
/// The first version of Postgres that has `transaction_timeout`.
const HAS_TRANSACTION_TIMEOUT: u32 = 170_000;

/// What the statements need of their sessions.
#[derive(Clone, Debug)]
pub(super) struct Session {
    pub(super) schema: String,
    pub(super) lease: Duration,
    pub(super) statement_timeout: Duration,
    /// The handle, which polls name as the owner of what they claim.
    pub(super) instance: Uuid,
    pub(super) dead_letter_retention: Option<Duration>,
    /// Whether polls say how long requests have waited.
    pub(super) measured: bool,
    /// The largest body that a statement may move, in bytes.
    pub(super) max_body: usize,
}

#[derive(Clone, Debug)]
pub(super) struct Db {
    pool: PgPool,
    idle: Arc<IdleConnections>,
    obsolete: Arc<Obsolete>,
    source: Arc<Mutex<Source>>,
    session: Session,
}

/// Where the options of new connections come from.
#[derive(Debug)]
struct Source {
    /// The caller's pool, unless the crate was given options of its own.
    followed: Option<PgPool>,
    /// Before they are pinned.
    options: Arc<PgConnectOptions>,
    runner_pools: Vec<PgPool>,
}

/// Since when the sessions that were open are of no use, because one of them couldn't write: their
/// server has become a standby, or the address leads to another server now.
#[derive(Debug, Default)]
pub(super) struct Obsolete(Mutex<Option<Instant>>);

impl Obsolete {
    /// All sessions that are open now are of no use.
    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether a session that was open at this time is of no use.
    pub(super) fn covers(&self, open: Instant) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some_and(|since| open < since)
    }
}

/// Why an operation of the store failed. Its texts show no DETAIL, which may contain whole rows.
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
        has_sqlstate(&self.error, &["22", "23", "54"])
    }

    /// Whether the session can't write: its server is a standby.
    fn is_read_only(&self) -> bool {
        is_read_only(&self.error)
    }

    /// As [`is_data`](Self::is_data), or a trigger raised an error, perhaps at one row.
    pub(crate) fn may_concern_one_row(&self) -> bool {
        self.is_data() || has_sqlstate(&self.error, &["P0", "44"])
    }

    /// Whether the database refused the statement for another reason than how the connection, the
    /// transaction or the server fares, which passes.
    pub(crate) fn is_refusal(&self) -> bool {
        const PASSING: [&str; 11] = [
            "08", "0A", "25", "26", "28", "3D", "40", "53", "55", "57", "58",
        ];
        self.error.as_database_error().is_some() && !has_sqlstate(&self.error, &PASSING)
    }

    /// The caller's error for a commit whose outcome is unknown.
    pub(crate) fn into_indeterminate(self) -> Error {
        Error::new(Kind::Indeterminate(Some(shared(self.error))))
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, database_text(&self.error))
    }
}

impl fmt::Debug for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreError")
            .field("operation", &self.operation)
            .field("error", &database_text(&self.error))
            .field("unknown", &self.unknown)
            .finish()
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        error.error.into()
    }
}

impl Db {
    /// A pool that connects on first use, with `max_connections` for statements. Its connections
    /// have these options or, for `None`, those of the caller's pool. Must be called within a tokio
    /// runtime.
    pub(super) fn new(
        connect: Option<&PgConnectOptions>,
        caller_pool: &PgPool,
        session: Session,
        max_connections: u32,
    ) -> Self {
        let options = match connect {
            Some(connect) => Arc::new(connect.clone()),
            None => caller_pool.connect_options(),
        };
        let obsolete = Arc::default();
        let pool = pool_options(max_connections.saturating_add(LISTENERS), &obsolete)
            .connect_lazy_with(pinned(&options, &session));
        let source = Source {
            followed: connect.is_none().then(|| caller_pool.clone()),
            options,
            runner_pools: Vec::new(),
        };
        Self {
            pool,
            idle: Arc::new(IdleConnections::new(max_connections, Arc::clone(&obsolete))),
            obsolete,
            source: Arc::new(Mutex::new(source)),
            session,
        }
    }

    pub(super) fn instance(&self) -> Uuid {
        self.session.instance
    }

    pub(super) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// A pool for one runner, closed together with it. Its polls don't wait for other statements,
    /// and holding its second connection proves that no poll is under way. `uses` notes when a
    /// connection is taken. Must be called within a tokio runtime.
    pub(super) fn runner_pool(&self, uses: &Arc<Uses>, room: RoomNow) -> PgPool {
        let told = Arc::default();
        let (connected, taken) = (Arc::clone(uses), Arc::clone(uses));
        let obsolete = Arc::clone(&self.obsolete);
        let mut source = self.source();
        let pool = pool_options(RUNNER_CONNECTIONS, &self.obsolete)
            .after_connect(move |connection, _| {
                connected.note();
                Box::pin(pin_newer(connection))
            })
            .before_acquire(move |connection, meta| {
                taken.note();
                let (obsolete, room, told) = (Arc::clone(&obsolete), room(), Arc::clone(&told));
                Box::pin(async move {
                    if !is_of_use(connection, meta, obsolete).await? {
                        return Ok(false);
                    }
                    tell_room(connection, room, &told).await?;
                    Ok(true)
                })
            })
            .connect_lazy_with(pinned_for_polls(&source.options, &self.session));
        source.runner_pools.retain(|pool| !pool.is_closed());
        source.runner_pools.push(pool.clone());
        pool
    }

    /// Closes the pool once the statements under way are done, and waits up to `within` for them.
    pub(super) async fn close(&self, within: Duration) {
        // The pool is closed from here on, awaited or not: no connection becomes idle any more.
        drop(self.pool.close());
        self.idle.close();
        close(&self.pool, within).await;
    }

    /// New connections use the options that the caller's pool has now: passwords rotate and servers
    /// move.
    pub(super) fn follow(&self) {
        let mut source = self.source();
        let options = source.followed.as_ref().map(PgPool::connect_options);
        if let Some(options) = options.filter(|now| !Arc::ptr_eq(now, &source.options)) {
            self.connect_with(&mut source, options);
        }
    }

    /// The options of new connections, before they are pinned.
    pub(super) fn options(&self) -> Arc<PgConnectOptions> {
        self.follow();
        Arc::clone(&self.source().options)
    }

    /// New connections use these options, and no longer those of the caller's pool.
    pub(super) fn set_connect_options(&self, options: PgConnectOptions) {
        let mut source = self.source();
        source.followed = None;
        self.connect_with(&mut source, Arc::new(options));
    }

    fn connect_with(&self, source: &mut Source, options: Arc<PgConnectOptions>) {
        self.pool
            .set_connect_options(pinned(&options, &self.session));
        source.runner_pools.retain(|pool| !pool.is_closed());
        for pool in &source.runner_pools {
            pool.set_connect_options(pinned_for_polls(&options, &self.session));
        }
        source.options = options;
    }

    fn source(&self) -> MutexGuard<'_, Source> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection for statements.
    pub(super) async fn acquire(&self) -> Result<Checkout<'_>, sqlx::Error> {
        self.idle.take(&self.pool, || self.follow()).await
    }

    /// Looks at why a statement failed. If its session can't write, no other one of that time is
    /// used again. Each would fail once, and then be returned as a sound connection.
    pub(super) fn note_failure(&self, error: &sqlx::Error) {
        if is_read_only(error) {
            self.obsolete.note();
            self.idle.discard();
        }
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
        let timeout = self.session.statement_timeout;
        let result = within_time(timeout, bytes, statements).await;
        match result {
            Ok(result) => {
                self.idle.keep(&self.pool, checkout);
                Ok(result)
            }
            Err(error) => {
                let error = located(error, &self.pool.connect_options());
                let error = StoreError::new(operation, error);
                self.note_failure(&error.error);
                if error.unknown || error.is_read_only() {
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
    within_time(STATEMENT_TIMEOUT, bytes, statement).await
}

async fn within_time<T, E: From<sqlx::Error>>(
    timeout: Duration,
    bytes: usize,
    statement: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::time::timeout(timeout + transfer_time(bytes), statement)
        .await
        .unwrap_or_else(|_elapsed| Err(timed_out().into()))
}

fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

fn transfer_time(bytes: usize) -> Duration {
    Duration::from_millis(bytes as u64 / BYTES_PER_MILLISECOND)
}

fn pool_options(max_connections: u32, obsolete: &Arc<Obsolete>) -> PgPoolOptions {
    let obsolete = Arc::clone(obsolete);
    PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .after_connect(|connection, _| Box::pin(pin_newer(connection)))
        .before_acquire(move |connection, meta| {
            Box::pin(is_of_use(connection, meta, Arc::clone(&obsolete)))
        })
}

/// Pins what older servers don't know: a startup option of theirs that is unknown fails the
/// connection.
async fn pin_newer(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    if connection.server_version_num() >= Some(HAS_TRANSACTION_TIMEOUT) {
        connection.execute("SET transaction_timeout = 0").await?;
    }
    Ok(())
}

/// Whether a connection that was idle may be used again. It may have died unnoticed, or its server
/// may be a standby now. Asking before every statement would be a round trip on the hot path.
async fn is_of_use(
    connection: &mut PgConnection,
    meta: PoolConnectionMetadata,
    obsolete: Arc<Obsolete>,
) -> Result<bool, sqlx::Error> {
    let opened = Instant::now().checked_sub(meta.age);
    if opened.is_some_and(|opened| obsolete.covers(opened)) {
        return Ok(false);
    }
    if meta.idle_for <= TRUSTED_FOR {
        return Ok(true);
    }
    let asked = connection.fetch_one("SHOW transaction_read_only");
    let row = tokio::time::timeout(PING_TIMEOUT, asked)
        .await
        .map_err(|_elapsed| timed_out())??;
    Ok(row.try_get::<String, _>(0)? == "off")
}

/// Tells the session of the next poll which room its process has. Nothing is sent while there is
/// nothing to tell, which is most of the time. `told` says whether the last poll was told anything.
async fn tell_room(
    connection: &mut PgConnection,
    room: Room,
    told: &AtomicBool,
) -> Result<(), sqlx::Error> {
    let is_some = room != Room::default();
    if told.swap(is_some, Ordering::Relaxed) || is_some {
        let set = sqlx::query(
            "SELECT
                set_config('requeuest.room', $1, false),
                set_config('requeuest.soon', $2, false)",
        )
        .bind(room.json)
        .bind(
            room.soon
                .map_or_else(String::new, |soon| soon.as_millis().to_string()),
        );
        tokio::time::timeout(PING_TIMEOUT, set.execute(connection))
            .await
            .map_err(|_elapsed| timed_out())??;
    }
    Ok(())
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
        sqlx::Error::Database(_) => has_sqlstate(error, &["08", "57P"]),
        sqlx::Error::Encode(_) => false,
        _ => true,
    }
}

fn is_read_only(error: &sqlx::Error) -> bool {
    // read_only_sql_transaction
    has_sqlstate(error, &["25006"])
}

/// The caller's options, with the settings that the statements were written for.
fn pinned(connect: &PgConnectOptions, session: &Session) -> PgConnectOptions {
    let lease = format!(r"{}\ milliseconds", session.lease.as_millis());
    // In a unit of its own: Postgres 14 reads no interval of so many milliseconds.
    let dead_letter_retention = session
        .dead_letter_retention
        .map_or_else(String::new, |retention| millis(retention).to_string());
    let search_path = quoted(&session.schema);
    let timeout = session.statement_timeout * SERVER_TIMEOUTS + transfer_time(session.max_body);
    let timeout = timeout.as_millis().to_string();
    connect.clone().options(SETTINGS.iter().copied()).options([
        ("search_path", search_path.as_str()),
        ("requeuest.lease", &lease),
        ("requeuest.formats", FORMATS),
        ("requeuest.dead_letter_retention", &dead_letter_retention),
        (
            "requeuest.measured",
            if session.measured { "on" } else { "off" },
        ),
        ("statement_timeout", &timeout),
    ])
}

/// The same for the connections of a runner. Postgres watches the time of polls, because sqlxmq
/// doesn't: an abandoned poll must not claim.
fn pinned_for_polls(connect: &PgConnectOptions, session: &Session) -> PgConnectOptions {
    let timeout = STATEMENT_TIMEOUT.as_millis().to_string();
    pinned(connect, session).options([
        ("statement_timeout", timeout),
        ("requeuest.instance", session.instance.to_string()),
    ])
}

/// What the statements depend on, whatever the role, the database or the caller's options say. Each
/// of these exists in every version from Postgres 14 on, and every role may set it. sqlx sets
/// `DateStyle`, `TimeZone`, `client_encoding` and `extra_float_digits`.
///
/// `session_replication_role` isn't here, because few roles may set it: the schema's triggers fire
/// under each of its values.
const SETTINGS: &[(&str, &str)] = &[
    ("default_transaction_isolation", r"read\ committed"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_deferrable", "off"),
    // A call returns once its commit is on disk, and on the standby of a synchronous replication.
    ("synchronous_commit", "on"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "30s"),
    ("idle_session_timeout", "0"),
    // Some errors are expected: a lock that is not to be had, a row that is there already.
    ("exit_on_error", "off"),
    ("client_min_messages", "warning"),
    ("row_security", "on"),
    // How texts are read and written.
    ("standard_conforming_strings", "on"),
    ("IntervalStyle", "postgres"),
    ("bytea_output", "hex"),
    ("array_nulls", "on"),
    ("transform_null_equals", "off"),
    ("jit", "off"),
    // A plan made while the tables were tiny is kept for the life of the connection. Every access
    // here is by an index, so a plan that is good for full tables is good for all.
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    // The other choices of the planner, as Postgres makes them by default.
    ("enable_bitmapscan", "on"),
    ("enable_gathermerge", "on"),
    ("enable_hashagg", "on"),
    ("enable_incremental_sort", "on"),
    ("enable_indexonlyscan", "on"),
    ("enable_indexscan", "on"),
    ("enable_material", "on"),
    ("enable_memoize", "on"),
    ("enable_nestloop", "on"),
    ("enable_partition_pruning", "on"),
    ("enable_sort", "on"),
    ("enable_tidscan", "on"),
    ("constraint_exclusion", "partition"),
    ("cursor_tuple_fraction", "0.1"),
    ("from_collapse_limit", "8"),
    ("join_collapse_limit", "8"),
    ("geqo", "off"),
    ("max_parallel_workers_per_gather", "0"),
    ("seq_page_cost", "1"),
    ("random_page_cost", "4"),
    ("cpu_tuple_cost", "0.01"),
    ("cpu_index_tuple_cost", "0.005"),
    ("cpu_operator_cost", "0.0025"),
    ("effective_cache_size", "4GB"),
    ("work_mem", "4MB"),
];

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;
    use crate::store::tests::store;
    use crate::testkit::Postgres;

    async fn session(connection: &mut PgConnection) -> i32 {
        sqlx::query_scalar("SELECT pg_backend_pid()")
            .fetch_one(connection)
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn an_idle_session_that_cannot_write_is_not_used_again() {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        let store = store(&database);
        let runner_pool = store
            .db()
            .runner_pool(&Arc::default(), Arc::new(Room::default));
        for pool in [store.db().pool(), &runner_pool] {
            let mut sessions = Vec::new();
            for mode in ["WRITE", "ONLY", "WRITE"] {
                let mut connection = pool.acquire().await.unwrap();
                sessions.push(session(&mut connection).await);
                let set = format!("SET SESSION CHARACTERISTICS AS TRANSACTION READ {mode}");
                connection.execute(&*set).await.unwrap();
                drop(connection);
                tokio::time::sleep(TRUSTED_FOR + Duration::from_millis(100)).await;
            }
            assert_eq!(sessions[0], sessions[1]);
            assert_ne!(sessions[1], sessions[2]);
        }
    }
}
