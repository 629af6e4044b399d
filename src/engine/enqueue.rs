//! Persisting requests, many at a time.
//!
//! What the database refuses is split down to the one bad row, which alone fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::engine::attempt;
use crate::engine::job::Job;
use crate::engine::lane;
use crate::engine::live::{self, Live};
use crate::engine::runner::claim::Claim;
use crate::engine::runner::lease::Slot;
use crate::engine::{Engine, Shared};
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::store::DbError;
use crate::store::enqueue::{self, Inserted, Inserting, NewRequest};

/// A restarted server leaves several dead connections in the pool; each try finds one.
const AGAIN_PAUSE: Duration = Duration::from_millis(10);
/// No caller is kept waiting longer for a database that is away.
const AGAIN_FOR: Duration = Duration::from_secs(3);
const LOCKED_RETRY_MIN: Duration = Duration::from_millis(2);
const LOCKED_RETRY_MAX: Duration = Duration::from_millis(100);

/// A request on its way into the database.
pub(crate) struct Submission {
    pub(crate) row: NewRequest,
    /// The first attempt, if this process makes it at once; else whichever runner claims the request.
    pub(crate) start: Option<Start>,
    /// Told after the commit.
    pub(crate) done: Done,
}

/// Gets the id of the request that is persisted: the new one, or an earlier one with the same key.
pub(crate) type Done = oneshot::Sender<Result<RequestId, Error>>;

/// What an attempt needs that follows the insert at once.
pub(crate) struct Start {
    pub(crate) engine: Arc<Engine>,
    pub(crate) slot: Slot,
    pub(crate) job: Job,
    /// The client that the request came through, if nobody waits who has it.
    pub(crate) live: Option<Live>,
}

/// Runs until the last sender is gone.
pub(crate) async fn run(shared: Arc<Shared>, incoming: mpsc::UnboundedReceiver<Submission>) {
    lane::run(incoming, |batch| {
        let shared = Arc::clone(&shared);
        async move { write(&shared, batch).await }
    })
    .await;
}

impl lane::Item for Submission {
    fn size(&self) -> usize {
        self.row.size()
    }

    fn is_urgent(&self) -> bool {
        true
    }
}

type Parts = (Option<Start>, Done);

async fn write(shared: &Shared, batch: Vec<Submission>) {
    if let Err(error) = shared.verify().await {
        for submission in batch {
            let _ = submission.done.send(Err(error.share()));
        }
        return;
    }
    let mut runners = Vec::new();
    let mut stack = vec![batch];
    while let Some(batch) = stack.pop() {
        let (rows, mut parts): (Vec<NewRequest>, Vec<Parts>) = batch
            .into_iter()
            .map(|submission| (submission.row, (submission.start, submission.done)))
            .unzip();
        let (mut rows, written) = insert(shared, rows).await;
        match written {
            Ok(()) => {
                let ready = rows.iter().filter(|row| row.needs_runner());
                runners.extend(ready.map(|row| Arc::clone(&row.channel)));
                for (row, (start, done)) in rows.iter().zip(parts) {
                    begin(row.id, start, done);
                }
            }
            Err(error) if error.is_data() && rows.len() > 1 => {
                let rest = rows.split_off(rows.len() / 2);
                let rest_parts = parts.split_off(rows.len());
                stack.push(rejoin(rest, rest_parts));
                stack.push(rejoin(rows, parts));
            }
            Err(error) => {
                let unknown = error.unknown;
                let error = if unknown {
                    Error::new(Kind::Indeterminate(Some(error.error)))
                } else {
                    shared.refused(error)
                };
                for (row, (_, done)) in rows.iter().zip(parts) {
                    let error = error.share();
                    let error = if unknown {
                        error.with_id(row.id)
                    } else {
                        error
                    };
                    let _ = done.send(Err(error));
                }
            }
        }
    }
    notify(shared, runners).await;
}

fn rejoin(rows: Vec<NewRequest>, parts: Vec<Parts>) -> Vec<Submission> {
    let submissions = rows.into_iter().zip(parts);
    submissions
        .map(|(row, (start, done))| Submission { row, start, done })
        .collect()
}

/// After a broken connection the insert is tried again, where the rows are not there already and while the leases that they
/// may have got still run: later, another runner could have taken them.
async fn insert(shared: &Shared, rows: Vec<NewRequest>) -> (Vec<NewRequest>, Result<(), DbError>) {
    let lease = shared.config.lease;
    let began = Instant::now();
    let bytes = rows.iter().map(NewRequest::size).sum();
    let rows = Arc::new(rows);
    let try_once = |again: bool| {
        let rows = Arc::clone(&rows);
        shared.db.run_large(bytes, move |connection| {
            Box::pin(async move { enqueue::insert(connection, &rows, lease, again).await })
        })
    };
    let mut written = try_once(false).await;
    let mut pause = AGAIN_PAUSE;
    while written.as_ref().is_err_and(|error| error.unknown) {
        if began.elapsed() + pause > AGAIN_FOR.min(lease / 2) {
            break;
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
        written = try_once(true).await.map_err(|error| DbError {
            // Whatever this one knows of itself, the first is still unknown.
            unknown: true,
            ..error
        });
    }
    // The statements are over, and with them the other handles.
    let rows = Arc::try_unwrap(rows).unwrap_or_default();
    (rows, written)
}

/// The request is persisted: its first attempt may begin.
fn begin(id: RequestId, start: Option<Start>, done: Done) {
    // A caller that is gone cancels nothing.
    let _ = done.send(Ok(id));
    if let Some(start) = start {
        let claim = Claim::inline(&start.engine, start.job, start.slot);
        if let Some((claim, transport)) = live::hand_over(claim, start.live) {
            start
                .engine
                .spawn(attempt::drive_by_engine(claim, transport));
        }
    }
}

/// Inserts a request with a key of some kind. It has a lane of its own, because a caller's transaction may hold the key for long:
/// no connection is kept while it does, and no other request waits.
pub(crate) async fn insert_locked(shared: Arc<Shared>, submission: Submission) {
    let Submission {
        row,
        start,
        mut done,
    } = submission;
    let row = Arc::new(row);
    match insert_when_free(&shared, &row, &mut done).await {
        Ok(id) if id == row.id => begin(id, start, done),
        attached_or_refused => {
            let _ = done.send(attached_or_refused);
        }
    }
}

/// Tries until the keys are free. Returns the request that is persisted: this one, or an earlier one that has the caller's key.
async fn insert_when_free(
    shared: &Shared,
    row: &Arc<NewRequest>,
    done: &mut Done,
) -> Result<RequestId, Error> {
    let mut pause = LOCKED_RETRY_MIN;
    let mut unknown_since: Option<Instant> = None;
    loop {
        shared.verify().await?;
        match try_locked(shared, row, unknown_since.is_some()).await {
            Ok(Inserted::Busy) => {}
            Ok(inserted) => return inserted.persisted(row.id),
            Err(error) if error.unknown || unknown_since.is_some() => {
                let since = *unknown_since.get_or_insert_with(Instant::now);
                if since.elapsed() + pause > AGAIN_FOR.min(shared.config.lease / 2) {
                    return Err(Error::new(Kind::Indeterminate(Some(error.error))).with_id(row.id));
                }
            }
            Err(error) => return Err(shared.refused(error)),
        }
        tokio::select! {
            () = tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64())) => {}
            // Nobody wants it any more, or hears of it.
            () = done.closed() => return Err(Error::new(Kind::Closed)),
        }
        pause = (pause * 2).min(LOCKED_RETRY_MAX);
    }
}

async fn try_locked(
    shared: &Shared,
    row: &Arc<NewRequest>,
    again: bool,
) -> Result<Inserted, DbError> {
    let bytes = row.size();
    let (schema, row) = (shared.config.schema.clone(), Arc::clone(row));
    let how = Inserting {
        wait: false,
        again,
        ..shared.config.inserting()
    };
    shared
        .db
        .run_large(bytes, move |connection| {
            Box::pin(async move { enqueue::insert_one(connection, &schema, &row, how).await })
        })
        .await
}

async fn notify(shared: &Shared, mut runners: Vec<Arc<str>>) {
    if runners.is_empty() {
        return;
    }
    runners.sort_unstable();
    runners.dedup();
    let told = shared
        .db
        .run(move |connection| {
            Box::pin(async move { enqueue::notify_runners(connection, &runners).await })
        })
        .await;
    if let Err(error) = told {
        // Runners look by themselves a moment later.
        log::debug!("notifying runners failed: {}", error.error);
    }
}
