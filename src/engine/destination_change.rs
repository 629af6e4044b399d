//! Changing a destination for all processes, as its operator or the application wants.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::change::{Entry, Signed};
use crate::destination::{DestinationEventKind, DestinationPolicy, Report, millis};
use crate::error::{Error, Kind};
use crate::store::Store;
use crate::store::destinations::StoredDestination;

/// What is changed.
#[derive(Clone, Debug)]
pub(crate) enum DestinationChange {
    /// Nothing is sent to it for so long, or until further notice.
    Pause(Option<Duration>),
    Resume,
    Disable(String),
    Enable,
    SetPolicy {
        /// `None`: that of each process's code.
        policy: Option<Box<DestinationPolicy>>,
        /// The policy that applies now.
        rules: Box<DestinationPolicy>,
    },
    Reset,
}

impl DestinationChange {
    /// A pause until then.
    pub(crate) fn pause(until: Option<SystemTime>) -> Self {
        let length = |until: SystemTime| until.duration_since(SystemTime::now());
        Self::Pause(until.map(|until| length(until).unwrap_or_default()))
    }

    /// Whether it changes only a destination of which something is known.
    fn needs_row(&self) -> bool {
        matches!(self, Self::Resume | Self::Enable | Self::Reset)
    }

    fn apply(&self, row: &mut StoredDestination) -> Vec<DestinationEventKind> {
        match self {
            Self::Pause(length) => {
                let until = length.map(|length| row.now.saturating_add(millis(length)));
                row.state.pause(until, row.now)
            }
            Self::Resume => row.state.resume(row.now),
            Self::Disable(reason) => row.state.disable(reason, row.now),
            Self::Enable => row.state.enable(row.now),
            Self::SetPolicy { policy, rules } => {
                row.policy = policy.as_deref().cloned();
                // A breaker that the policy no longer has must not stay open.
                row.state.apply(rules, &Report::default(), row.now)
            }
            Self::Reset => row.state.reset(row.now),
        }
    }

    fn entry(&self, name: &str) -> Entry {
        let (action, detail): (_, Option<Value>) = match self {
            Self::Pause(None) => ("pause_destination", None),
            Self::Pause(Some(length)) => (
                "pause_destination",
                Some(json!({ "for_ms": millis(*length) })),
            ),
            Self::Resume => ("resume_destination", None),
            Self::Disable(reason) => ("disable_destination", Some(json!({ "reason": reason }))),
            Self::Enable => ("enable_destination", None),
            Self::SetPolicy { policy, .. } => {
                ("set_destination_policy", Some(json!({ "policy": policy })))
            }
            Self::Reset => ("reset_destination", None),
        };
        let entry = Entry::new(action, name);
        match detail {
            Some(detail) => entry.detail(&detail),
            None => entry,
        }
    }

    /// Makes the change, with a record if there is an author. Returns the destination as it is now,
    /// and what happened to it.
    pub(crate) async fn make(
        &self,
        store: &Store,
        name: &str,
        author: Option<&Signed>,
    ) -> Result<(Vec<StoredDestination>, Vec<DestinationEventKind>), Error> {
        store.verify().await?;
        let mut events = Vec::new();
        let mut found = true;
        let change = |row: &mut StoredDestination| {
            found = !self.needs_row() || row.is_noted();
            if found {
                events = self.apply(row);
            }
            found
        };
        let rows = match author {
            Some(author) => {
                let entry = self.entry(name);
                store
                    .change_destination_recorded(name, change, author, &entry)
                    .await
            }
            None => store.change_destinations(&[name], change).await,
        };
        let rows = rows.map_err(Error::from)?;
        if !found {
            return Err(Error::new(Kind::UnknownDestination(name.into())));
        }
        Ok((rows, events))
    }
}
