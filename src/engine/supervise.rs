//! Long-lived tasks begin again after a panic.
//!
//! A panic would be a fault of this crate. It must not end the renewal of leases, or a lane, for
//! as long as the process lives, and unnoticed. It is logged without its message, which may show
//! what the task worked on.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::engine::telemetry::LineLimit;
use crate::health::BackgroundTask;
use crate::runtime::caught;

/// The pause before a task begins again. It doubles while the task keeps panicking.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// How often each task has panicked.
#[derive(Debug, Default)]
pub(crate) struct Panics {
    tasks: Mutex<Vec<BackgroundTask>>,
    lines: LineLimit,
}

impl Panics {
    /// The tasks that have begun.
    pub(crate) fn tasks(&self) -> Vec<BackgroundTask> {
        self.tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Counts and logs a panic of this task.
    pub(crate) fn note(&self, task: &'static str) {
        let panics = self.add(task, 1);
        if self.lines.allows(task).is_some() {
            tracing::error!(task, panics, "a background task panicked");
        }
    }

    fn add(&self, name: &'static str, panics: u64) -> u64 {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = tasks.iter_mut().find(|task| task.name == name) {
            task.panics += panics;
            return task.panics;
        }
        tasks.push(BackgroundTask { name, panics });
        panics
    }

    /// The result of the work. `None` if it panicked, which is noted.
    pub(crate) async fn catch<T>(
        &self,
        task: &'static str,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let result = caught(pin!(work)).await;
        result.inspect_err(|_| self.note(task)).ok()
    }

    /// As [`catch`](Self::catch), for work that doesn't wait.
    pub(crate) fn catch_now<T>(&self, task: &'static str, work: impl FnOnce() -> T) -> Option<T> {
        let result = catch_unwind(AssertUnwindSafe(work));
        result.inspect_err(|_| self.note(task)).ok()
    }
}

/// Runs a task until it ends, from the beginning after each panic.
pub(crate) async fn supervise<F: Future<Output = ()>>(
    panics: Arc<Panics>,
    name: &'static str,
    mut task: impl FnMut() -> F,
) {
    let mut restarts = Restarts::new(&panics, name);
    while panics.catch(name, task()).await.is_none() {
        restarts.pause().await;
    }
}

/// The pauses of one task between its panics and its beginnings.
pub(crate) struct Restarts {
    pause: Duration,
    began: Instant,
}

impl Restarts {
    /// Of a task that begins.
    pub(crate) fn new(panics: &Panics, task: &'static str) -> Self {
        panics.add(task, 0);
        Self {
            pause: PAUSE_MIN,
            began: Instant::now(),
        }
    }

    pub(crate) async fn pause(&mut self) {
        if self.began.elapsed() > PAUSE_MAX {
            self.pause = PAUSE_MIN;
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.began = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_counted_and_begins_again() {
        let panics = Arc::new(Panics::default());
        let runs = AtomicUsize::new(0);
        let began = Instant::now();
        supervise(Arc::clone(&panics), "sweep", || async {
            tokio::task::yield_now().await;
            assert!(runs.fetch_add(1, Ordering::SeqCst) > 2, "hunter2");
        })
        .await;
        assert_eq!(began.elapsed().as_millis() / 100, 1 + 2 + 4);
        let [task] = &panics.tasks()[..] else {
            panic!("{panics:?}");
        };
        assert_eq!((task.name, task.panics), ("sweep", 3));
        assert!(panics.catch_now("sweep", || panic!("hunter2")).is_none());
        assert_eq!(panics.catch_now("other", || 1), Some(1));
        assert_eq!(panics.tasks()[0].panics, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_are_bounded_and_short_again_after_a_calm_time() {
        let mut restarts = Restarts::new(&Panics::default(), "sweep");
        for _ in 0..20 {
            restarts.pause().await;
        }
        let began = Instant::now();
        restarts.pause().await;
        assert_eq!(began.elapsed(), PAUSE_MAX);
        tokio::time::sleep(2 * PAUSE_MAX).await;
        let began = Instant::now();
        restarts.pause().await;
        assert_eq!(began.elapsed(), PAUSE_MIN);
    }
}
