//! `pgmq`, a queue without workers. The workers here are handwritten and do everything in batches.
//!
//! The SQL comes with the crate ("Install using the embedded scripts" in its README), so no
//! extension is needed. The loop is the one in its README (read with a visibility timeout, act,
//! delete), with a batch in each step.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pgmq::{Message, PGMQueueExt};
use sqlx09::PgPool;
use sqlx09::postgres::PgPoolOptions;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::peer::{AnyError, CONNECTIONS, Call, Peer, Site, pieces};

const QUEUE: &str = "post";
const BATCH: i32 = 100;
/// The crate's default (`VT_DEFAULT`), in seconds.
const VISIBILITY: i32 = 30;
/// More than one, so that one loop sends while another reads or deletes.
const LOOPS: usize = 2;
/// How long a loop waits after an empty read. The crate's own polling waits 250 ms.
const IDLE: Duration = Duration::from_millis(5);

pub(crate) struct Pgmq {
    site: Site,
    pool: PgPool,
    queue: PGMQueueExt,
}

pub(crate) struct Loops {
    running: JoinSet<Result<(), AnyError>>,
    stop: watch::Sender<bool>,
}

impl Peer for Pgmq {
    const NAME: &'static str = "pgmq";
    const CRATE: &'static str = "pgmq";

    type Workers = Loops;

    async fn prepare(site: Site) -> Result<Self, AnyError> {
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .connect(&site.database_url)
            .await?;
        let queue = PGMQueueExt::new_with_pool(pool.clone()).await;
        queue.install_sql_from_embedded().await?;
        queue.create(QUEUE).await?;
        Ok(Self { site, pool, queue })
    }

    async fn start(&self) -> Result<Loops, AnyError> {
        let (stop, stopped) = watch::channel(false);
        let slots = Arc::new(Semaphore::new(self.site.concurrency));
        let mut running = JoinSet::new();
        for _ in 0..LOOPS {
            running.spawn(deliver(
                self.queue.clone(),
                self.site.http.clone(),
                Arc::clone(&slots),
                stopped.clone(),
            ));
        }
        Ok(Loops { running, stop })
    }

    async fn enqueue(&self, _: &Loops, number: u64) -> Result<(), AnyError> {
        self.queue.send(QUEUE, &self.site.call(number)).await?;
        Ok(())
    }

    async fn enqueue_all(&self, numbers: Range<u64>) -> Result<(), AnyError> {
        for piece in pieces(numbers, 1000) {
            let calls: Vec<_> = piece.map(|number| self.site.call(number)).collect();
            self.queue.send_batch(QUEUE, &calls).await?;
        }
        Ok(())
    }

    async fn stop(&self, mut loops: Loops) -> Result<(), AnyError> {
        loops.stop.send_replace(true);
        while let Some(ended) = loops.running.join_next().await {
            ended??;
        }
        self.pool.close().await;
        Ok(())
    }
}

async fn deliver(
    queue: PGMQueueExt,
    http: reqwest::Client,
    slots: Arc<Semaphore>,
    stopped: watch::Receiver<bool>,
) -> Result<(), AnyError> {
    while !*stopped.borrow() {
        let batch: Vec<Message<Call>> = queue.read_batch(QUEUE, VISIBILITY, BATCH).await?;
        if batch.is_empty() {
            tokio::time::sleep(IDLE).await;
            continue;
        }
        let mut posts = JoinSet::new();
        for message in batch {
            let (http, slots) = (http.clone(), Arc::clone(&slots));
            posts.spawn(async move {
                let _slot = slots.acquire().await?;
                message.message.post(&http).await?;
                Ok::<_, AnyError>(message.msg_id)
            });
        }
        let mut sent = Vec::new();
        while let Some(post) = posts.join_next().await {
            match post? {
                Ok(id) => sent.push(id),
                // The message becomes visible again after its timeout.
                Err(error) => eprintln!("pgmq: {error}"),
            }
        }
        queue.delete_batch(QUEUE, &sent).await?;
    }
    Ok(())
}
