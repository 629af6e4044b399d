//! What drives persisted requests: one engine a handle, and the tasks that belong to it.
//!
//! ```text
//!  fronts ─► enqueue lane ─► attempt ─► settle lane ─► waiters
//!                              ▲            │
//!             sqlxmq's runner ─┘            └─ due again
//! ```

pub(crate) mod attempt;
pub(crate) mod bulk;
mod config;
pub(crate) mod dead_letters;
pub(crate) mod enqueue;
mod fault;
pub(crate) mod hand_over;
pub(crate) mod job;
pub(crate) mod lane;
pub(crate) mod live;
pub(crate) mod reconcile;
pub(crate) mod runner;
pub(crate) mod runtime;
mod shared;
pub(crate) mod transport;
pub(crate) mod waiters;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::PgPool;
use sqlxmq::CurrentJob;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::error::{Error, Kind};
use crate::store::BoxFuture;

use enqueue::Submission;
use runner::lease::{self, Lease, Slot};
use runner::settle::{self, Settlement, Settling};
use runner::sweep;
use runtime::Home;
use transport::{Transport, TransportSlot};

pub(crate) use config::Config;
pub(crate) use shared::Shared;

/// How many bodies that were too large to come with their claim are fetched at a time.
const LARGE_BODIES: usize = 16;
/// How many bulk inserts there are at a time: each holds a connection, perhaps while it waits for a caller's ordering key.
const BULK_TURNS: usize = 2;
/// How many results may wait for their commit, or one for each attempt at a time, before new requests are left to the queue.
const MAX_UNSETTLED: usize = 1024;
/// What part of the runner's room results may take that wait for others to be committed with.
const ROOM_SHARE: usize = 4;
/// Longer than any statement may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(15);
/// How often a shutdown looks whether everything is settled.
const DRAIN_POLL: Duration = Duration::from_millis(5);

/// How far a shutdown is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Open,
    /// Nothing new is begun; attempts in flight go on.
    Closing,
    /// Attempts in flight are given up.
    Stopping,
}

pub(crate) struct Engine {
    shared: Arc<Shared>,
    user_pool: PgPool,
    home: Home,
    enqueue: mpsc::UnboundedSender<Submission>,
    settle: mpsc::UnboundedSender<Settlement>,
    transport: TransportSlot,
    slots: Arc<Semaphore>,
    /// Half of the slots: while there is a backlog, new requests can't starve those that wait in the queue.
    inline_slots: Arc<Semaphore>,
    /// Held by each result that waits for its commit.
    unsettled: Arc<()>,
    large_bodies: Semaphore,
    bulk_turns: Semaphore,
    /// Whether a runner claims here, so that this process may make first attempts.
    running: watch::Sender<bool>,
    /// Has a receiver for each runner that may still bring claims.
    runners: watch::Sender<()>,
    phase: watch::Sender<Phase>,
    tasks: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("config", &self.shared.config)
            .field("instance", &self.shared.instance)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts the lanes and the tasks that look after leases, waiters and old outcomes.
    pub(crate) fn start(user_pool: PgPool, config: Config) -> Result<Arc<Self>, Error> {
        let home = Home::find().map_err(|error| Error::config("runtime", error.to_string()))?;
        let _context = home.handle().enter();
        let shared = Arc::new(Shared::new(&user_pool, config));
        let (enqueue, enqueued) = mpsc::unbounded_channel();
        let (settle, settled) = mpsc::unbounded_channel();
        // The lanes end by themselves when their senders are gone; the others have no end of their own.
        home.handle()
            .spawn(enqueue::run(Arc::clone(&shared), enqueued));
        home.handle()
            .spawn(settle::run(Arc::clone(&shared), settled));
        let tasks = vec![
            home.handle().spawn(lease::renew(Arc::clone(&shared))),
            home.handle().spawn(waiters::watch(Arc::clone(&shared))),
            home.handle().spawn(sweep::run(Arc::clone(&shared))),
        ];
        let concurrency = shared.config.concurrency;
        Ok(Arc::new(Self {
            shared,
            user_pool,
            enqueue,
            settle,
            transport: TransportSlot::default(),
            slots: Arc::new(Semaphore::new(concurrency)),
            inline_slots: Arc::new(Semaphore::new(concurrency.div_ceil(2))),
            unsettled: Arc::default(),
            large_bodies: Semaphore::new(LARGE_BODIES),
            bulk_turns: Semaphore::new(BULK_TURNS),
            running: watch::Sender::new(false),
            runners: watch::Sender::new(()),
            phase: watch::Sender::new(Phase::Open),
            tasks,
            home,
        }))
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(crate) fn config(&self) -> &Config {
        &self.shared.config
    }

    pub(crate) fn user_pool(&self) -> &PgPool {
        &self.user_pool
    }

    pub(crate) fn slots(&self) -> &Arc<Semaphore> {
        &self.slots
    }

    pub(crate) fn large_bodies(&self) -> &Semaphore {
        &self.large_bodies
    }

    pub(crate) fn bulk_turns(&self) -> &Semaphore {
        &self.bulk_turns
    }

    pub(crate) fn transport(&self) -> Option<Transport> {
        self.transport.get()
    }

    /// Sets the transport of background attempts unless one is set.
    pub(crate) fn offer_transport(&self, transport: impl FnOnce() -> Transport) {
        self.transport.offer(transport);
    }

    pub(crate) async fn transport_known(&self) {
        self.transport.known().await;
    }

    pub(crate) fn set_running(&self, running: bool) {
        self.running.send_replace(running);
    }

    /// Whether what is claimed now is sent from here.
    pub(crate) fn is_claiming(&self) -> bool {
        *self.running.borrow() && !self.is_closing()
    }

    /// Waits until the claiming is to end: with the guard of the runner or with the engine's shutdown, whoever keeps the guard.
    pub(crate) async fn claiming_ends(&self) {
        let mut running = self.running.subscribe();
        tokio::select! {
            () = self.closing() => {}
            // The sender is this engine, so it doesn't go away.
            _ = running.wait_for(|running| !running) => {}
        }
    }

    /// Counts a runner for as long as it may bring claims, which is until this is dropped.
    pub(crate) fn runner(&self) -> watch::Receiver<()> {
        self.runners.subscribe()
    }

    pub(crate) fn is_closing(&self) -> bool {
        *self.phase.borrow() >= Phase::Closing
    }

    /// Waits until nothing new is begun.
    pub(crate) async fn closing(&self) {
        self.reached(Phase::Closing).await;
    }

    /// Waits until attempts in flight have no more time.
    pub(crate) async fn stopping(&self) {
        self.reached(Phase::Stopping).await;
    }

    async fn reached(&self, wanted: Phase) {
        let mut phase = self.phase.subscribe();
        // The sender is this engine, so it doesn't go away.
        let _ = phase.wait_for(|phase| *phase >= wanted).await;
    }

    pub(crate) fn enqueue(&self, submission: Submission) -> Result<(), Error> {
        // A pool that its owner closed takes nothing more, though this one would.
        if self.is_closing() || self.user_pool.is_closed() {
            return Err(Error::new(Kind::Closed));
        }
        if submission.row.needs_lock() {
            self.spawn(enqueue::insert_locked(Arc::clone(&self.shared), submission));
            return Ok(());
        }
        self.enqueue
            .send(submission)
            .map_err(|_| Error::new(Kind::Closed))
    }

    /// Has a result recorded.
    pub(crate) fn settle(
        self: &Arc<Self>,
        lease: Arc<Lease>,
        current: Option<CurrentJob>,
        result: Settling,
        urgent: bool,
    ) {
        lease.settling();
        // Without a lane the runtime is ending; the lease will run out and others take over.
        let _ = self.settle.send(Settlement {
            lease,
            result,
            urgent,
            _current: current,
            _counted: Arc::clone(&self.unsettled),
            _engine: Arc::clone(self),
        });
    }

    /// Whether as many results wait for their commit as may: while the database takes requests faster than their results, memory must not
    /// grow with them. Those that a runner claims are bounded anyway.
    fn is_behind(&self) -> bool {
        self.unsettled() > MAX_UNSETTLED.max(self.config().concurrency)
    }

    /// Whether results that wait for their commit take room that sqlxmq's runner could claim for.
    pub(crate) fn fills_up(&self) -> bool {
        self.unsettled() >= self.config().concurrency / ROOM_SHARE
    }

    /// How many results wait for their commit.
    fn unsettled(&self) -> usize {
        Arc::strong_count(&self.unsettled) - 1
    }

    /// A slot for a first attempt by this process, if it may make one on this channel now and there is a client for it: the live
    /// caller's, or the engine's own.
    pub(crate) fn inline_slot(&self, channel: &str, has_client: bool) -> Option<Slot> {
        let subscribed = match &self.config().channels {
            None => true,
            Some(channels) => channels.iter().any(|subscribed| **subscribed == *channel),
        };
        let has_client = has_client || self.transport.is_known();
        if !(subscribed && self.is_claiming() && has_client) || self.is_behind() {
            return None;
        }
        let attempt = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        let inline = if self.shared.backlog.load(Ordering::Relaxed) {
            Some(Arc::clone(&self.inline_slots).try_acquire_owned().ok()?)
        } else {
            None
        };
        Some(Slot {
            _attempt: attempt,
            _inline: inline,
        })
    }

    /// Spawns on the engine's runtime.
    pub(crate) fn spawn(
        &self,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        self.home.handle().spawn(future)
    }

    /// Runs a future on the engine's runtime and waits for it from any executor.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        future: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        self.home
            .run(future)
            .await
            .unwrap_or_else(|| Err(Error::new(Kind::Closed)))
    }

    /// Runs statements on the crate's own pool, from any executor, after making sure of the schema.
    pub(crate) async fn query<T: Send + 'static>(
        &self,
        statements: impl for<'c> FnOnce(
            &'c mut sqlx::PgConnection,
        ) -> BoxFuture<'c, Result<T, sqlx::Error>>
        + Send
        + 'static,
    ) -> Result<T, Error> {
        self.query_large(0, statements).await
    }

    /// As [`query`](Self::query), for statements that may move so many bytes.
    pub(crate) async fn query_large<T: Send + 'static>(
        &self,
        bytes: usize,
        statements: impl for<'c> FnOnce(
            &'c mut sqlx::PgConnection,
        ) -> BoxFuture<'c, Result<T, sqlx::Error>>
        + Send
        + 'static,
    ) -> Result<T, Error> {
        if self.user_pool.is_closed() {
            return Err(Error::new(Kind::Closed));
        }
        let shared = Arc::clone(&self.shared);
        self.run(async move { shared.query_large(bytes, statements).await })
            .await
    }

    /// New connections use what the caller's pool uses now.
    pub(crate) fn reconnect(&self) {
        let connect = self.config().connect_options(&self.user_pool);
        self.shared.db.reconnect_with(&connect);
    }

    /// No new claims and no new requests; waits for the attempts in flight, then has them given back: what was not being sent at
    /// once, what was as a failed attempt.
    pub(crate) async fn shutdown(self: Arc<Self>, grace: Duration) -> Result<(), Error> {
        self.phase.send_replace(Phase::Closing);
        let attempts = async {
            if !self.drained(grace).await {
                self.phase.send_replace(Phase::Stopping);
            }
        };
        // Each runner's end is bounded. What its last poll brings is noted by then, and on its way back.
        tokio::join!(attempts, self.runners.closed());
        // No longer than others would wait for the leases anyway.
        self.drained(self.config().lease).await;
        self.shared.waiters.close();
        self.shared.db.close(CLOSE_TIMEOUT).await;
        Ok(())
    }

    async fn drained(&self, within: Duration) -> bool {
        let drained = async {
            while !self.shared.leases.is_empty() {
                tokio::time::sleep(DRAIN_POLL).await;
            }
        };
        tokio::time::timeout(within, drained).await.is_ok()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
