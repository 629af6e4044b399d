//! Every read stays quick however many requests there are: it reads a bounded number of rows.
//!
//! The quick form has more rows than a read looks at, and counts what is read. The long form has a
//! million requests of each kind, and measures.

use std::time::{Duration, Instant, SystemTime};

use requeuest::admin::{Admin, PageRequest, RequestFilter, RequestState, Window};
use requeuest::testkit::TestDatabase;
use requeuest::{RequestId, Status};
use sqlx::Executor;
use sqlx::postgres::PgPoolOptions;

use crate::support::{count, eventually, migrated};

const SESSIONS: &str = "reads";
/// How long a read may take in the long form.
const QUICK: Duration = Duration::from_millis(50);
/// How many rows and index entries a read may look at: a few times what it looks at in one table.
const MOST: i64 = 60_000;

fn is_long() -> bool {
    std::env::var("REQUEUEST_LONG_FAULTS").is_ok_and(|value| value == "1")
}

/// Fills each of the three tables with so many rows, one after the other in the order of ids.
async fn fill(database: &TestDatabase, rows: i64) {
    let tables = [
        "mq_msgs",
        "mq_payloads",
        "attempts",
        "outcomes_kept",
        "outcomes_3",
    ];
    for table in tables {
        let kept = format!("ALTER TABLE requeuest.{table} SET (autovacuum_enabled = false)");
        database.pool().execute(&*kept).await.unwrap();
    }
    let id = "(lpad(to_hex(1700000000000 + i), 12, '0') || '7000' || substr(md5(i::text), 1, 16))
        ::uuid";
    let created = "to_timestamp(1700000000 + i / 1000.0)";
    let destination = "'https://' || i % 20 || '.example:443'";
    let statements = [
        format!(
            "INSERT INTO requeuest.mq_msgs (
                id, channel_name, channel_args, attempt_at, created_at, seq, attempts, state,
                destination
             )
             SELECT
                {id}, 'c' || i % 5,
                CASE WHEN i % 20 < 3 THEN 'eeee|o|key' || i % 1000
                    ELSE lpad(to_hex(i % 20), 4, '0') || '|d|' || {destination} END,
                now() + (i % 1000 - 500) * interval '1 second', {created},
                CASE WHEN i % 20 < 3 THEN i END, i % 2,
                (CASE WHEN i % 20 < 3 THEN 'behind' WHEN i % 20 < 6 THEN 'deferred'
                    WHEN i % 20 = 6 THEN 'held' WHEN i % 20 = 7 THEN 'claimed'
                    WHEN i % 20000 = 8 THEN 'parked' ELSE 'waiting' END)::requeuest.mq_state,
                CASE WHEN i % 20 < 6 THEN {destination} END
             FROM generate_series(3, {rows}::bigint * 3, 3) i"
        ),
        format!(
            "INSERT INTO requeuest.attempts (id, number, duration_ms, error_class, error)
             SELECT {id}, 1, 10, 'connect', 'connection refused by the server'
             FROM generate_series(3, {rows}::bigint * 3, 6) i"
        ),
        format!(
            "INSERT INTO requeuest.outcomes (
                slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
                http_status, error_class, error, destination
             )
             SELECT
                -1, {id}, 'c' || i % 5, 'eeee|d|' || {destination},
                CASE WHEN i % 1000 = 1 THEN 'ambiguous' ELSE 'discarded' END, 3, {created},
                {created} + interval '1 minute', CASE WHEN i % 2 = 0 THEN 404 END,
                CASE WHEN i % 2 = 1 THEN 'connect' END,
                CASE WHEN i % 2 = 1 THEN 'connection refused by the server' END, {destination}
             FROM generate_series(4, {rows}::bigint * 3, 3) i"
        ),
        format!(
            "INSERT INTO requeuest.outcomes (
                slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
                expires_at, http_status, head
             )
             SELECT
                i % 8, {id}, 'c' || i % 5, 'eeee|d|' || {destination}, 'completed', 1, {created},
                {created} + interval '1 second', now() + interval '1 day', 200, '{{}}'
             FROM generate_series(5, {rows}::bigint * 3, 3) i"
        ),
        format!(
            "INSERT INTO requeuest.mq_payloads (id, name, head)
             SELECT {id}, 'request', '{{\"method\":\"POST\",\"url\":\"https://a.example/x\"}}'
             FROM generate_series(3, {rows}::bigint * 3, 3) i"
        ),
        "VACUUM ANALYZE".to_owned(),
    ];
    let mut connection = database.pool().acquire().await.unwrap();
    for statement in statements {
        sqlx::raw_sql(&statement)
            .execute(&mut *connection)
            .await
            .unwrap();
    }
}

fn filters(rows: i64) -> Vec<(&'static str, RequestFilter)> {
    let filter = RequestFilter::new;
    let at = |tenths: u64| {
        let millis = 1_700_000_000_000 + rows.unsigned_abs() * 3 / 10 * tenths;
        SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
    };
    let common = "https://4.example";
    let letters = || filter().status(Status::Discarded);
    vec![
        ("all", filter()),
        ("channel", filter().channel("c1")),
        ("channel without requests", filter().channel("none")),
        ("destination", filter().destination(common)),
        (
            "destination without requests",
            filter().destination("https://none"),
        ),
        ("ordering key", filter().ordering_key("key1")),
        (
            "ordering key without requests",
            filter().ordering_key("none"),
        ),
        ("scheduled", filter().status(Status::Scheduled)),
        ("available", filter().status(Status::Available)),
        ("running", filter().status(Status::Running)),
        ("retryable", filter().status(Status::Retryable)),
        ("deferred", filter().status(Status::Deferred)),
        ("parked", filter().status(Status::Parked)),
        ("completed", filter().status(Status::Completed)),
        ("cancelled, none", filter().status(Status::Cancelled)),
        ("discarded", letters()),
        ("ambiguous", filter().status(Status::Ambiguous)),
        ("discarded of channel", letters().channel("c1")),
        ("discarded of destination", letters().destination(common)),
        (
            "discarded of channel and destination",
            letters().channel("c1").destination(common),
        ),
        ("waiting", filter().state(RequestState::Waiting)),
        ("behind", filter().state(RequestState::Behind)),
        (
            "behind in channel",
            filter().state(RequestState::Behind).channel("c1"),
        ),
        (
            "deferred to destination",
            filter().state(RequestState::Deferred).destination(common),
        ),
        ("halted, none", filter().state(RequestState::Halted)),
        ("error", filter().error_contains("REFUSED")),
        ("error that none has", filter().error_contains("needle")),
        (
            "error that no retryable has",
            filter().error_contains("needle").status(Status::Retryable),
        ),
        (
            "error that no discarded has",
            letters().error_contains("needle"),
        ),
        ("middle", filter().created_before(at(5))),
        ("range", filter().created_after(at(4)).created_before(at(5))),
        (
            "range of channel",
            filter()
                .channel("c1")
                .created_after(at(4))
                .created_before(at(5)),
        ),
        ("key without request", filter().channel("c1").key("none")),
    ]
}

struct Table {
    times: Vec<(String, Duration)>,
}

impl Table {
    /// The longest of a few times, after the caches are warm.
    async fn measure<T>(&mut self, what: String, read: impl AsyncFn() -> T) -> T {
        let mut result = read().await;
        let mut longest = Duration::ZERO;
        for _ in 0..if is_long() { 5 } else { 0 } {
            let began = Instant::now();
            result = read().await;
            longest = longest.max(began.elapsed());
        }
        println!("{longest:>12.1?}  {what}");
        self.times.push((what, longest));
        result
    }
}

async fn read_all(admin: &Admin, rows: i64) -> Table {
    let mut table = Table { times: Vec::new() };
    let mut ids: Vec<RequestId> = Vec::new();
    for (name, filter) in filters(rows) {
        let limits: &[u32] = if is_long() { &[100, 1000] } else { &[100] };
        for &limit in limits {
            let page = PageRequest::new().limit(limit);
            let what = format!("page of {limit}: {name}");
            let found = table
                .measure(what, async || admin.requests(&filter, &page).await.unwrap())
                .await;
            ids.extend(found.requests.iter().take(1).map(|request| request.id));
            if let Some(next) = found.next {
                let page = page.after(next);
                let what = format!("second page of {limit}: {name}");
                table
                    .measure(what, async || admin.requests(&filter, &page).await.unwrap())
                    .await;
            }
        }
        let what = format!("count: {name}");
        table
            .measure(what, async || admin.count(&filter).await.unwrap())
            .await;
    }
    table
        .measure("counts".to_owned(), async || admin.counts().await.unwrap())
        .await;
    ids.sort();
    ids.dedup();
    for id in ids {
        let what = format!("request {id}");
        let found = table
            .measure(what, async || admin.request(id).await.unwrap())
            .await;
        assert!(found.is_some());
    }
    let window = Window::Day;
    table
        .measure("activity".to_owned(), async || {
            admin.activity(window).await.unwrap()
        })
        .await;
    table
        .measure("runners".to_owned(), async || {
            admin.runners().await.unwrap()
        })
        .await;
    table
}

/// The rows and index entries that the sessions of the reads have looked at, and whole-table scans.
async fn read(database: &TestDatabase) -> (i64, i64) {
    let tables = "pg_stat_user_tables WHERE schemaname = 'requeuest'
        AND relname ~ '^(mq_msgs|mq_payloads|attempts|outcomes)'";
    let looked =
        format!("SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM {tables}");
    let entries = "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes
        WHERE schemaname = 'requeuest'";
    let scans = format!("SELECT sum(seq_scan)::bigint FROM {tables}");
    (
        count(database, &looked).await + count(database, entries).await,
        count(database, &scans).await,
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_read_looks_at_a_bounded_number_of_rows() {
    let rows = if is_long() { 1_000_000 } else { 11_000 };
    let database = migrated().await;
    fill(&database, rows).await;
    let (_, scans) = read(&database).await;
    let options = database.options().application_name(SESSIONS);
    let reads = PgPoolOptions::new().connect_lazy_with(options);
    let handle = requeuest::Durable::builder(reads.clone())
        .runner(false)
        .max_connections(2)
        .build()
        .unwrap();
    let table = read_all(&handle.admin(), rows).await;
    handle.shutdown(Duration::ZERO).await.unwrap();
    reads.close().await;
    let open =
        format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{SESSIONS}'");
    eventually("the end of the sessions", || async {
        count(&database, &open).await == 0
    })
    .await;
    let (looked, after) = read(&database).await;
    println!(
        "{looked} rows and index entries by {} reads",
        table.times.len()
    );
    assert_eq!(after, scans, "a read has scanned a table");
    if is_long() {
        let slow: Vec<_> = table
            .times
            .iter()
            .filter(|(_, time)| *time > QUICK)
            .collect();
        assert!(slow.is_empty(), "{slow:#?}");
    } else {
        let most = MOST * table.times.len() as i64;
        assert!(
            looked < most,
            "{looked} rows and index entries were looked at"
        );
    }
}
