//! A real Postgres for tests, without any setup.
//!
//! This crate's guarantees depend on Postgres, so a test of code that uses it needs a real
//! Postgres, not a mock. [`Postgres`] finds or starts one, [`Postgres::database`] gives each test
//! its own database, and everything is cleaned up afterwards.
//!
//! ```no_run
//! use requeuest::testkit::Postgres;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let database = Postgres::shared().await?.database().await?;
//! let one: i32 = sqlx::query_scalar("select 1").fetch_one(database.pool()).await?;
//! assert_eq!(one, 1);
//! # Ok(())
//! # }
//! ```
//!
//! The testkit needs a tokio runtime, whichever runtime the tested code runs on.
//!
//! # Which Postgres
//!
//! The first of these that is available:
//!
//! 1. the server that the environment variable `DATABASE_URL` names. Databases are created in it,
//!    so its user must be allowed to create them, and it must be Postgres 13 or newer;
//! 2. installed server binaries: in `PATH`, in the directory that `pg_config` names, and in the
//!    usual places of packages;
//! 3. with the feature `testkit-download`: binaries downloaded once into the user's cache.
//!
//! Without that feature, no code of a downloader is compiled. With 2 and 3, a private throwaway
//! cluster is started. Postgres refuses to run as root, so if the tests run as root, the cluster
//! runs as the user `postgres` or `nobody`. If none of the three is available, the [`Error`] says
//! what was tried and what to install. No test is silently skipped.
//!
//! # Cleanup
//!
//! A cluster's processes and directory are removed when its last handle is dropped, or when the
//! test process ends: by a panic, by `SIGKILL`, or with the handle in a `static`. A small
//! supervising shell does this, so it works on Unix only. On other systems every handle must be
//! dropped. The handle of [`Postgres::shared`] never is, so its cluster outlives the process there;
//! prefer `DATABASE_URL`.
//!
//! On a server named by `DATABASE_URL`, a [`TestDatabase`] is dropped with its handle. A killed
//! process leaves its databases there; their names begin with `requeuest_test_`.
//!
//! # Not for production
//!
//! A private cluster asks for no password and does not sync to disk. It listens on the loopback
//! address only, but every user of the machine can connect to it while it runs.

mod cluster;
#[cfg(not(unix))]
#[path = "direct.rs"]
mod control;
#[cfg(unix)]
#[path = "supervisor.rs"]
mod control;
mod database;
mod error;
#[cfg(feature = "testkit-download")]
mod fetch;
mod given;
mod locate;
mod outcome;
mod postgres;
mod run_as;

pub use self::cluster::StopMode;
pub use self::database::TestDatabase;
pub use self::error::Error;
pub use self::outcome::{outcome, stale_results};
pub use self::postgres::{Postgres, PostgresBuilder};
