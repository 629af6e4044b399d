//! `graphile_worker`, configured like "Throughput-oriented worker" in its guide
//! (`docs/src/configuration/worker-options.md` of the crate): a local queue that fetches 100 jobs
//! at a time, and completions that are written in batches, 5 ms apart.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use graphile_worker::{
    IntoTaskHandlerResult, JobSpec, LocalQueueConfig, TaskHandler, Worker, WorkerContext,
    WorkerOptions, WorkerUtils,
};
use sqlx09::PgPool;
use sqlx09::postgres::PgPoolOptions;
use tokio::task::JoinHandle;

use crate::peer::{AnyError, CONNECTIONS, Call, Peer, Site, pieces};

impl TaskHandler for Call {
    const IDENTIFIER: &'static str = "post";

    async fn run(self, context: WorkerContext) -> impl IntoTaskHandlerResult {
        match context.get_ext::<reqwest::Client>() {
            Some(http) => self.post(http).await,
            None => Err("a worker without a client".into()),
        }
    }
}

pub(crate) struct Graphile {
    site: Site,
    pool: PgPool,
    worker: Arc<Worker>,
    utils: WorkerUtils,
}

impl Peer for Graphile {
    const NAME: &'static str = "graphile";
    const CRATE: &'static str = "graphile_worker";

    type Workers = JoinHandle<Result<(), AnyError>>;

    async fn prepare(site: Site) -> Result<Self, AnyError> {
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .connect(&site.database_url)
            .await?;
        let worker = WorkerOptions::default()
            .concurrency(site.concurrency)
            .poll_interval(Duration::from_millis(500))
            .complete_job_batch_delay(Duration::from_millis(5))
            .fail_job_batch_delay(Duration::from_millis(5))
            .local_queue(
                LocalQueueConfig::default()
                    .with_size(100)
                    .with_ttl(Duration::from_secs(60)),
            )
            .define_job::<Call>()
            .add_extension(site.http.clone())
            // Ctrl-C must end the whole run, not only the worker.
            .listen_os_shutdown_signals(false)
            .pg_pool(pool.clone())
            .init()
            .await?;
        Ok(Self {
            site,
            pool,
            utils: worker.create_utils(),
            worker: Arc::new(worker),
        })
    }

    async fn start(&self) -> Result<Self::Workers, AnyError> {
        let worker = Arc::clone(&self.worker);
        Ok(tokio::spawn(async move { Ok(worker.run().await?) }))
    }

    async fn enqueue(&self, _: &Self::Workers, number: u64) -> Result<(), AnyError> {
        self.utils
            .add_job(self.site.call(number), JobSpec::default())
            .await?;
        Ok(())
    }

    async fn enqueue_all(&self, numbers: Range<u64>) -> Result<(), AnyError> {
        let spec = JobSpec::default();
        for piece in pieces(numbers, 1000) {
            let jobs: Vec<_> = piece
                .map(|number| (self.site.call(number), &spec))
                .collect();
            self.utils.add_jobs(&jobs).await?;
        }
        Ok(())
    }

    async fn stop(&self, running: Self::Workers) -> Result<(), AnyError> {
        self.worker.request_shutdown();
        running.await??;
        self.pool.close().await;
        Ok(())
    }
}
