//! What an engine and its tasks share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sqlx::PgPool;
use tokio::sync::Notify;
use uuid::Uuid;

use super::config::Config;
use super::runner::lease::Leases;
use super::runner::polls::Polls;
use super::waiters::Waiters;
use crate::error::{Error, Kind, MigrationState};
use crate::migrate::wanted_version;
use crate::store::inspect::{self, Schema};
use crate::store::{BoxFuture, Db, DbError, Session};

/// It holds no sender, so the tasks end when the engine does.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) db: Db,
    pub(crate) instance: Uuid,
    pub(crate) waiters: Arc<Waiters>,
    pub(crate) leases: Leases,
    /// Told when requests have ended here.
    pub(crate) settled: Notify,
    pub(crate) polls: Polls,
    /// The last poll that brought anything left more behind.
    pub(crate) backlog: AtomicBool,
    /// Results that came too late to count.
    pub(crate) stale_results: AtomicU64,
    verified: AtomicBool,
}

impl Shared {
    /// Opens the crate's own pool.
    pub(super) fn new(user_pool: &PgPool, config: Config) -> Self {
        let session = Session {
            schema: config.schema.clone(),
            lease: config.lease,
            max_body: config.max_request_body.max(config.max_response_body),
        };
        let connect = config.connect_options(user_pool);
        Self {
            db: Db::new(&connect, session, config.max_connections),
            instance: Uuid::now_v7(),
            waiters: Arc::default(),
            leases: Leases::default(),
            settled: Notify::new(),
            polls: Polls::default(),
            backlog: AtomicBool::new(false),
            stale_results: AtomicU64::new(0),
            verified: AtomicBool::new(false),
            config,
        }
    }

    /// Makes sure, once, that the schema is there and is the one that the statements were written for.
    pub(crate) async fn verify(&self) -> Result<(), Error> {
        if self.verified.load(Ordering::Relaxed) {
            return Ok(());
        }
        let schema = self.config.schema.clone();
        let found = self
            .db
            .run(move |connection| {
                Box::pin(async move { inspect::schema_version(connection, &schema).await })
            })
            .await?;
        let wanted = wanted_version();
        let state = match found {
            Schema::Missing => MigrationState::Missing,
            Schema::Elsewhere => MigrationState::Swallowed,
            Schema::Version(found) if found < wanted => MigrationState::Older { found, wanted },
            Schema::Version(found) if found > wanted => MigrationState::Newer { found, wanted },
            Schema::Version(_) => {
                self.verified.store(true, Ordering::Relaxed);
                return Ok(());
            }
        };
        Err(Error::new(Kind::Migrations(state)))
    }

    /// Runs statements on the crate's own pool, after making sure of the schema. From the engine's own runtime; others go through
    /// [`Engine::query`].
    pub(crate) async fn query<T: Send>(
        &self,
        statements: impl for<'c> FnOnce(
            &'c mut sqlx::PgConnection,
        ) -> BoxFuture<'c, Result<T, sqlx::Error>>
        + Send,
    ) -> Result<T, Error> {
        self.query_large(0, statements).await
    }

    /// As [`query`](Self::query), for statements that may move so many bytes.
    pub(crate) async fn query_large<T: Send>(
        &self,
        bytes: usize,
        statements: impl for<'c> FnOnce(
            &'c mut sqlx::PgConnection,
        ) -> BoxFuture<'c, Result<T, sqlx::Error>>
        + Send,
    ) -> Result<T, Error> {
        self.verify().await?;
        let result = self.db.run_large(bytes, statements).await;
        result.map_err(|error| self.refused(error))
    }

    /// What a caller is told of a statement that failed.
    pub(crate) fn refused(&self, error: DbError) -> Error {
        let error = Error::from(error);
        if error.is_not_migrated() {
            // Something of the schema turned out to be gone: the next call looks again.
            self.verified.store(false, Ordering::Relaxed);
        }
        error
    }
}
