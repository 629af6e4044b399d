//! What all processes have before them, in numbers: for metrics.
//!
//! One handle looks for all of them, every few seconds. The look is bounded, however many requests
//! there are.

use std::sync::Arc;
use std::time::Duration;

use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{Store, StoreError, millis};
use crate::destination::DestinationState;
use crate::recorder::{DueChannel, QueueState};

/// How many destinations are looked at.
const MAX_DESTINATIONS: usize = 1000;

impl Store {
    /// Becomes the observer of the queue, or stays it, for this long. Returns whether this handle
    /// is it.
    pub(crate) async fn observe_queue(
        &self,
        instance: Uuid,
        lasting: Duration,
    ) -> Result<bool, StoreError> {
        self.run("depth.observe", async |connection| {
            let observes: Option<bool> = sqlx::query_scalar(OBSERVE)
                .bind(instance)
                .bind(millis(lasting))
                .fetch_optional(connection)
                .await?;
            Ok(observes.is_some())
        })
        .await
    }

    /// Leaves that to others.
    pub(crate) async fn leave_queue(&self, instance: Uuid) -> Result<(), StoreError> {
        self.run("depth.leave", async |connection| {
            sqlx::query("DELETE FROM queue_observer WHERE instance = $1")
                .bind(instance)
                .execute(connection)
                .await?;
            Ok(())
        })
        .await
    }

    /// How much there is in which state. Without destinations.
    pub(crate) async fn queue_depth(&self) -> Result<QueueState, StoreError> {
        self.run("depth.look", async |connection| depth(connection).await)
            .await
    }

    /// The destinations that take no requests, or not all.
    pub(crate) async fn closed_destinations(
        &self,
    ) -> Result<Vec<(Arc<str>, DestinationState)>, StoreError> {
        let known = self.known_destinations("", MAX_DESTINATIONS).await?;
        let closed = known.into_iter().filter_map(|row| {
            let policy = row.policy.as_ref();
            let state = row.state.status(&row.name, policy, row.now).state;
            (state != DestinationState::Open).then(|| (row.name.into(), state))
        });
        Ok(closed.collect())
    }
}

const OBSERVE: &str = "
    INSERT INTO queue_observer AS o (instance, expires_at)
    VALUES ($1, clock_timestamp() + $2 * interval '1 millisecond')
    ON CONFLICT (one_row) DO UPDATE
    SET instance = excluded.instance, expires_at = excluded.expires_at
    WHERE o.instance = $1 OR o.expires_at < clock_timestamp()
    RETURNING true";

async fn depth(connection: &mut PgConnection) -> Result<QueueState, sqlx::Error> {
    let rows = sqlx::query("SELECT d.kind, d.channel, d.number, d.oldest_ms FROM queue_depth() d")
        .fetch_all(connection)
        .await?;
    // Each state has a number, so that one that is over becomes zero.
    let mut state = QueueState::none();
    for row in &rows {
        let kind: String = row.try_get("kind")?;
        let number: i64 = row.try_get("number")?;
        let number = number.unsigned_abs();
        let oldest: Option<i64> = row.try_get("oldest_ms")?;
        let oldest = oldest.map(|ms| Duration::from_millis(ms.max(0).unsigned_abs()));
        let depth = state.depth.iter_mut().find(|(name, _)| *name == kind);
        if let Some((_, depth)) = depth {
            *depth += number;
        }
        match &*kind {
            "due" => {
                let channel: String = row.try_get("channel")?;
                note_due(&mut state.due, channel, number, oldest.unwrap_or_default());
            }
            "dead_letters" => state.dead_letters = number,
            "expired" => state.oldest_expired_outcome = oldest,
            _ => {}
        }
    }
    Ok(state)
}

/// A channel has a row for each format and priority, one after the other.
fn note_due(due: &mut Vec<DueChannel>, channel: String, requests: u64, oldest: Duration) {
    match due.last_mut().filter(|last| *last.channel == *channel) {
        Some(last) => {
            last.requests += requests;
            last.oldest = last.oldest.max(oldest);
        }
        None => due.push(DueChannel {
            channel: channel.into(),
            requests,
            oldest,
        }),
    }
}
