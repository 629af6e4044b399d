//! A database for one test, so that tests don't see each other's rows and can run side by side.

use std::fmt;
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Executor, PgPool};
use uuid::Uuid;

use super::{Error, Postgres};

/// Enough for what one test does at a time, and few enough that many tests fit one server.
const MAX_CONNECTIONS: u32 = 10;
/// Shorter than sqlx's half a minute: a test that runs out of connections should say so soon.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a drop may take on a server that isn't ours.
const DROP_DEADLINE: Duration = Duration::from_secs(5);

/// A new, empty database; see [`Postgres::database`].
///
/// It keeps its server running. Dropping it drops the database where the server is one named by
/// `DATABASE_URL`: its connections are cut, and failure, or 5 s without an answer, is only logged. In
/// a private cluster the database stays until the cluster goes as a whole, which is quicker.
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
        let options = PgConnectOptions::from_str(&url)
            .map_err(|error| Error::new("the database's URL is not valid").caused_by(error))?;
        // `template1` can't be copied while anybody is connected to it; to `template0` nobody is.
        let statement = format!(r#"CREATE DATABASE "{name}" TEMPLATE template0"#);
        execute(server.options(), &statement)
            .await
            .map_err(|error| {
                Error::new(format!("no database could be created in {server:?}")).caused_by(error)
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

    /// The URL of the database, for what makes its own connections. It holds the password, if the
    /// server asks for one.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The same as connect options.
    #[must_use]
    pub fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    /// A pool of at most 10 connections to the database, made when they are first wanted.
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
        // A thread with a runtime of its own: this may be running inside a runtime, which can't be
        // blocked on, or after the last one has gone.
        let spawned = thread::Builder::new().spawn(move || {
            let _ = done.send(on_own_runtime(options, &statement));
        });
        // Waited for, or the end of the process could overtake it.
        let outcome = match spawned {
            Ok(_) => wait
                .recv_timeout(DROP_DEADLINE + Duration::from_millis(500))
                .unwrap_or_else(|error| Err(error.into())),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = outcome {
            tracing::warn!("the test database {} was not dropped: {error}", self.name);
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
