//! What an operation does with the requests of a chunk.

use std::collections::HashSet;

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::error::{database_text, has_sqlstate};
use crate::id::RequestId;
use crate::operation::Action;
use crate::status::Status;
use crate::store::dead_letters::{
    ChangeResult, CurrentState, purge, replay, replay_sealed, resolve,
};
use crate::store::{Store, millis};

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was changed. A replay made this new one.
    Done(Option<RequestId>),
    /// It was cancelled, in this channel.
    Cancelled(String),
    /// A transaction has its ordering key.
    Busy,
    /// It can't be changed, because of this.
    Skipped(String),
    /// The database refused it.
    Failed(String),
    /// Nothing was done: it is encrypted, and this process has no keys.
    NeedsKeys,
}

type Verdicts = Vec<(RequestId, Verdict)>;

impl Store {
    /// Changes these requests in the transaction of the connection. If the database refuses one, it
    /// alone fails.
    pub(super) async fn apply(
        &self,
        connection: &mut PgConnection,
        action: Action,
        ids: &[RequestId],
    ) -> Result<Verdicts, sqlx::Error> {
        match self.try_apply(connection, action, ids).await {
            Err(error) if concerns_a_row(&error) => {}
            verdicts => return verdicts,
        }
        let mut verdicts = Vec::with_capacity(ids.len());
        for id in ids {
            match self.try_apply(connection, action, &[*id]).await {
                Ok(one) => verdicts.extend(one),
                Err(error) if concerns_a_row(&error) => {
                    verdicts.push((*id, Verdict::Failed(database_text(&error))));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(verdicts)
    }

    /// All or none of them.
    async fn try_apply(
        &self,
        connection: &mut PgConnection,
        action: Action,
        ids: &[RequestId],
    ) -> Result<Verdicts, sqlx::Error> {
        let mut savepoint = connection.begin().await?;
        let applied = match action {
            Action::Replay => self.replay_all_in(&mut savepoint, ids).await,
            Action::Cancel => self.cancel_all_in(&mut savepoint, ids).await,
            Action::Purge => purge_all_in(&mut savepoint, ids).await,
            Action::Resolve(resolution) => {
                let retention = self.config().retention;
                let mut verdicts = Vec::with_capacity(ids.len());
                let mut failed = None;
                for id in ids {
                    match resolve(&mut savepoint, *id, resolution, None, retention).await {
                        Ok(result) => verdicts.push((*id, verdict(result, None))),
                        Err(error) => {
                            failed = Some(error);
                            break;
                        }
                    }
                }
                failed.map_or(Ok(verdicts), Err)
            }
        };
        match applied {
            Ok(verdicts) => {
                savepoint.commit().await?;
                Ok(verdicts)
            }
            Err(error) => {
                if error.as_database_error().is_some() {
                    savepoint.rollback().await?;
                }
                Err(error)
            }
        }
    }

    async fn replay_all_in(
        &self,
        connection: &mut PgConnection,
        ids: &[RequestId],
    ) -> Result<Verdicts, sqlx::Error> {
        let retention = self.config().retention;
        let pairs: Vec<_> = ids.iter().map(|id| (*id, RequestId::generate())).collect();
        let (replayed, sealed) = replay(connection, &pairs, retention).await?;
        let mut verdicts: Verdicts = replayed
            .into_iter()
            .map(|(old, new, result)| (old, verdict(result, Some(new))))
            .collect();
        for (old, new) in sealed {
            let result = if self.sealer().has_keys() {
                let result = replay_sealed(connection, old, new, retention, self.sealer()).await?;
                verdict(result, Some(new))
            } else {
                Verdict::NeedsKeys
            };
            verdicts.push((old, result));
        }
        Ok(verdicts)
    }

    async fn cancel_all_in(
        &self,
        connection: &mut PgConnection,
        ids: &[RequestId],
    ) -> Result<Verdicts, sqlx::Error> {
        // The channel is that of the row as it was before the statement.
        let rows: Vec<(Uuid, Option<String>, Option<String>)> = sqlx::query_as(
            "SELECT
                i.id, cancel_request(i.id, $2 * interval '1 millisecond'),
                (SELECT m.channel_name FROM mq_msgs m WHERE m.id = i.id)
             FROM unnest($1::uuid[]) AS i(id)",
        )
        .bind(ids.iter().copied().map(Uuid::from).collect::<Vec<_>>())
        .bind(millis(self.config().retention))
        .fetch_all(connection)
        .await?;
        let verdict = |verdict: Option<String>, channel: Option<String>| match verdict.as_deref() {
            Some("cancelled") => Verdict::Cancelled(channel.unwrap_or_default()),
            Some(_) => Verdict::Skipped("it had ended".to_owned()),
            None => Verdict::Skipped(GONE.to_owned()),
        };
        Ok(rows
            .into_iter()
            .map(|(id, cancelled, channel)| (id.into(), verdict(cancelled, channel)))
            .collect())
    }
}

async fn purge_all_in(
    connection: &mut PgConnection,
    ids: &[RequestId],
) -> Result<Verdicts, sqlx::Error> {
    let found: Vec<Uuid> = sqlx::query_scalar(
        "SELECT k.id FROM outcomes_kept k WHERE k.id = ANY ($1) ORDER BY k.id FOR UPDATE",
    )
    .bind(ids.iter().copied().map(Uuid::from).collect::<Vec<_>>())
    .fetch_all(&mut *connection)
    .await?;
    let found: Vec<_> = found.into_iter().map(RequestId::from).collect();
    purge(connection, &found).await?;
    let found: HashSet<_> = found.into_iter().collect();
    let verdict = |id| {
        if found.contains(id) {
            Verdict::Done(None)
        } else {
            Verdict::Skipped(GONE.to_owned())
        }
    };
    Ok(ids.iter().map(|id| (*id, verdict(id))).collect())
}

const GONE: &str = "there is no such request any more";

fn verdict(result: ChangeResult, new: Option<RequestId>) -> Verdict {
    Verdict::Skipped(match result {
        ChangeResult::Done => return Verdict::Done(new),
        ChangeResult::Busy => return Verdict::Busy,
        ChangeResult::Elsewhere(holder) => match holder.channel {
            Some(channel) => {
                format!("unfinished requests of the channel {channel:?} have its ordering key")
            }
            None => "requests of another channel had its ordering key".to_owned(),
        },
        ChangeResult::Gone => "what is stored of it is gone".to_owned(),
        ChangeResult::Unreadable(reason) => format!("it can't be read: {reason}"),
        ChangeResult::WrongState(state) => wrong_state(&state),
    })
}

fn wrong_state(state: &CurrentState) -> String {
    match (&state.replayed_as, &state.status) {
        (Some(new), _) => format!("it was replayed as {new}"),
        (None, None) => GONE.to_owned(),
        (None, Some(Ok(status @ (Status::Discarded | Status::Ambiguous)))) => {
            format!("it is {status}; only ambiguous requests can be resolved")
        }
        (None, Some(Ok(status))) => format!("it is {status}"),
        (None, Some(Err(reason))) => format!("its status can't be read: {reason}"),
    }
}

/// Whether the database refused a row, and not the connection, the transaction or for want of
/// something that passes.
fn concerns_a_row(error: &sqlx::Error) -> bool {
    const PASSING: [&str; 12] = [
        "08", "0A", "25", "26", "28", "3D", "40", "42", "53", "55", "57", "58",
    ];
    error.as_database_error().is_some() && !has_sqlstate(error, &PASSING)
}
