//! Where the crate's work runs: on the caller's tokio runtime, or on one of its own.
//!
//! Futures that callers await use channels only, so they work on any executor. Work that needs
//! tokio's timers or sockets is spawned here.

use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::Poll;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::redact::panic_text;

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A tokio runtime to spawn on.
#[derive(Debug)]
pub(crate) struct Runtime {
    handle: Handle,
    /// Dropping this ends the thread of a runtime of the crate's own.
    _own: Option<oneshot::Sender<()>>,
}

impl Runtime {
    /// The current tokio runtime, or a new one on a thread of its own.
    pub(crate) fn find() -> io::Result<Self> {
        if let Ok(handle) = Handle::try_current() {
            return Ok(Self { handle, _own: None });
        }
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (own, ended) = oneshot::channel::<()>();
        std::thread::Builder::new()
            .name("requeuest".to_owned())
            .spawn(move || {
                // Ends when the sender is dropped: nothing is ever sent.
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

    /// Spawns a future on this runtime, and returns one that waits for it on any executor. `None`
    /// if the runtime has ended.
    ///
    /// Not an `async fn`, whose future would keep room for the one that it spawns.
    pub(crate) fn run<T, F>(&self, future: F) -> impl Future<Output = Option<T>> + use<T, F>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let task = self.handle.spawn(future);
        async move { task.await.ok() }
    }
}

/// Runs work on a tokio runtime and thread of its own, for callers on any executor. The work
/// continues if the caller is dropped.
///
/// # Errors
///
/// If the thread or the runtime can't be started, or the work panics.
pub(crate) async fn once<T, F>(work: impl FnOnce() -> F + Send + 'static) -> io::Result<T>
where
    T: Send + 'static,
    F: Future<Output = T>,
{
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new()
        .name("requeuest-once".to_owned())
        .spawn(move || {
            let result = Builder::new_current_thread()
                .enable_all()
                .build()
                .map(|runtime| runtime.block_on(work()));
            // Without a receiver the caller was dropped.
            let _ = sender.send(result);
        })?;
    receiver
        .await
        .unwrap_or_else(|_| Err(io::Error::other("the work panicked")))
}

/// Runs code that may panic: the application's, or a task that must not end. A panic ends the
/// future, with its text as the error, and nothing else of the task.
pub(crate) async fn caught<F: Future + Unpin>(mut future: F) -> Result<F::Output, String> {
    poll_fn(|cx| {
        // What a panic leaves behind is dropped, and not used again.
        match catch_unwind(AssertUnwindSafe(|| Pin::new(&mut future).poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(panic_text(&*panic))),
        }
    })
    .await
}
