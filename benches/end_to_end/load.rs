//! Callers side by side, and how long each of their calls takes.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::AnyError;

/// What came of a number of calls.
pub(crate) struct Measured {
    pub(crate) calls: usize,
    pub(crate) took: Duration,
    /// Sorted; empty where only the whole was timed.
    pub(crate) latencies: Vec<Duration>,
}

impl Measured {
    pub(crate) fn whole(calls: usize, took: Duration) -> Self {
        Self {
            calls,
            took,
            latencies: Vec::new(),
        }
    }

    pub(crate) fn rate(&self) -> f64 {
        self.calls as f64 / self.took.as_secs_f64()
    }

    /// The latency that so large a share of the calls doesn't exceed.
    pub(crate) fn percentile(&self, share: f64) -> Option<Duration> {
        let last = self.latencies.len().checked_sub(1)?;
        let place = (last as f64 * share).round() as usize;
        self.latencies.get(place).copied()
    }
}

/// Has `callers` tasks make `count` calls altogether, each of them one after another.
pub(crate) async fn each<F, T>(callers: usize, count: usize, call: F) -> Result<Measured, AnyError>
where
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = Result<(), AnyError>> + Send,
{
    let mut running = JoinSet::new();
    let began = Instant::now();
    for caller in 0..callers {
        let call = call.clone();
        let share = count / callers + usize::from(caller < count % callers);
        running.spawn(async move {
            let mut latencies = Vec::with_capacity(share);
            for _ in 0..share {
                let started = Instant::now();
                call().await?;
                latencies.push(started.elapsed());
            }
            Ok::<_, AnyError>(latencies)
        });
    }
    let mut latencies = Vec::with_capacity(count);
    while let Some(caller) = running.join_next().await {
        latencies.append(&mut caller??);
    }
    let took = began.elapsed();
    latencies.sort_unstable();
    Ok(Measured {
        calls: count,
        took,
        latencies,
    })
}
