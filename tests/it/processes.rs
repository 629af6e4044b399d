//! Whole processes that die, stop or compete: copies of this test binary that use the crate. The
//! receiver runs in the test itself.
//!
//! The quick form runs with the suite. `REQUEUEST_LONG_FAULTS=1` runs the long form: 400 killed
//! processes instead of 100, an outage of a minute instead of 5 s, 20,000 requests shared by eight
//! processes instead of 3,000, and 100 cases of the model instead of 5.

mod clock;
mod limits;
mod lost;
mod model;
mod order;
mod outage;
mod senders;
mod sharing;

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use requeuest::testkit::TestDatabase;
use requeuest::{DurableBuilder, Options, Request, ReqwestTransport};
use sqlx::PgPool;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;
use tokio::sync::watch;

use crate::support::{LONG, Seen, Server, builder_on, in_time, part, post, quick, reply};

/// The shortest lease allowed, so that another process soon takes over.
const LEASE: Duration = Duration::from_secs(1);
/// How soon after the end of its lease a dead process's request is taken over.
const TAKE_OVER: Duration = Duration::from_secs(2);
/// Added on a busy machine.
const SLACK: Duration = Duration::from_secs(8);
/// The header that names the process that sent an attempt. The client adds it, so it isn't part of
/// the request.
const SENDER: &str = "sender";

const DATABASE: &str = "REQUEUEST_TEST_DATABASE";
const SERVER: &str = "REQUEUEST_TEST_SERVER";
const NAME: &str = "REQUEUEST_TEST_NAME";

pub(crate) fn is_long() -> bool {
    std::env::var("REQUEUEST_LONG_FAULTS").is_ok_and(|value| value == "1")
}

/// A builder whose attempts carry the process's name.
fn named_builder(pool: &PgPool, name: &str) -> DurableBuilder {
    let mut headers = http::HeaderMap::new();
    headers.insert(SENDER, name.parse().unwrap());
    let client = reqwest::Client::builder()
        .default_headers(headers)
        .retry(reqwest::retry::never())
        .build()
        .unwrap();
    builder_on(pool)
        .transport(ReqwestTransport::new(client))
        .retry(quick())
}

/// A request whose body is its number, with an ordering key.
fn ordered(url: &str, number: &str, key: &str) -> Request {
    post(url, number.to_owned()).with(Options::default().ordered(key))
}

/// An attempt as the receiver saw it.
#[derive(Clone, Debug)]
struct Arrival {
    number: String,
    sender: String,
    at: Instant,
}

/// All attempts, in the order of their arrival.
#[derive(Clone, Debug, Default)]
struct Arrivals(Arc<Mutex<Vec<Arrival>>>);

impl Arrivals {
    fn note(&self, seen: &Seen) -> Arrival {
        let sender = seen.headers.get(SENDER);
        let arrival = Arrival {
            number: String::from_utf8(seen.body.to_vec()).unwrap(),
            sender: sender.map_or_else(String::new, |name| name.to_str().unwrap().to_owned()),
            at: Instant::now(),
        };
        self.0.lock().unwrap().push(arrival.clone());
        arrival
    }

    fn all(&self) -> Vec<Arrival> {
        self.0.lock().unwrap().clone()
    }

    fn by_number(&self) -> HashMap<String, Vec<Arrival>> {
        let mut numbers: HashMap<String, Vec<Arrival>> = HashMap::new();
        for arrival in self.all() {
            numbers
                .entry(arrival.number.clone())
                .or_default()
                .push(arrival);
        }
        numbers
    }
}

/// A running copy of this binary. Dropping it kills the process.
pub(crate) struct Member {
    child: Child,
    lines: watch::Receiver<Vec<String>>,
}

impl Member {
    /// Starts a process of this name that plays the part.
    pub(crate) fn start(
        module: &str,
        part_name: &str,
        name: &str,
        database: &TestDatabase,
        url: &str,
    ) -> Self {
        Self::start_with(module, part_name, name, database, url, &[])
    }

    fn start_with(
        module: &str,
        part_name: &str,
        name: &str,
        database: &TestDatabase,
        url: &str,
        environment: &[(&str, &str)],
    ) -> Self {
        let mut command = part(module, part_name);
        command
            .env(DATABASE, database.url())
            .env(SERVER, url)
            .env(NAME, name)
            .envs(environment.iter().copied())
            .stdout(Stdio::piped());
        let mut command = tokio::process::Command::from(command);
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let (said, lines) = watch::channel(Vec::new());
        tokio::spawn(async move {
            let mut read = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = read.next_line().await {
                // The remaining lines are the test harness's.
                if let Some(line) = line.strip_prefix('@') {
                    said.send_modify(|lines| lines.push(line.to_owned()));
                }
            }
        });
        Self { child, lines }
    }

    /// Waits until the process has printed this line.
    pub(crate) async fn says(&mut self, wanted: &str) {
        let said = self
            .lines
            .wait_for(|lines| lines.iter().any(|line| line == wanted));
        let said = tokio::time::timeout(LONG, said).await;
        assert!(matches!(said, Ok(Ok(_))), "it never said {wanted:?}");
    }

    fn has_said(&self, wanted: &str) -> bool {
        self.lines.borrow().iter().any(|line| line == wanted)
    }

    /// All lines that the process printed, once it has ended.
    async fn all_lines(&mut self) -> Vec<String> {
        in_time(async { while self.lines.changed().await.is_ok() {} }).await;
        self.lines.borrow().clone()
    }

    pub(crate) async fn kill(&mut self) -> Instant {
        self.child.kill().await.unwrap();
        Instant::now()
    }

    async fn signal(&self, signal: &str) {
        let pid = self.child.id().unwrap();
        let sent = tokio::process::Command::new("sh")
            .args(["-c", &format!("kill -s {signal} {pid}")])
            .status();
        assert!(sent.await.unwrap().success());
    }
}

/// The settings of the process that plays a part.
pub(crate) struct Me {
    name: String,
    url: String,
    pool: PgPool,
}

impl Me {
    pub(crate) fn new() -> Self {
        let pool = sqlx::postgres::PgPoolOptions::new()
            .max_connections(4)
            .connect_lazy(&std::env::var(DATABASE).unwrap())
            .unwrap();
        Self {
            name: std::env::var(NAME).unwrap(),
            url: std::env::var(SERVER).unwrap(),
            pool,
        }
    }

    pub(crate) fn handle(&self) -> DurableBuilder {
        named_builder(&self.pool, &self.name).max_connections(2)
    }
}

/// Tells the test. Begins a new line, because the harness may have printed half a line.
pub(crate) fn say(what: &str) {
    println!("\n@{what}");
}

pub(crate) fn median_and_max(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    (median, times.last().copied().unwrap_or_default())
}

/// The completed requests: their ids, and the numbers that the receiver sent back.
async fn completed(database: &TestDatabase) -> HashMap<String, String> {
    let rows: Vec<(String, String)> = sqlx::query_as(
        "SELECT id::text, convert_from(body, 'UTF8') FROM requeuest.outcomes
         WHERE status = 'completed'",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    rows.into_iter().collect()
}

/// A receiver that sends each number back after a random delay.
async fn echo_server(arrivals: &Arrivals, within: Duration) -> Server {
    let arrivals = arrivals.clone();
    Server::start(move |_, seen| {
        arrivals.note(&seen);
        let takes = within.mul_f64(fastrand::f64());
        async move {
            tokio::time::sleep(takes).await;
            reply(200, seen.body)
        }
    })
    .await
}
