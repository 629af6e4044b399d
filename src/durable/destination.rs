//! One destination as an operator sees it, and opening, closing and limiting it for all processes.

use std::sync::Arc;
use std::time::SystemTime;

use super::Durable;
use crate::change::Signed;
use crate::destination::{DestinationPolicy, DestinationStatus, validate_name};
use crate::engine::destination_change::DestinationChange;
use crate::engine::tasks::destinations::tell;
use crate::error::Error;

impl Durable {
    /// A handle for one destination: the scheme, host and port of a URL, such as
    /// `https://api.example.com` or `http://10.0.0.7:8080`, or the caller's limit key.
    ///
    /// Its operations change what all processes share. They work from any process, whether or not
    /// it delivers, and reach every process that delivers within 2 seconds.
    ///
    /// # Errors
    ///
    /// If the name is neither, with `destination` in [`Error::field`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// let partner = durable.destination("https://api.example.com")?;
    /// partner.pause(None).await?;
    /// println!("{:?}", partner.status().await?);
    /// partner.resume().await?;
    /// # Ok(()) }
    /// ```
    pub fn destination(&self, name: &str) -> Result<DestinationHandle, Error> {
        Ok(DestinationHandle {
            name: validate_name(name)?,
            durable: self.clone(),
        })
    }
}

/// One destination, as all processes share it. From [`Durable::destination`].
///
/// # Examples
///
/// ```no_run
/// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
/// let tenant = durable.destination("tenant-7")?;
/// if tenant.status().await?.state.is_closed() {
///     tenant.reset().await?;
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct DestinationHandle {
    name: String,
    durable: Durable,
}

impl DestinationHandle {
    /// The name: scheme, host and port in lower case, or the limit key.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What all processes together know of the destination. A destination that was never limited or
    /// closed, and has had no failures, is [open](crate::DestinationState::Open).
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
    /// # async fn example(partner: requeuest::DestinationHandle) -> Result<(), requeuest::Error> {
    /// let status = partner.status().await?;
    /// println!("{}: {} of {} attempts failed", status.state, status.failures, status.attempts);
    /// # Ok(()) }
    /// ```
    pub async fn status(&self) -> Result<DestinationStatus, Error> {
        let name = self.name.clone();
        let row = self
            .durable
            .engine()
            .with_store(|store| async move { store.destination(&name).await })
            .await?;
        let config = self.durable.engine().config();
        let policy = row
            .policy
            .as_ref()
            .or_else(|| config.policies.of(&self.name));
        Ok(row.state.status(&self.name, policy, row.now))
    }

    /// Sends no request until a time, or with `None` until [`resume`](Self::resume). Requests that
    /// arrive meanwhile are kept, and no attempt of them is counted. Attempts in flight finish. The
    /// length of the pause is measured by this process's clock.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the destination may or may not be paused.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::time::{Duration, SystemTime};
    ///
    /// # async fn example(partner: requeuest::DestinationHandle) -> Result<(), requeuest::Error> {
    /// partner.pause(SystemTime::now() + Duration::from_secs(600)).await?;
    /// # Ok(()) }
    /// ```
    pub async fn pause(&self, until: impl Into<Option<SystemTime>>) -> Result<(), Error> {
        self.make(DestinationChange::pause(until.into()), None)
            .await
    }

    /// Ends a pause. The requests that waited are sent.
    ///
    /// # Errors
    ///
    /// If nothing is known of the destination ([`Error::is_unknown_destination`]), or if the
    /// database fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(partner: requeuest::DestinationHandle) -> Result<(), requeuest::Error> {
    /// partner.pause(None).await?;
    /// // The partner's maintenance has ended.
    /// partner.resume().await?;
    /// # Ok(()) }
    /// ```
    pub async fn resume(&self) -> Result<(), Error> {
        self.make(DestinationChange::Resume, None).await
    }

    /// Sends no request until [`enable`](Self::enable). Requests are kept as during a
    /// [`pause`](Self::pause). The status shows the reason.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(partner: requeuest::DestinationHandle) -> Result<(), requeuest::Error> {
    /// partner.disable("the contract has ended").await?;
    /// # Ok(()) }
    /// ```
    pub async fn disable(&self, reason: &str) -> Result<(), Error> {
        let change = DestinationChange::Disable(reason.to_owned());
        self.make(change, None).await
    }

    /// Enables a disabled destination. The requests that waited are sent, and the failures that
    /// disabled it are forgotten.
    ///
    /// # Errors
    ///
    /// If nothing is known of the destination ([`Error::is_unknown_destination`]), or if the
    /// database fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(partner: requeuest::DestinationHandle) -> Result<(), requeuest::Error> {
    /// // The partner has repaired the endpoint.
    /// partner.enable().await?;
    /// # Ok(()) }
    /// ```
    pub async fn enable(&self) -> Result<(), Error> {
        self.make(DestinationChange::Enable, None).await
    }

    /// Sets the policy for all processes, in place of the policy that their code sets. `None`
    /// returns to the policy of their code.
    ///
    /// # Errors
    ///
    /// If a value is not valid, with its name in [`Error::field`], or if the database fails.
    /// Nothing changes then.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::DestinationPolicy;
    ///
    /// # async fn example(partner: requeuest::DestinationHandle) -> Result<(), requeuest::Error> {
    /// partner.set_policy(DestinationPolicy::default().max_concurrency(2)).await?;
    /// // Back to what the code says.
    /// partner.set_policy(None).await?;
    /// # Ok(()) }
    /// ```
    pub async fn set_policy(
        &self,
        policy: impl Into<Option<DestinationPolicy>>,
    ) -> Result<(), Error> {
        let change = self.policy_change(policy.into())?;
        self.make(change, None).await
    }

    /// Forgets what attempts have shown: failures, an open breaker, and a pause that `Retry-After`
    /// asked for. An operator's [`pause`](Self::pause) stays, and a disabled destination stays
    /// disabled.
    ///
    /// # Errors
    ///
    /// If nothing is known of the destination ([`Error::is_unknown_destination`]), or if the
    /// database fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(partner: requeuest::DestinationHandle) -> Result<(), requeuest::Error> {
    /// // The partner is back before the breaker has noticed.
    /// partner.reset().await?;
    /// # Ok(()) }
    /// ```
    pub async fn reset(&self) -> Result<(), Error> {
        self.make(DestinationChange::Reset, None).await
    }

    /// Makes a change, with a record if there is an author.
    pub(crate) async fn make(
        &self,
        change: DestinationChange,
        author: Option<Signed>,
    ) -> Result<(), Error> {
        let name = self.name.clone();
        let engine = self.durable.engine();
        let gate = Arc::clone(&engine.driver().slots.gate);
        let changed = engine
            .with_store(|store| async move {
                let (rows, events) = change.make(&store, &name, author.as_ref()).await?;
                // This process knows at once, the others when they next ask the database.
                gate.learn(rows);
                Ok(events)
            })
            .await?;
        for kind in changed {
            tell(
                engine.config().on_destination_event.as_ref(),
                &self.name,
                kind,
            );
        }
        Ok(())
    }

    /// The change to this policy, if its values are valid.
    pub(crate) fn policy_change(
        &self,
        policy: Option<DestinationPolicy>,
    ) -> Result<DestinationChange, Error> {
        let config = self.durable.engine().config();
        if let Some(policy) = &policy {
            policy.validate(config.attempt_timeout)?;
        }
        let coded = config.policies.of(&self.name);
        let rules = policy.clone().or_else(|| coded.cloned());
        Ok(DestinationChange::SetPolicy {
            policy: policy.map(Box::new),
            rules: Box::new(rules.unwrap_or_default()),
        })
    }
}
