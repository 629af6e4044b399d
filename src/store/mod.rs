//! The only SQL of the crate: one operation a file, each a named method of [`Store`].
//!
//! Statements join rows by `id = ANY (ARRAY[x.id])`, sort by the other side's id, and put `OFFSET
//! 0` into an `EXISTS`. Without these, statistics made while the queue was empty could turn them
//! into scans; the first migration explains how.

mod activity;
pub(crate) mod bulk;
pub(crate) mod cancel;
pub(crate) mod changes;
pub(crate) mod claim;
mod columns;
pub(crate) mod connect;
mod db;
pub(crate) mod dead_letters;
mod depth;
pub(crate) mod destinations;
mod doctor;
pub(crate) mod enqueue;
pub(crate) mod hand_over;
mod idle;
pub(crate) mod inspect;
pub(crate) mod listen;
pub(crate) mod operations;
pub(crate) mod outcome;
pub(crate) mod paused_channels;
mod recorded;
#[cfg(feature = "encryption")]
pub(crate) mod reencrypt;
pub(crate) mod runner_pool;
pub(crate) mod runners;
mod schema;
pub(crate) mod settle;
mod statement;
pub(crate) mod sweep;
pub(crate) mod url;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use self::db::{Db, Session};
use crate::error::{Error, database_text};
use crate::sealer::Sealer;

pub(crate) use self::db::{STATEMENT_TIMEOUT, StoreError};

/// What a handle's store was told by its builder.
#[derive(Clone, Debug)]
pub(crate) struct StoreConfig {
    pub(crate) schema: String,
    pub(crate) lease: Duration,
    /// How long a statement may take, besides the time for what it moves.
    pub(crate) statement_timeout: Duration,
    pub(crate) retention: Duration,
    /// `None` keeps dead letters until they are purged.
    pub(crate) dead_letter_retention: Option<Duration>,
    pub(crate) max_request_body: usize,
    pub(crate) max_response_body: usize,
    pub(crate) max_connections: u32,
    /// Whether an insert on a caller's connection notifies runners.
    pub(crate) notify_in_transactions: bool,
    /// For the crate's own connections. `None` uses the options of the caller's pool.
    pub(crate) connect_options: Option<PgConnectOptions>,
    /// Whether polls say how long requests have waited.
    pub(crate) measured: bool,
    /// How requests and responses are stored.
    pub(crate) sealer: Sealer,
}

/// Named operations on the schema, over a connection pool of the crate's own. Cheap to clone.
///
/// A store needs no engine: whatever only reads or changes rows can use one alone. Its methods must
/// be awaited on a tokio runtime.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    db: Db,
    caller_pool: PgPool,
    config: StoreConfig,
    /// The schema was found to be the one that the statements were written for.
    verified: AtomicBool,
    /// What the role may do, once the schema is verified.
    may_insert: AtomicBool,
    may_read: AtomicBool,
}

impl Store {
    /// A store beside the caller's pool. Connects on first use; must be called within a tokio
    /// runtime.
    pub(crate) fn new(caller_pool: PgPool, config: StoreConfig) -> Self {
        let session = Session {
            schema: config.schema.clone(),
            lease: config.lease,
            statement_timeout: config.statement_timeout,
            instance: Uuid::now_v7(),
            dead_letter_retention: config.dead_letter_retention,
            measured: config.measured,
            max_body: config.max_request_body.max(config.max_response_body),
        };
        let connect = config.connect_options.as_ref();
        let db = Db::new(connect, &caller_pool, session, config.max_connections);
        Self {
            inner: Arc::new(Inner {
                db,
                caller_pool,
                config,
                verified: AtomicBool::new(false),
                may_insert: AtomicBool::new(true),
                may_read: AtomicBool::new(true),
            }),
        }
    }

    /// Identifies the handle among those of all processes.
    pub(crate) fn instance(&self) -> Uuid {
        self.db().instance()
    }

    pub(crate) fn config(&self) -> &StoreConfig {
        &self.inner.config
    }

    /// Makes the stored forms of requests and responses, and reads them.
    pub(crate) fn sealer(&self) -> &Sealer {
        &self.inner.config.sealer
    }

    /// The pool that the application gave.
    pub(crate) fn caller_pool(&self) -> &PgPool {
        &self.inner.caller_pool
    }

    /// Whether the crate's own pool was closed, by a shutdown.
    pub(crate) fn is_closed(&self) -> bool {
        self.db().pool().is_closed()
    }

    /// Closes the crate's own pool once the statements under way are done, and waits up to `within`
    /// for them.
    pub(crate) async fn close(&self, within: Duration) {
        self.db().close(within).await;
    }

    /// New connections use these options.
    pub(crate) fn set_connect_options(&self, options: PgConnectOptions) {
        self.db().set_connect_options(options);
    }

    /// New connections use the options that the caller's pool has now.
    pub(crate) fn reconnect(&self) {
        self.db().follow();
    }

    /// The caller's error for an operation that failed.
    pub(crate) async fn refused(&self, error: StoreError) -> Error {
        let error = Error::from(error);
        if !error.is_not_migrated() {
            return error;
        }
        // A part of the schema is gone. Or it only looks so, because names in a schema that the
        // role may not use don't exist for it.
        self.inner.verified.store(false, Ordering::Relaxed);
        match Box::pin(self.verify()).await {
            Err(cause) if cause.is_not_migrated() => cause,
            _ => error,
        }
    }

    fn db(&self) -> &Db {
        &self.inner.db
    }

    /// Runs the statements of the operation of this name. Every operation on one of the crate's own
    /// connections passes through here, except a bulk insert, which keeps its connection.
    async fn run<T>(
        &self,
        operation: &'static str,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        self.run_large(operation, 0, statements).await
    }

    /// As [`run`](Self::run), for statements that may move this many bytes.
    async fn run_large<T>(
        &self,
        operation: &'static str,
        bytes: usize,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        let result = self.db().run(operation, bytes, statements).await;
        if let Err(error) = &result {
            let error = database_text(&error.error);
            tracing::debug!(operation, error, "a store operation failed");
        }
        result
    }

    /// As [`run`](Self::run), once the schema is verified, with an error for the caller.
    async fn run_verified<T>(
        &self,
        operation: &'static str,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Error> {
        self.run_verified_large(operation, 0, statements).await
    }

    /// As [`run_verified`](Self::run_verified), for statements that may move this many bytes.
    async fn run_verified_large<T>(
        &self,
        operation: &'static str,
        bytes: usize,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Error> {
        self.verify().await?;
        match self.run_large(operation, bytes, statements).await {
            Ok(result) => Ok(result),
            Err(error) => Err(self.refused(error).await),
        }
    }

    /// Whether the caller's pool keeps its sessions. Connect options of the crate's own are given
    /// when the caller's pool goes through a pooler, and then it doesn't.
    fn caller_keeps_sessions(&self) -> bool {
        self.config().connect_options.is_none()
    }
}

/// The schema's name as an SQL identifier. The builder and the migrator check the name.
pub(crate) fn quoted(schema: &str) -> String {
    format!("\"{schema}\"")
}

/// Postgres counts in milliseconds here; no duration of this crate comes near the limit.
fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;
    use crate::durable::Durable;
    use crate::id::RequestId;
    use crate::status::Status;
    use crate::store::cancel::Cancelled;
    use crate::testkit::{Postgres, TestDatabase};

    /// A store on a test's database, with the default schema.
    pub(super) fn store(database: &TestDatabase) -> Store {
        let config = StoreConfig {
            schema: "requeuest".to_owned(),
            lease: Duration::from_secs(15),
            statement_timeout: STATEMENT_TIMEOUT,
            retention: Duration::from_secs(60),
            dead_letter_retention: None,
            max_request_body: 1024,
            max_response_body: 1024,
            max_connections: 2,
            notify_in_transactions: true,
            connect_options: None,
            measured: false,
            sealer: Sealer::default(),
        };
        Store::new(database.pool().clone(), config)
    }

    #[tokio::test]
    async fn a_store_needs_no_engine() {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        let store = || store(&database);
        let error = store().verify().await.unwrap_err();
        assert!(error.is_not_migrated(), "{error}");

        crate::migrate(database.pool()).await.unwrap();
        let handle = Durable::builder(database.pool().clone()).runner(false);
        let handle = handle.build().unwrap();
        let request = http::Request::get("http://a/").body("").unwrap();
        let id = handle.fire(request).await.unwrap();

        let store = store();
        assert_eq!(store.status(id).await.unwrap(), Some(Status::Available));
        let now = Cancelled::Now("default".to_owned());
        assert_eq!(store.cancel(id).await.unwrap(), now);
        assert_eq!(store.cancel(id).await.unwrap(), Cancelled::Finished);
        assert_eq!(store.status(id).await.unwrap(), Some(Status::Cancelled));
        let unknown = RequestId::generate();
        assert_eq!(store.cancel(unknown).await.unwrap(), Cancelled::Unknown);
        store.close(Duration::from_secs(5)).await;
        assert!(store.status(id).await.unwrap_err().is_closed());
    }
}
