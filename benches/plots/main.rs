//! Charts of how rate and latency depend on the number of callers and on the number of waiting
//! requests.
//!
//! `cargo bench --bench plots -- --into docs --json figures.json` draws `callers.svg` and
//! `backlog.svg`. Without `--into`, the figures are printed and nothing is drawn.
//!
//! - `--callers` (512) and `--backlog` (1000000): the largest number of callers and of waiting
//!   requests.
//! - `--seconds` (4): how long each point is measured.
//! - `--rounds` (3): how often each point is measured.
//! - `--only`: `callers` or `backlog`.
//! - `--set name=value`: a setting of the Postgres server.
//!
//! Points are medians of the rounds. Before each measurement, the tables are vacuumed and a
//! checkpoint is made, so that no point pays for the one before. Each count is checked: one request
//! too many or too few fails the run.

#![allow(clippy::cast_precision_loss)] // no count here comes near 2^52

mod chart;
#[path = "../common/mod.rs"]
mod common;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use requeuest::sqlx::{self, PgPool};
use requeuest::testkit::{Postgres, TestDatabase};
use requeuest::{DEFAULT_CHANNEL, Durable, Options, Request};
use serde_json::{Value, json};

use chart::{Chart, Line};
use common::load::{Measured, each_for, median};
use common::poll::{poll, session};
use common::receiver::Receiver;
use common::report::{Report, micros};
use common::server::Setting;
use common::{AnyError, arguments, request, server};

/// Callers beside a backlog.
const CALLERS: usize = 64;
const POLLS: usize = 21;
/// Longer than any run.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    run(&Arguments::parse()?).await
}

/// Command-line arguments.
struct Arguments {
    callers: usize,
    backlog: usize,
    time: Duration,
    rounds: usize,
    into: Option<PathBuf>,
    json: Option<PathBuf>,
    /// `None`: measure everything.
    only: Option<String>,
    /// Settings of the Postgres server.
    settings: Vec<Setting>,
}

impl Arguments {
    fn parse() -> Result<Self, AnyError> {
        let mut parsed = Self {
            callers: 512,
            backlog: 1_000_000,
            time: Duration::from_secs(4),
            rounds: 3,
            into: None,
            json: None,
            only: None,
            settings: Vec::new(),
        };
        for argument in arguments() {
            let (name, value) = argument?;
            match &*name {
                "--callers" => parsed.callers = value.parse()?,
                "--backlog" => parsed.backlog = value.parse()?,
                "--seconds" => parsed.time = Duration::try_from_secs_f64(value.parse()?)?,
                "--rounds" => parsed.rounds = value.parse()?,
                "--into" => parsed.into = Some(value.into()),
                "--json" => parsed.json = Some(value.into()),
                "--only" => parsed.only = Some(value),
                "--set" => parsed.settings.push(server::setting(&value)?),
                _ => return Err(format!("unknown argument {name}").into()),
            }
        }
        Ok(parsed)
    }

    fn wants(&self, name: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == name)
    }
}

async fn run(arguments: &Arguments) -> Result<(), AnyError> {
    let postgres = server::start(&arguments.settings).await?;
    let database = postgres.database().await?;
    let settings = server::describe(database.pool()).await?;
    println!("{settings}");
    let mut report = Report::default();
    report.note("settings", settings);
    let version = server::version(database.pool()).await?;
    let cores = std::thread::available_parallelism()?;
    let bench = Bench {
        postgres,
        receiver: Receiver::start()?,
        body: vec![b'x'; 256].into(),
        arguments,
        note: format!(
            "Postgres {version} with fsync; {cores} cores for callers, receiver and Postgres; \
             POSTs of 256 bytes; medians of {} rounds",
            arguments.rounds
        ),
    };
    if arguments.wants("callers") {
        bench.callers(&mut report).await?;
    }
    if arguments.wants("backlog") {
        bench.backlog(&mut report).await?;
    }
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    Ok(())
}

/// Measurements at one position, one per round.
#[derive(Default)]
struct Point {
    rates: Vec<f64>,
    /// In milliseconds, like all times here.
    p50s: Vec<f64>,
    p99s: Vec<f64>,
}

impl Point {
    fn add(&mut self, measured: &Measured) {
        let millis = |share| micros(measured.percentile(share).unwrap_or_default()) / 1e3;
        self.rates.push(measured.rate());
        self.p50s.push(millis(0.5));
        self.p99s.push(millis(0.99));
    }

    fn rate(&self) -> f64 {
        median(self.rates.clone())
    }

    fn p50(&self) -> f64 {
        median(self.p50s.clone())
    }

    fn p99(&self) -> f64 {
        median(self.p99s.clone())
    }

    fn json(&self) -> Value {
        json!({ "rate": self.rate(), "p50_ms": self.p50(), "p99_ms": self.p99() })
    }
}

fn line(name: &'static str, values: impl IntoIterator<Item = f64>) -> Line {
    Line {
        name,
        values: values.into_iter().collect(),
    }
}

struct Bench<'a> {
    postgres: Postgres,
    receiver: Receiver,
    body: Bytes,
    arguments: &'a Arguments,
    /// Where the figures were measured.
    note: String,
}

impl Bench<'_> {
    async fn callers(&self, report: &mut Report) -> Result<(), AnyError> {
        let callers = (0..).map(|power| 1_usize << power);
        let callers: Vec<_> = callers
            .take_while(|callers| *callers <= self.arguments.callers)
            .collect();
        let new = || -> Vec<Point> { callers.iter().map(|_| Point::default()).collect() };
        let (mut awaited, mut fired) = (new(), new());
        for _ in 0..self.arguments.rounds {
            let database = self.database().await?;
            let pool = database.pool();
            let durable = durable(pool).await?;
            for ((callers, awaited), fired) in callers.iter().zip(&mut awaited).zip(&mut fired) {
                tidy(pool).await?;
                awaited.add(&self.awaited(&durable, *callers).await?);
                tidy(pool).await?;
                fired.add(&self.fired(&durable, *callers, pool).await?);
            }
            durable.shutdown(Duration::from_secs(5)).await?;
            pool.close().await;
        }
        println!(
            "\n{:>9} {:>17} {:>9} {:>9} {:>9}",
            "callers", "await_response/s", "p50 ms", "p99 ms", "fire/s"
        );
        let mut figures = Vec::new();
        for ((callers, awaited), fired) in callers.iter().zip(&awaited).zip(&fired) {
            println!(
                "{callers:>9} {:>17.0} {:>9.2} {:>9.2} {:>9.0}",
                awaited.rate(),
                awaited.p50(),
                awaited.p99(),
                fired.rate()
            );
            figures.push(json!({
                "callers": callers,
                "await_response": awaited.json(),
                "fire": { "rate": fired.rate() },
            }));
        }
        report.note("callers", figures);
        let chart = Chart {
            title: "Rate and latency by the number of callers".to_owned(),
            note: self.note.clone(),
            positions: (
                "callers, each with one request at a time".to_owned(),
                callers.iter().map(ToString::to_string).collect(),
            ),
            rates: vec![
                line("fire, until received", fired.iter().map(Point::rate)),
                line("await_response", awaited.iter().map(Point::rate)),
            ],
            times: vec![
                line("await_response, p50", awaited.iter().map(Point::p50)),
                line("await_response, p99", awaited.iter().map(Point::p99)),
            ],
        };
        self.draw(&chart, "callers.svg")
    }

    async fn backlog(&self, report: &mut Report) -> Result<(), AnyError> {
        let sizes = std::iter::successors(Some(1000), |size| Some(size * 10));
        let sizes: Vec<usize> = std::iter::once(0)
            .chain(sizes.take_while(|size| *size <= self.arguments.backlog))
            .collect();
        let database = self.database().await?;
        let pool = database.pool();
        let durable = durable(pool).await?;
        let mut connection = session(&database).await?;
        let (mut points, mut polls) = (Vec::new(), Vec::new());
        let mut waiting = 0;
        println!(
            "\n{:>9} {:>17} {:>9} {:>9} {:>9}",
            "waiting", "await_response/s", "p50 ms", "p99 ms", "poll ms"
        );
        let mut figures = Vec::new();
        for &size in &sizes {
            let more: Result<Vec<Request>, _> = (waiting..size).map(|_| self.delayed()).collect();
            durable.fire_many(more?).await?;
            waiting = size;
            let mut point = Point::default();
            for _ in 0..self.arguments.rounds {
                tidy(pool).await?;
                point.add(&self.awaited(&durable, CALLERS).await?);
            }
            let mut times = Vec::new();
            for _ in 0..POLLS {
                let (claimed, took) = poll(&mut connection, DEFAULT_CHANNEL).await?;
                if claimed > 0 {
                    return Err(
                        format!("{claimed} requests were due that should have waited").into(),
                    );
                }
                times.push(micros(took) / 1e3);
            }
            let time = median(times);
            println!(
                "{size:>9} {:>17.0} {:>9.2} {:>9.2} {time:>9.2}",
                point.rate(),
                point.p50(),
                point.p99()
            );
            figures.push(json!({
                "waiting": size, "await_response": point.json(), "poll_ms": time,
            }));
            points.push(point);
            polls.push(time);
        }
        let left: i64 = sqlx::query_scalar("SELECT count(*) FROM requeuest.mq_msgs")
            .fetch_one(pool)
            .await?;
        if left != waiting as i64 {
            return Err(
                format!("{left} of {waiting} delayed requests are left in the queue").into(),
            );
        }
        durable.shutdown(Duration::from_secs(5)).await?;
        report.note("backlog", figures);
        let chart = Chart {
            title: format!(
                "await_response from {CALLERS} callers \
                 beside requests of the same channel that are delayed"
            ),
            note: self.note.clone(),
            positions: (
                "requests that wait, due in a day".to_owned(),
                sizes.iter().map(|size| short(*size)).collect(),
            ),
            rates: vec![line("await_response", points.iter().map(Point::rate))],
            times: vec![
                line("await_response, p50", points.iter().map(Point::p50)),
                line("await_response, p99", points.iter().map(Point::p99)),
                line("a poll, which finds nothing due", polls),
            ],
        };
        self.draw(&chart, "backlog.svg")
    }

    async fn database(&self) -> Result<TestDatabase, AnyError> {
        let database = self.postgres.database().await?;
        requeuest::migrate(database.pool()).await?;
        Ok(database)
    }

    async fn awaited(&self, durable: &Durable, callers: usize) -> Result<Measured, AnyError> {
        let before = self.receiver.received();
        let (durable, url, body) = (
            durable.clone(),
            self.receiver.url.clone(),
            self.body.clone(),
        );
        let measured = each_for(callers, self.arguments.time, move || {
            let (durable, request) = (durable.clone(), request(&url, &body));
            async move {
                durable.await_response(request).await?;
                Ok(())
            }
        })
        .await?;
        self.receiver.expect(before + measured.calls)?;
        Ok(measured)
    }

    /// Measures until the receiver has all requests.
    async fn fired(
        &self,
        durable: &Durable,
        callers: usize,
        pool: &PgPool,
    ) -> Result<Measured, AnyError> {
        let before = self.receiver.received();
        let (durable, url, body) = (
            durable.clone(),
            self.receiver.url.clone(),
            self.body.clone(),
        );
        let began = Instant::now();
        let persisted = each_for(callers, self.arguments.time, move || {
            let (durable, request) = (durable.clone(), request(&url, &body));
            async move {
                durable.fire(request).await?;
                Ok(())
            }
        })
        .await?;
        let ended = self.receiver.wait_for(before + persisted.calls).await?;
        server::settled(pool).await?;
        self.receiver.expect(before + persisted.calls)?;
        Ok(Measured::total(persisted.calls, ended - began))
    }

    fn delayed(&self) -> Result<Request, AnyError> {
        let request = Request::try_from(request(&self.receiver.url, &self.body))?;
        Ok(request.with(Options::default().delay(DAY)))
    }

    fn draw(&self, chart: &Chart, name: &str) -> Result<(), AnyError> {
        if let Some(directory) = &self.arguments.into {
            std::fs::create_dir_all(directory)?;
            chart.draw(&directory.join(name))?;
        }
        Ok(())
    }
}

/// A handle with open connections and prepared statements.
async fn durable(pool: &PgPool) -> Result<Durable, AnyError> {
    let durable = Durable::builder(pool.clone()).build()?;
    durable.status(requeuest::Uuid::nil().into()).await?;
    Ok(durable)
}

async fn tidy(pool: &PgPool) -> Result<(), AnyError> {
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        sqlx::query(statement).execute(pool).await?;
    }
    Ok(())
}

/// Formats 10000 as 10k.
fn short(count: usize) -> String {
    match count {
        0 => "none".to_owned(),
        1_000_000.. => format!("{}M", count / 1_000_000),
        _ => format!("{}k", count / 1000),
    }
}
