//! What a user does with requests that ended without success.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Durable;
use crate::destination;
use crate::engine::{Engine, Shared};
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::kept::{DEFAULT_KEPT_LIMIT, Filter, HaltedKey, Kept, Resolution, Wanted};
use crate::store::DbError;
use crate::store::kept::{self, Changed, Page};

/// How many requests one statement sends anew.
const REPLAY_BATCH: u32 = 100;
/// How many requests one statement forgets.
const PURGE_BATCH: u32 = 500;
const BUSY_PAUSE_MIN: Duration = Duration::from_millis(2);
const BUSY_PAUSE_MAX: Duration = Duration::from_millis(100);
/// After a commit whose outcome is unknown: a restarted server leaves several dead connections in the pool.
const AGAIN_FOR: Duration = Duration::from_secs(3);

impl Durable {
    /// The requests that were given up ([`Status::Discarded`](crate::Status::Discarded)) or may have been sent
    /// ([`Status::Ambiguous`](crate::Status::Ambiguous)), in the order of their ids: about that of their enqueueing. They are kept until
    /// they are replayed, resolved or purged.
    ///
    /// # Errors
    ///
    /// If the filter is not valid, with the field's name in [`Error::field`], or the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::Filter;
    ///
    /// let mut page = Filter::default().channel("billing");
    /// loop {
    ///     let kept = durable.list(&page).await?;
    ///     let Some(last) = kept.last() else { break };
    ///     page = page.after(last.id);
    ///     for request in kept {
    ///         println!("{} {:?}: {:?}", request.id, request.destination, request.error);
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn list(&self, filter: &Filter) -> Result<Vec<Kept>, Error> {
        let wanted = filter.checked()?;
        self.engine()
            .query(move |connection| {
                Box::pin(async move {
                    let page = Page {
                        now: kept::now(&mut *connection).await?,
                        limit: wanted.limit.unwrap_or(DEFAULT_KEPT_LIMIT),
                        wanted,
                    };
                    kept::list(connection, &page).await
                })
            })
            .await
    }

    /// Sends a kept request once more, as a new request with a new id: the same method, URL, headers and body, so that an
    /// idempotency key stays what it was, and the same retry policy, with attempts and age counted anew. It has no
    /// [`deadline`](crate::Options::deadline), whatever the first one had.
    ///
    /// If the old one holds up its ordering key, the new one takes its place and the key goes on; any other
    /// [`ordered`](crate::Options::ordered) one goes last. A [`key`](crate::Options::key) that led to the old one leads to the new one.
    /// The old one is no longer kept: its outcome can be asked for until the retention has passed.
    ///
    /// # Errors
    ///
    /// If there is no such request ([`Error::is_unknown_id`]), or it is not kept ([`Error::is_wrong_state`]): it has not ended, or not
    /// so, or was replayed before. Nothing is changed then. If the database fails; after [`Error::is_indeterminate`] it is
    /// unknown whether it was replayed, and [`Error::request_id`] is the new id.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, it may or may not have been replayed. It can't be replayed twice.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable, id: requeuest::RequestId) -> Result<(), requeuest::Error> {
    /// let again = durable.replay(id).await?;
    /// println!("{}", durable.response(again).await?.status());
    /// # Ok(()) }
    /// ```
    pub async fn replay(&self, id: RequestId) -> Result<RequestId, Error> {
        let engine = Arc::clone(self.engine());
        self.engine().run(replay_one(engine, id)).await
    }

    /// Sends all kept requests once more that match, as [`replay`](Self::replay) does. A batch at a time: after an error some
    /// were replayed and the others were not. One whose stored request is gone is left out.
    ///
    /// Without a [`limit`](Filter::limit) it is all that had ended when the call began. Returns the new ids.
    ///
    /// # Errors
    ///
    /// If the filter is not valid, with the field's name in [`Error::field`], or the database fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on, awaited or not. None is replayed twice.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::{Filter, Status};
    ///
    /// let outage = Filter::default().destination("https://pay.example.com").status(Status::Discarded);
    /// let again = durable.replay_all(&outage).await?;
    /// println!("{} requests go out again", again.len());
    /// # Ok(()) }
    /// ```
    pub async fn replay_all(&self, filter: &Filter) -> Result<Vec<RequestId>, Error> {
        let wanted = filter.checked()?;
        let engine = Arc::clone(self.engine());
        self.engine().run(replay_all(engine, wanted)).await
    }

    /// Forgets all kept requests that match, with their outcomes and [`key`](crate::Options::key)s. If one of them holds up its ordering
    /// key, the key goes on. Returns how many there were. Without a [`limit`](Filter::limit) it is all that had ended when the call began.
    ///
    /// # Errors
    ///
    /// If the filter is not valid, with the field's name in [`Error::field`], or the database fails: some may be gone then.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use std::time::Duration;
    /// use requeuest::Filter;
    ///
    /// let old = Filter::default().finished_before(Duration::from_secs(90 * 24 * 3600));
    /// durable.purge(&old).await?;
    /// # Ok(()) }
    /// ```
    pub async fn purge(&self, filter: &Filter) -> Result<u64, Error> {
        let wanted = filter.checked()?;
        let engine = Arc::clone(self.engine());
        self.engine().run(purge(engine, wanted)).await
    }

    /// Says of a request that ended as [`Status::Ambiguous`](crate::Status::Ambiguous) what became of it.
    ///
    /// [`Resolution::Sent`] ends it as completed; who asks for its response gets an error
    /// ([`Error::is_response_unknown`]). [`Resolution::NotSent`] puts it back into the queue under its id, without the attempt that did not
    /// arrive and without a deadline. If it holds up its ordering key, it is sent in its place; any other ordered one goes last.
    ///
    /// A handler ([`on_outcome`](Self::on_outcome)) gets the new end, too. While it handles the first one, this waits: don't await it in there.
    ///
    /// # Errors
    ///
    /// If there is no such request ([`Error::is_unknown_id`]), or it is not ambiguous ([`Error::is_wrong_state`]): nothing is changed then.
    /// If the database fails: it may have taken effect.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, it may or may not have taken effect.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::{Filter, Resolution, Status};
    ///
    /// for request in durable.list(&Filter::default().status(Status::Ambiguous)).await? {
    ///     // Somebody looked into the other side's books.
    ///     durable.resolve(request.id, Resolution::Sent).await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn resolve(&self, id: RequestId, resolution: Resolution) -> Result<(), Error> {
        let engine = Arc::clone(self.engine());
        self.engine()
            .run(async move { resolve(engine.shared(), id, resolution, None).await })
            .await
    }

    /// The ordering keys whose requests wait, because one that was to hold them up
    /// ([`halt_on_discard`](crate::Options::halt_on_discard)) ended without success. A key in which several did is there several times.
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
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// for halted in durable.halted().await? {
    ///     println!("{} waits for request {}", halted.key, halted.id);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn halted(&self) -> Result<Vec<HaltedKey>, Error> {
        self.engine()
            .query(|connection| Box::pin(async move { kept::halted(connection).await }))
            .await
    }

    /// Lets an ordering key go on without the request that holds it up, which stays kept. If several of its requests do, it is the
    /// first of them: call it once for each. Returns `false` if the key was not held up.
    ///
    /// # Errors
    ///
    /// If channel or key are not valid, with the name in [`Error::field`], or the database fails: it may have taken effect.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, it may or may not have taken effect.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// for halted in durable.halted().await? {
    ///     durable.resume(halted.channel, halted.key).await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn resume(
        &self,
        channel: impl Into<String>,
        key: impl Into<String>,
    ) -> Result<bool, Error> {
        let (channel, key) = (channel.into(), key.into());
        crate::Options::default()
            .channel(&*channel)
            .ordered(&*key)
            .validate()?;
        let group = destination::ordered_group(&key);
        self.engine()
            .query(move |connection| {
                Box::pin(async move { kept::resume(connection, &channel, &group).await })
            })
            .await
    }
}

fn not_changed(id: RequestId, changed: Changed) -> Error {
    let kind = match changed {
        Changed::NotKept(standing) => match standing.status {
            None => Kind::UnknownId,
            Some(status) => Kind::WrongState {
                status,
                replayed_as: standing.replayed_as,
            },
        },
        _ => Kind::Corrupt("its payload is gone".into()),
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
async fn replay_one(engine: Arc<Engine>, old: RequestId) -> Result<RequestId, Error> {
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
                Box::pin(async move { kept::replay(connection, &pairs, retention).await })
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
            Err(error) => return Err(refused(shared, error)),
        }
        pause.wait().await;
    }
}

async fn replay_all(engine: Arc<Engine>, wanted: Wanted) -> Result<Vec<RequestId>, Error> {
    let mut pages = Pages::begin(&engine, wanted, REPLAY_BATCH).await?;
    let mut all = Vec::new();
    while let Some(ids) = pages.next(&engine).await? {
        let pairs: Arc<[_]> = ids.iter().map(|id| (*id, RequestId::generate())).collect();
        for (old, new, changed) in replay_batch(&engine, pairs).await? {
            match changed {
                Changed::Done => all.push(new),
                Changed::Busy => match replay_one(Arc::clone(&engine), old).await {
                    Ok(new) => all.push(new),
                    Err(error) if error.is_wrong_state() || error.is_unknown_id() => {}
                    Err(error) => return Err(error),
                },
                // Somebody else was quicker, or there is nothing to send.
                Changed::NotKept(_) | Changed::Gone => {}
            }
        }
    }
    Ok(all)
}

async fn purge(engine: Arc<Engine>, wanted: Wanted) -> Result<u64, Error> {
    let mut pages = Pages::begin(&engine, wanted, PURGE_BATCH).await?;
    let mut purged = 0;
    while let Some(ids) = pages.next(&engine).await? {
        purged += query(&engine, move |connection| {
            Box::pin(async move { kept::purge(connection, &ids).await })
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
            Box::pin(async move { kept::now(connection).await })
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
            Box::pin(async move { kept::ids(connection, &page).await })
        })
        .await?;
        if self.left != u32::MAX {
            self.left -= u32::try_from(ids.len()).unwrap_or(self.left).min(self.left);
        }
        self.page.wanted.after = ids.last().copied();
        Ok((!ids.is_empty()).then_some(ids))
    }
}

/// As [`Durable::resolve`]; with `finished_at`, in the store's microseconds, only if it is still the end that was asked about.
pub(crate) async fn resolve(
    shared: &Shared,
    id: RequestId,
    resolution: Resolution,
    finished_at: Option<i64>,
) -> Result<(), Error> {
    let retention = shared.config.retention;
    let mut pause = Pause::new();
    loop {
        shared.verify().await?;
        let changed = shared
            .db
            .run(move |connection| {
                Box::pin(async move {
                    kept::resolve(connection, id, resolution, finished_at, retention).await
                })
            })
            .await
            .map_err(|error| refused(shared, error))?;
        match changed {
            Changed::Done => return Ok(()),
            Changed::Busy => pause.wait().await,
            changed => return Err(not_changed(id, changed)),
        }
    }
}

fn refused(shared: &Shared, error: DbError) -> Error {
    let error = Error::from(error);
    if error.is_not_migrated() {
        shared.unverify();
    }
    error
}

fn open(engine: &Engine) -> Result<(), Error> {
    if engine.user_pool().is_closed() {
        Err(Error::new(Kind::Closed))
    } else {
        Ok(())
    }
}

/// As [`Engine::query`], from a task of the engine's own runtime.
async fn query<T: Send>(
    engine: &Engine,
    statements: impl for<'c> FnOnce(
        &'c mut sqlx::PgConnection,
    ) -> crate::store::BoxFuture<'c, Result<T, sqlx::Error>>
    + Send,
) -> Result<T, Error> {
    open(engine)?;
    let shared = engine.shared();
    shared.verify().await?;
    shared
        .db
        .run(statements)
        .await
        .map_err(|error| refused(shared, error))
}
