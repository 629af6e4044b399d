//! Several processes on one queue: whether they drain a backlog faster than one process, whether
//! they wait for each other in the database, and what an idle runner costs.
//!
//! ```text
//! cargo bench --bench fleet -- --processes 4 --requests 100000 --rounds 3 --idle 20 \
//!     --json figures.json
//! ```
//!
//! - `--only`: some of `drain,idle`.
//! - `--concurrency`: concurrent attempts in each process, if not the default.
//! - `--threads`: threads of each process's runtime, if not its share of the cores.
//! - `--body`: bytes in each body, if not 256.
//! - `--set max_wal_size=4GB`: a setting of the Postgres server.
//!
//! The processes are copies of this program. They share the machine with Postgres (with `fsync` on)
//! and the receiver, so the ratio shows what they cost each other, not what more machines would
//! gain. Each round has its own database. One process and several take turns, because the speed of
//! the machine varies over time. Each count is checked: a request that was not delivered exactly
//! once fails the run.

#![allow(clippy::cast_precision_loss)] // no count here comes near 2^52

#[path = "../common/mod.rs"]
mod common;
mod drain;
mod idle;
mod waits;
mod worker;

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;

use common::report::Report;
use common::server::{self, Setting};
use common::{AnyError, arguments};

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    if let Some(process) = worker::Process::from_environment() {
        return process?.run().await;
    }
    run(&Arguments::parse()?).await
}

/// Command-line arguments.
struct Arguments {
    processes: usize,
    requests: usize,
    rounds: usize,
    /// How long the idle runner is watched.
    idle: Duration,
    /// Concurrent attempts in each process.
    concurrency: usize,
    /// Threads of each process's runtime. `None`: its share of the cores.
    threads: Option<usize>,
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
            processes: 4,
            requests: 100_000,
            rounds: 3,
            idle: Duration::from_secs(20),
            concurrency: requeuest::DEFAULT_CONCURRENCY,
            threads: None,
            body: vec![b'x'; 256].into(),
            json: None,
            only: Vec::new(),
            settings: Vec::new(),
        };
        for argument in arguments() {
            let (name, value) = argument?;
            match &*name {
                "--processes" => parsed.processes = value.parse()?,
                "--requests" => parsed.requests = value.parse()?,
                "--rounds" => parsed.rounds = value.parse()?,
                "--idle" => parsed.idle = Duration::try_from_secs_f64(value.parse()?)?,
                "--concurrency" => parsed.concurrency = value.parse()?,
                "--threads" => parsed.threads = Some(value.parse()?),
                "--body" => parsed.body = vec![b'x'; value.parse()?].into(),
                "--json" => parsed.json = Some(value.into()),
                "--only" => parsed.only = value.split(',').map(str::to_owned).collect(),
                "--set" => parsed.settings.push(server::setting(&value)?),
                _ => return Err(format!("unknown argument {name}").into()),
            }
        }
        Ok(parsed)
    }

    /// Threads for the runtime of each process, if there are `processes` of them.
    fn threads(&self, processes: usize) -> usize {
        let share = || {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            cores.div_ceil(processes)
        };
        self.threads.unwrap_or_else(share)
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|wanted| wanted == name)
    }
}

async fn run(arguments: &Arguments) -> Result<(), AnyError> {
    let mut report = Report::default();
    if arguments.wants("drain") {
        drain::measure(arguments, &mut report).await?;
    }
    if arguments.wants("idle") {
        idle::measure(arguments, &mut report).await?;
    }
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    Ok(())
}
