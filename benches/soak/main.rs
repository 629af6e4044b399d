//! A constant rate for a long time: does anything drift, grow or get lost?
//!
//! `cargo bench --bench soak -- --minutes 30 --interval 60 --retention 300 --json figures.json`
//!
//! - `--rate`: requests per second. Without it, the rate is `--share` (0.7) of what `--callers`
//!   (64) reach in the first `--probe` (20) seconds.
//! - `--trouble yes`: beside this load, a receiver that fails, dead letters, 20,000 ordering keys
//!   whose first request waits, and a handler that never takes one outcome in 10,000, on a channel
//!   with another retention. Tables that still grow in the last third of the run fail it.
//! - `--set name=value`: a setting of the Postgres server.
//!
//! All times except `--minutes` are in seconds.
//!
//! Requests start when the clock says so, however long earlier requests take, and each latency
//! counts from the planned start. So a stall shows in all requests that it holds up. The retention
//! is short, so that the run includes pruning. Outcomes are pruned by slots, so they grow until a
//! third more than the retention has passed. Each request must be answered once: any other count,
//! or an error, fails the run.

#![allow(clippy::cast_precision_loss)] // no count here comes near 2^52

#[path = "../common/mod.rs"]
mod common;
mod trouble;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use requeuest::Durable;
use requeuest::sqlx::{self, FromRow, PgPool};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use common::load::{each_for, median, percentile};
use common::receiver::Receiver;
use common::report::{Report, micros};
use common::server::Setting;
use common::{AnyError, arguments, memory, request, server};
use trouble::Trouble;

/// How often the run looks for requests that are due to start.
const TICK: Duration = Duration::from_millis(1);
/// A table that is smaller than this, in bytes, or has grown by less than this factor, is level.
const SMALL: f64 = 4.0 * 1024.0 * 1024.0;
const LEVEL: f64 = 1.2;

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    run(&Arguments::parse()?).await
}

/// Command-line arguments.
struct Arguments {
    minutes: f64,
    interval: Duration,
    retention: Duration,
    /// Requests per second.
    rate: Option<f64>,
    share: f64,
    callers: usize,
    probe: Duration,
    body: Bytes,
    trouble: bool,
    json: Option<PathBuf>,
    settings: Vec<Setting>,
}

impl Arguments {
    fn parse() -> Result<Self, AnyError> {
        let mut parsed = Self {
            minutes: 30.0,
            interval: Duration::from_secs(60),
            retention: Duration::from_secs(300),
            rate: None,
            share: 0.7,
            callers: 64,
            probe: Duration::from_secs(20),
            body: vec![b'x'; 256].into(),
            trouble: false,
            json: None,
            settings: Vec::new(),
        };
        for argument in arguments() {
            let (name, value) = argument?;
            let seconds = || Ok::<_, AnyError>(Duration::try_from_secs_f64(value.parse()?)?);
            match &*name {
                "--minutes" => parsed.minutes = value.parse()?,
                "--interval" => parsed.interval = seconds()?,
                "--retention" => parsed.retention = seconds()?,
                "--rate" => parsed.rate = Some(value.parse()?),
                "--share" => parsed.share = value.parse()?,
                "--callers" => parsed.callers = value.parse()?,
                "--probe" => parsed.probe = seconds()?,
                "--body" => parsed.body = vec![b'x'; value.parse()?].into(),
                "--trouble" => parsed.trouble = value == "yes",
                "--json" => parsed.json = Some(value.into()),
                "--set" => parsed.settings.push(server::setting(&value)?),
                _ => return Err(format!("unknown argument {name}").into()),
            }
        }
        Ok(parsed)
    }

    /// The number of intervals in the run.
    fn intervals(&self) -> usize {
        (self.minutes * 60.0 / self.interval.as_secs_f64()).ceil() as usize
    }
}

async fn run(arguments: &Arguments) -> Result<(), AnyError> {
    let postgres = server::start(&arguments.settings).await?;
    let database = postgres.database().await?;
    let pool = database.pool();
    requeuest::migrate(pool).await?;
    let receiver = Receiver::start()?;
    let mut report = Report::default();
    let settings = server::describe(pool).await?;
    println!("{settings}");
    report.note("settings", settings);
    let durable = Durable::builder(pool.clone())
        .retention(arguments.retention)
        .build()?;
    durable.status(requeuest::Uuid::nil().into()).await?;

    let caller = Caller {
        durable: durable.clone(),
        url: receiver.url.clone(),
        body: arguments.body.clone(),
    };
    let mut made = 0;
    let rate = if let Some(rate) = arguments.rate {
        rate
    } else {
        let probe = {
            let caller = caller.clone();
            move || caller.clone().call()
        };
        let reached = each_for(arguments.callers, arguments.probe, probe).await?;
        report.rate("await_response, as fast as it goes", &reached, None);
        made += reached.calls;
        reached.rate() * arguments.share
    };
    println!(
        "{rate:.0} requests a second for {} minutes, kept for {} s\n",
        arguments.minutes,
        arguments.retention.as_secs()
    );
    report.note("requests a second", rate);

    let trouble = if arguments.trouble {
        Some(Trouble::start(pool, arguments.retention).await?)
    } else {
        None
    };
    let times = Times::default();
    let count = (rate * arguments.interval.as_secs_f64() * arguments.intervals() as f64) as usize;
    // A separate task, so that the queries for a row hold up no call.
    let calls = tokio::spawn(paced(caller, rate, count, times.clone()));
    let (rows, ()) = tokio::try_join!(watch(pool, arguments, &times), async { calls.await? })?;
    made += count;
    if let Some(trouble) = trouble {
        trouble.check()?;
    } else {
        server::settled(pool).await?;
    }
    durable.shutdown(Duration::from_secs(5)).await?;
    receiver.expect(made)?;
    println!("\n{made} requests, each answered and received once");
    report.note("requests", made);
    report.note("intervals", rows.iter().map(Row::json).collect::<Vec<_>>());
    drift(&rows, &mut report);
    let growing = growing(&rows, &mut report);
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    // A shorter run is over before outcomes are pruned for the first time.
    let whole = arguments.minutes * 60.0 > 6.0 * arguments.retention.as_secs_f64();
    if whole && !growing.is_empty() {
        return Err(format!("these tables grow: {}", growing.join(", ")).into());
    }
    Ok(())
}

/// Everything that a call needs.
#[derive(Clone)]
struct Caller {
    durable: Durable,
    url: String,
    body: Bytes,
}

impl Caller {
    async fn call(self) -> Result<(), AnyError> {
        let request = request(&self.url, &self.body);
        let response = self.durable.await_response(request).await?;
        match response.status() {
            http::StatusCode::OK => Ok(()),
            status => Err(format!("a request was answered with {status}").into()),
        }
    }
}

/// Latencies of the calls that have ended since the last `take`.
#[derive(Clone, Default)]
struct Times(Arc<Mutex<Vec<Duration>>>);

impl Times {
    fn add(&self, time: Duration) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        times.push(time);
    }

    /// Swaps the latencies with a buffer whose memory is reused, so that the memory of this bench
    /// itself doesn't look like growth.
    fn take(&self, taken: &mut Vec<Duration>) {
        taken.clear();
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut *times, taken);
    }
}

/// Starts each call at its planned time, whether or not earlier calls have ended.
async fn paced(caller: Caller, rate: f64, count: usize, times: Times) -> Result<(), AnyError> {
    let mut running = JoinSet::new();
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let began = Instant::now();
    let mut started = 0;
    while started < count {
        tokio::select! {
            _ = ticks.tick() => {
                let due = (began.elapsed().as_secs_f64() * rate) as usize + 1;
                while started < due.min(count) {
                    let planned = began + Duration::from_secs_f64(started as f64 / rate);
                    let (caller, times) = (caller.clone(), times.clone());
                    running.spawn(async move {
                        caller.call().await?;
                        times.add(planned.elapsed());
                        Ok::<_, AnyError>(())
                    });
                    started += 1;
                }
            }
            Some(ended) = running.join_next() => ended??,
        }
    }
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok(())
}

/// Figures at the end of an interval.
struct Row {
    /// Seconds since the start.
    seconds: f64,
    /// Calls that ended, per second.
    rate: f64,
    p50: Duration,
    p95: Duration,
    p99: Duration,
    sizes: Sizes,
    /// On disk with indexes, in bytes, by table; partitions of the ring together.
    tables: BTreeMap<String, f64>,
    /// Resident memory, in MiB.
    memory: Option<u64>,
}

/// On disk, in bytes.
#[derive(FromRow)]
struct Sizes {
    queue: i64,
    queue_indexes: i64,
    payloads: i64,
    payloads_indexes: i64,
    outcomes: i64,
    /// Rows of the queue that no vacuum has removed yet, according to the statistics.
    dead: i64,
}

const SIZES: &str = "
    SELECT
        pg_table_size('requeuest.mq_msgs') AS queue,
        pg_indexes_size('requeuest.mq_msgs') AS queue_indexes,
        pg_table_size('requeuest.mq_payloads') AS payloads,
        pg_indexes_size('requeuest.mq_payloads') AS payloads_indexes,
        (
            SELECT sum(pg_total_relation_size(inhrelid))::bigint FROM pg_inherits
            WHERE inhparent = 'requeuest.outcomes'::regclass
        ) AS outcomes,
        (
            SELECT n_dead_tup FROM pg_stat_user_tables
            WHERE relid = 'requeuest.mq_msgs'::regclass
        ) AS dead";

const TABLES: &str = "
    SELECT
        regexp_replace(c.relname, '^outcomes_[0-9]+$', 'outcomes'),
        sum(pg_total_relation_size(c.oid))::float8
    FROM pg_class c
    WHERE c.relkind = 'r' AND c.relnamespace = 'requeuest'::regnamespace
    GROUP BY 1";

/// Prints and returns a row for each interval.
async fn watch(pool: &PgPool, arguments: &Arguments, times: &Times) -> Result<Vec<Row>, AnyError> {
    println!(
        "{:>7} {:>9} {:>9} {:>9} {:>9}  {:>15} {:>15} {:>9} {:>9} {:>7}",
        "s",
        "calls/s",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "queue+indexes",
        "content+indexes",
        "outcomes",
        "dead rows",
        "memory"
    );
    let mut ticks = tokio::time::interval(arguments.interval);
    ticks.tick().await;
    let (began, mut last) = (Instant::now(), Instant::now());
    let mut rows = Vec::new();
    let mut taken = Vec::new();
    while rows.len() < arguments.intervals() {
        ticks.tick().await;
        let now = Instant::now();
        times.take(&mut taken);
        let ended = taken.len() as f64;
        taken.sort_unstable();
        let row = Row {
            seconds: (now - began).as_secs_f64(),
            rate: ended / (now - last).as_secs_f64(),
            p50: percentile(&taken, 0.5).unwrap_or_default(),
            p95: percentile(&taken, 0.95).unwrap_or_default(),
            p99: percentile(&taken, 0.99).unwrap_or_default(),
            sizes: sqlx::query_as(SIZES).fetch_one(pool).await?,
            tables: sqlx::query_as(TABLES)
                .fetch_all(pool)
                .await?
                .into_iter()
                .collect(),
            memory: memory::resident(),
        };
        row.print();
        rows.push(row);
        last = now;
    }
    Ok(rows)
}

impl Row {
    fn print(&self) {
        let sizes = &self.sizes;
        let pair = |table, indexes| format!("{:.1} + {:.1}", mebibytes(table), mebibytes(indexes));
        println!(
            "{:>7.0} {:>9.0} {:>9.2} {:>9.2} {:>9.2}  {:>15} {:>15} {:>9.1} {:>9} {:>7}",
            self.seconds,
            self.rate,
            millis(self.p50),
            millis(self.p95),
            millis(self.p99),
            pair(sizes.queue, sizes.queue_indexes),
            pair(sizes.payloads, sizes.payloads_indexes),
            mebibytes(sizes.outcomes),
            sizes.dead,
            self.memory
                .map_or_else(|| "?".to_owned(), |memory| memory.to_string()),
        );
    }

    fn json(&self) -> Value {
        let sizes = &self.sizes;
        json!({
            "seconds": self.seconds,
            "rate": self.rate,
            "p50_us": micros(self.p50),
            "p95_us": micros(self.p95),
            "p99_us": micros(self.p99),
            "queue_bytes": sizes.queue,
            "queue_index_bytes": sizes.queue_indexes,
            "payload_bytes": sizes.payloads,
            "payload_index_bytes": sizes.payloads_indexes,
            "outcome_bytes": sizes.outcomes,
            "table_bytes": self.tables,
            "dead_rows": sizes.dead,
            "resident_mib": self.memory,
        })
    }
}

fn millis(duration: Duration) -> f64 {
    micros(duration) / 1e3
}

fn mebibytes(bytes: i64) -> f64 {
    bytes as f64 / (1024.0 * 1024.0)
}

/// Compares the last third of the run with the first. Sizes are compared with the second third,
/// because they first have to reach a level. The slowest calls are compared with both, because the
/// amount that a checkpoint writes to disk grows with the sizes.
fn drift(rows: &[Row], report: &mut Report) {
    let third = rows.len() / 3;
    if third == 0 {
        return;
    }
    let (first, second) = (&rows[..third], &rows[third..rows.len() - third]);
    let last = &rows[rows.len() - third..];
    let mut compare = |name: &str, before: &[Row], figure: &dyn Fn(&Row) -> f64| {
        let median_of = |rows: &[Row]| median(rows.iter().map(figure).collect());
        let (earlier, later) = (median_of(before), median_of(last));
        println!(
            "{name:<32} {earlier:>9.2} {later:>9.2}  {:>5.2} ×",
            later / earlier
        );
        report.note(&format!("drift: {name}"), json!([earlier, later]));
    };
    println!("\nmedians of the first third and of the last");
    compare("calls/s", first, &|row| row.rate);
    compare("p50, ms", first, &|row| millis(row.p50));
    compare("p95, ms", first, &|row| millis(row.p95));
    compare("p99, ms", first, &|row| millis(row.p99));
    println!("medians of the second third and of the last");
    compare("p95 then, ms", second, &|row| millis(row.p95));
    compare("p99 then, ms", second, &|row| millis(row.p99));
    compare("queue with indexes, MiB", second, &|row| {
        mebibytes(row.sizes.queue + row.sizes.queue_indexes)
    });
    compare("content with indexes, MiB", second, &|row| {
        mebibytes(row.sizes.payloads + row.sizes.payloads_indexes)
    });
    compare("outcomes, MiB", second, &|row| {
        mebibytes(row.sizes.outcomes)
    });
    compare("memory, MiB", second, &|row| {
        row.memory.unwrap_or_default() as f64
    });
}

/// Prints the size of each table in the second and in the last third of the run. Returns the tables
/// that grow.
fn growing(rows: &[Row], report: &mut Report) -> Vec<String> {
    let third = rows.len() / 3;
    let Some(last) = rows.last().filter(|_| third > 0) else {
        return Vec::new();
    };
    println!("sizes with indexes, MiB: medians of the second third and of the last");
    let mut growing = Vec::new();
    for table in last.tables.keys() {
        let median_of = |rows: &[Row]| {
            let sizes = rows.iter().filter_map(|row| row.tables.get(table));
            median(sizes.copied().collect())
        };
        let earlier = median_of(&rows[third..rows.len() - third]);
        let later = median_of(&rows[rows.len() - third..]);
        let [before, after] = [earlier, later].map(|bytes| bytes / (1024.0 * 1024.0));
        println!(
            "{table:<32} {before:>9.2} {after:>9.2}  {:>5.2} ×",
            later / earlier
        );
        report.note(&format!("size: {table}"), json!([earlier, later]));
        if later > SMALL && later > LEVEL * earlier {
            growing.push(table.clone());
        }
    }
    growing
}
