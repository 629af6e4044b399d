//! Where the crate's work runs: on the caller's tokio runtime, or on one of its own.
//!
//! Futures that callers await use channels only, so that they work on any executor; whatever needs tokio's timers or
//! sockets is spawned here.

use std::future::Future;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// A tokio runtime to spawn on.
#[derive(Debug)]
pub(crate) struct Home {
    handle: Handle,
    /// Dropped with the home: ends the thread that an own runtime lives on.
    _own: Option<oneshot::Sender<()>>,
}

impl Home {
    /// The current tokio runtime, or a new one on a thread of its own.
    pub(crate) fn find() -> std::io::Result<Self> {
        if let Ok(handle) = Handle::try_current() {
            return Ok(Self { handle, _own: None });
        }
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (own, ended) = oneshot::channel::<()>();
        std::thread::Builder::new()
            .name("requeuest".to_owned())
            .spawn(move || {
                // Ends when the sender is dropped, which is all that it is for.
                let _ = runtime.block_on(ended);
            })?;
        Ok(Self {
            handle,
            _own: Some(own),
        })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Runs a future here and waits for it from any executor. `None` if the runtime has ended.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        self.handle.spawn(future).await.ok()
    }
}

/// Runs one piece of work on a tokio runtime and thread of its own, for callers on any executor. The work goes on if the
/// caller is dropped.
pub(crate) async fn once<T, E, F>(work: impl FnOnce() -> F + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<sqlx::Error> + Send + 'static,
    F: Future<Output = Result<T, E>>,
{
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new()
        .name("requeuest-once".to_owned())
        .spawn(move || {
            let result = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime.block_on(work()),
                Err(error) => Err(sqlx::Error::Io(error).into()),
            };
            // The receiver is gone if the caller is: then nobody wants the result.
            let _ = sender.send(result);
        })
        .map_err(sqlx::Error::Io)?;
    receiver.await.map_err(|_| sqlx::Error::WorkerCrashed)?
}
