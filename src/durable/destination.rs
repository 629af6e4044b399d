//! Looking at one destination, and opening, closing and limiting it for all processes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Durable;
use crate::destination::{
    DestinationEventKind, DestinationPolicy, DestinationStatus, Report, millis, validate_name,
};
use crate::engine::attempt::gate::Known;
use crate::engine::tasks::destinations::tell;
use crate::error::{Error, Kind};
use crate::store::destinations::StoredDestination;

impl Durable {
    /// A handle for one destination: the scheme, host and port of a URL, such as
    /// `https://api.example.com` or `http://10.0.0.7:8080`, or the caller's limit key.
    ///
    /// Its operations work on what all processes share, from any process, whether or not it delivers.
    /// They reach every process within 2 seconds.
    ///
    /// # Errors
    ///
    /// If the name is neither ([`Error::field`] is `destination`).
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

/// One destination, for all processes. From [`Durable::destination`].
#[derive(Clone, Debug)]
pub struct DestinationHandle {
    name: String,
    durable: Durable,
}

/// What an operation needs to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// A destination that was closed, limited or watched.
    Row,
}

impl DestinationHandle {
    /// The name: scheme, host and port in lower case, or the limit key.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the processes know of the destination. One that was never limited or closed, and has
    /// shown no failures, is [open](crate::DestinationState::Open).
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
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

    /// Sends no request until a time, or until [`resume`](Self::resume) for `None`. Requests that
    /// arrive meanwhile are kept, and no attempt of them is counted. Attempts in flight finish. The
    /// time is how far it lies ahead by this process's clock.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the destination may or may not be paused.
    pub async fn pause(&self, until: impl Into<Option<SystemTime>>) -> Result<(), Error> {
        let length = until.into().map(|until| {
            until
                .duration_since(SystemTime::now())
                .unwrap_or(Duration::ZERO)
        });
        self.change(Needs::Nothing, move |row| {
            let until = length.map(|length| row.now.saturating_add(millis(length)));
            row.state.pause(until, row.now)
        })
        .await
    }

    /// Ends a pause. What waited goes out.
    ///
    /// # Errors
    ///
    /// If nothing is known of the destination ([`Error::is_unknown_destination`]), or the database fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    pub async fn resume(&self) -> Result<(), Error> {
        self.change(Needs::Row, |row| row.state.resume(row.now))
            .await
    }

    /// Sends no request until [`enable`](Self::enable), with a reason that the status shows.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    pub async fn disable(&self, reason: &str) -> Result<(), Error> {
        let reason = reason.to_owned();
        self.change(Needs::Nothing, move |row| {
            row.state.disable(&reason, row.now)
        })
        .await
    }

    /// Enables a disabled destination. What waited goes out, and the failures that disabled it are
    /// forgotten.
    ///
    /// # Errors
    ///
    /// If nothing is known of the destination ([`Error::is_unknown_destination`]), or the database fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    pub async fn enable(&self) -> Result<(), Error> {
        self.change(Needs::Row, |row| row.state.enable(row.now))
            .await
    }

    /// Sets the policy for all processes, in place of the one that their code sets. `None` goes back
    /// to that one.
    ///
    /// # Errors
    ///
    /// If a value is not valid, with its name in [`Error::field`]; then nothing changes. Or if the
    /// database fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    pub async fn set_policy(
        &self,
        policy: impl Into<Option<DestinationPolicy>>,
    ) -> Result<(), Error> {
        let policy = policy.into();
        if let Some(policy) = &policy {
            policy.validate(self.durable.engine().config().attempt_timeout)?;
        }
        let coded = self.durable.engine().config().policies.of(&self.name);
        let rules = policy
            .clone()
            .or_else(|| coded.cloned())
            .unwrap_or_default();
        self.change(Needs::Nothing, move |row| {
            row.policy.clone_from(&policy);
            // Closes a breaker that is gone.
            row.state.apply(&rules, &Report::default(), row.now)
        })
        .await
    }

    /// Forgets what attempts have shown: failures, an open breaker, a pause that `Retry-After` asked
    /// for. A [`pause`](Self::pause) stays, and so does a disabled destination.
    ///
    /// # Errors
    ///
    /// If nothing is known of the destination ([`Error::is_unknown_destination`]), or the database fails.
    ///
    /// # Cancel safety
    ///
    /// As for [`pause`](Self::pause).
    pub async fn reset(&self) -> Result<(), Error> {
        self.change(Needs::Row, |row| row.state.reset(row.now))
            .await
    }

    async fn change(
        &self,
        needs: Needs,
        mut change: impl FnMut(&mut StoredDestination) -> Vec<DestinationEventKind> + Send + 'static,
    ) -> Result<(), Error> {
        let name = self.name.clone();
        let engine = self.durable.engine();
        let gate = Arc::clone(&engine.driver().slots.gate);
        let changed = engine
            .with_store(|store| async move {
                store.verify().await?;
                let mut events = Vec::new();
                let mut found = true;
                let rows = store
                    .change_destinations(&[&name], |row| {
                        found = needs == Needs::Nothing || row.is_noted;
                        if found {
                            events = change(row);
                        }
                        found
                    })
                    .await
                    .map_err(Error::from)?;
                if !found {
                    return Err(Error::new(Kind::UnknownDestination(name.into())));
                }
                // This process knows at once, the others with their next look.
                gate.learn(rows.into_iter().map(Known::from).collect());
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
}
