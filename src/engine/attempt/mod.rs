//! One request in this process's hands, from its claim to its settle.
//!
//! The modules here form a ring, and all of it is in this folder. A [`claim`] gives itself back
//! when it is dropped, so it holds the [`Driver`]. The driver knows the [`waiters`]. A waiting
//! caller may make the attempts itself, so a waiter can be handed a claim, through its
//! [`caller_client`].
//!
//! ```text
//! claim ─► drive ─► hooks ─► send ─► judge ─► claim.settle ─► the settle lane
//!   ▲                                    │
//!   └───────────── held retry ◄──────────┘
//! ```

pub(crate) mod bodies;
pub(crate) mod caller_client;
pub(crate) mod claim;
pub(crate) mod drive;
pub(crate) mod fault;
pub(crate) mod gate;
pub(crate) mod hooks;
pub(crate) mod job;
mod judge;
pub(crate) mod leases;
pub(crate) mod paused;
pub(crate) mod send;
pub(crate) mod slots;
pub(crate) mod transport;
pub(crate) mod waiters;

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::engine::config::Config;
use crate::engine::lifecycle::Lifecycle;
use crate::engine::meter::Meter;
use crate::engine::runner::polls::Polls;
use crate::engine::settle::{Settlement, Settler};
use crate::engine::supervise::Panics;
use crate::engine::tasks::channels::UsedChannels;
use crate::engine::telemetry::{Failures, LineLimit};
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::runtime::Runtime;
use crate::status::Status;
use crate::store::Store;

use bodies::{Bodies, Room};
use gate::Gate;
use leases::Leases;
use paused::PausedChannels;
use slots::{NoSlot, Slot, Slots};
use transport::DefaultTransport;
use waiters::Waiters;

/// What a claim may touch. Lives until the last claim and the last handle are gone.
pub(crate) struct Driver {
    pub(crate) config: Config,
    pub(crate) store: Store,
    /// Identifies this engine to other processes, which notify it of outcomes.
    pub(crate) instance: Uuid,
    pub(crate) leases: Arc<Leases>,
    pub(crate) paused: Arc<PausedChannels>,
    pub(crate) waiters: Arc<Waiters>,
    pub(crate) slots: Slots,
    pub(crate) transport: DefaultTransport,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) polls: Arc<Polls>,
    pub(crate) channels: Arc<UsedChannels>,
    pub(crate) meter: Arc<Meter>,
    pub(crate) bodies: Bodies,
    /// Requests whose large body could not be fetched.
    pub(crate) unfetched: Failures,
    /// Requests whose stored content could not be read.
    pub(crate) unusable: Failures,
    /// Bounds the lines about panics in the application's code.
    pub(crate) policy_panics: LineLimit,
    pub(crate) settler: Arc<Settler>,
    /// Notified when this process has started an operation on many requests.
    pub(crate) operation_started: Arc<Notify>,
    /// The settle lane ends once the driver, and with it this sender, is gone.
    settlements: mpsc::UnboundedSender<Settlement>,
    /// Tasks without an end of their own: the driver's end aborts them.
    tasks: Vec<JoinHandle<()>>,
    /// How often the background tasks have panicked.
    pub(crate) panics: Arc<Panics>,
    runtime: Runtime,
}

/// The parts of a [`Driver`] that its tasks share with it.
pub(crate) struct Parts {
    pub(crate) store: Store,
    pub(crate) instance: Uuid,
    pub(crate) leases: Arc<Leases>,
    pub(crate) paused: Arc<PausedChannels>,
    pub(crate) waiters: Arc<Waiters>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) polls: Arc<Polls>,
    pub(crate) channels: Arc<UsedChannels>,
    pub(crate) meter: Arc<Meter>,
    pub(crate) settler: Arc<Settler>,
    pub(crate) settlements: mpsc::UnboundedSender<Settlement>,
    pub(crate) tasks: Vec<JoinHandle<()>>,
    pub(crate) panics: Arc<Panics>,
    pub(crate) runtime: Runtime,
}

impl Driver {
    pub(super) fn new(config: Config, parts: Parts) -> Self {
        Self {
            slots: Slots::new(
                config.concurrency,
                parts.gate,
                Arc::clone(&parts.meter),
                config.max_unsettled_bytes,
            ),
            bodies: Bodies::new(config.max_sending_bytes),
            config,
            store: parts.store,
            instance: parts.instance,
            leases: parts.leases,
            paused: parts.paused,
            waiters: parts.waiters,
            transport: DefaultTransport::default(),
            lifecycle: Lifecycle::new(),
            polls: parts.polls,
            channels: parts.channels,
            meter: parts.meter,
            unfetched: Failures::default(),
            unusable: Failures::default(),
            policy_panics: LineLimit::default(),
            settler: parts.settler,
            operation_started: Arc::default(),
            settlements: parts.settlements,
            tasks: parts.tasks,
            panics: parts.panics,
            runtime: parts.runtime,
        }
    }

    /// Spawns on the engine's runtime.
    pub(crate) fn spawn(
        &self,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        self.runtime.handle().spawn(future)
    }

    /// Spawns a future on the engine's runtime, and returns one that waits for it on any executor.
    pub(crate) fn run<T, F>(&self, future: F) -> impl Future<Output = Result<T, Error>> + use<T, F>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let result = self.runtime.run(future);
        async move {
            result
                .await
                .unwrap_or_else(|| Err(Error::new(Kind::Closed)))
        }
    }

    /// Runs an operation of the store on the engine's runtime, from any executor.
    pub(crate) async fn with_store<T, F>(
        &self,
        operation: impl FnOnce(Store) -> F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        self.ensure_caller_pool()?;
        self.run(operation(self.store.clone())).await
    }

    /// Once the caller's pool is closed, no call is accepted, though the crate's own pool is open.
    pub(crate) fn ensure_caller_pool(&self) -> Result<(), Error> {
        if self.store.caller_pool().is_closed() {
            Err(Error::new(Kind::Closed))
        } else {
            Ok(())
        }
    }

    /// Notes that these requests of these channels were cancelled.
    pub(crate) fn note_cancelled(&self, cancelled: Vec<(RequestId, String)>) {
        for (id, channel) in &cancelled {
            self.meter.ended(channel, Status::Cancelled, 1);
            self.leases.forget(*id);
        }
        // Waiters of this process get the outcome from the database.
        let ids = cancelled.into_iter().map(|(id, _)| id).collect();
        self.waiters.fetch_soon(ids);
    }

    /// A slot for a first attempt by this process, with room for a large body, if it may make one
    /// on this channel now and a client is known: the caller's, or the default transport.
    pub(crate) fn try_inline(
        &self,
        channel: &str,
        destination: &str,
        has_client: bool,
        body: usize,
    ) -> Result<(Slot, Option<Room>), NoSlot> {
        let has_client = has_client || self.transport.is_known();
        if !(self.config.delivers(channel) && self.lifecycle.is_claiming() && has_client) {
            return Err(NoSlot::Busy);
        }
        if self.paused.contains(channel) {
            return Err(NoSlot::Busy);
        }
        let slot = self.slots.try_inline(destination)?;
        let room = if bodies::is_large(body) {
            Some(self.bodies.try_take(body).ok_or(NoSlot::Busy)?)
        } else {
            None
        };
        Ok((slot, room))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("instance", &self.instance)
            .finish_non_exhaustive()
    }
}
