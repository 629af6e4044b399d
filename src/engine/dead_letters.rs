//! Replaying, purging and resolving dead letters, a batch at a time.

use std::sync::Arc;
use std::time::Instant;

use super::attempt::Driver;
use super::backoff::{BusyPause, RETRY_UNKNOWN_FOR};
use crate::dead_letter::{Resolution, Wanted};
use crate::error::{Error, Kind, Operation};
use crate::id::RequestId;
use crate::store::Store;
use crate::store::dead_letters::{ChangeResult, Page, Replayed};

/// How many requests one statement replays.
const REPLAY_BATCH: u32 = 100;
/// How many requests one statement purges.
const PURGE_BATCH: u32 = 500;

/// Replays one dead letter. No connection is kept while a transaction holds the ordering key.
pub(crate) async fn replay_one(driver: Arc<Driver>, old: RequestId) -> Result<RequestId, Error> {
    let new = RequestId::generate();
    let mut pause = BusyPause::new();
    loop {
        let replayed = replay_batch(&driver, &[(old, new)]).await;
        let replayed = replayed.map_err(|error| {
            // The id by which the caller can look the replay up.
            if error.is_indeterminate() {
                error.with_id(new)
            } else {
                error
            }
        })?;
        match replayed.first() {
            Some((_, _, ChangeResult::Done)) => return Ok(new),
            Some((_, _, ChangeResult::Busy)) => pause.wait().await,
            Some((_, _, result)) => {
                return Err(not_changed(Operation::Replay, old, result.clone()));
            }
            None => return Err(Error::new(Kind::UnknownId).with_id(old)),
        }
    }
}

/// Replays a batch. A retry with the same new ids finds what the first try did, so a commit without
/// an acknowledgement is no loss.
async fn replay_batch(
    driver: &Driver,
    pairs: &[(RequestId, RequestId)],
) -> Result<Vec<Replayed>, Error> {
    let store = &driver.store;
    let mut pause = BusyPause::new();
    let mut unknown_since: Option<Instant> = None;
    loop {
        driver.ensure_caller_pool()?;
        store.verify().await?;
        match store.replay(pairs).await {
            Ok(replayed) => return Ok(replayed),
            Err(error) if error.is_unknown() || unknown_since.is_some() => {
                let since = *unknown_since.get_or_insert_with(Instant::now);
                if since.elapsed() > RETRY_UNKNOWN_FOR {
                    return Err(error.into_indeterminate());
                }
            }
            Err(error) => return Err(store.refused(error).await),
        }
        pause.wait().await;
    }
}

/// Replays all dead letters that match. Returns the new ids, or an error with the new ids of those
/// that were replayed before it.
pub(crate) async fn replay_all(
    driver: Arc<Driver>,
    wanted: Wanted,
) -> Result<Vec<RequestId>, Error> {
    let mut all = Vec::new();
    match replay_pages(&driver, wanted, &mut all).await {
        Ok(()) => Ok(all),
        Err(error) => Err(error.with_replayed(all)),
    }
}

async fn replay_pages(
    driver: &Arc<Driver>,
    wanted: Wanted,
    all: &mut Vec<RequestId>,
) -> Result<(), Error> {
    let mut pages = Pages::begin(driver, wanted, REPLAY_BATCH).await?;
    while let Some(ids) = pages.next(driver).await? {
        let pairs: Vec<_> = ids.iter().map(|id| (*id, RequestId::generate())).collect();
        for (old, new, result) in replay_batch(driver, &pairs).await? {
            match result {
                ChangeResult::Done => all.push(new),
                ChangeResult::Busy => match replay_one(Arc::clone(driver), old).await {
                    Ok(new) => all.push(new),
                    Err(error)
                        if error.is_wrong_state()
                            || error.is_unknown_id()
                            || error.is_order_conflict() => {}
                    Err(error) => return Err(error),
                },
                // Another call was quicker, the stored request is gone or can't be read, or its
                // ordering key belongs to another channel for now.
                ChangeResult::WrongState(_)
                | ChangeResult::Gone
                | ChangeResult::Unreadable(_)
                | ChangeResult::Elsewhere(_) => {}
            }
        }
    }
    Ok(())
}

/// Purges all dead letters that match. Returns how many there were, or an error with the number of
/// those that were deleted before it.
pub(crate) async fn purge(driver: Arc<Driver>, wanted: Wanted) -> Result<u64, Error> {
    let mut purged = 0;
    match purge_pages(&driver, wanted, &mut purged).await {
        Ok(()) => Ok(purged),
        Err(error) => Err(error.with_purged(purged)),
    }
}

async fn purge_pages(driver: &Driver, wanted: Wanted, purged: &mut u64) -> Result<(), Error> {
    let mut pages = Pages::begin(driver, wanted, PURGE_BATCH).await?;
    while let Some(ids) = pages.next(driver).await? {
        driver.ensure_caller_pool()?;
        *purged += driver.store.purge(&ids).await?;
    }
    Ok(())
}

/// The dead letters of a filter, a batch at a time.
struct Pages {
    page: Page,
    /// How many may still come.
    left: u32,
    batch: u32,
}

impl Pages {
    async fn begin(driver: &Driver, wanted: Wanted, batch: u32) -> Result<Self, Error> {
        driver.ensure_caller_pool()?;
        let now = driver.store.now().await?;
        Ok(Self {
            left: wanted.limit.unwrap_or(u32::MAX),
            page: Page {
                wanted,
                now,
                limit: batch,
            },
            batch,
        })
    }

    async fn next(&mut self, driver: &Driver) -> Result<Option<Vec<RequestId>>, Error> {
        self.page.limit = self.batch.min(self.left);
        if self.page.limit == 0 {
            return Ok(None);
        }
        driver.ensure_caller_pool()?;
        let letters = driver.store.dead_letter_ids(&self.page).await?;
        if self.left != u32::MAX {
            let found = u32::try_from(letters.len()).unwrap_or(self.left);
            self.left -= found.min(self.left);
        }
        self.page.wanted.after = letters.last().copied();
        let ids: Vec<_> = letters.into_iter().map(|letter| letter.id).collect();
        Ok((!ids.is_empty()).then_some(ids))
    }
}

/// Records what became of an ambiguous request. With `finished_at`, in the store's microseconds,
/// only if the request still has the outcome of that time.
pub(crate) async fn resolve(
    store: &Store,
    id: RequestId,
    resolution: Resolution,
    finished_at: Option<i64>,
) -> Result<(), Error> {
    let mut pause = BusyPause::new();
    loop {
        match store.resolve(id, resolution, finished_at).await? {
            ChangeResult::Done => return Ok(()),
            ChangeResult::Busy => pause.wait().await,
            result => return Err(not_changed(Operation::Resolve, id, result)),
        }
    }
}

pub(super) fn not_changed(operation: Operation, id: RequestId, result: ChangeResult) -> Error {
    let kind = match result {
        ChangeResult::WrongState(state) => match state.status {
            None => Kind::UnknownId,
            Some(Err(unreadable)) => return Error::from(unreadable).with_id(id),
            Some(Ok(status)) => Kind::WrongState {
                operation,
                status,
                replayed_as: state.replayed_as,
            },
        },
        ChangeResult::Elsewhere(key) => Kind::OrderConflict {
            key: key.key,
            holder: key.channel,
        },
        ChangeResult::Unreadable(unreadable) => return Error::from(unreadable).with_id(id),
        ChangeResult::Gone => Kind::Corrupt("its payload is gone".into()),
        // The callers handle these two themselves.
        ChangeResult::Done | ChangeResult::Busy => Kind::Corrupt("the change had no result".into()),
    };
    Error::new(kind).with_id(id)
}
