//! Concurrent callers, which stand for the handlers of an application that make requests.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::peer::AnyError;

/// Spawns `callers` tasks that take the numbers one by one. Returns how long that took.
pub(crate) async fn each<F, T>(
    callers: usize,
    numbers: Range<u64>,
    call: F,
) -> Result<Duration, AnyError>
where
    F: Fn(u64) -> T + Clone + Send + 'static,
    T: Future<Output = Result<(), AnyError>> + Send,
{
    let next = Arc::new(AtomicU64::new(numbers.start));
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..callers {
        let (next, call) = (Arc::clone(&next), call.clone());
        tasks.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= numbers.end {
                    return Ok::<_, AnyError>(());
                }
                call(number).await?;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(began.elapsed())
}
