//! An [`Admin`] of its own, for programs that neither enqueue nor deliver.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{Access, Admin};
use crate::change::Author;
use crate::durable::{
    DEFAULT_DEAD_LETTER_RETENTION, DEFAULT_LEASE, DEFAULT_MAX_REQUEST_BODY,
    DEFAULT_MAX_RESPONSE_BODY, DEFAULT_RETENTION,
};
use crate::error::Error;
use crate::finding::Finding;
use crate::migrate::{DEFAULT_SCHEMA, validate_schema};
use crate::runtime::Runtime;
use crate::sealer::Sealer;
use crate::store::{self, STATEMENT_TIMEOUT, Store, StoreConfig};

/// How many connections an [`Admin`] of its own opens at most: 2.
pub const DEFAULT_ADMIN_CONNECTIONS: u32 = 2;
/// The longest time that a statement may take.
const MAX_STATEMENT_TIMEOUT: Duration = Duration::from_secs(3600);

/// Configures an [`Admin`] of its own. From [`Admin::builder`].
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use requeuest::admin::Admin;
///
/// # async fn example(url: &str) -> Result<(), requeuest::Error> {
/// let admin = Admin::builder(url)
///     .schema("billing")
///     .statement_timeout(Duration::from_secs(2))
///     .connect()
///     .await?;
/// # Ok(()) }
/// ```
#[must_use = "a builder does nothing until it connects"]
pub struct AdminBuilder {
    /// Checked when it connects.
    url: String,
    store: StoreConfig,
}

impl AdminBuilder {
    pub(super) fn new(url: String) -> Self {
        Self {
            url,
            store: StoreConfig {
                schema: DEFAULT_SCHEMA.to_owned(),
                lease: DEFAULT_LEASE,
                statement_timeout: STATEMENT_TIMEOUT,
                retention: DEFAULT_RETENTION,
                dead_letter_retention: Some(DEFAULT_DEAD_LETTER_RETENTION),
                max_request_body: DEFAULT_MAX_REQUEST_BODY,
                max_response_body: DEFAULT_MAX_RESPONSE_BODY,
                max_connections: DEFAULT_ADMIN_CONNECTIONS,
                notify_in_transactions: true,
                connect_options: None,
                measured: false,
                sealer: Sealer::default(),
            },
        }
    }

    /// The schema of the requests. Defaults to `requeuest`.
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.store.schema = schema.into();
        self
    }

    /// How many connections are open at most. At least 1. Defaults to
    /// [`DEFAULT_ADMIN_CONNECTIONS`].
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.store.max_connections = connections;
        self
    }

    /// How long a statement may take, from 1 millisecond to 1 hour. Statements that move bodies get
    /// more time by their size. Defaults to 10 seconds.
    pub fn statement_timeout(mut self, timeout: Duration) -> Self {
        self.store.statement_timeout = timeout;
        self
    }

    /// Reads what these keys encrypted. Defaults to no keys: then encrypted contents and errors are
    /// shown as such.
    #[cfg(feature = "encryption")]
    pub fn encryption(mut self, keys: crate::encryption::Keyring) -> Self {
        self.store.sealer.set_keys(keys);
        self
    }

    /// Connects, and checks that the schema is there and works with this version.
    ///
    /// # Errors
    ///
    /// If a setting is not valid, with its name as [`Error::field`]: of the URL, nothing is shown.
    /// If the database can't be reached. If the schema is not installed or doesn't fit
    /// ([`Error::is_not_migrated`]).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn connect(self) -> Result<Admin, Error> {
        let admin = self.open()?;
        admin
            .with_store(|store| async move { store.verify().await })
            .await?;
        Ok(admin)
    }

    /// As [`Admin::doctor`], also where the schema is not installed or doesn't fit.
    ///
    /// # Errors
    ///
    /// If a setting is not valid, or if the database can't be reached. A check that fails is a
    /// finding.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn doctor(self) -> Result<Vec<Finding>, Error> {
        self.open()?.doctor().await
    }

    /// An [`Admin`] that has not looked at the schema yet.
    fn open(self) -> Result<Admin, Error> {
        let Self { url, store: config } = self;
        let refused = |field, reason: &'static str| Err(Error::config(field, reason));
        validate_schema(&config.schema).map_err(|reason| Error::config("schema", reason))?;
        config.sealer.validate()?;
        if config.max_connections == 0 {
            return refused("max_connections", "must be at least 1");
        }
        let timeout = config.statement_timeout;
        if timeout < Duration::from_millis(1) || timeout > MAX_STATEMENT_TIMEOUT {
            return refused("statement_timeout", "must be from 1 millisecond to 1 hour");
        }
        let options = store::url::connect_options(&url)?;
        let runtime =
            Runtime::find().map_err(|error| Error::config("runtime", error.to_string()))?;
        let store = {
            let _context = runtime.handle().enter();
            Store::new(store::url::pool(options), config)
        };
        Ok(Admin {
            access: Access::Own {
                store,
                runtime: Arc::new(runtime),
            },
            author: Author::default(),
        })
    }
}

impl fmt::Debug for AdminBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminBuilder")
            .field("schema", &self.store.schema)
            .finish_non_exhaustive()
    }
}
