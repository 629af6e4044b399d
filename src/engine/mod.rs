//! What drives persisted requests: one engine a handle, and the tasks that belong to it.
//!
//! ```text
//!  fronts ─► enqueue lane ─► attempt ─► settle lane ─► waiters
//!                              ▲            │
//!             sqlxmq's runner ─┘            └─ due again
//! ```
//!
//! [`Engine`] belongs to the handles: it takes requests and shuts down. [`Driver`] belongs to the
//! claims, and lives until the last of them is settled. The tasks hold only parts of the driver
//! that send nothing, so they end with it.

pub(crate) mod attempt;
mod backoff;
mod budget;
mod bulk;
pub(crate) mod changes;
mod config;
pub(crate) mod dead_letters;
pub(crate) mod destination_change;
pub(crate) mod enqueue;
mod keys;
mod lane;
mod lifecycle;
pub(crate) mod meter;
pub(crate) mod runner;
mod settle;
mod supervise;
pub(crate) mod tasks;
mod telemetry;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use self::attempt::gate::{Gate, Rules};
use self::attempt::leases::Leases;
use self::attempt::paused::PausedChannels;
use self::attempt::transport::Transport;
use self::attempt::{Driver, Parts};
use self::budget::Budget;
use self::bulk::BULK_INSERTS;
use self::enqueue::Submission;
use self::keys::BusyKeys;
use self::meter::Meter;
use self::settle::Settler;
use self::supervise::{Panics, supervise};
use crate::error::{Error, Kind};
use crate::health::SweepPart;
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::runtime::Runtime;
use crate::store::Store;
use crate::store::cancel::Cancelled;
use crate::store::hand_over::OutcomeHandler;
use crate::store::outcome::Found;

pub(crate) use self::config::{Config, DestinationObserver};

/// Longer than any statement may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(15);
/// How long after a handle was built its layer may wrap its first service without a warning.
const TRANSPORT_PATIENCE: Duration = Duration::from_secs(10);
/// A shutdown waits no longer than this to give back what is leased of destinations.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// A shutdown waits no longer than this to add what was counted.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a shutdown checks whether everything is settled.
const DRAIN_POLL: Duration = Duration::from_millis(5);

/// What the handles own: the driver, and the ways to give it requests.
#[derive(Debug)]
pub(crate) struct Engine {
    driver: Arc<Driver>,
    submissions: mpsc::UnboundedSender<Submission>,
    /// What bounds the submissions.
    budget: Arc<Budget>,
    busy_keys: Arc<BusyKeys>,
    bulk_permits: Arc<Semaphore>,
    sweep: Arc<tasks::sweep::Health>,
    handler_places: Arc<tasks::hand_over::Places>,
}

impl Engine {
    /// Starts the lanes, and the tasks that look after leases, waiters and old rows.
    pub(crate) fn start(runtime: Runtime, store: Store, mut config: Config) -> Arc<Self> {
        let (instance, leases, waiters, polls) = (
            store.instance(),
            Arc::default(),
            Arc::default(),
            Arc::default(),
        );
        let panics: Arc<Panics> = Arc::default();
        let meter = Arc::new(Meter::new(config.recorder.as_ref()));
        config.on_destination_event = meter.observing(config.on_destination_event.take());
        let settler = Arc::new(Settler::new(
            store.clone(),
            Arc::clone(&panics),
            instance,
            Arc::clone(&leases),
            Arc::clone(&waiters),
            Arc::clone(&polls),
            Arc::clone(&meter),
        ));
        let sweep: Arc<tasks::sweep::Health> = Arc::default();
        let channels: Arc<tasks::channels::UsedChannels> = Arc::default();
        let (submissions, enqueued) = mpsc::unbounded_channel();
        let (settlements, settled) = mpsc::unbounded_channel();
        // The lanes end when their senders are gone. The other tasks have no end of their own.
        let spawn = runtime.handle();
        let enqueuing = enqueue::run(
            store.clone(),
            Arc::clone(&channels),
            Arc::clone(&meter),
            enqueued,
            Arc::clone(&panics),
        );
        spawn.spawn(enqueuing);
        spawn.spawn(Arc::clone(&settler).run(settled));
        let watch = {
            let (store, leases) = (store.clone(), Arc::clone(&leases));
            let waiters = Arc::clone(&waiters);
            move || {
                let (store, leases) = (store.clone(), Arc::clone(&leases));
                tasks::watch::run(store, leases, Arc::clone(&waiters), instance)
            }
        };
        let gate = Gate::new(Rules::of(&config, store.config().lease));
        let paused: Arc<PausedChannels> = Arc::default();
        let look_at_destinations = {
            let (store, gate) = (store.clone(), Arc::clone(&gate));
            let paused = Arc::clone(&paused);
            let tell = config.on_destination_event.clone();
            move || {
                let (store, gate) = (store.clone(), Arc::clone(&gate));
                tasks::destinations::run(store, gate, Arc::clone(&paused), instance, tell.clone())
            }
        };
        let look_at_channels = {
            let (store, channels) = (store.clone(), Arc::clone(&channels));
            move || tasks::channels::run(store.clone(), Arc::clone(&channels))
        };
        let mut tasks = vec![
            spawn.spawn(supervise(Arc::clone(&panics), "watch", watch)),
            spawn.spawn(supervise(Arc::clone(&panics), "channels", look_at_channels)),
            spawn.spawn(supervise(
                Arc::clone(&panics),
                "destinations",
                look_at_destinations,
            )),
        ];
        tasks.extend(upkeep(spawn, &panics, &store, &leases, &sweep, &meter));
        let caller_connections = store.caller_pool().options().get_max_connections();
        let handler_places = tasks::hand_over::Places::new(caller_connections);
        let budget = Budget::new(config.max_queued_requests, config.max_queued_bytes);
        let busy_keys = BusyKeys::new(config.max_key_wait);
        let parts = Parts {
            store,
            instance,
            leases,
            paused,
            waiters,
            gate,
            polls,
            channels,
            meter,
            settler,
            settlements,
            tasks,
            panics,
            runtime,
        };
        let driver = Arc::new(Driver::new(config, parts));
        drive_operations(&driver);
        let engine = Arc::new(Self {
            driver,
            submissions,
            budget: Arc::new(budget),
            busy_keys: Arc::new(busy_keys),
            bulk_permits: Arc::new(Semaphore::new(BULK_INSERTS)),
            sweep,
            handler_places: Arc::new(handler_places),
        });
        engine.measure();
        engine
    }

    /// Starts what measures for the application's recorder, if there is one.
    fn measure(self: &Arc<Self>) {
        if self.driver.meter.is_told() {
            let measuring = tasks::measure::run(Arc::downgrade(self));
            self.driver.spawn(measuring);
        }
    }

    pub(crate) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    pub(crate) fn config(&self) -> &Config {
        &self.driver.config
    }

    pub(crate) fn store(&self) -> &Store {
        &self.driver.store
    }

    /// How the sweep of old rows fares.
    pub(crate) fn sweep_parts(&self) -> Vec<SweepPart> {
        self.sweep.parts()
    }

    /// Sets the default transport unless one is set. Returns whether it was set.
    pub(crate) fn offer_transport(&self, transport: impl FnOnce() -> Transport) -> bool {
        self.driver.transport.offer(transport)
    }

    /// Warns if no transport is offered for a while: the runner waits for it.
    pub(crate) fn expect_transport(&self) {
        let driver = Arc::downgrade(&self.driver);
        self.driver.spawn(async move {
            tokio::time::sleep(TRANSPORT_PATIENCE).await;
            let Some(driver) = driver.upgrade() else {
                return;
            };
            if !driver.transport.is_known() && !driver.lifecycle.is_closing() {
                tracing::warn!(
                    channel = &*driver.config.channel,
                    "the layer has wrapped no service yet, and until it does this handle delivers \
                     nothing; apply the layer, or set DurableBuilder::transport or runner(false)"
                );
            }
        });
    }

    /// Notes that requests were persisted in these channels, for runners to claim.
    pub(crate) fn left_to_runners<'a>(&self, channels: impl IntoIterator<Item = &'a Arc<str>>) {
        self.driver.channels.note(channels);
    }

    /// Refuses new requests after a shutdown, and once the caller's pool is closed.
    pub(crate) fn ensure_open(&self) -> Result<(), Error> {
        self.ensure_not_closing()?;
        self.driver.ensure_caller_pool()
    }

    /// Refuses new requests after a shutdown.
    pub(crate) fn ensure_not_closing(&self) -> Result<(), Error> {
        if self.driver.lifecycle.is_closing() {
            Err(Error::new(Kind::Closed))
        } else {
            Ok(())
        }
    }

    /// Spawns a future on the engine's runtime, and returns one that waits for it on any executor.
    pub(crate) fn run<T, F>(&self, future: F) -> impl Future<Output = Result<T, Error>> + use<T, F>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        self.driver.run(future)
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
        self.driver.with_store(operation).await
    }

    /// Waits for the outcome of a request, wherever it is driven.
    pub(crate) async fn outcome(&self, id: RequestId) -> Result<Outcome, Error> {
        let driver = &self.driver;
        // Subscribed before asking, or the outcome could come in between.
        let waiter = driver.waiters.subscribe(id, None, None);
        let found = self
            .with_store(|store| async move { store.find_one(id).await })
            .await?;
        match found {
            Found::Finished(outcome) => Ok(*outcome),
            Found::Pending => {
                let elsewhere = !driver.leases.is_driven(id);
                if elsewhere {
                    let instance = driver.instance;
                    let watched = self
                        .with_store(|store| async move { store.watch(id, instance).await })
                        .await;
                    // A role that only reads can't be told, and looks once a second anyway.
                    if let Err(error) = watched {
                        if !error.is_forbidden() {
                            return Err(error);
                        }
                    }
                }
                waiter.arm(elsewhere);
                waiter.await
            }
            Found::Unreadable(unreadable) => Err(Error::from(unreadable).with_id(id)),
            // One outcome alone is always fetched.
            Found::Unknown | Found::Unfetched => Err(Error::new(Kind::UnknownId).with_id(id)),
        }
    }

    /// Cancels a request. `false` if it had finished already.
    pub(crate) async fn cancel(&self, id: RequestId) -> Result<bool, Error> {
        let cancelled = self
            .with_store(|store| async move { store.cancel(id).await })
            .await?;
        match cancelled {
            Cancelled::Now(channel) => {
                self.driver.note_cancelled(vec![(id, channel)]);
                Ok(true)
            }
            Cancelled::Finished => Ok(false),
            Cancelled::Unknown => Err(Error::new(Kind::UnknownId).with_id(id)),
        }
    }

    /// Cancels every unfinished request of these channels, or of all channels for `None`.
    pub(crate) async fn cancel_channels(&self, channels: Option<Vec<String>>) -> Result<(), Error> {
        let channels = channels.map(Arc::<[String]>::from);
        loop {
            let channels = channels.clone();
            let (cancelled, more) = self
                .with_store(|store| async move { store.cancel_channels(channels.as_deref()).await })
                .await?;
            self.driver.note_cancelled(cancelled);
            if !more {
                return Ok(());
            }
        }
    }

    /// Hands the outcomes of a channel to a handler until the task is aborted.
    pub(crate) async fn subscribe_outcomes(
        &self,
        channel: Arc<str>,
        handler: impl OutcomeHandler,
    ) -> Result<JoinHandle<()>, Error> {
        let name = Arc::clone(&channel);
        self.with_store(|store| async move { store.register_handler(&name).await })
            .await?;
        let (driver, handler) = (Arc::clone(&self.driver), Arc::new(handler));
        let places = Arc::clone(&self.handler_places);
        let hand_over = move || {
            let (driver, handler) = (Arc::clone(&driver), Arc::clone(&handler));
            tasks::hand_over::run(driver, Arc::clone(&places), Arc::clone(&channel), handler)
        };
        let panics = Arc::clone(&self.driver.panics);
        Ok(self.driver.spawn(supervise(panics, "hand over", hand_over)))
    }

    /// Refuses new requests and claims, waits for the attempts in flight, then gives them back:
    /// requests that weren't being sent at once, the others as failed attempts.
    pub(crate) async fn shutdown(self: Arc<Self>, grace: Duration) -> Result<(), Error> {
        let driver = &self.driver;
        driver.lifecycle.close();
        let attempts = async {
            if !self.drained(grace).await {
                driver.lifecycle.stop();
            }
        };
        // Each runner's end is bounded. The claims of its last poll are known by then, and on their
        // way back.
        tokio::join!(attempts, driver.lifecycle.runners_ended());
        // Other processes would wait for the leases no longer than this.
        self.drained(driver.store.config().lease).await;
        driver.waiters.close();
        if driver.slots.gate.close() {
            // The permits would expire with their leases, and other processes would wait for that.
            let released = driver.store.release_destinations(driver.instance);
            let _ = tokio::time::timeout(RELEASE_TIMEOUT, released).await;
        }
        let counted = async {
            tasks::activity::flush(&driver.store, &driver.meter).await;
            if driver.meter.is_told() {
                // Another process looks at the queue from now on.
                let _ = driver.store.leave_queue(driver.instance).await;
            }
        };
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, counted).await;
        driver.store.close(CLOSE_TIMEOUT).await;
        tracing::info!("the engine has shut down");
        Ok(())
    }

    async fn drained(&self, within: Duration) -> bool {
        let drained = async {
            while !self.driver.leases.is_empty() {
                tokio::time::sleep(DRAIN_POLL).await;
            }
        };
        tokio::time::timeout(within, drained).await.is_ok()
    }
}

/// Starts the tasks that look after stored rows, which need little of the driver.
fn upkeep(
    spawn: &Handle,
    panics: &Arc<Panics>,
    store: &Store,
    leases: &Arc<Leases>,
    sweep: &Arc<tasks::sweep::Health>,
    meter: &Arc<Meter>,
) -> [JoinHandle<()>; 3] {
    let renew = {
        let (store, leases) = (store.clone(), Arc::clone(leases));
        move || tasks::renew::run(store.clone(), Arc::clone(&leases))
    };
    let sweep_rows = {
        let (store, sweep, meter) = (store.clone(), Arc::clone(sweep), Arc::clone(meter));
        move || tasks::sweep::run(store.clone(), Arc::clone(&sweep), Arc::clone(&meter))
    };
    let note_activity = {
        let (store, meter) = (store.clone(), Arc::clone(meter));
        move || tasks::activity::run(store.clone(), Arc::clone(&meter))
    };
    [
        spawn.spawn(supervise(Arc::clone(panics), "renew", renew)),
        spawn.spawn(supervise(Arc::clone(panics), "sweep", sweep_rows)),
        spawn.spawn(supervise(Arc::clone(panics), "activity", note_activity)),
    ]
}

/// Drives operations on many requests while this process has a runner. The task ends by itself.
fn drive_operations(driver: &Arc<Driver>) {
    let (weak, started) = (
        Arc::downgrade(driver),
        Arc::clone(&driver.operation_started),
    );
    let run = move || tasks::operations::run(weak.clone(), Arc::clone(&started));
    driver.spawn(supervise(Arc::clone(&driver.panics), "operations", run));
}
