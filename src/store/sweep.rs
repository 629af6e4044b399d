//! Removing rows that have outlived the retention: the steps of a sweep. Each is a short statement
//! that looks at a bounded number of rows. The engine's sweep task decides which step is next.

use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{Store, StoreError, millis};

/// How many rows one statement looks at. A statement over everything at once would hold back vacuum
/// and the write-ahead log.
const BATCH: i32 = 1000;
/// How many expired outcomes one statement deletes.
const DELETES: i32 = 5000;

/// A slot of the ring of outcomes that has expired rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpiredSlot {
    slot: i32,
    /// The slot has other rows too.
    pub(crate) live: bool,
    /// A row should have gone by now.
    pub(crate) overdue: bool,
}

/// A channel that no runner delivers, or whose runner has just come back.
#[derive(Clone, Debug)]
pub(crate) struct NotedChannel {
    pub(crate) name: String,
    format: i16,
}

/// What an attempt to truncate a slot did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Emptied {
    Now,
    /// Nothing: a row has not expired or waits for a handler.
    Live,
    /// Nothing: a transaction has used the slot and has not ended.
    Locked,
    /// Nothing: the role may not truncate.
    Denied,
}

/// Rows that belong to requests, and are deleted some time after them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Old {
    /// Failed attempts.
    Attempts,
    /// Callers' keys.
    Keys,
}

/// Where a pass over old rows stands, by a time in microseconds since 1970. It begins at `None`.
pub(crate) type Position = Option<i64>;

/// What one step of a pass did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// Where the next step begins. `None` once there are no more old rows.
    pub(crate) next: Position,
    /// Most rows of the step were deleted, so more of its kind are likely.
    pub(crate) fruitful: bool,
}

impl Store {
    /// Gives up requests past their deadline, in case no runner polls. Returns whether there may be
    /// more.
    pub(crate) async fn sweep_deadlines(&self) -> Result<bool, StoreError> {
        self.run("sweep.deadlines", async |connection| {
            let ended: i32 = sqlx::query_scalar("SELECT expire_requests($1)")
                .bind(BATCH)
                .fetch_one(connection)
                .await?;
            Ok(ended >= BATCH)
        })
        .await
    }

    /// Looks at channels with requests, those after this one, and notes those that no runner
    /// delivers. Returns where to continue.
    pub(crate) async fn note_channels(
        &self,
        after: Option<&str>,
    ) -> Result<Option<String>, StoreError> {
        self.run("sweep.channels", async |connection| {
            sqlx::query_scalar("SELECT note_channels($1, $2)")
                .bind(after.unwrap_or_default())
                .bind(BATCH)
                .fetch_one(connection)
                .await
        })
        .await
    }

    /// The channels that were noted, with a format each: those first that wait for longest.
    pub(crate) async fn noted_channels(&self) -> Result<Vec<NotedChannel>, StoreError> {
        self.run("sweep.noted", async |connection| {
            let rows: Vec<(String, i16)> = sqlx::query_as(
                "SELECT u.channel_name, u.format FROM undelivered_channels u
                 WHERE u.format = ANY (known_formats())
                 ORDER BY u.noted_until NULLS FIRST LIMIT $1",
            )
            .bind(i64::from(BATCH))
            .fetch_all(connection)
            .await?;
            let noted = rows.into_iter();
            Ok(noted
                .map(|(name, format)| NotedChannel { name, format })
                .collect())
        })
        .await
    }

    /// Gives up requests of a channel that no runner has delivered within the time that they may
    /// take. Returns how many, and whether there may be more to do.
    pub(crate) async fn sweep_channel(
        &self,
        channel: &NotedChannel,
    ) -> Result<(u64, bool), StoreError> {
        self.run("sweep.undelivered", async |connection| {
            let (given_up, more): (i64, bool) =
                sqlx::query_as("SELECT given_up, more FROM sweep_channel($1, $2, $3)")
                    .bind(&channel.name)
                    .bind(channel.format)
                    .bind(BATCH)
                    .fetch_one(connection)
                    .await?;
            Ok((given_up.unsigned_abs(), more))
        })
        .await
    }

    /// Makes the first requests of ordering keys claimable if they are not, which only happens when
    /// rows were changed by hand. Looks at a bounded number of keys, from a random one on. Returns
    /// how many it found.
    pub(crate) async fn mend_order(&self) -> Result<i32, StoreError> {
        self.run("sweep.order", async |connection| {
            sqlx::query_scalar("SELECT mend_behind($1)")
                .bind(BATCH)
                .fetch_one(connection)
                .await
        })
        .await
    }

    /// The slots that have expired rows.
    pub(crate) async fn expired_slots(&self) -> Result<Vec<ExpiredSlot>, StoreError> {
        self.run("sweep.slots", async |connection| {
            expired_slots(connection).await
        })
        .await
    }

    /// Moves expired outcomes that wait for a handler out of a slot. Returns whether there may be
    /// more.
    pub(crate) async fn move_unhandled(&self, slot: ExpiredSlot) -> Result<bool, StoreError> {
        self.run("sweep.move", async |connection| {
            let moved: i32 = sqlx::query_scalar("SELECT move_unhandled($1, $2)")
                .bind(slot.slot)
                .bind(BATCH)
                .fetch_one(connection)
                .await?;
            Ok(moved >= BATCH)
        })
        .await
    }

    /// Truncates a slot, unless a row of it is needed.
    pub(crate) async fn empty_slot(&self, slot: ExpiredSlot) -> Result<Emptied, StoreError> {
        self.run("sweep.truncate", async |connection| {
            let verdict: String = sqlx::query_scalar("SELECT empty_slot($1)")
                .bind(slot.slot)
                .fetch_one(connection)
                .await?;
            Ok(match &*verdict {
                "emptied" => Emptied::Now,
                "locked" => Emptied::Locked,
                "denied" => Emptied::Denied,
                _ => Emptied::Live,
            })
        })
        .await
    }

    /// Deletes expired outcomes of a slot that can't be truncated. Returns whether there may be
    /// more.
    pub(crate) async fn delete_expired(&self, slot: ExpiredSlot) -> Result<bool, StoreError> {
        self.run("sweep.delete", async |connection| {
            let deleted: i32 = sqlx::query_scalar("SELECT delete_expired($1, $2)")
                .bind(slot.slot)
                .bind(DELETES)
                .fetch_one(connection)
                .await?;
            Ok(deleted >= DELETES)
        })
        .await
    }

    /// Deletes outcomes after this id that had to wait for their handlers and were handled. Returns
    /// where to continue, and how many still wait.
    pub(crate) async fn delete_handled(
        &self,
        after: Option<Uuid>,
    ) -> Result<(Option<Uuid>, i64), StoreError> {
        self.run("sweep.handled", async |connection| {
            sqlx::query_as("SELECT last, waiting FROM delete_handled($1, $2)")
                .bind(after)
                .bind(BATCH)
                .fetch_one(connection)
                .await
        })
        .await
    }

    /// Deletes expired dead letters, the oldest first, except those that halt an ordering key or
    /// wait for a handler. Returns how many it deleted, and whether there may be more.
    pub(crate) async fn purge_expired(&self) -> Result<(u64, bool), StoreError> {
        self.run("sweep.dead_letters", async |connection| {
            let (looked, purged): (i64, i64) =
                sqlx::query_as("SELECT looked, purged FROM purge_expired($1)")
                    .bind(BATCH)
                    .fetch_one(connection)
                    .await?;
            Ok((purged.unsigned_abs(), looked >= i64::from(BATCH)))
        })
        .await
    }

    /// Deletes a batch of old rows whose requests are gone.
    pub(crate) async fn sweep_old(&self, rows: Old, from: Position) -> Result<Step, StoreError> {
        let retention = millis(self.config().retention);
        let (operation, statement, age) = match rows {
            Old::Attempts => ("sweep.attempts", ATTEMPTS, retention),
            // An outcome may stay for some slots longer than the retention. A pass that came by
            // before would have to come again.
            Old::Keys => ("sweep.keys", KEYS, retention / 4 * 5),
        };
        self.run(operation, async |connection| {
            step(connection, statement, from, age).await
        })
        .await
    }
}

async fn expired_slots(connection: &mut PgConnection) -> Result<Vec<ExpiredSlot>, sqlx::Error> {
    let rows = sqlx::query("SELECT slot, live, overdue FROM expired_slots()")
        .fetch_all(connection)
        .await?;
    rows.iter()
        .map(|row| {
            Ok(ExpiredSlot {
                slot: row.try_get(0)?,
                live: row.try_get(1)?,
                overdue: row.try_get(2)?,
            })
        })
        .collect()
}

/// Rows with the same time as the last one of a step are looked at again by the next one. `now()`
/// can bound the index; `clock_timestamp()`, which is volatile, can't.
const ATTEMPTS: &str = "
    WITH seen AS MATERIALIZED (
        SELECT a.id, a.number, a.ended_at AS at FROM attempts a
        WHERE a.ended_at >= coalesce('epoch'::timestamptz + $1 * interval '1 us', '-infinity')
            AND a.ended_at < now() - $2 * interval '1 millisecond'
        ORDER BY a.ended_at LIMIT $3
    ), gone AS (
        DELETE FROM attempts a USING seen s
        WHERE a.id = ANY (ARRAY[s.id]) AND a.number = s.number
            AND NOT EXISTS (SELECT FROM mq_payloads p WHERE p.id = s.id OFFSET 0)
        RETURNING a.id
    )
    SELECT
        (SELECT count(*) FROM seen), (SELECT count(*) FROM gone),
        (SELECT epoch_us(max(s.at)) FROM seen s)";

/// The key of a request that is just being inserted is too young to look abandoned. The time is
/// checked again for the row that is deleted, because a new request may have taken the key over.
const KEYS: &str = "
    WITH seen AS MATERIALIZED (
        SELECT k.channel_name, k.key, k.id, k.created_at AS at FROM request_keys k
        WHERE k.created_at >= coalesce('epoch'::timestamptz + $1 * interval '1 us', '-infinity')
            AND k.created_at < now() - $2 * interval '1 millisecond'
        ORDER BY k.created_at LIMIT $3
    ), gone AS (
        DELETE FROM request_keys k USING seen s
        WHERE k.channel_name = s.channel_name AND k.key = ANY (ARRAY[s.key]) AND k.id = s.id
            AND k.created_at < now() - $2 * interval '1 millisecond'
            AND NOT EXISTS (SELECT FROM mq_msgs m WHERE m.id = s.id OFFSET 0)
            AND NOT EXISTS (SELECT FROM outcomes o WHERE o.id = s.id OFFSET 0)
        RETURNING k.id
    )
    SELECT
        (SELECT count(*) FROM seen), (SELECT count(*) FROM gone),
        (SELECT epoch_us(max(s.at)) FROM seen s)";

async fn step(
    connection: &mut PgConnection,
    statement: &'static str,
    from: Position,
    older_than: i64,
) -> Result<Step, sqlx::Error> {
    let batch = i64::from(BATCH);
    let (seen, gone, last): (i64, i64, Position) = sqlx::query_as(statement)
        .bind(from)
        .bind(older_than)
        .bind(batch)
        .fetch_one(connection)
        .await?;
    Ok(Step {
        next: match last {
            Some(last) if seen >= batch => Some(if from == Some(last) { last + 1 } else { last }),
            _ => None,
        },
        fruitful: gone * 2 > seen,
    })
}
