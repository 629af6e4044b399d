//! Drives operations on many requests, in each process with a runner.
//!
//! Each chunk is a transaction of the store, which locks its operation. So processes take turns,
//! and none has to take over from another.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use uuid::Uuid;

use crate::engine::attempt::Driver;
use crate::engine::telemetry::OwnCondition;
use crate::store::operations::Driven;

/// How often operations are looked for that another process has started.
const INTERVAL: Duration = Duration::from_secs(1);
/// How soon an operation that is due is looked at again while another process works at it.
const TAKEN_PAUSE: Duration = Duration::from_millis(100);
/// How many requests a chunk changes.
const CHUNK: usize = 200;
/// After how long an operation that this process couldn't drive is looked at again.
const LEFT_FOR: Duration = Duration::from_secs(60);

/// Runs until the driver is gone.
pub(crate) async fn run(driver: Weak<Driver>, started: Arc<Notify>) {
    let mut operations = Operations {
        chunk: CHUNK,
        left: HashMap::new(),
        failing: OwnCondition::default(),
    };
    let mut pause = INTERVAL;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = started.notified() => {}
        }
        let Some(driver) = driver.upgrade() else {
            return;
        };
        pause = if driver.lifecycle.is_claiming() {
            operations.step(&driver).await
        } else {
            INTERVAL
        };
    }
}

struct Operations {
    /// How many requests the next chunk changes. Fewer after a chunk that took too long.
    chunk: usize,
    /// Operations that this process can't drive, and since when.
    left: HashMap<Uuid, Instant>,
    failing: OwnCondition,
}

impl Operations {
    /// Makes one chunk. Returns how long to wait until the next one.
    async fn step(&mut self, driver: &Driver) -> Duration {
        self.left.retain(|_, since| since.elapsed() < LEFT_FOR);
        let left: Vec<Uuid> = self.left.keys().copied().collect();
        match driver.store.drive_operation(&left, self.chunk).await {
            Ok(driven) => {
                if self.failing.ends() {
                    tracing::info!("operations on many requests continue");
                }
                self.chunk = (self.chunk * 2).min(CHUNK);
                match driven {
                    Driven::Nothing(next) => next.unwrap_or(INTERVAL).clamp(TAKEN_PAUSE, INTERVAL),
                    Driven::Chunk(ended) => {
                        driver.note_cancelled(ended);
                        Duration::ZERO
                    }
                    Driven::NotReadable(id) | Driven::NeedsKeys(id) => {
                        self.left.insert(id.into(), Instant::now());
                        Duration::ZERO
                    }
                }
            }
            Err(error) => {
                self.chunk = (self.chunk / 4).max(1);
                // A shutdown closes the pool.
                if !driver.lifecycle.is_closing() && self.failing.begins() {
                    tracing::warn!(%error, "operations on many requests can't continue yet");
                }
                INTERVAL
            }
        }
    }
}
