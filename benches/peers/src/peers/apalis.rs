//! `apalis` on `apalis-postgres`, configured like `examples/basic.rs` of the latter: batches of
//! 100, no lock statement per task, wake-ups by `LISTEN`, and tasks spawned on the runtime. The
//! limit on concurrent tasks is added with `concurrency` of apalis.

use std::io;
use std::ops::Range;

use apalis::prelude::{
    BoxDynError, Data, ParallelizeExt, TaskSink, WorkerBuilder, WorkerBuilderExt, WorkerError,
};
use apalis_postgres::{Config, PostgresStorage};
use sqlx09::PgPool;
use sqlx09::postgres::PgPoolOptions;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::peer::{AnyError, CONNECTIONS, Call, Peer, Site, pieces};

pub(crate) struct Apalis {
    site: Site,
    pool: PgPool,
    storage: PostgresStorage<Call>,
}

pub(crate) struct Worker {
    running: JoinHandle<Result<(), WorkerError>>,
    stop: oneshot::Sender<()>,
}

async fn post(call: Call, http: Data<reqwest::Client>) -> Result<(), BoxDynError> {
    call.post(&http).await
}

impl Peer for Apalis {
    const NAME: &'static str = "apalis";
    const CRATE: &'static str = "apalis-postgres";

    type Workers = Worker;

    async fn prepare(site: Site) -> Result<Self, AnyError> {
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .connect(&site.database_url)
            .await?;
        PostgresStorage::setup(&pool).await?;
        let config = Config::default()
            .queue("post")
            .batch_size(100)
            .lock_tasks(false);
        let storage = PostgresStorage::new(&pool).with_config(config);
        Ok(Self {
            site,
            pool,
            storage,
        })
    }

    async fn start(&self) -> Result<Worker, AnyError> {
        let worker = WorkerBuilder::new("post")
            .backend(self.storage.clone().with_pubsub())
            .data(self.site.http.clone())
            .concurrency(self.site.concurrency)
            .parallelize(tokio::spawn)
            .build(post);
        let (stop, stopped) = oneshot::channel();
        let signal = async move {
            // The wait also ends once the sender is dropped, that is, when the measurement
            // failed.
            let _ = stopped.await;
            Ok::<_, io::Error>(())
        };
        let running = tokio::spawn(worker.run_until(signal));
        Ok(Worker { running, stop })
    }

    async fn enqueue(&self, _: &Worker, number: u64) -> Result<(), AnyError> {
        // A storage is also a sink with a buffer, so each caller needs its own.
        self.storage.clone().push(self.site.call(number)).await?;
        Ok(())
    }

    async fn enqueue_all(&self, numbers: Range<u64>) -> Result<(), AnyError> {
        let mut storage = self.storage.clone();
        for piece in pieces(numbers, 1000) {
            let calls = piece.map(|number| self.site.call(number)).collect();
            storage.push_bulk(calls).await?;
        }
        Ok(())
    }

    async fn stop(&self, worker: Worker) -> Result<(), AnyError> {
        let _ = worker.stop.send(());
        worker.running.await??;
        self.pool.close().await;
        Ok(())
    }
}
