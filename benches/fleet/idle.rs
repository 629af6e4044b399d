//! What an idle runner costs.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use requeuest::sqlx::postgres::PgConnectOptions;
use requeuest::sqlx::{self, ConnectOptions, PgConnection};
use requeuest::testkit::{Postgres, TestDatabase};

use crate::Arguments;
use crate::common::report::Report;
use crate::common::{AnyError, server};
use crate::worker::Worker;

const LIBRARY: &str = "pg_stat_statements";
/// Clock ticks per second, in which Linux reports the CPU time of processes.
const TICKS: f64 = 100.0;

/// True once the runner has a session that listens and a session that has polled.
const IS_RUNNING: &str = "
    SELECT bool_or(query ILIKE 'listen%') AND bool_or(query LIKE '%mq_poll%' AND state = 'idle')
    FROM pg_stat_activity WHERE datname = $1";

pub(crate) async fn measure(arguments: &Arguments, report: &mut Report) -> Result<(), AnyError> {
    let (postgres, counter) = start_server(arguments).await?;
    let options: PgConnectOptions = postgres.url().parse()?;
    // Connected to another database, so that its statements don't count.
    let mut connection = options.connect().await?;
    let database = postgres.database().await?;
    requeuest::migrate(database.pool()).await?;
    // The statements of the pool's sessions don't count either, because these sessions end here.
    database.pool().close().await;
    let mut worker = Worker::start("fleet", &database, arguments.concurrency, 1).await?;
    worker.begin().await?;
    while !is_running(&mut connection, &database).await? {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let sessions = sessions(&mut connection, &database).await?;

    let began = Instant::now();
    let before = counter.read(&mut connection, &database).await?;
    let ticks = (cpu(worker.id().as_slice()), cpu(&sessions));
    tokio::time::sleep(arguments.idle).await;
    let after = counter.read(&mut connection, &database).await?;
    let ended = (cpu(worker.id().as_slice()), cpu(&sessions));
    let seconds = began.elapsed().as_secs_f64();
    worker.end().await?;

    let mut statements: Vec<(String, f64)> = after
        .into_iter()
        .map(|(statement, calls)| {
            let calls = calls - before.get(&statement).copied().unwrap_or_default();
            (statement, calls as f64 / seconds)
        })
        .filter(|(_, rate)| *rate > 0.0)
        .collect();
    statements.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    let rate: f64 = statements.iter().map(|(_, rate)| rate).sum();
    println!(
        "\nidle, for {seconds:.0} s: {rate:.2} {} a second",
        counter.what()
    );
    for (statement, rate) in &statements {
        println!("  {rate:>5.2}/s  {statement}");
    }
    report.note(&format!("idle: {} a second", counter.what()), rate);
    let spent = |before: Option<f64>, after: Option<f64>| Some((after? - before?) / seconds);
    for (what, spent) in [
        ("the process", spent(ticks.0, ended.0)),
        ("its sessions in Postgres", spent(ticks.1, ended.1)),
    ] {
        match spent {
            Some(spent) => {
                let percent = spent / TICKS * 100.0;
                println!("  CPU of {what}: {percent:.2} % of a core");
                report.note(&format!("idle: CPU of {what}, % of a core"), percent);
            }
            None => println!("  CPU of {what}: unknown, because there is no /proc here"),
        }
    }
    Ok(())
}

/// What is counted.
#[derive(Clone, Copy)]
enum Counter {
    Statements,
    /// For a server without the library. Each statement outside a transaction counts as one.
    Transactions,
}

/// Starts a separate server, because counting statements would slow the other measurements down a
/// little.
async fn start_server(arguments: &Arguments) -> Result<(Postgres, Counter), AnyError> {
    let mut settings = arguments.settings.clone();
    settings.push(("shared_preload_libraries".to_owned(), LIBRARY.to_owned()));
    if let Ok(postgres) = server::start(&settings).await {
        let options: PgConnectOptions = postgres.url().parse()?;
        let extension = format!("CREATE EXTENSION {LIBRARY}");
        let created = sqlx::query(&extension)
            .execute(&mut options.connect().await?)
            .await;
        if created.is_ok() {
            return Ok((postgres, Counter::Statements));
        }
    }
    let postgres = server::start(&arguments.settings).await?;
    Ok((postgres, Counter::Transactions))
}

impl Counter {
    fn what(self) -> &'static str {
        match self {
            Self::Statements => "queries",
            Self::Transactions => "transactions",
        }
    }

    /// How often each statement was executed in the database. The start of its text identifies it.
    async fn read(
        self,
        connection: &mut PgConnection,
        database: &TestDatabase,
    ) -> Result<HashMap<String, i64>, AnyError> {
        let counted = match self {
            Self::Statements => {
                r"SELECT left(regexp_replace(query, '\s+', ' ', 'g'), 100), sum(calls)::bigint
                  FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
                  WHERE d.datname = $1 GROUP BY 1"
            }
            Self::Transactions => {
                "SELECT 'any transaction', xact_commit + xact_rollback
                 FROM pg_stat_database WHERE datname = $1"
            }
        };
        let counted: Vec<(String, i64)> = sqlx::query_as(counted)
            .bind(database.name())
            .fetch_all(connection)
            .await?;
        Ok(counted.into_iter().collect())
    }
}

async fn is_running(
    connection: &mut PgConnection,
    database: &TestDatabase,
) -> Result<bool, AnyError> {
    let running: Option<bool> = sqlx::query_scalar(IS_RUNNING)
        .bind(database.name())
        .fetch_one(connection)
        .await?;
    Ok(running == Some(true))
}

/// Process ids of the sessions.
async fn sessions(
    connection: &mut PgConnection,
    database: &TestDatabase,
) -> Result<Vec<u32>, AnyError> {
    let ids: Vec<i32> = sqlx::query_scalar(
        "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'",
    )
    .bind(database.name())
    .fetch_all(connection)
    .await?;
    Ok(ids.into_iter().map(|id| id as u32).collect())
}

/// Clock ticks that these processes have used so far, where the system reports them.
fn cpu(processes: &[u32]) -> Option<f64> {
    processes.iter().map(|&process| ticks(process)).sum()
}

fn ticks(process: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The program's name may contain spaces; the fields after it don't.
    let (_, fields) = stat.rsplit_once(')')?;
    // Time in user mode and in the kernel.
    let times = fields.split_whitespace().skip(11).take(2);
    times.map(|time| time.parse::<f64>().ok()).sum()
}
