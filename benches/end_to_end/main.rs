//! Requests per second from end to end (persisted, sent, answered and settled), and the latency of
//! one request.
//!
//! ```text
//! cargo bench --bench end_to_end -- --callers 64 --requests 20000 --drain 100000 \
//!     --json figures.json
//! ```
//!
//! - `--only`: some of `limits,await,fire,single,drain`.
//! - `--limit`: how many attempts the receiver may get at the same time. It then has a rate limit
//!   too, which is never reached.
//! - `--guard on`: the handles have a guard that allows the receiver's address.
//! - `--encrypt on`: what is stored is encrypted.
//! - `--set max_wal_size=4GB`: a setting of the Postgres server.
//!
//! The receiver, Postgres (with `fsync` on) and the callers share the machine. The same run also
//! measures what bounds the durable calls: the exchange alone, and bare statements that write the
//! same rows. Compare ratios within one run; absolute figures vary with the machine. Each count is
//! checked: one request too many or too few fails the run.

#![allow(clippy::cast_precision_loss)] // no count here comes near 2^52

#[path = "../common/mod.rs"]
mod common;
mod limits;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use requeuest::encryption::{Key, Keyring};
use requeuest::guard::Guard;
use requeuest::sqlx::PgPool;
use requeuest::{DestinationPolicy, Durable, RateLimit};

use common::load::{Measured, each};
use common::receiver::Receiver;
use common::report::{Report, micros};
use common::server::Setting;
use common::{AnyError, memory, request, server};

/// Rows in a bare batch: about as many as a busy lane writes at once.
const BATCH: usize = 64;

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    run(&Arguments::parse()?).await
}

/// Command-line arguments.
struct Arguments {
    callers: usize,
    requests: usize,
    /// Calls made by a single caller, to measure their latency.
    single: usize,
    drain: usize,
    /// Concurrent attempts.
    concurrency: usize,
    limit: Option<u32>,
    guard: bool,
    encrypt: bool,
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
            callers: 64,
            requests: 20_000,
            single: 2000,
            drain: 100_000,
            concurrency: requeuest::DEFAULT_CONCURRENCY,
            limit: None,
            guard: false,
            encrypt: false,
            body: vec![b'x'; 256].into(),
            json: None,
            only: Vec::new(),
            settings: Vec::new(),
        };
        for argument in common::arguments() {
            let (name, value) = argument?;
            match &*name {
                "--callers" => parsed.callers = value.parse()?,
                "--requests" => parsed.requests = value.parse()?,
                "--single" => parsed.single = value.parse()?,
                "--drain" => parsed.drain = value.parse()?,
                "--set" => parsed.settings.push(server::setting(&value)?),
                "--only" => parsed.only = value.split(',').map(str::to_owned).collect(),
                "--concurrency" => parsed.concurrency = value.parse()?,
                "--encrypt" => parsed.encrypt = value == "on",
                "--limit" => parsed.limit = Some(value.parse()?),
                "--guard" => parsed.guard = value == "on",
                "--body" => parsed.body = vec![b'x'; value.parse()?].into(),
                "--json" => parsed.json = Some(value.into()),
                _ => return Err(format!("unknown argument {name}").into()),
            }
        }
        Ok(parsed)
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|wanted| wanted == name)
    }
}

async fn run(arguments: &Arguments) -> Result<(), AnyError> {
    let postgres = server::start(&arguments.settings).await?;
    let database = postgres.database().await?;
    let pool = database.pool();
    requeuest::migrate(pool).await?;
    limits::tables(pool).await?;
    let bench = Bench {
        pool,
        receiver: Receiver::start()?,
        arguments,
    };
    let mut report = Report::default();
    let settings = server::describe(pool).await?;
    println!("{settings}");
    report.note("settings", settings);
    println!(
        "{} requests of {} bytes from {} callers; p50 / p99 of each call\n",
        arguments.requests,
        arguments.body.len(),
        arguments.callers
    );
    bench.many_callers(&mut report).await?;
    if arguments.wants("single") {
        bench.single_caller(&mut report).await?;
    }
    if arguments.wants("drain") {
        bench.drain(&mut report).await?;
    }
    if let Some(path) = &arguments.json {
        report.write(path)?;
    }
    Ok(())
}

struct Bench<'a> {
    pool: &'a PgPool,
    receiver: Receiver,
    arguments: &'a Arguments,
}

impl Bench<'_> {
    /// Measures rates with many callers.
    async fn many_callers(&self, report: &mut Report) -> Result<(), AnyError> {
        let (callers, requests) = (self.arguments.callers, self.arguments.requests);
        let mut limit = None;
        if self.arguments.wants("limits") {
            let before = self.receiver.received();
            let bare =
                limits::exchange(&self.receiver, &self.arguments.body, callers, requests).await?;
            report.rate("the exchange alone", &bare, None);
            self.receiver.expect(before + requests)?;
            let commits =
                limits::commits(self.pool, &self.arguments.body, callers, requests / 2).await?;
            report.rate("bare one-row inserts", &commits, None);
            let (inserts, deletes) =
                limits::batches(self.pool, &self.arguments.body, BATCH, requests).await?;
            report.rate("bare inserts in batches", &inserts, None);
            report.rate("bare deletes in batches", &deletes, None);
            limit = Some(("bare one-row inserts", commits.rate()));
        }
        let durable = self.durable().await?;
        if self.arguments.wants("await") {
            let awaited = self.awaited(&durable, callers, requests).await?;
            report.rate("await_response", &awaited, limit);
        }
        if self.arguments.wants("fire") {
            let (until_persisted, until_received) = self.fired(&durable, callers, requests).await?;
            report.rate("fire, until persisted", &until_persisted, limit);
            report.rate("fire, until received", &until_received, limit);
        }
        durable.shutdown(Duration::from_secs(5)).await?;
        Ok(())
    }

    /// Measures latencies with one caller.
    async fn single_caller(&self, report: &mut Report) -> Result<(), AnyError> {
        let single = self.arguments.single;
        let exchange = limits::exchange(&self.receiver, &self.arguments.body, 1, single).await?;
        report.rate("1 caller: the exchange alone", &exchange, None);
        let commit = limits::commits(self.pool, &self.arguments.body, 1, single).await?;
        report.rate("1 caller: bare one-row insert", &commit, None);
        let durable = self.durable().await?;
        let (fired, _) = self.fired(&durable, 1, single).await?;
        report.rate("1 caller: fire", &fired, None);
        let awaited = self.awaited(&durable, 1, single).await?;
        report.rate("1 caller: await_response", &awaited, None);
        let p50 = |measured: &Measured| micros(measured.percentile(0.5).unwrap_or_default());
        let fire = p50(&fired) / p50(&commit);
        let both = p50(&awaited) / (2.0 * p50(&commit) + p50(&exchange));
        println!(
            "  p50 of fire: {fire:.2} × a bare insert; \
             of await_response: {both:.2} × two bare inserts and the exchange"
        );
        report.note("fire / bare insert, p50", fire);
        report.note("await_response / (2 bare inserts + exchange), p50", both);
        durable.shutdown(Duration::from_secs(5)).await?;
        Ok(())
    }

    /// Drains requests that already wait when the runner starts.
    async fn drain(&self, report: &mut Report) -> Result<(), AnyError> {
        let count = self.arguments.drain;
        let enqueuer = Durable::builder(self.pool.clone()).runner(false).build()?;
        let before = self.receiver.received();
        let url = &self.receiver.url;
        let requests = (0..count).map(|_| self.request(url));
        let began = Instant::now();
        enqueuer.fire_many(requests).await?;
        let filled = Measured::total(count, began.elapsed());
        report.rate("fire_many", &filled, None);
        let began = Instant::now();
        let durable = self.durable().await?;
        let tenth = count / 10;
        let early = self.receiver.wait_for(before + tenth).await?;
        let late = self.receiver.wait_for(before + count - tenth).await?;
        let ended = self.receiver.wait_for(before + count).await?;
        let drained = Measured::total(count, ended - began);
        report.rate("draining", &drained, None);
        report.rate(
            "  its first tenth",
            &Measured::total(tenth, early - began),
            None,
        );
        report.rate(
            "  its last tenth",
            &Measured::total(tenth, ended - late),
            None,
        );
        if let Some(peak) = memory::peak() {
            println!("  the process's resident memory, at its most: {peak} MiB");
            report.note("peak resident memory, MiB", peak);
        }
        server::settled(self.pool).await?;
        self.receiver.expect(before + count)?;
        durable.shutdown(Duration::from_secs(5)).await?;
        Ok(())
    }

    /// A handle with open connections and prepared statements.
    async fn durable(&self) -> Result<Durable, AnyError> {
        let mut builder =
            Durable::builder(self.pool.clone()).concurrency(self.arguments.concurrency);
        if let Some(attempts) = self.arguments.limit {
            let limits = DestinationPolicy::default()
                .max_concurrency(attempts)
                .rate(RateLimit::new(1_000_000, Duration::from_secs(1)));
            builder = builder.destination("127.0.0.1", limits);
        }
        if self.arguments.guard {
            builder = builder.guard(Guard::new().allow("127.0.0.1"));
        }
        if self.arguments.encrypt {
            let bytes: Vec<u8> = (0..32).collect();
            builder = builder.encryption(Keyring::new(Key::new("bench", bytes)?));
        }
        let durable = builder.build()?;
        durable.status(requeuest::Uuid::nil().into()).await?;
        Ok(durable)
    }

    async fn awaited(
        &self,
        durable: &Durable,
        callers: usize,
        count: usize,
    ) -> Result<Measured, AnyError> {
        let before = self.receiver.received();
        let (durable, url) = (durable.clone(), self.receiver.url.clone());
        let body = self.arguments.body.clone();
        let measured = each(callers, count, move || {
            let (durable, request) = (durable.clone(), request(&url, &body));
            async move {
                durable.await_response(request).await?;
                Ok(())
            }
        })
        .await?;
        self.receiver.expect(before + count)?;
        Ok(measured)
    }

    /// Measures until the callers have their ids, and until the receiver has all requests.
    async fn fired(
        &self,
        durable: &Durable,
        callers: usize,
        count: usize,
    ) -> Result<(Measured, Measured), AnyError> {
        let before = self.receiver.received();
        let (durable, url) = (durable.clone(), self.receiver.url.clone());
        let body = self.arguments.body.clone();
        let began = Instant::now();
        let persisted = each(callers, count, move || {
            let (durable, request) = (durable.clone(), request(&url, &body));
            async move {
                durable.fire(request).await?;
                Ok(())
            }
        })
        .await?;
        let ended = self.receiver.wait_for(before + count).await?;
        server::settled(self.pool).await?;
        self.receiver.expect(before + count)?;
        Ok((persisted, Measured::total(count, ended - began)))
    }

    fn request(&self, url: &str) -> http::Request<Bytes> {
        request(url, &self.arguments.body)
    }
}
