//! The handle of a server, which hides where the server came from, and the builder for those tests
//! to which it matters.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use sqlx::postgres::PgConnectOptions;
use tokio::sync::OnceCell;

use super::cluster::{Cluster, StopMode};
use super::given::Given;
use super::run_as::RunAs;
use super::{Error, TestDatabase, fetch, locate};

/// A running Postgres; see the [module](super) for which one.
///
/// Clones are handles of the same server. A private cluster is stopped and removed when the last
/// handle, or the last [`TestDatabase`] in it, is dropped; that takes some tenths of a second, 5 s at
/// most, and doesn't need a runtime.
#[derive(Clone)]
pub struct Postgres {
    server: Arc<Server>,
}

enum Server {
    Private(Cluster),
    Given(Box<Given>),
}

impl Postgres {
    /// A server of the caller's own: a new private cluster, unless `DATABASE_URL` names a server.
    ///
    /// Making a cluster takes a second or two; most tests do with [`shared`](Self::shared).
    ///
    /// # Errors
    ///
    /// When there is no Postgres to be found, or it does not start, or the server of `DATABASE_URL`
    /// does not answer.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up: a cluster half made is removed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), requeuest::testkit::Error> {
    /// let postgres = requeuest::testkit::Postgres::start().await?;
    /// let one = postgres.database().await?;
    /// let other = postgres.database().await?;
    /// assert_ne!(one.name(), other.name());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn start() -> Result<Self, Error> {
        Self::builder().start().await
    }

    /// The server that all tests of this process share, started when it's first asked for.
    ///
    /// It lives until the process ends, and may be used from any number of runtimes. Test runners
    /// that run each test in a process of its own get a server for each; set `DATABASE_URL` there.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start). A failure isn't remembered: the next call tries again.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: whoever else waits starts the server instead.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use requeuest::testkit::Postgres;
    ///
    /// let database = Postgres::shared().await?.database().await?;
    /// sqlx::query("create table t (x int)").execute(database.pool()).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn shared() -> Result<Self, Error> {
        static SHARED: OnceCell<Postgres> = OnceCell::const_new();

        SHARED.get_or_try_init(Self::start).await.cloned()
    }

    /// A server with something special about it.
    #[must_use]
    pub fn builder() -> PostgresBuilder {
        PostgresBuilder::default()
    }

    /// Creates an empty database with a unique name; this crate's schema isn't in it yet.
    ///
    /// # Errors
    ///
    /// When the server does not answer, or its user may not create databases.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future may leave a database behind on a server named by `DATABASE_URL`; in a
    /// private cluster it goes with the cluster.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), requeuest::testkit::Error> {
    /// let postgres = requeuest::testkit::Postgres::shared().await?;
    /// let database = postgres.database().await?;
    /// println!("{}", database.name());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn database(&self) -> Result<TestDatabase, Error> {
        TestDatabase::create(self).await
    }

    /// The URL of the maintenance database: `postgres` in a private cluster, else `DATABASE_URL`
    /// itself, with its password.
    #[must_use]
    pub fn url(&self) -> String {
        match &*self.server {
            Server::Private(cluster) => cluster.url("postgres"),
            Server::Given(given) => given.url().to_owned(),
        }
    }

    /// Stops the server of a private cluster; its data, its port and this handle stay.
    ///
    /// All connections break, and new ones are refused until [`resume`](Self::resume). It does
    /// nothing if the server is stopped already.
    ///
    /// # Errors
    ///
    /// When the server is one named by `DATABASE_URL`, or does not stop within 30 s.
    ///
    /// # Cancel safety
    ///
    /// A server told to stop does stop, also when the future is dropped; call again to wait for it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), requeuest::testkit::Error> {
    /// use requeuest::testkit::{Postgres, StopMode};
    ///
    /// let postgres = Postgres::builder().private().start().await?;
    /// postgres.stop(StopMode::Immediate).await?;
    /// // …what does the application do meanwhile?
    /// postgres.resume().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn stop(&self, mode: StopMode) -> Result<(), Error> {
        self.cluster()?.stop(mode).await
    }

    /// Starts a stopped server again, on the same port, and waits until it answers.
    ///
    /// It does nothing if the server runs.
    ///
    /// # Errors
    ///
    /// When the server is one named by `DATABASE_URL`, or does not start within 30 s.
    ///
    /// # Cancel safety
    ///
    /// A server told to start does start, also when the future is dropped; call again to wait for it.
    ///
    /// # Examples
    ///
    /// See [`stop`](Self::stop).
    pub async fn resume(&self) -> Result<(), Error> {
        self.cluster()?.resume().await
    }

    /// [`stop`](Self::stop) and [`resume`](Self::resume) in one, with no other caller in between.
    ///
    /// # Errors
    ///
    /// As both.
    ///
    /// # Cancel safety
    ///
    /// As both.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), requeuest::testkit::Error> {
    /// use requeuest::testkit::{Postgres, StopMode};
    ///
    /// let postgres = Postgres::builder().private().start().await?;
    /// postgres.restart(StopMode::Fast).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn restart(&self, mode: StopMode) -> Result<(), Error> {
        self.cluster()?.restart(mode).await
    }

    pub(super) fn is_private(&self) -> bool {
        matches!(&*self.server, Server::Private(_))
    }

    pub(super) fn options(&self) -> PgConnectOptions {
        match &*self.server {
            Server::Private(cluster) => cluster.options(),
            Server::Given(given) => given.options(),
        }
    }

    pub(super) fn url_of(&self, database: &str) -> String {
        match &*self.server {
            Server::Private(cluster) => cluster.url(database),
            Server::Given(given) => given.url_of(database),
        }
    }

    fn cluster(&self) -> Result<&Cluster, Error> {
        match &*self.server {
            Server::Private(cluster) => Ok(cluster),
            Server::Given(_) => Err(Error::new(
                "the server of DATABASE_URL is not ours to stop or start; a private cluster is, \
                 which `Postgres::builder().private()` gives",
            )),
        }
    }
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.server {
            Server::Private(cluster) => cluster.fmt(f),
            Server::Given(given) => write!(f, "Server({given:?})"),
        }
    }
}

/// Builds a [`Postgres`] with something special about it.
///
/// Each setter asks for a private cluster, since none applies to another's server: `DATABASE_URL` is
/// then passed over.
#[derive(Clone, Debug, Default)]
pub struct PostgresBuilder {
    private: bool,
    bin_dir: Option<PathBuf>,
    settings: Vec<(String, String)>,
}

impl PostgresBuilder {
    /// Asks for a private cluster: for a test that stops the server, or changes what all its
    /// databases share. Defaults to the server of `DATABASE_URL`, where one is named.
    #[must_use]
    pub fn private(mut self) -> Self {
        self.private = true;
        self
    }

    /// Uses the installation whose `initdb` and `postgres` are in this directory and no other: for
    /// testing against several majors. Defaults to a search.
    #[must_use]
    pub fn bin_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.bin_dir = Some(dir.into());
        self.private()
    }

    /// Sets a server setting; of several values for the same one, the last counts.
    ///
    /// Two differ from Postgres' own defaults unless set here: `fsync` is `off`, and
    /// `max_connections` is `200`. `listen_addresses`, `unix_socket_directories`, `port`,
    /// `cluster_name` and `logging_collector` can't be changed.
    #[must_use]
    pub fn config(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self.private()
    }

    /// Finds or starts the server.
    ///
    /// # Errors
    ///
    /// As [`Postgres::start`]; also when the directory has no usable Postgres, or the server refuses
    /// a setting.
    ///
    /// # Cancel safety
    ///
    /// As [`Postgres::start`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), requeuest::testkit::Error> {
    /// let postgres = requeuest::testkit::Postgres::builder()
    ///     .bin_dir("/usr/lib/postgresql/15/bin")
    ///     .config("fsync", "on")
    ///     .start()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn start(self) -> Result<Postgres, Error> {
        if !self.private {
            if let Some(given) = Given::from_env()? {
                given.check().await?;
                return Ok(Postgres {
                    server: Arc::new(Server::Given(Box::new(given))),
                });
            }
        }
        let run_as = RunAs::detect()?;
        let bin = if let Some(dir) = self.bin_dir {
            locate::forced(dir, run_as.clone()).await?
        } else {
            let fetched = fetch::fetch(run_as.clone());
            let environment = locate::Environment::current();
            locate::binaries(environment, run_as.clone(), fetched).await?
        };
        let cluster = Cluster::launch(&bin, &run_as, &self.settings).await?;
        Ok(Postgres {
            server: Arc::new(Server::Private(cluster)),
        })
    }
}
