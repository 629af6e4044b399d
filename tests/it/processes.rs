//! Whole processes that die, stop or crowd: copies of this test binary with the crate in each. The receiver lives in the test.
//!
//! The quick form runs with the suite. `REQUEUEST_LONG_FAULTS=1` asks for the long one: 400 processes are killed and not 100, the outage
//! lasts a minute and not 5 s, eight processes share 20,000 requests and not 3,000, the model is driven through 100 cases and not 5.

mod clock;
mod model;
mod order;
mod outage;
mod senders;
mod sharing;

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, DurableBuilder, Options, Request, ReqwestTransport};
use sqlx::PgPool;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;
use tokio::sync::watch;

use crate::support::{LONG, Seen, Server, in_time, part};

/// The shortest that there is, so that take-overs are quick.
const LEASE: Duration = Duration::from_secs(1);
/// What a process that holds nothing but its lease is taken over within, after the lease.
const TAKE_OVER: Duration = Duration::from_secs(2);
/// On a machine that is busy with other things.
const SLACK: Duration = Duration::from_secs(8);
/// The header that tells who sent an attempt; the client adds it, so it is not part of the request.
const SENDER: &str = "sender";

const DATABASE: &str = "REQUEUEST_TEST_DATABASE";
const SERVER: &str = "REQUEUEST_TEST_SERVER";
const NAME: &str = "REQUEUEST_TEST_NAME";

fn long() -> bool {
    std::env::var("REQUEUEST_LONG_FAULTS").is_ok_and(|value| value == "1")
}

/// A handle whose attempts tell its name.
fn named(pool: &PgPool, name: &str) -> DurableBuilder {
    let mut headers = http::HeaderMap::new();
    headers.insert(SENDER, name.parse().unwrap());
    let client = reqwest::Client::builder()
        .default_headers(headers)
        .retry(reqwest::retry::never())
        .build()
        .unwrap();
    Durable::builder(pool.clone())
        .transport(ReqwestTransport::new(client))
        .retry(
            RetryPolicy::exponential()
                .base(Duration::from_millis(1))
                .cap(Duration::from_millis(50)),
        )
}

/// A request with a number of its own, which the receiver sends back.
fn post(url: &str, number: &str) -> Request {
    http::Request::post(url)
        .body(number.to_owned())
        .unwrap()
        .try_into()
        .unwrap()
}

fn ordered(url: &str, number: &str, key: &str) -> Request {
    post(url, number).with(Options::default().ordered(key))
}

/// An attempt as the receiver saw it.
#[derive(Clone, Debug)]
struct Arrival {
    number: String,
    sender: String,
    at: Instant,
}

/// All attempts, in the order in which they came.
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

/// A copy of this binary at work. It is killed when this is dropped.
struct Member {
    child: Child,
    lines: watch::Receiver<Vec<String>>,
}

impl Member {
    /// Starts one that plays the part, by this name.
    fn start(
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
                // The rest is the test harness's.
                if let Some(line) = line.strip_prefix('@') {
                    said.send_modify(|lines| lines.push(line.to_owned()));
                }
            }
        });
        Self { child, lines }
    }

    /// Waits until it has said this.
    async fn says(&mut self, wanted: &str) {
        let said = self
            .lines
            .wait_for(|lines| lines.iter().any(|line| line == wanted));
        let said = tokio::time::timeout(LONG, said).await;
        assert!(matches!(said, Ok(Ok(_))), "it never said {wanted:?}");
    }

    fn has_said(&self, wanted: &str) -> bool {
        self.lines.borrow().iter().any(|line| line == wanted)
    }

    /// Everything that it has said, once it is gone.
    async fn last_words(&mut self) -> Vec<String> {
        in_time(async { while self.lines.changed().await.is_ok() {} }).await;
        self.lines.borrow().clone()
    }

    async fn kill(&mut self) -> Instant {
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

/// What a member knows of itself.
struct Me {
    name: String,
    url: String,
    pool: PgPool,
}

impl Me {
    fn new() -> Self {
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

    fn handle(&self) -> DurableBuilder {
        named(&self.pool, &self.name).max_connections(2)
    }
}

/// Tells the test. A line of its own, whatever the harness has printed before it.
fn say(what: &str) {
    println!("\n@{what}");
}

fn median_and_max(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    (median, times.last().copied().unwrap_or_default())
}

/// The responses that were kept, by id, with what the receiver sent back: the number.
async fn completed(database: &TestDatabase) -> HashMap<String, String> {
    let rows: Vec<(String, String)> = sqlx::query_as(
        "select id::text, convert_from(body, 'UTF8') from requeuest.outcomes where status = 'completed'",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    rows.into_iter().collect()
}

/// A receiver that sends each number back, after a moment.
async fn echo(arrivals: &Arrivals, within: Duration) -> Server {
    let arrivals = arrivals.clone();
    Server::start(move |_, seen| {
        arrivals.note(&seen);
        let takes = within.mul_f64(fastrand::f64());
        async move {
            tokio::time::sleep(takes).await;
            crate::support::reply(200, seen.body)
        }
    })
    .await
}
