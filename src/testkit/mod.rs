//! A real Postgres for tests, with nothing to set up.
//!
//! What this crate promises is kept by Postgres, so a test of code that uses it wants a Postgres
//! too, not a stand-in. [`Postgres`] finds one or starts one, [`Postgres::database`] gives each test
//! a database of its own, and nothing is left behind.
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
//! All of it needs a tokio runtime, whichever runtime the tested code runs on.
//!
//! # Which Postgres
//!
//! The first that there is of:
//!
//! 1. the server that the environment variable `DATABASE_URL` names. Databases are created in it, so
//!    its user must be allowed to, and it must be Postgres 13 or newer;
//! 2. installed server binaries: in `PATH`, where `pg_config` says, and where packages put them;
//! 3. binaries downloaded once into the user's cache, by [`postgresql_embedded`].
//!
//! With 2 and 3, a private throwaway cluster is started, also when the tests run as root: it then
//! runs as the user `postgres` or `nobody`, since Postgres refuses root. With none of them the
//! [`Error`] says what was tried and what to install; no test is silently skipped.
//!
//! # What is left behind
//!
//! Nothing: a cluster goes, processes and directory, when its last handle is dropped, or when the
//! test process ends, be it by a panic, by `SIGKILL`, or with the handle in a `static`. That is the
//! job of a small supervising shell, so it holds on Unix only. Elsewhere a handle has to be dropped:
//! a cluster of [`Postgres::shared`], whose handle never is, outlives its process there, and
//! `DATABASE_URL` is the better choice.
//!
//! On a server named by `DATABASE_URL`, a [`TestDatabase`] is dropped with its handle. A process that
//! is killed leaves its databases there; their names begin with `requeuest_test_`.
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
