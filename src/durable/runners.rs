//! Listing the runners of all processes.

use super::Durable;
use crate::error::Error;
use crate::health::RunnerInfo;

impl Durable {
    /// The runners that deliver requests of this schema, of all processes, in the order in which
    /// they started. A runner registers when it starts and says every 15 seconds that it is alive.
    /// It is left out after a shutdown at once, and 60 seconds after its process died.
    ///
    /// A channel without a runner is one that no runner lists, and for which none has
    /// [`channels`](RunnerInfo::channels) `None`. Requests in such a channel are given up once
    /// their time is over: see [`FailureClass::NoRunner`](crate::FailureClass::NoRunner).
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// let runners = durable.runners().await?;
    /// if !runners.iter().any(|runner| runner.delivers("emails")) {
    ///     println!("no runner delivers emails");
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn runners(&self) -> Result<Vec<RunnerInfo>, Error> {
        self.engine()
            .with_store(|store| async move { store.runners().await })
            .await
    }
}
