//! A process that delivers: a copy of this program, controlled through its environment and its
//! standard input.

use std::process::Stdio;
use std::time::Duration;

use requeuest::sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, ReqwestTransport};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};

use crate::common::AnyError;
use crate::common::receiver::SENDER;

const NAME: &str = "REQUEUEST_FLEET_NAME";
const DATABASE: &str = "REQUEUEST_FLEET_DATABASE";
const CONCURRENCY: &str = "REQUEUEST_FLEET_CONCURRENCY";
/// Sets the number of threads of tokio's runtime.
const THREADS: &str = "TOKIO_WORKER_THREADS";

/// The parent's handle on a process. Dropping it kills the process.
pub(crate) struct Worker {
    child: Child,
    input: ChildStdin,
}

impl Worker {
    /// Starts a process and waits until it is ready. It delivers once `begin` is called.
    pub(crate) async fn start(
        name: &str,
        database: &TestDatabase,
        concurrency: usize,
        threads: usize,
    ) -> Result<Self, AnyError> {
        let mut child = Command::new(std::env::current_exe()?)
            .env(NAME, name)
            .env(DATABASE, database.url())
            .env(CONCURRENCY, concurrency.to_string())
            .env(THREADS, threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let input = child.stdin.take().ok_or("a process without input")?;
        let output = child.stdout.take().ok_or("a process without output")?;
        if BufReader::new(output).lines().next_line().await?.is_none() {
            return Err(format!("{name} ended before it was ready").into());
        }
        Ok(Self { child, input })
    }

    pub(crate) async fn begin(&mut self) -> Result<(), AnyError> {
        self.input.write_all(b"begin\n").await?;
        Ok(())
    }

    /// `None` once the process has ended.
    pub(crate) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Shuts the process down and waits for its end.
    pub(crate) async fn end(self) -> Result<(), AnyError> {
        let Self { mut child, input } = self;
        drop(input);
        let status = child.wait().await?;
        if !status.success() {
            return Err(format!("a process ended with {status}").into());
        }
        Ok(())
    }
}

/// What the process itself knows of its task.
pub(crate) struct Process {
    name: String,
    database: String,
    concurrency: usize,
}

impl Process {
    /// `None` in the parent.
    pub(crate) fn from_environment() -> Option<Result<Self, AnyError>> {
        let name = std::env::var(NAME).ok()?;
        let process = || {
            Ok(Self {
                name,
                database: std::env::var(DATABASE)?,
                concurrency: std::env::var(CONCURRENCY)?.parse()?,
            })
        };
        Some(process())
    }

    /// Delivers from the first line of standard input until the end of it.
    pub(crate) async fn run(self) -> Result<(), AnyError> {
        let options: PgConnectOptions = self.database.parse()?;
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .connect_with(options.application_name(&self.name))
            .await?;
        let mut headers = http::HeaderMap::new();
        headers.insert(SENDER, self.name.parse()?);
        let client = reqwest::Client::builder()
            .default_headers(headers)
            .retry(reqwest::retry::never())
            .build()?;
        let mut input = BufReader::new(tokio::io::stdin()).lines();
        println!("ready");
        if input.next_line().await?.is_none() {
            return Ok(());
        }
        let durable = Durable::builder(pool)
            .transport(ReqwestTransport::new(client))
            .concurrency(self.concurrency)
            .build()?;
        while input.next_line().await?.is_some() {}
        durable.shutdown(Duration::from_secs(5)).await?;
        Ok(())
    }
}
