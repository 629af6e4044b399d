//! Measures requeuest and other Postgres queues for Rust at the same work, in one run, on one
//! Postgres.
//!
//! ```text
//! cargo run --release -- --requests 10000 --drain 20000 --callers 64 --concurrency 64 \
//!     --only requeuest,sqlxmq --rounds 3 --json FILE
//! ```
//!
//! Callers, workers, the receiver and Postgres (with `fsync` on) share the machine, so absolute
//! figures say little: compare within a run. Every request carries a number, and the run fails if a
//! request never reaches the receiver.

mod callers;
mod limits;
mod measure;
mod peer;
mod peers;
mod receiver;
mod report;

use std::env;
use std::fs;
use std::process::ExitCode;

use ::requeuest::testkit::Postgres;

use crate::measure::{Bench, Measured};
use crate::peer::{AnyError, Peer};
use crate::peers::apalis::Apalis;
use crate::peers::graphile::Graphile;
use crate::peers::pgmq::Pgmq;
use crate::peers::requeuest::Requeuest;
use crate::peers::sqlxmq::Sqlxmq;
use crate::receiver::{Receiver, Tally};
use crate::report::{Limits, Measure, Report, Series};

const PEERS: [&str; 5] = [
    Requeuest::NAME,
    Sqlxmq::NAME,
    Graphile::NAME,
    Apalis::NAME,
    Pgmq::NAME,
];

struct Arguments {
    requests: u64,
    drain: u64,
    callers: usize,
    concurrency: usize,
    rounds: usize,
    only: Vec<&'static str>,
    json: Option<String>,
}

#[tokio::main]
async fn main() -> Result<ExitCode, AnyError> {
    let arguments = Arguments::parse(env::args().skip(1))?;
    let report = run(&arguments).await?;
    print!("{}", report.table());
    if let Some(file) = &arguments.json {
        fs::write(file, format!("{:#}\n", report.json()))?;
    }
    match report.lost() {
        0 => Ok(ExitCode::SUCCESS),
        lost => {
            eprintln!("requests that never arrived: {lost}");
            Ok(ExitCode::FAILURE)
        }
    }
}

async fn run(arguments: &Arguments) -> Result<Report, AnyError> {
    let bench = Bench {
        postgres: Postgres::builder().config("fsync", "on").start().await?,
        receiver: Receiver::start()?,
        callers: arguments.callers,
        concurrency: arguments.concurrency,
    };
    let mut limits = Limits::default();
    let mut taken = Vec::new();
    for round in 1..=arguments.rounds {
        let (exchange, commits) = bench.limits(arguments.requests).await?;
        limits.exchange.push(exchange);
        limits.commits.push(commits);
        for &peer in &arguments.only {
            eprintln!("round {round} of {}: {peer}", arguments.rounds);
            let one = match peer {
                Requeuest::NAME => measure::<Requeuest>(&bench, arguments).await,
                Sqlxmq::NAME => measure::<Sqlxmq>(&bench, arguments).await,
                Graphile::NAME => measure::<Graphile>(&bench, arguments).await,
                Apalis::NAME => measure::<Apalis>(&bench, arguments).await,
                Pgmq::NAME => measure::<Pgmq>(&bench, arguments).await,
                _ => Err("there is no such peer".into()),
            };
            taken.extend(one.map_err(|error| format!("{peer}: {error}"))?);
        }
    }
    Ok(Report {
        callers: arguments.callers,
        concurrency: arguments.concurrency,
        requests: arguments.requests,
        drain: arguments.drain,
        rounds: arguments.rounds,
        limits,
        // Counted last, so that a duplicate that arrives during a later measurement counts as well.
        series: series(taken, &bench.receiver),
    })
}

/// A measurement, and the peer that it belongs to.
struct Taken {
    peer: &'static str,
    krate: &'static str,
    measure: Measure,
    measured: Measured,
}

async fn measure<P: Peer>(bench: &Bench, arguments: &Arguments) -> Result<Vec<Taken>, AnyError> {
    let taken = |measure, measured| Taken {
        peer: P::NAME,
        krate: P::CRATE,
        measure,
        measured,
    };
    let mut all = vec![
        taken(Measure::Fire, bench.fire::<P>(arguments.requests).await?),
        taken(Measure::Drain, bench.drain::<P>(arguments.drain).await?),
    ];
    if P::NAME == Requeuest::NAME {
        let measured = bench.await_response(arguments.requests).await?;
        all.push(taken(Measure::Await, measured));
    }
    Ok(all)
}

fn series(taken: Vec<Taken>, receiver: &Receiver) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for one in taken {
        let same = |other: &Series| other.peer == one.peer && other.measure == one.measure;
        let known = all.iter().position(same).unwrap_or_else(|| {
            all.push(Series {
                peer: one.peer,
                krate: one.krate,
                measure: one.measure,
                rates: Vec::new(),
                tally: Tally::default(),
            });
            all.len() - 1
        });
        let tally = receiver.tally(&one.measured.numbers);
        all[known].rates.extend(one.measured.rate);
        all[known].tally.lost += tally.lost;
        all[known].tally.doubled += tally.doubled;
    }
    all
}

impl Arguments {
    fn parse(mut given: impl Iterator<Item = String>) -> Result<Self, AnyError> {
        let mut arguments = Self {
            requests: 10_000,
            drain: 20_000,
            callers: 64,
            concurrency: 64,
            rounds: 1,
            only: PEERS.to_vec(),
            json: None,
        };
        while let Some(name) = given.next() {
            let value = given.next().ok_or(format!("{name} needs a value"))?;
            match name.as_str() {
                "--requests" => arguments.requests = positive(&name, &value)?,
                "--drain" => arguments.drain = positive(&name, &value)?,
                "--callers" => arguments.callers = positive(&name, &value)? as usize,
                "--concurrency" => arguments.concurrency = positive(&name, &value)? as usize,
                "--rounds" => arguments.rounds = positive(&name, &value)? as usize,
                "--only" => {
                    arguments.only = value.split(',').map(known).collect::<Result<_, _>>()?
                }
                "--json" => arguments.json = Some(value),
                _ => return Err(format!("unknown argument {name}").into()),
            }
        }
        Ok(arguments)
    }
}

fn positive(name: &str, value: &str) -> Result<u64, AnyError> {
    match value.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{name} must be a number above zero, not {value}").into()),
    }
}

fn known(name: &str) -> Result<&'static str, AnyError> {
    let found = PEERS.into_iter().find(|peer| *peer == name);
    found.ok_or_else(|| format!("unknown peer {name}; known: {}", PEERS.join(", ")).into())
}
