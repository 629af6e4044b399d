//! What an engine was told to do.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;

use crate::classify::Classifier;
use crate::idempotency_header::IdempotencyHeader;
use crate::retry::RetryPolicy;
use crate::store::enqueue::Inserting;

/// What the builder checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Where requests go that name no channel.
    pub(crate) channel: Arc<str>,
    /// What the runner subscribes to; `None` for every channel.
    pub(crate) channels: Option<Vec<Arc<str>>>,
    pub(crate) concurrency: usize,
    pub(crate) lease: Duration,
    pub(crate) attempt_timeout: Duration,
    pub(crate) retry_awaited: RetryPolicy,
    pub(crate) retry_fired: RetryPolicy,
    pub(crate) classifier: Classifier,
    pub(crate) max_request_body: usize,
    pub(crate) max_response_body: usize,
    pub(crate) retention: Duration,
    pub(crate) schema: String,
    pub(crate) max_connections: u32,
    pub(crate) notify_in_transactions: bool,
    pub(crate) idempotency_header: IdempotencyHeader,
    /// For the crate's own connections, where the caller's pool goes through a pooler.
    pub(crate) connect: Option<PgConnectOptions>,
}

impl Config {
    /// For the crate's own connections: as the caller's pool has them now, unless others were given.
    pub(super) fn connect_options(&self, user_pool: &PgPool) -> PgConnectOptions {
        match &self.connect {
            Some(connect) => connect.clone(),
            None => (*user_pool.connect_options()).clone(),
        }
    }

    /// Whether the caller's pool keeps its sessions, as it seems: connect options beside it are for those behind a pooler.
    pub(super) fn callers_sessions_last(&self) -> bool {
        self.connect.is_none()
    }

    /// How rows with a key are inserted on the crate's own connections.
    pub(crate) fn inserting(&self) -> Inserting {
        Inserting {
            notify: true,
            wait: true,
            again: false,
            lease: self.lease,
            retention: self.retention,
            prepared: true,
        }
    }

    /// How rows are inserted on a caller's connection.
    pub(crate) fn inserting_for_caller(&self) -> Inserting {
        Inserting {
            notify: self.notify_in_transactions,
            prepared: self.callers_sessions_last(),
            ..self.inserting()
        }
    }
}
