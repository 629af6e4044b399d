//! Changes by an operator, on the record. Without an engine: they work on the store alone.

use std::time::Instant;

use super::backoff::{BusyPause, RETRY_UNKNOWN_FOR};
use super::dead_letters::not_changed;
use crate::change::Signed;
use crate::dead_letter::Resolution;
use crate::error::{Error, Operation};
use crate::id::RequestId;
use crate::store::Store;
use crate::store::dead_letters::ChangeResult;

/// Replays one dead letter. No connection is kept while a transaction holds the ordering key.
///
/// A retry with the same new id finds what the first try did, so a commit without an
/// acknowledgement is no loss.
pub(crate) async fn replay(
    store: &Store,
    old: RequestId,
    author: &Signed,
) -> Result<RequestId, Error> {
    let new = RequestId::generate();
    let mut pause = BusyPause::new();
    let mut unknown_since: Option<Instant> = None;
    loop {
        store.verify().await?;
        match store.replay_recorded(old, new, author).await {
            Ok(ChangeResult::Done) => return Ok(new),
            Ok(ChangeResult::Busy) => {}
            Ok(result) => return Err(not_changed(Operation::Replay, old, result)),
            Err(error) if error.is_unknown() || unknown_since.is_some() => {
                let since = *unknown_since.get_or_insert_with(Instant::now);
                if since.elapsed() > RETRY_UNKNOWN_FOR {
                    // The id by which the caller can look the replay up.
                    return Err(error.into_indeterminate().with_id(new));
                }
            }
            Err(error) => return Err(store.refused(error).await),
        }
        pause.wait().await;
    }
}

/// Records what became of an ambiguous request.
pub(crate) async fn resolve(
    store: &Store,
    id: RequestId,
    resolution: Resolution,
    author: &Signed,
) -> Result<(), Error> {
    let mut pause = BusyPause::new();
    loop {
        match store.resolve_recorded(id, resolution, author).await? {
            ChangeResult::Done => return Ok(()),
            ChangeResult::Busy => pause.wait().await,
            result => return Err(not_changed(Operation::Resolve, id, result)),
        }
    }
}
