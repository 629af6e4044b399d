//! What the fleet has done lately.

use super::Admin;
use crate::activity::{Activity, Window};
use crate::error::Error;

impl Admin {
    /// What all processes have done in the last hour or day: a point for each minute, or for each
    /// ten minutes, in total and by channel. The numbers are approximate: see [`Activity`].
    ///
    /// It takes one statement, which reads a bounded number of rows. Processes add their counts
    /// every ten seconds, so there is no point in asking more often.
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
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// use requeuest::admin::Window;
    ///
    /// for minute in admin.activity(Window::Hour).await?.points {
    ///     println!("{} of {} attempts failed", minute.failed_attempts, minute.attempts);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn activity(&self, window: Window) -> Result<Activity, Error> {
        self.with_store(|store| async move { store.activity(window).await })
            .await
    }
}
