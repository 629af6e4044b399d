//! Callers side by side, and how long each of their calls takes.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::AnyError;

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
        percentile(&self.latencies, share)
    }
}

/// Of what is sorted.
pub(crate) fn percentile(latencies: &[Duration], share: f64) -> Option<Duration> {
    let last = latencies.len().checked_sub(1)?;
    let place = (last as f64 * share).round() as usize;
    latencies.get(place).copied()
}

/// Of what is not; of an even number, the greater of the two in the middle.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

/// Has `callers` tasks make `count` calls altogether, each of them one after another.
pub(crate) async fn each<F, T>(callers: usize, count: usize, call: F) -> Result<Measured, AnyError>
where
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = Result<(), AnyError>> + Send,
{
    let goes_on = move |caller, made| {
        let share = count / callers + usize::from(caller < count % callers);
        made < share
    };
    side_by_side(callers, goes_on, call).await
}

/// Has `callers` tasks make calls for so long, each of them one after another.
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
    side_by_side(callers, move |_, _| began.elapsed() < time, call).await
}

/// Each caller goes on while that is so of its number and of how many calls it has made.
async fn side_by_side<G, F, T>(callers: usize, goes_on: G, call: F) -> Result<Measured, AnyError>
where
    G: Fn(usize, usize) -> bool + Clone + Send + 'static,
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = Result<(), AnyError>> + Send,
{
    let mut running = JoinSet::new();
    let began = Instant::now();
    for caller in 0..callers {
        let (goes_on, call) = (goes_on.clone(), call.clone());
        running.spawn(async move {
            let mut latencies = Vec::new();
            while goes_on(caller, latencies.len()) {
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
