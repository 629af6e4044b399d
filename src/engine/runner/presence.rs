//! A runner's registration, by which other processes know that it delivers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::attempt::Driver;
use crate::engine::telemetry::OwnCondition;
use crate::store::runners::Announcement;

/// How often a runner renews its registration, unless its leases are shorter.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Without a renewal for this long, a runner counts as gone. Long enough for a failover.
const ALIVE_FOR: Duration = Duration::from_secs(60);
/// A shutdown waits no longer than this for the removal of the registration, which expires anyway.
const WITHDRAW_TIMEOUT: Duration = Duration::from_secs(2);

/// Registers a runner, and removes the registration when it is dropped.
pub(super) struct Presence {
    driver: Arc<Driver>,
    host: Option<String>,
    announced: Option<Instant>,
    failing: OwnCondition,
}

impl Presence {
    pub(super) fn new(driver: &Arc<Driver>) -> Self {
        Self {
            driver: Arc::clone(driver),
            host: host(),
            announced: None,
            failing: OwnCondition::default(),
        }
    }

    /// Renews the registration if it is time to. To be called while the runner polls.
    pub(super) async fn announce(&mut self) {
        let interval = self.driver.store.config().lease.min(HEARTBEAT);
        if self.announced.is_some_and(|at| at.elapsed() < interval) {
            return;
        }
        let announcement = Announcement {
            instance: self.driver.instance,
            channels: self.driver.config.deliver.as_deref(),
            host: self.host.as_deref(),
            in_flight: self.driver.leases.all().len(),
            alive_for: ALIVE_FOR,
        };
        match self.driver.store.announce(&announcement).await {
            Ok(()) => {
                self.announced = Some(Instant::now());
                if self.failing.ends() {
                    tracing::info!("the runner is registered again");
                }
            }
            Err(error) => {
                if self.failing.begins() {
                    tracing::warn!(
                        %error,
                        "the runner can't be registered; other processes may take its channels \
                         for undelivered"
                    );
                }
            }
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        if self.announced.is_none() {
            return;
        }
        let driver = Arc::clone(&self.driver);
        // A shutdown closes the connections only after this.
        let counted = driver.lifecycle.count_runner();
        self.driver.spawn(async move {
            let withdrawn = driver.store.withdraw(driver.instance);
            let _ = tokio::time::timeout(WITHDRAW_TIMEOUT, withdrawn).await;
            drop(counted);
        });
    }
}

/// The name of this machine, where it can be had without a call to the system.
pub(crate) fn host() -> Option<String> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let host = host.or_else(|| std::env::var("HOSTNAME").ok());
    let host = host.or_else(|| std::env::var("COMPUTERNAME").ok())?;
    let host = host.trim();
    (!host.is_empty()).then(|| host.to_owned())
}
