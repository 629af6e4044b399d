//! `sqlxmq` by itself: a job sends a POST, then calls `complete()`.
//!
//! The configuration is that of its crate documentation: the job macro, a registry with the client
//! as its context, and a minimum of half the maximum ("the difference between the min and max will
//! dictate the maximum batch size which can be received: larger batch sizes are more efficient",
//! `JobRunnerOptions::set_concurrency`).

use std::ops::Range;
use std::time::Duration;

use sqlx08::PgPool;
use sqlx08::postgres::PgPoolOptions;
use sqlxmq::{CurrentJob, JobRegistry, JobRunnerHandle};

use crate::peer::{AnyError, CONNECTIONS, Call, Peer, Site, pieces};

/// In the order of their versions. They need the extension `uuid-ossp`, which is one of the
/// contributed modules of Postgres.
const MIGRATIONS: [&str; 5] = [
    include_str!("../../migrations/sqlxmq/20210316025847_setup.up.sql"),
    include_str!("../../migrations/sqlxmq/20210921115907_clear.up.sql"),
    include_str!("../../migrations/sqlxmq/20211013151757_fix_mq_latest_message.up.sql"),
    include_str!("../../migrations/sqlxmq/20220208120856_fix_concurrent_poll.up.sql"),
    include_str!("../../migrations/sqlxmq/20220713122907_fix-clear_all-keep-nil-message.up.sql"),
];

/// The crate has no function that spawns many jobs, but its SQL function takes an array. The values
/// are those that `JobBuilder` sends.
const INSERT_ALL: &str = "SELECT mq_insert(ARRAY(
    SELECT (
        gen_random_uuid(), interval '0', 4, interval '1 second', $1, '', NULL, false, $2, call, NULL
    )::mq_new_t
    FROM unnest($3::text[]) AS call))";

const CHANNEL: &str = "post";

#[sqlxmq::job(channel_name = "post")]
async fn post(mut job: CurrentJob, http: reqwest::Client) -> Result<(), AnyError> {
    let call: Call = job.json()?.ok_or("a job without a call")?;
    call.post(&http).await?;
    job.complete().await?;
    Ok(())
}

pub(crate) struct Sqlxmq {
    site: Site,
    pool: PgPool,
}

impl Peer for Sqlxmq {
    const NAME: &'static str = "sqlxmq";
    const CRATE: &'static str = "sqlxmq";

    type Workers = JobRunnerHandle;

    async fn prepare(site: Site) -> Result<Self, AnyError> {
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .connect(&site.database_url)
            .await?;
        for migration in MIGRATIONS {
            sqlx08::raw_sql(migration).execute(&pool).await?;
        }
        Ok(Self { site, pool })
    }

    async fn start(&self) -> Result<JobRunnerHandle, AnyError> {
        let mut registry = JobRegistry::new(&[post]);
        registry.set_context(self.site.http.clone());
        registry.set_error_handler(|job, error| eprintln!("sqlxmq: {job}: {error}"));
        let runner = registry
            .runner(&self.pool)
            .set_channel_names(&[CHANNEL])
            .set_concurrency(self.site.concurrency.div_ceil(2), self.site.concurrency)
            .run()
            .await?;
        Ok(runner)
    }

    async fn enqueue(&self, _: &JobRunnerHandle, number: u64) -> Result<(), AnyError> {
        post.builder()
            .set_json(&self.site.call(number))?
            .spawn(&self.pool)
            .await?;
        Ok(())
    }

    async fn enqueue_all(&self, numbers: Range<u64>) -> Result<(), AnyError> {
        for piece in pieces(numbers, 1000) {
            let calls: Vec<_> = piece
                .map(|number| serde_json::to_string(&self.site.call(number)))
                .collect::<Result<_, _>>()?;
            sqlx08::query(INSERT_ALL)
                .bind(CHANNEL)
                .bind(post.name())
                .bind(calls)
                .execute(&self.pool)
                .await?;
        }
        Ok(())
    }

    async fn stop(&self, mut runner: JobRunnerHandle) -> Result<(), AnyError> {
        runner.stop().await;
        runner.wait_jobs_finish(Duration::from_secs(10)).await;
        self.pool.close().await;
        Ok(())
    }
}
