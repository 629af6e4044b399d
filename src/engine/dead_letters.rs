//! What is done with requests that ended without success, a batch at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::PgConnection;

use crate::dead_letter::{Resolution, Wanted};
use crate::engine::{Engine, Shared};
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::store::BoxFuture;
use crate::store::dead_letters::{self, Changed, Page};

/// How many requests one statement sends anew.
const REPLAY_BATCH: u32 = 100;
/// How many requests one statement forgets.
const PURGE_BATCH: u32 = 500;
const BUSY_PAUSE_MIN: Duration = Duration::from_millis(2);
const BUSY_PAUSE_MAX: Duration = Duration::from_millis(100);
/// After a commit whose outcome is unknown: a restarted server leaves several dead connections in the pool.
const AGAIN_FOR: Duration = Duration::from_secs(3);

fn not_changed(id: RequestId, changed: Changed) -> Error {
    let kind = match changed {
        Changed::NotKept(standing) => match standing.status {
            None => Kind::UnknownId,
            Some(status) => Kind::WrongState {
                status,
                replayed_as: standing.replayed_as,
            },
        },
        Changed::Elsewhere => Kind::OrderConflict,
        Changed::Gone | Changed::Done | Changed::Busy => {
            Kind::Corrupt("its payload is gone".into())
        }
    };
    Error::new(kind).with_id(id)
}

/// Waits a little longer each time, and not in step with others.
struct Pause(Duration);

impl Pause {
    fn new() -> Self {
        Self(BUSY_PAUSE_MIN)
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.0.mul_f64(0.5 + fastrand::f64())).await;
        self.0 = (self.0 * 2).min(BUSY_PAUSE_MAX);
    }
}

/// No connection is kept while a transaction has the ordering key.
pub(crate) async fn replay_one(engine: Arc<Engine>, old: RequestId) -> Result<RequestId, Error> {
    let new = RequestId::generate();
    let mut pause = Pause::new();
    loop {
        let replayed = replay_batch(&engine, Arc::new([(old, new)])).await;
        let replayed = replayed.map_err(|error| {
            // The id by which it can be looked up.
            if error.is_indeterminate() {
                error.with_id(new)
            } else {
                error
            }
        })?;
        match replayed.first() {
            Some((_, _, Changed::Done)) => return Ok(new),
            Some((_, _, Changed::Busy)) => pause.wait().await,
            Some((_, _, changed)) => return Err(not_changed(old, *changed)),
            None => return Err(Error::new(Kind::UnknownId).with_id(old)),
        }
    }
}

type Replayed = Vec<(RequestId, RequestId, Changed)>;

/// Asked again with the same new ids, it finds what it did before: a commit without an acknowledgement is no loss.
async fn replay_batch(
    engine: &Engine,
    pairs: Arc<[(RequestId, RequestId)]>,
) -> Result<Replayed, Error> {
    let shared = engine.shared();
    let retention = shared.config.retention;
    let mut pause = Pause::new();
    let mut unknown_since: Option<Instant> = None;
    loop {
        open(engine)?;
        shared.verify().await?;
        let pairs = Arc::clone(&pairs);
        let replayed = shared
            .db
            .run(move |connection| {
                Box::pin(async move { dead_letters::replay(connection, &pairs, retention).await })
            })
            .await;
        match replayed {
            Ok(replayed) => return Ok(replayed),
            Err(error) if error.unknown || unknown_since.is_some() => {
                let since = *unknown_since.get_or_insert_with(Instant::now);
                if since.elapsed() > AGAIN_FOR {
                    return Err(Error::new(Kind::Indeterminate(Some(error.error))));
                }
            }
            Err(error) => return Err(shared.refused(error)),
        }
        pause.wait().await;
    }
}

pub(crate) async fn replay_all(
    engine: Arc<Engine>,
    wanted: Wanted,
) -> Result<Vec<RequestId>, Error> {
    let mut pages = Pages::begin(&engine, wanted, REPLAY_BATCH).await?;
    let mut all = Vec::new();
    while let Some(ids) = pages.next(&engine).await? {
        let pairs: Arc<[_]> = ids.iter().map(|id| (*id, RequestId::generate())).collect();
        for (old, new, changed) in replay_batch(&engine, pairs).await? {
            match changed {
                Changed::Done => all.push(new),
                Changed::Busy => match replay_one(Arc::clone(&engine), old).await {
                    Ok(new) => all.push(new),
                    Err(error)
                        if error.is_wrong_state()
                            || error.is_unknown_id()
                            || error.is_order_conflict() => {}
                    Err(error) => return Err(error),
                },
                // Somebody else was quicker, there is nothing to send, or it has to stay kept for now.
                Changed::NotKept(_) | Changed::Gone | Changed::Elsewhere => {}
            }
        }
    }
    Ok(all)
}

pub(crate) async fn purge(engine: Arc<Engine>, wanted: Wanted) -> Result<u64, Error> {
    let mut pages = Pages::begin(&engine, wanted, PURGE_BATCH).await?;
    let mut purged = 0;
    while let Some(ids) = pages.next(&engine).await? {
        purged += query(&engine, move |connection| {
            Box::pin(async move { dead_letters::purge(connection, &ids).await })
        })
        .await?;
    }
    Ok(purged)
}

/// The requests of a filter, a batch at a time.
struct Pages {
    page: Page,
    /// How many may still come.
    left: u32,
    batch: u32,
}

impl Pages {
    async fn begin(engine: &Engine, wanted: Wanted, batch: u32) -> Result<Self, Error> {
        let now = query(engine, |connection| {
            Box::pin(async move { dead_letters::now(connection).await })
        })
        .await?;
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

    async fn next(&mut self, engine: &Engine) -> Result<Option<Vec<RequestId>>, Error> {
        self.page.limit = self.batch.min(self.left);
        if self.page.limit == 0 {
            return Ok(None);
        }
        let page = self.page.clone();
        let ids = query(engine, move |connection| {
            Box::pin(async move { dead_letters::ids(connection, &page).await })
        })
        .await?;
        if self.left != u32::MAX {
            self.left -= u32::try_from(ids.len()).unwrap_or(self.left).min(self.left);
        }
        self.page.wanted.after = ids.last().copied();
        Ok((!ids.is_empty()).then_some(ids))
    }
}

/// Says what became of an ambiguous request; with `finished_at`, in the store's microseconds, only if it is still the end that was asked about.
pub(crate) async fn resolve(
    shared: &Shared,
    id: RequestId,
    resolution: Resolution,
    finished_at: Option<i64>,
) -> Result<(), Error> {
    let retention = shared.config.retention;
    let mut pause = Pause::new();
    loop {
        let changed = shared
            .query(move |connection| {
                Box::pin(async move {
                    dead_letters::resolve(connection, id, resolution, finished_at, retention).await
                })
            })
            .await?;
        match changed {
            Changed::Done => return Ok(()),
            Changed::Busy => pause.wait().await,
            changed => return Err(not_changed(id, changed)),
        }
    }
}

fn open(engine: &Engine) -> Result<(), Error> {
    if engine.user_pool().is_closed() {
        Err(Error::new(Kind::Closed))
    } else {
        Ok(())
    }
}

async fn query<T: Send>(
    engine: &Engine,
    statements: impl for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, sqlx::Error>>
    + Send,
) -> Result<T, Error> {
    open(engine)?;
    engine.shared().query(statements).await
}
