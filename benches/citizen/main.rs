//! Whether one slow or dead receiver delays the others.
//!
//! ```text
//! cargo bench --bench citizen -- --rows 1000000 --keys 20000 --seconds 20 --wait 60 \
//!     --json figures.json
//! ```
//!
//! - `--only`: some of `backlog,endpoints`.
//! - `--rows`: requests that wait for a slow receiver, and as many for one that never answers.
//! - `--keys`: ordering keys whose first request is retried.
//! - `--drain`: requests of the drain beside the backlog, and `--callers` of `await_response`.
//! - `--seconds`: how long the endpoints get webhooks, `--rate` of them a second. The callers of
//!   `await_response` call for half as long.
//! - `--wait`: how many seconds after the last one requests may arrive beside bad receivers.
//! - `--set max_wal_size=4GB`: a setting of the Postgres server.
//!
//! Without options, it is a short run of less than a minute. `backlog` compares deliveries to
//! healthy receivers with and without requests that wait for bad ones, and `endpoints` the
//! webhooks to good endpoints with and without bad endpoints among them. Both use the default
//! settings of a handle. The receivers, Postgres (with `fsync` on) and the callers share the
//! machine.
//!
//! Targets are printed beside the figures, and a run that misses them doesn't fail. A request to a
//! good receiver that arrives twice fails the run, and so does one that doesn't arrive when there
//! are no bad ones.

#![allow(clippy::cast_precision_loss)] // no count here comes near 2^52

mod backlog;
#[path = "../common/mod.rs"]
mod common;
mod endpoint;
mod endpoints;
mod figures;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use requeuest::Durable;
use requeuest::sqlx::{self, ConnectOptions, PgPool, postgres::PgConnectOptions};
use requeuest::testkit::{Postgres, TestDatabase};

use common::report::Report;
use common::server::{self, Setting};
use common::{AnyError, arguments};

/// How long attempts may take to end when a handle shuts down. Some receivers never answer.
const GRACE: Duration = Duration::from_millis(500);
/// How long requests may take to arrive where no receiver is bad.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    run(&Arguments::parse()?).await
}

/// Command-line arguments.
struct Arguments {
    rows: usize,
    keys: usize,
    drain: usize,
    callers: usize,
    seconds: Duration,
    /// Webhooks a second.
    rate: usize,
    wait: Duration,
    /// The body of each request.
    body: Bytes,
    json: Option<PathBuf>,
    /// Empty: measure everything.
    only: Vec<String>,
    /// Settings of the Postgres server.
    settings: Vec<Setting>,
}

impl Arguments {
    fn parse() -> Result<Self, AnyError> {
        let mut parsed = Self {
            rows: 20_000,
            keys: 2000,
            drain: 20_000,
            callers: 64,
            seconds: Duration::from_secs(5),
            rate: 1000,
            wait: Duration::from_secs(4),
            body: vec![b'x'; 256].into(),
            json: None,
            only: Vec::new(),
            settings: Vec::new(),
        };
        for argument in arguments() {
            let (name, value) = argument?;
            match &*name {
                "--rows" => parsed.rows = value.parse()?,
                "--keys" => parsed.keys = value.parse()?,
                "--drain" => parsed.drain = value.parse()?,
                "--callers" => parsed.callers = value.parse()?,
                "--seconds" => parsed.seconds = Duration::try_from_secs_f64(value.parse()?)?,
                "--rate" => parsed.rate = value.parse()?,
                "--wait" => parsed.wait = Duration::try_from_secs_f64(value.parse()?)?,
                "--body" => parsed.body = vec![b'x'; value.parse()?].into(),
                "--json" => parsed.json = Some(value.into()),
                "--only" => parsed.only = value.split(',').map(str::to_owned).collect(),
                "--set" => parsed.settings.push(server::setting(&value)?),
                _ => return Err(format!("unknown argument {name}").into()),
            }
        }
        Ok(parsed)
    }

    /// When requests that have been fired until now must have arrived.
    fn deadline(&self, all_good: bool) -> Instant {
        Instant::now() + if all_good { PATIENCE } else { self.wait }
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|wanted| wanted == name)
    }
}

async fn run(arguments: &Arguments) -> Result<(), AnyError> {
    let postgres = server::start(&arguments.settings).await?;
    let mut report = Report::default();
    let settings = server::describe(postgres.database().await?.pool()).await?;
    println!("{settings}");
    report.note("settings", settings);
    if arguments.wants("backlog") {
        backlog::measure(&postgres, arguments, &mut report).await?;
    }
    if arguments.wants("endpoints") {
        endpoints::measure(&postgres, arguments, &mut report).await?;
    }
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    Ok(())
}

async fn migrated(postgres: &Postgres) -> Result<TestDatabase, AnyError> {
    let database = postgres.database().await?;
    requeuest::migrate(database.pool()).await?;
    Ok(database)
}

/// A handle with default settings, open connections and prepared statements.
async fn durable(pool: &PgPool) -> Result<Durable, AnyError> {
    let durable = Durable::builder(pool.clone()).build()?;
    durable.status(requeuest::Uuid::nil().into()).await?;
    Ok(durable)
}

/// Drops the database. Otherwise, a vacuum of it could run during the next measurement.
async fn drop_database(postgres: &Postgres, database: &TestDatabase) -> Result<(), AnyError> {
    database.pool().close().await;
    let maintenance: PgConnectOptions = postgres.url().parse()?;
    let drop = format!(r#"DROP DATABASE "{}" WITH (FORCE)"#, database.name());
    sqlx::query(&drop)
        .execute(&mut maintenance.connect().await?)
        .await?;
    Ok(())
}
