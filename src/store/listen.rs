//! Listening for outcomes that other processes settle. A notification is a hint, never the truth.

use sqlx::postgres::PgListener;
use uuid::Uuid;

use super::Store;
use super::outcome::notification_channel;
use crate::id::RequestId;

/// A connection that listens for finished requests. It is held until the listener is dropped.
#[derive(Debug)]
pub(crate) struct OutcomeListener(PgListener);

impl Store {
    /// Listens for requests that this instance waits for. `None` if the database can't be reached.
    pub(crate) async fn listen(&self, instance: Uuid) -> Option<OutcomeListener> {
        let db = self.db();
        db.follow();
        let mut listener = PgListener::connect_with(db.pool()).await.ok()?;
        let own = notification_channel(instance);
        let all = notification_channel(Uuid::nil());
        let listening = listener.listen_all([own.as_str(), all.as_str()]).await;
        // A standby accepts no LISTEN.
        listening.inspect_err(|error| db.note_failure(error)).ok()?;
        Some(OutcomeListener(listener))
    }
}

impl OutcomeListener {
    /// The requests that the next notification names, or `None` if the listener must be replaced.
    pub(crate) async fn next(&mut self) -> Option<Vec<RequestId>> {
        let notification = self.0.recv().await.ok()?;
        Some(notified_ids(notification.payload()))
    }
}

/// The ids in a notification's payload. Anything else is left out, because any session may notify.
fn notified_ids(payload: &str) -> Vec<RequestId> {
    payload
        .split(',')
        .filter_map(|id| id.parse().ok())
        .collect()
}
