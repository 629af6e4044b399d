//! Settling: recording the results of attempts. A request finishes, or is put back, or is parked
//! because it can't be read.
//!
//! Each statement locks rows in the order of their ids, so two settles can't deadlock. A claim that
//! is no longer the latest matches no row, and changes nothing.

mod finish;
mod park;
mod put_back;

use std::sync::Arc;
use std::time::Duration;

use sqlx::FromRow;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::enqueue::notify_runners;
use super::outcome::notify_waiters;
use super::{Store, StoreError};
use crate::classify::FailureClass;
use crate::id::RequestId;
use crate::response::Response;
use crate::sealer::StoredResponse;

pub(crate) use self::finish::{Finish, Finished};
pub(crate) use self::park::Park;
pub(crate) use self::put_back::{PutBack, WaitsFor};

/// The claim that a settle stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Fence {
    pub(crate) id: RequestId,
    pub(crate) claim_no: i32,
}

impl Fence {
    /// The fence after a settle has raised the number, as `next_claim_no` does.
    pub(crate) fn next(self) -> Self {
        Self {
            claim_no: self.claim_no % i32::MAX + 1,
            ..self
        }
    }
}

/// A failed attempt.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) class: FailureClass,
    pub(crate) text: String,
    pub(crate) duration: Duration,
    /// The response whose status asked for another attempt.
    pub(crate) response: Option<Response>,
}

/// A row after its settle.
#[derive(Debug)]
pub(crate) struct SettledRow {
    /// The claim with its new number.
    pub(crate) fence: Fence,
    pub(crate) attempts: u32,
    /// The instance that waits for the outcome. Nil if several do.
    pub(crate) waiter: Option<Uuid>,
    pub(crate) channel: String,
    /// The next request of the ordering key may be claimed now.
    pub(crate) ordered: bool,
}

impl Store {
    /// Notifies instances that wait for finished requests, and runners that may claim the next
    /// ones.
    pub(crate) async fn notify_settled(
        &self,
        waiters: &[(Uuid, RequestId)],
        runners: &[Arc<str>],
    ) -> Result<(), StoreError> {
        self.run("settle.notify", async |connection| {
            if !waiters.is_empty() {
                notify_waiters(&mut *connection, waiters).await?;
            }
            if !runners.is_empty() {
                notify_runners(connection, runners).await?;
            }
            Ok(())
        })
        .await
    }
}

fn status_of(response: Option<&Response>) -> Option<i16> {
    response.map(|response| response.status.as_u16() as i16)
}

/// The body of a response as it is stored.
fn body_of<'a>(
    response: Option<&'a Response>,
    stored: Option<&'a StoredResponse>,
) -> Option<&'a [u8]> {
    let sealed = stored.and_then(|stored| stored.sealed_body.as_deref());
    sealed.or_else(|| response.map(|response| &*response.body))
}

/// Reads by position, which saves looking up nine names for each row.
fn settled_row(row: &PgRow) -> Result<SettledRow, sqlx::Error> {
    let (id, claim_no, attempts, waiter, channel, ordered): (Uuid, _, i32, _, _, _) =
        FromRow::from_row(row)?;
    Ok(SettledRow {
        fence: Fence {
            id: id.into(),
            claim_no,
        },
        attempts: attempts.max(0) as u32,
        waiter,
        channel,
        ordered,
    })
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::finish::finish;
    use super::*;
    use crate::outcome::{Fault, Outcome};
    use crate::sealer::Sealer;
    use crate::testkit::Postgres;

    #[tokio::test]
    async fn an_earlier_claim_in_the_same_batch_changes_nothing() {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        crate::migrate(database.pool()).await.unwrap();
        let mut connection = database.pool().acquire().await.unwrap();
        sqlx::query("SET search_path TO requeuest")
            .execute(&mut *connection)
            .await
            .unwrap();
        for put_back_first in [true, false] {
            let id = RequestId::generate();
            sqlx::query(
                "INSERT INTO mq_msgs (
                    id, channel_name, channel_args, attempt_at, claim_no, attempts
                 )
                 VALUES ($1, 'c', 'g', now(), 2, 2)",
            )
            .bind(Uuid::from(id))
            .execute(&mut *connection)
            .await
            .unwrap();
            let fence = |claim_no| Fence { id, claim_no };
            let put_back = |claim_no, seconds| PutBack {
                fence: fence(claim_no),
                delay: Duration::from_secs(seconds),
                hold: false,
                waits_for: WaitsFor::Delay,
                uncounted: false,
                failure: None,
            };
            let latest = if put_back_first {
                let put_backs = [put_back(1, 0), put_back(2, 3600)];
                let (none, now) = (Sealer::default(), Duration::ZERO);
                let settled =
                    super::put_back::put_back(&mut connection, &put_backs, now, &none).await;
                let settled = settled.unwrap();
                assert_eq!(settled.len(), 1);
                let delayed: bool =
                    sqlx::query_scalar("SELECT attempt_at > now() FROM mq_msgs WHERE id = $1")
                        .bind(Uuid::from(id))
                        .fetch_one(&mut *connection)
                        .await
                        .unwrap();
                assert!(delayed);
                settled[0].fence.claim_no
            } else {
                2
            };
            let outcome =
                |text: &str| Arc::new(Outcome::discarded(id, Fault::new("other", text.to_owned())));
            let finishes = [
                (fence(latest - 1), outcome("stale")),
                (fence(latest), outcome("latest")),
            ];
            let retention = Duration::from_secs(60);
            let none = Sealer::default();
            let settled = finish(&mut connection, &finishes, retention, &none).await;
            let settled = settled.unwrap();
            assert_eq!(settled.len(), 1);
            assert_eq!(settled[0].row.fence, fence(latest));
            let stored: Vec<String> =
                sqlx::query_scalar("SELECT error FROM outcomes WHERE id = $1")
                    .bind(Uuid::from(id))
                    .fetch_all(&mut *connection)
                    .await
                    .unwrap();
            assert_eq!(stored, ["latest"]);
        }
    }
}
