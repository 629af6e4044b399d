//! The same backlog, drained by one process and by several.

use std::time::{Duration, Instant};

use requeuest::Durable;
use requeuest::sqlx::{self, ConnectOptions, PgPool, postgres::PgConnectOptions};
use requeuest::testkit::Postgres;

use crate::Arguments;
use crate::common::load::{Measured, median};
use crate::common::receiver::Receiver;
use crate::common::report::Report;
use crate::common::{AnyError, request, server};
use crate::waits::Waits;
use crate::worker::Worker;

pub(crate) async fn measure(arguments: &Arguments, report: &mut Report) -> Result<(), AnyError> {
    let postgres = server::start(&arguments.settings).await?;
    let settings = server::describe(postgres.database().await?.pool()).await?;
    println!("{settings}");
    report.note("settings", settings);
    let (processes, requests) = (arguments.processes, arguments.requests);
    println!(
        "{requests} requests of {} bytes, drained by 1 process and by {processes}; \
         {} of each, and the medians\n",
        arguments.body.len(),
        arguments.rounds
    );
    let mut both = [Rounds::of(1), Rounds::of(processes)];
    for _ in 0..arguments.rounds {
        for rounds in &mut both {
            rounds.add(round(&postgres, arguments, rounds.processes).await?);
        }
    }
    let [one, all] = both;
    let base = one.rate();
    println!();
    for (rounds, name) in [(one, "one"), (all, "all")] {
        let rate = rounds.rate();
        println!(
            "{:<14} {rate:>9.0}/s  {:>5.2} × 1 process, {} threads each\n  {}",
            label(rounds.processes),
            rate / base,
            arguments.threads(rounds.processes),
            rounds.waits
        );
        report.note(&format!("{name}: processes"), rounds.processes);
        report.note(
            &format!("{name}: threads each"),
            arguments.threads(rounds.processes),
        );
        report.note(&format!("{name}: rate"), rate);
        report.note(&format!("{name}: rate / 1 process"), rate / base);
        report.note(&format!("{name}: samples"), rounds.waits.samples());
        for (kind, what) in [("Lock", "lock"), ("LWLock", "LWLock")] {
            let figure = format!("{name}: {what} waits, % of samples");
            report.note(&figure, rounds.waits.percent(kind));
        }
        report.note(&format!("{name}: least and most of one"), rounds.extremes());
    }
    Ok(())
}

fn label(processes: usize) -> String {
    match processes {
        1 => "1 process".to_owned(),
        _ => format!("{processes} processes"),
    }
}

/// All rounds with the same number of processes.
struct Rounds {
    processes: usize,
    rates: Vec<f64>,
    waits: Waits,
    /// What each process delivered, in each round.
    delivered: Vec<usize>,
}

impl Rounds {
    fn of(processes: usize) -> Self {
        Self {
            processes,
            rates: Vec::new(),
            waits: Waits::default(),
            delivered: Vec::new(),
        }
    }

    fn add(&mut self, round: Round) {
        println!(
            "{:<14} {:>9.0}/s  delivered by each: {:?}",
            label(self.processes),
            round.drained.rate(),
            round.delivered
        );
        self.rates.push(round.drained.rate());
        self.waits.add(round.waits);
        self.delivered.extend(round.delivered);
    }

    fn rate(&self) -> f64 {
        median(self.rates.clone())
    }

    /// The least and the most that one process delivered in a round.
    fn extremes(&self) -> Vec<usize> {
        let delivered = &self.delivered;
        let ends = [delivered.iter().min(), delivered.iter().max()];
        ends.into_iter().flatten().copied().collect()
    }
}

struct Round {
    drained: Measured,
    waits: Waits,
    /// What each process delivered, including those that delivered nothing.
    delivered: Vec<usize>,
}

async fn round(
    postgres: &Postgres,
    arguments: &Arguments,
    processes: usize,
) -> Result<Round, AnyError> {
    let count = arguments.requests;
    let database = postgres.database().await?;
    let pool = database.pool();
    requeuest::migrate(pool).await?;
    let receiver = Receiver::start()?;
    fill(pool, &receiver, arguments).await?;

    let threads = arguments.threads(processes);
    let mut workers = Vec::new();
    for number in 0..processes {
        let name = format!("fleet {number}");
        workers.push(Worker::start(&name, &database, arguments.concurrency, threads).await?);
    }
    let maintenance: PgConnectOptions = postgres.url().parse()?;
    let mut connection = maintenance.connect().await?;
    let mut waits = Waits::default();
    let began = Instant::now();
    for worker in &mut workers {
        worker.begin().await?;
    }
    let ended = tokio::select! {
        ended = receiver.wait_for(count) => ended?,
        never = waits.watch(&mut connection, database.name()) => match never? {},
    };
    server::settled(pool).await?;
    for worker in workers {
        worker.end().await?;
    }
    // Exactly `count` requests arrived, and each of them completed.
    receiver.expect(count)?;
    let (outcomes, completed): (i64, i64) = sqlx::query_as(
        "SELECT count(DISTINCT id),
            count(*) FILTER (WHERE status = 'completed' AND http_status = 200)
         FROM requeuest.outcomes",
    )
    .fetch_one(pool)
    .await?;
    if [outcomes, completed] != [count as i64; 2] {
        return Err(
            format!("of {count} requests {outcomes} ended and {completed} completed").into(),
        );
    }
    // Otherwise, a vacuum of this database could run during the next round.
    pool.close().await;
    sqlx::query(&format!(
        r#"DROP DATABASE "{}" WITH (FORCE)"#,
        database.name()
    ))
    .execute(&mut maintenance.connect().await?)
    .await?;
    let mut delivered = receiver.by_sender();
    delivered.resize(processes, 0);
    Ok(Round {
        drained: Measured::total(count, ended - began),
        waits,
        delivered,
    })
}

/// Enqueues all requests before any process delivers.
async fn fill(pool: &PgPool, receiver: &Receiver, arguments: &Arguments) -> Result<(), AnyError> {
    let enqueuer = Durable::builder(pool.clone()).runner(false).build()?;
    let requests = (0..arguments.requests).map(|_| request(&receiver.url, &arguments.body));
    enqueuer.fire_many(requests).await?;
    enqueuer.shutdown(Duration::from_secs(5)).await?;
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        sqlx::query(statement).execute(pool).await?;
    }
    Ok(())
}
