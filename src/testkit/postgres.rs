//! The handle of a server, which hides where the server came from, and its builder.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use sqlx::postgres::PgConnectOptions;
use tokio::sync::OnceCell;

use super::cluster::{Cluster, StopMode};
use super::given::Given;
use super::run_as::RunAs;
use super::{Error, TestDatabase, locate};

/// A running Postgres; see the [module](super) for which one.
///
/// Clones are handles of the same server. A private cluster is stopped and removed when the last
/// handle, or the last [`TestDatabase`] in it, is dropped. That takes a few tenths of a second, at
/// most 5 s, and doesn't need a runtime.
#[derive(Clone)]
pub struct Postgres {
    server: Arc<Server>,
}

enum Server {
    Private(Cluster),
    Given(Box<Given>),
}

impl Postgres {
    /// A new private cluster, or the server that `DATABASE_URL` names.
    ///
    /// Making a cluster takes a second or two. Most tests can use [`shared`](Self::shared) instead.
    ///
    /// # Errors
    ///
    /// If no Postgres is found, if it does not start, or if the server of `DATABASE_URL` does not
    /// answer.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, a partly made cluster is removed.
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

    /// The server that all tests of this process share. The first call starts it.
    ///
    /// It lives until the process ends, and any number of runtimes may use it. Test runners that
    /// run each test in its own process start one server for each test; set `DATABASE_URL` there.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start). A failure isn't remembered: the next call tries again.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, another waiting caller starts the server.
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

    /// Configures a server.
    #[must_use]
    pub fn builder() -> PostgresBuilder {
        PostgresBuilder::default()
    }

    /// Creates an empty database with a unique name. It doesn't contain this crate's schema yet.
    ///
    /// # Errors
    ///
    /// If the server does not answer, or its user may not create databases.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, a database may be left behind on a server named by `DATABASE_URL`.
    /// In a private cluster it is removed with the cluster.
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

    /// The URL of the maintenance database: `postgres` in a private cluster, otherwise
    /// `DATABASE_URL` itself, including its password.
    #[must_use]
    pub fn url(&self) -> String {
        match &*self.server {
            Server::Private(cluster) => cluster.url("postgres"),
            Server::Given(given) => given.url().to_owned(),
        }
    }

    /// Stops the server of a private cluster. Its data, its port and this handle stay valid.
    ///
    /// All connections break, and new ones are refused until [`resume`](Self::resume). Does nothing
    /// if the server is already stopped.
    ///
    /// # Errors
    ///
    /// If the server is named by `DATABASE_URL`, or does not stop within 30 s.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the server still stops. Call again to wait for it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), requeuest::testkit::Error> {
    /// use requeuest::testkit::{Postgres, StopMode};
    ///
    /// let postgres = Postgres::builder().private().start().await?;
    /// postgres.stop(StopMode::Immediate).await?;
    /// // Test here what the application does without its database.
    /// postgres.resume().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn stop(&self, mode: StopMode) -> Result<(), Error> {
        self.cluster()?.stop(mode).await
    }

    /// Starts a stopped server again, on the same port, and waits until it answers.
    ///
    /// Does nothing if the server is running.
    ///
    /// # Errors
    ///
    /// If the server is named by `DATABASE_URL`, or does not start within 30 s.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the server still starts. Call again to wait for it.
    ///
    /// # Examples
    ///
    /// See [`stop`](Self::stop).
    pub async fn resume(&self) -> Result<(), Error> {
        self.cluster()?.resume().await
    }

    /// [`stop`](Self::stop) and [`resume`](Self::resume) in one, with no other call in between.
    ///
    /// # Errors
    ///
    /// As [`stop`](Self::stop) and [`resume`](Self::resume).
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the server may stay stopped. Call [`resume`](Self::resume) to
    /// start it again.
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
                "the server of DATABASE_URL can't be stopped or started by tests; use a private \
                 cluster: `Postgres::builder().private()`",
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

/// Configures and starts a [`Postgres`].
///
/// Each setter asks for a private cluster, because none applies to an existing server.
/// `DATABASE_URL` is ignored then.
#[derive(Clone, Debug, Default)]
pub struct PostgresBuilder {
    private: bool,
    bin_dir: Option<PathBuf>,
    settings: Vec<(String, String)>,
}

impl PostgresBuilder {
    /// Asks for a private cluster, for a test that stops the server or changes settings shared by
    /// all of its databases. Defaults to the server of `DATABASE_URL`, if it names one.
    #[must_use]
    pub fn private(mut self) -> Self {
        self.private = true;
        self
    }

    /// Uses the `initdb` and `postgres` in this directory and no others, for testing against
    /// several major versions. Defaults to a search.
    #[must_use]
    pub fn bin_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.bin_dir = Some(dir.into());
        self.private()
    }

    /// Sets a server setting. If a setting is set several times, the last value applies.
    ///
    /// Two settings have other defaults than in Postgres: `fsync` is `off`, and `max_connections`
    /// is `200`. `listen_addresses`, `unix_socket_directories`, `port`, `cluster_name` and
    /// `logging_collector` can't be changed.
    #[must_use]
    pub fn config(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self.private()
    }

    /// Finds or starts the server.
    ///
    /// # Errors
    ///
    /// As [`Postgres::start`]. Also if the directory has no usable Postgres, or the server refuses
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
            locate::from_dir(dir, run_as.clone()).await?
        } else {
            #[cfg(feature = "testkit-download")]
            let fetched = super::fetch::fetch(run_as.clone());
            #[cfg(not(feature = "testkit-download"))]
            let fetched = async { Err(locate::NO_DOWNLOAD.into()) };
            let environment = locate::Environment::current();
            locate::binaries(environment, run_as.clone(), fetched).await?
        };
        let cluster = Cluster::launch(&bin, &run_as, &self.settings).await?;
        Ok(Postgres {
            server: Arc::new(Server::Private(cluster)),
        })
    }
}
