//! Changes of one dead letter, or of an ordering key, on the record.

use sqlx::PgConnection;

use super::dead_letters::{ChangeResult, purge, replay, replay_sealed, resolve, resume};
use super::{Store, StoreError};
use crate::change::{Entry, Signed};
use crate::dead_letter::Resolution;
use crate::error::Error;
use crate::id::RequestId;

impl Store {
    /// Replays a dead letter under a new id.
    pub(crate) async fn replay_recorded(
        &self,
        old: RequestId,
        new: RequestId,
        author: &Signed,
    ) -> Result<ChangeResult, StoreError> {
        let bytes = self.config().max_request_body;
        self.recorded_large("recorded.replay", bytes, author, async |connection| {
            let result = self.replay_in(connection, old, new).await?;
            let detail = serde_json::json!({ "new": new });
            let entry = Entry::new("replay", old.to_string()).detail(&detail);
            Ok(with_entry(result, entry))
        })
        .await
    }

    /// Replays a dead letter, encrypted or not, in a transaction.
    async fn replay_in(
        &self,
        connection: &mut PgConnection,
        old: RequestId,
        new: RequestId,
    ) -> Result<ChangeResult, sqlx::Error> {
        let retention = self.config().retention;
        let (replayed, sealed) = replay(connection, &[(old, new)], retention).await?;
        match replayed.into_iter().next() {
            Some((_, _, result)) if sealed.is_empty() => Ok(result),
            _ => replay_sealed(connection, old, new, retention, self.sealer()).await,
        }
    }

    /// Records whether an ambiguous request was sent.
    pub(crate) async fn resolve_recorded(
        &self,
        id: RequestId,
        resolution: Resolution,
        author: &Signed,
    ) -> Result<ChangeResult, Error> {
        let retention = self.config().retention;
        self.recorded_verified("recorded.resolve", author, async |connection| {
            let result = resolve(connection, id, resolution, None, retention).await?;
            let detail = serde_json::json!({ "sent": resolution == Resolution::Sent });
            let entry = Entry::new("resolve", id.to_string()).detail(&detail);
            Ok(with_entry(result, entry))
        })
        .await
    }

    /// Deletes a dead letter. Returns whether there was one.
    pub(crate) async fn purge_recorded(
        &self,
        id: RequestId,
        author: &Signed,
    ) -> Result<bool, Error> {
        self.recorded_verified("recorded.purge", author, async |connection| {
            let purged = purge(connection, &[id]).await? > 0;
            Ok((purged, purged.then(|| Entry::new("purge", id.to_string()))))
        })
        .await
    }

    /// Releases an ordering key from the dead letter that halts it. Returns whether one did.
    pub(crate) async fn release_key_recorded(
        &self,
        channel: &str,
        group: &str,
        key: &str,
        author: &Signed,
    ) -> Result<bool, Error> {
        self.recorded_verified("recorded.release_key", author, async |connection| {
            let released = resume(connection, channel, group).await?;
            let detail = serde_json::json!({ "key": key });
            let entry = || Entry::new("release_key", channel).detail(&detail);
            Ok((released, released.then(entry)))
        })
        .await
    }
}

/// Only what was done is recorded.
fn with_entry(result: ChangeResult, entry: Entry) -> (ChangeResult, Option<Entry>) {
    let is_done = result == ChangeResult::Done;
    (result, is_done.then_some(entry))
}
