//! An examination of the database, for its operator.

use super::Admin;
use crate::error::Error;
use crate::finding::Finding;

impl Admin {
    /// Examines the database, and says what to do: the schema and its version, the rights of the
    /// role, clocks, notifications and advisory locks, requests that wait and why, dead rows and
    /// what keeps them, long transactions, indexes, room for locks and connections, settings.
    ///
    /// There is at least one finding of each [`Check`](crate::admin::Check), in their order: what
    /// is fine is [`Severity::Ok`](crate::admin::Severity::Ok), and what the role may not see is a
    /// [`Severity::Note`](crate::admin::Severity::Note). A role that only reads is enough for most
    /// checks, and `pg_monitor` shows the sessions of other roles. It changes nothing.
    ///
    /// Each check looks at a bounded number of rows and has a limit of 6 seconds. It takes up to
    /// three connections for a moment, with the settings of the role and not with those of a
    /// handle.
    ///
    /// # Errors
    ///
    /// If the database can't be reached. A check that fails is a finding.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// use requeuest::admin::Severity;
    ///
    /// for finding in admin.doctor().await? {
    ///     println!("{:8} {:18} {}", finding.severity, finding.check, finding.summary);
    ///     if let Some(advice) = finding.advice.filter(|_| finding.severity > Severity::Note) {
    ///         println!("{:28}{advice}", "");
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn doctor(&self) -> Result<Vec<Finding>, Error> {
        self.with_store(|store| async move { store.doctor().await })
            .await
    }
}
