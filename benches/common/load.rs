//! Concurrent callers, and the latency of each of their calls.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::AnyError;

/// The result of a number of calls.
pub(crate) struct Measured {
    pub(crate) calls: usize,
    pub(crate) took: Duration,
    /// Sorted; empty if only the total was timed.
    pub(crate) latencies: Vec<Duration>,
}

impl Measured {
    pub(crate) fn total(calls: usize, took: Duration) -> Self {
        Self {
            calls,
            took,
            latencies: Vec::new(),
        }
    }

    pub(crate) fn rate(&self) -> f64 {
        self.calls as f64 / self.took.as_secs_f64()
    }

    /// The latency that this share of the calls doesn't exceed.
    pub(crate) fn percentile(&self, share: f64) -> Option<Duration> {
        percentile(&self.latencies, share)
    }
}

/// Expects sorted latencies.
pub(crate) fn percentile(latencies: &[Duration], share: f64) -> Option<Duration> {
    let last = latencies.len().checked_sub(1)?;
    let place = (last as f64 * share).round() as usize;
    latencies.get(place).copied()
}

/// Sorts the figures. Of an even number of figures, returns the greater of the two middle ones.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

/// Runs `callers` tasks, each making one call after another, that make `count` calls in total.
pub(crate) async fn each<F, T>(callers: usize, count: usize, call: F) -> Result<Measured, AnyError>
where
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = Result<(), AnyError>> + Send,
{
    let keep_going = move |caller, made| {
        let share = count / callers + usize::from(caller < count % callers);
        made < share
    };
    run_callers(callers, keep_going, call).await
}

/// Runs `callers` tasks, each making one call after another, until `time` has passed.
pub(crate) async fn each_for<F, T>(
    callers: usize,
    time: Duration,
    call: F,
) -> Result<Measured, AnyError>
where
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = Result<(), AnyError>> + Send,
{
    let began = Instant::now();
    run_callers(callers, move |_, _| began.elapsed() < time, call).await
}

/// A caller makes calls while `keep_going` returns true for its number and its calls so far.
async fn run_callers<G, F, T>(callers: usize, keep_going: G, call: F) -> Result<Measured, AnyError>
where
    G: Fn(usize, usize) -> bool + Clone + Send + 'static,
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = Result<(), AnyError>> + Send,
{
    let mut running = JoinSet::new();
    let began = Instant::now();
    for caller in 0..callers {
        let (keep_going, call) = (keep_going.clone(), call.clone());
        running.spawn(async move {
            let mut latencies = Vec::new();
            while keep_going(caller, latencies.len()) {
                let started = Instant::now();
                call().await?;
                latencies.push(started.elapsed());
            }
            Ok::<_, AnyError>(latencies)
        });
    }
    let mut latencies = Vec::new();
    while let Some(caller) = running.join_next().await {
        latencies.append(&mut caller??);
    }
    let took = began.elapsed();
    latencies.sort_unstable();
    Ok(Measured {
        calls: latencies.len(),
        took,
        latencies,
    })
}
