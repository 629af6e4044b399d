//! One database for each test, so that tests don't see each other's rows and can run in parallel.

use std::fmt;
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Executor, PgPool};
use uuid::Uuid;

use super::{Error, Postgres};

/// Enough for one test, and few enough for many tests to share a server.
const MAX_CONNECTIONS: u32 = 10;
/// Shorter than sqlx's 30 seconds, so that a test that runs out of connections fails soon.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long dropping a database may take on a server named by `DATABASE_URL`.
const DROP_DEADLINE: Duration = Duration::from_secs(5);

/// A new, empty database; see [`Postgres::database`].
///
/// It keeps its server running. On a server named by `DATABASE_URL`, dropping it closes all
/// connections to the database and drops the database. If that fails, or takes longer than 5 s, it
/// is only logged. In a private cluster the database stays until the whole cluster is removed,
/// which is quicker.
pub struct TestDatabase {
    name: String,
    url: String,
    options: PgConnectOptions,
    pool: PgPool,
    server: Postgres,
}

impl TestDatabase {
    pub(super) async fn create(server: &Postgres) -> Result<Self, Error> {
        let name = format!("requeuest_test_{}", Uuid::now_v7().simple());
        let url = server.url_of(&name);
        let options = PgConnectOptions::from_str(&url).map_err(|error| {
            Error::new("the database's URL is not valid; check DATABASE_URL").caused_by(error)
        })?;
        // `template1` can't be copied while there are connections to it. `template0` allows none.
        let statement = format!(r#"CREATE DATABASE "{name}" TEMPLATE template0"#);
        execute(server.options(), &statement)
            .await
            .map_err(|error| {
                Error::new(format!("creating a database failed on {server:?}")).caused_by(error)
            })?;
        let pool = PgPoolOptions::new()
            .max_connections(MAX_CONNECTIONS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(options.clone());
        Ok(Self {
            name,
            url,
            options,
            pool,
            server: server.clone(),
        })
    }

    /// The URL of the database, for code that makes its own connections. It contains the password,
    /// if the server needs one.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The connect options of the database, for code that makes its own connections.
    #[must_use]
    pub fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    /// A pool of at most 10 connections to the database, opened on demand.
    ///
    /// The pool belongs to the tokio runtime on which the database was created.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// The name of the database, unique among all test databases.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for TestDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestDatabase")
            .field("name", &self.name)
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        if self.server.is_private() {
            return;
        }
        let options = self.server.options();
        let statement = format!(r#"DROP DATABASE IF EXISTS "{}" WITH (FORCE)"#, self.name);
        let (done, wait) = mpsc::channel();
        // A separate thread with its own runtime: this code may run inside a runtime, which must
        // not be blocked on, or after the last runtime has ended.
        let spawned = thread::Builder::new().spawn(move || {
            let _ = done.send(on_own_runtime(options, &statement));
        });
        // Wait for the thread; otherwise the process could end first.
        let outcome = match spawned {
            Ok(_) => wait
                .recv_timeout(DROP_DEADLINE + Duration::from_millis(500))
                .unwrap_or_else(|error| Err(error.into())),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = outcome {
            tracing::warn!(database = %self.name, %error, "a test database was not dropped");
        }
    }
}

fn on_own_runtime(
    options: PgConnectOptions,
    statement: &str,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        tokio::time::timeout(DROP_DEADLINE, execute(options, statement)).await??;
        Ok(())
    })
}

async fn execute(options: PgConnectOptions, statement: &str) -> Result<(), sqlx::Error> {
    let mut connection = options.connect().await?;
    connection.execute(statement).await?;
    connection.close().await
}
