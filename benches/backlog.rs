//! What a backlog costs: polls and inserts while many other requests wait.
//!
//! `cargo bench --bench backlog -- --rows 1000000`; `--only` takes `polls`, `inserts`, `pinned` or
//! `blocked`.
//!
//! Each poll asks for 256 requests. Its time is compared with the time of a poll among a thousand
//! ready requests in the same run.

#![allow(clippy::cast_precision_loss)] // no count here comes near 2^52

mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use requeuest::sqlx::{self, PgPool};
use requeuest::testkit::{Postgres, TestDatabase};
use requeuest::{Durable, Options};

use common::poll::{BATCH, poll, session};
use common::receiver::Receiver;
use common::{AnyError, arguments, server};

const POLLS: usize = 21;
const CHANNEL: &str = "c";

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let (mut rows, mut only) = (1_000_000, None);
    for argument in arguments() {
        let (name, value) = argument?;
        match &*name {
            "--rows" => rows = value.parse()?,
            "--only" => only = Some(value),
            _ => return Err(format!("unknown argument {name}").into()),
        }
    }
    run(rows, only.as_deref()).await
}

/// Requests that wait in the queue.
struct Backlog {
    name: &'static str,
    rows: i64,
    groups: i64,
    /// When they are due, as an SQL interval from now.
    due: &'static str,
    /// How many of the requests are ready to be claimed.
    ready: i64,
}

async fn run(rows: i64, only: Option<&str>) -> Result<(), AnyError> {
    let postgres = server::start(&[]).await?;
    let ready = "interval '-1 second'";
    let delayed = "interval '1 day'";
    let backlog = |name, groups, due| Backlog {
        name,
        rows,
        groups,
        due,
        ready: if due == delayed { 0 } else { rows },
    };
    let few = Backlog {
        rows: rows.min(1000),
        ready: rows.min(1000),
        ..backlog("few, ready", 8, ready)
    };
    if only.is_none_or(|only| only == "inserts") {
        inserts(&postgres, &backlog("waiting", 1000, delayed)).await?;
    }
    if only.is_some_and(|only| only == "inserts") {
        return Ok(());
    }
    println!("\n{rows} requests; the median of {POLLS} polls of {BATCH}\n");
    let base = polls(&postgres, &few, None).await?;
    if only.is_none_or(|only| only == "pinned") {
        for dead in [rows / 10, rows, 5 * rows] {
            pinned(&postgres, &few, dead, base).await?;
        }
    }
    if only.is_none_or(|only| only == "blocked") {
        for (name, first) in [
            ("few, retrying keys", "now() + interval '1 day', 'waiting'"),
            ("few, halted keys", "'9999-12-31 UTC', 'halted'"),
        ] {
            blocked(&postgres, &few, rows / 10, name, first, base).await?;
        }
    }
    if only.is_some_and(|only| only != "polls") {
        return Ok(());
    }
    for (name, channels) in [
        ("ready, polls of all, 1 channel", 1),
        ("ready, 5,000 channels", 5000),
    ] {
        in_channels(&postgres, &backlog(name, 1000, ready), channels, base).await?;
    }
    for backlog in [
        backlog("ready, in 8 groups", 8, ready),
        backlog("ready, in 1,000 groups", 1000, ready),
        backlog("ready, in 20,000 groups", 20_000, ready),
        backlog("delayed", 20_000, delayed),
    ] {
        polls(&postgres, &backlog, Some(base)).await?;
    }
    one_ready(
        &postgres,
        &backlog("delayed, one of them ready", 20_000, delayed),
    )
    .await
}

async fn filled(postgres: &Postgres, backlog: &Backlog) -> Result<TestDatabase, AnyError> {
    let database = postgres.database().await?;
    requeuest::migrate(database.pool()).await?;
    // The row that all others are copies of.
    let durable = Durable::builder(database.pool().clone())
        .runner(false)
        .build()?;
    durable.fire(request()?).await?;
    durable.shutdown(Duration::from_secs(5)).await?;
    let fill = format!(
        // Ids rise, like those of the crate.
        "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
         SELECT
            lpad(to_hex(n), 32, '0')::uuid, 'c',
            lpad(to_hex((n % {groups} * 7919) % 65536), 4, '0')
                || '|d|http://' || n % {groups} || ':80',
            now() + {due}
         FROM generate_series(1, {rows}) AS n;
         INSERT INTO requeuest.mq_payloads (id, name, head, body)
         SELECT m.id, p.name, p.head, p.body
         FROM requeuest.mq_msgs m, requeuest.mq_payloads p WHERE m.id <> p.id;
         SELECT requeuest.mq_delete(
            ARRAY(SELECT id FROM requeuest.mq_msgs WHERE channel_name <> 'c')
         );",
        due = backlog.due,
        groups = backlog.groups,
        rows = backlog.rows,
    );
    sqlx::raw_sql(&fill).execute(database.pool()).await?;
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        sqlx::query(statement).execute(database.pool()).await?;
    }
    Ok(database)
}

/// Few requests are ready. The deleted rows of many earlier ones can't be vacuumed, because an old
/// snapshot pins them.
async fn pinned(
    postgres: &Postgres,
    few: &Backlog,
    dead: i64,
    base: Duration,
) -> Result<(), AnyError> {
    let database = filled(postgres, few).await?;
    let mut snapshot = database.pool().begin().await?;
    for statement in [
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "SELECT FROM requeuest.mq_msgs LIMIT 1",
    ] {
        sqlx::query(statement).execute(&mut *snapshot).await?;
    }
    sqlx::raw_sql(&format!(
        "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
         SELECT gen_random_uuid(), 'c', '0000|d|http://gone:80', now() - interval '1 hour'
         FROM generate_series(1, {dead});
         DELETE FROM requeuest.mq_msgs WHERE channel_args = '0000|d|http://gone:80';"
    ))
    .execute(database.pool())
    .await?;
    sqlx::query("VACUUM ANALYZE requeuest.mq_msgs")
        .execute(database.pool())
        .await?;
    let name = format!("few, and {dead} dead ones");
    timed(&database, few, &name, Some(base)).await?;
    snapshot.rollback().await?;
    Ok(())
}

/// A tenth as many ordering keys as rows are blocked: a request waits behind the first one of each,
/// and a hundred behind that of each hundredth key. Times the delivery of new requests, from the
/// moment that the keys were blocked on, and then polls beside a few ready requests.
async fn blocked(
    postgres: &Postgres,
    few: &Backlog,
    keys: i64,
    name: &str,
    first: &str,
    base: Duration,
) -> Result<(), AnyError> {
    let later = Backlog {
        due: "interval '1 day'",
        ..*few
    };
    let database = filled(postgres, &later).await?;
    let insert = |due_and_state: &str, series: &str| {
        format!(
            "INSERT INTO requeuest.mq_msgs
                (id, channel_name, channel_args, attempt_at, state, seq)
             SELECT gen_random_uuid(), 'c',
                lpad(to_hex(n::bigint * 7919 % 65536), 4, '0') || '|c|' || n, {due_and_state},
                nextval('requeuest.mq_seq')
             FROM {series};"
        )
    };
    let behind = "now() - interval '1 second', 'waiting'";
    let fill = [
        insert(first, &format!("generate_series(1, {keys}) n")),
        insert(behind, &format!("generate_series(1, {keys}) n")),
        insert(
            behind,
            &format!("generate_series(1, 99), generate_series(1, {keys}, 100) n"),
        ),
    ];
    delivered(&database, name, &fill.concat()).await?;
    sqlx::query("VACUUM ANALYZE")
        .execute(database.pool())
        .await?;
    sqlx::query("UPDATE requeuest.mq_msgs SET attempt_at = now() WHERE seq IS NULL")
        .execute(database.pool())
        .await?;
    timed(&database, few, name, Some(base)).await?;
    Ok(())
}

/// How long new requests take beside the blocked ones, which `fill` inserts, from their commit to
/// their response.
async fn delivered(database: &TestDatabase, name: &str, fill: &str) -> Result<(), AnyError> {
    const EACH: usize = 50;
    let receiver = Receiver::start()?;
    let pool = database.pool();
    let durable = Durable::builder(pool.clone()).channel(CHANNEL).build()?;
    let deliver = async |options: Options| -> Result<Duration, AnyError> {
        let request = http::Request::post(&receiver.url).body(Bytes::new())?;
        let request = requeuest::Request::try_from(request)?.with(options);
        let began = Instant::now();
        // Not sent by the process that inserts it, but claimed by a poll.
        let id = durable.fire_in(pool, request).await?;
        durable.response(id).await?;
        Ok(began.elapsed())
    };
    // The runner has started, and listens.
    deliver(Options::default()).await?;
    sqlx::raw_sql(fill).execute(pool).await?;
    let mut times = Vec::new();
    for number in 0..EACH {
        times.push(deliver(Options::default()).await?);
        times.push(deliver(Options::default().ordered(format!("new {number}"))).await?);
    }
    durable.shutdown(Duration::from_secs(5)).await?;
    times.sort_unstable();
    println!(
        "{name}: {} new ones in {:.1} ms each (median), {:.1} ms at most",
        times.len(),
        millis(times[EACH]),
        millis(times[2 * EACH - 1])
    );
    Ok(())
}

async fn polls(
    postgres: &Postgres,
    backlog: &Backlog,
    base: Option<Duration>,
) -> Result<Duration, AnyError> {
    let database = filled(postgres, backlog).await?;
    timed(&database, backlog, backlog.name, base).await
}

/// Polls of all channels while each of them has a share of the backlog.
async fn in_channels(
    postgres: &Postgres,
    backlog: &Backlog,
    channels: i64,
    base: Duration,
) -> Result<(), AnyError> {
    let database = filled(postgres, backlog).await?;
    let spread = "UPDATE requeuest.mq_msgs
                  SET channel_name = 'c' || ('x' || right(id::text, 8))::bit(32)::bigint % $1";
    sqlx::query(spread)
        .bind(channels)
        .execute(database.pool())
        .await?;
    sqlx::query("VACUUM ANALYZE requeuest.mq_msgs")
        .execute(database.pool())
        .await?;
    timed_of(&database, None, backlog, backlog.name, Some(base)).await?;
    Ok(())
}

async fn timed(
    database: &TestDatabase,
    backlog: &Backlog,
    name: &str,
    base: Option<Duration>,
) -> Result<Duration, AnyError> {
    timed_of(database, Some(CHANNEL), backlog, name, base).await
}

async fn timed_of(
    database: &TestDatabase,
    channel: Option<&str>,
    backlog: &Backlog,
    name: &str,
    base: Option<Duration>,
) -> Result<Duration, AnyError> {
    let mut connection = session(database).await?;
    let mut times = Vec::new();
    let mut left = backlog.ready;
    for _ in 0..POLLS {
        let (claimed, took) = poll(&mut connection, channel).await?;
        if claimed != left.min(i64::from(BATCH)) {
            return Err(
                format!("a poll claimed {claimed} requests while {left} were ready").into(),
            );
        }
        left -= claimed;
        // With few requests, makes those already claimed ready again.
        if left < i64::from(BATCH) && backlog.ready > 0 {
            sqlx::query(
                "UPDATE mq_msgs SET state = 'waiting', attempt_at = now() - interval '1 second'
                 WHERE state = 'claimed'",
            )
            .execute(&mut connection)
            .await?;
            left = backlog.ready;
        }
        times.push(took);
    }
    times.sort_unstable();
    let median = times[POLLS / 2];
    let ratio = base.map_or(1.0, |base| median.as_secs_f64() / base.as_secs_f64());
    println!("{name:<28} {:>8.2} ms  {ratio:>5.2} ×", millis(median));
    Ok(median)
}

/// One of many delayed requests becomes ready, and the next poll must find it.
async fn one_ready(postgres: &Postgres, backlog: &Backlog) -> Result<(), AnyError> {
    let database = filled(postgres, backlog).await?;
    let mut connection = session(&database).await?;
    let mut times = Vec::new();
    for _ in 0..POLLS {
        sqlx::query(
            "UPDATE mq_msgs SET attempt_at = now() WHERE id = (
                SELECT id FROM mq_msgs WHERE state = 'waiting' AND channel_name = 'c'
                ORDER BY attempt_at DESC LIMIT 1
            )",
        )
        .execute(&mut connection)
        .await?;
        let (claimed, took) = poll(&mut connection, CHANNEL).await?;
        if claimed != 1 {
            return Err(format!("the next poll claimed {claimed} requests instead of one").into());
        }
        times.push(took);
    }
    times.sort_unstable();
    println!("{:<28} {:>8.2} ms", backlog.name, millis(times[POLLS / 2]));
    Ok(())
}

/// The rate of `fire` beside the backlog, and beside none.
async fn inserts(postgres: &Postgres, backlog: &Backlog) -> Result<(), AnyError> {
    let empty = Backlog {
        rows: 0,
        ..*backlog
    };
    let (empty, full) = (
        filled(postgres, &empty).await?,
        filled(postgres, backlog).await?,
    );
    let mut rates = [Vec::new(), Vec::new()];
    // Alternates, because the speed of the machine varies over time.
    for _ in 0..3 {
        for (database, rates) in [&empty, &full].into_iter().zip(&mut rates) {
            rates.push(insert_rate(database.pool()).await?);
        }
    }
    let [empty, full] = rates.map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[1]
    });
    println!("fire beside none             {empty:>8.0} /s");
    println!(
        "fire beside them             {full:>8.0} /s  {:>5.2} ×",
        full / empty
    );
    Ok(())
}

async fn insert_rate(pool: &PgPool) -> Result<f64, AnyError> {
    const CALLERS: usize = 64;
    const EACH: usize = 150;
    // No runner, so that only the insert is measured.
    let durable = Durable::builder(pool.clone()).runner(false).build()?;
    durable.status(requeuest::Uuid::nil().into()).await?;
    let began = Instant::now();
    let caller = || async {
        for _ in 0..EACH {
            durable.fire(request()?).await?;
        }
        Ok::<_, AnyError>(())
    };
    futures_util::future::try_join_all((0..CALLERS).map(|_| caller())).await?;
    let rate = (CALLERS * EACH) as f64 / began.elapsed().as_secs_f64();
    durable.shutdown(Duration::from_secs(5)).await?;
    Ok(rate)
}

fn request() -> http::Result<http::Request<Bytes>> {
    http::Request::post("http://127.0.0.1:9/").body(Bytes::from_static(&[b'x'; 256]))
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
