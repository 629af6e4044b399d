//! Which keys the stored rows need, and encrypting them anew.
//!
//! Tables are read a page at a time, in the order of their primary keys. A row is changed in a
//! statement of its own, and only if it is still what was read. A row that a transaction has locked
//! is left for another time, so nothing waits here and nothing deadlocks.

mod table;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::Store;
use crate::codec::Unreadable;
use crate::error::Error;
use crate::id::RequestId;
use crate::sealer::{Sealer, StoredResponse};

pub(crate) use self::table::{Place, Table};

/// How many rows a page has.
const PAGE: i64 = 500;

/// A row, and the keys that it needs.
#[derive(Debug)]
pub(crate) struct KeyedRow {
    pub(crate) place: Place,
    /// Without repetitions. An empty one stands for content that is not encrypted.
    pub(crate) keys: Vec<String>,
}

/// What became of a row.
#[derive(Debug)]
pub(crate) enum Reencrypted {
    Done,
    /// It is gone, has changed, or is locked.
    Skipped,
    /// This process can't read it.
    Unreadable(Unreadable),
}

impl Store {
    /// The next rows of a table. None at its end.
    pub(crate) async fn keyed_rows(
        &self,
        table: Table,
        after: &Place,
    ) -> Result<Vec<KeyedRow>, Error> {
        self.run_verified("encryption.page", async |connection| {
            page(connection, table, after).await
        })
        .await
    }

    /// Encrypts a row by the first key.
    pub(crate) async fn reencrypt(
        &self,
        table: Table,
        place: &Place,
    ) -> Result<Reencrypted, Error> {
        let config = self.config();
        let bytes = config.max_request_body.max(config.max_response_body);
        self.run_verified_large("encryption.row", bytes, async |connection| match table {
            Table::Requests => request(connection, place, self.sealer()).await,
            Table::Outcomes => outcome(connection, place, self.sealer()).await,
            Table::Attempts => attempt(connection, place, self.sealer()).await,
            Table::Keys => key(connection, place, self.sealer()).await,
            Table::HandOvers => hand_over(connection, place, self.sealer()).await,
        })
        .await
    }
}

async fn page(
    connection: &mut PgConnection,
    table: Table,
    after: &Place,
) -> Result<Vec<KeyedRow>, sqlx::Error> {
    let rows = sqlx::query(table.page())
        .bind(&after.first)
        .bind(&after.second)
        .bind(PAGE)
        // Planned for the tables as they are now.
        .persistent(false)
        .fetch_all(connection)
        .await?;
    let keyed = |row: &PgRow| {
        let mut keys: Vec<Option<String>> = row.try_get("keys")?;
        keys.sort_unstable();
        keys.dedup();
        Ok(KeyedRow {
            place: Place {
                first: row.try_get("first")?,
                second: row.try_get("second")?,
            },
            keys: keys.into_iter().flatten().collect(),
        })
    };
    rows.iter().map(keyed).collect()
}

/// The value, or an early return with why the row can't be read.
macro_rules! readable {
    ($read:expr) => {
        match $read {
            Ok(value) => value,
            Err(reason) => return Ok(Reencrypted::Unreadable(reason)),
        }
    };
}

fn changed(rows: u64) -> Reencrypted {
    if rows > 0 {
        Reencrypted::Done
    } else {
        Reencrypted::Skipped
    }
}

/// A stored response, encrypted by the first key, if there is one.
fn response(
    sealer: &Sealer,
    id: RequestId,
    status: Option<i16>,
    head: Option<&str>,
    body: Option<Vec<u8>>,
) -> Result<Option<StoredResponse>, Unreadable> {
    let (Some(status), Some(head)) = (status, head) else {
        return Ok(None);
    };
    sealer
        .reseal_response(id, status as u16, head, body)
        .map(Some)
}

async fn request(
    connection: &mut PgConnection,
    place: &Place,
    sealer: &Sealer,
) -> Result<Reencrypted, sqlx::Error> {
    let id = place.id();
    let row = sqlx::query(
        "SELECT p.head, p.body, p.response_status, p.response_head, p.response_body
         FROM mq_payloads p WHERE p.id = $1",
    )
    .bind(Uuid::from(id))
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else {
        return Ok(Reencrypted::Skipped);
    };
    let old_head: String = row.try_get("head")?;
    let (head, body) = readable!(sealer.reseal_request(id, id, &old_head, row.try_get("body")?));
    let old_response: Option<String> = row.try_get("response_head")?;
    let response_status = row.try_get("response_status")?;
    let response_body = row.try_get("response_body")?;
    let response = readable!(response(
        sealer,
        id,
        response_status,
        old_response.as_deref(),
        response_body
    ));
    let done = sqlx::query(
        "UPDATE mq_payloads p
         SET head = $2, body = $3, response_head = coalesce($4, p.response_head),
            response_body = CASE WHEN $4 IS NULL THEN p.response_body ELSE $5 END
         WHERE p.id = ANY (ARRAY(
            SELECT o.id FROM mq_payloads o
            WHERE o.id = $1 AND o.head = $6 AND o.response_head IS NOT DISTINCT FROM $7
            FOR UPDATE SKIP LOCKED
         ))",
    )
    .bind(Uuid::from(id))
    .bind(head)
    .bind(body.as_deref())
    .bind(response.as_ref().map(|response| &*response.head))
    .bind(response.as_ref().and_then(|it| it.sealed_body.as_deref()))
    .bind(&old_head)
    .bind(&old_response)
    .execute(connection)
    .await?;
    Ok(changed(done.rows_affected()))
}

async fn outcome(
    connection: &mut PgConnection,
    place: &Place,
    sealer: &Sealer,
) -> Result<Reencrypted, sqlx::Error> {
    let id = place.id();
    let slot: i16 = place.second.parse().unwrap_or_default();
    let row = sqlx::query(
        "SELECT o.http_status, o.head, o.body, o.error_class, o.error FROM outcomes o
         WHERE o.id = $1 AND o.slot = $2",
    )
    .bind(Uuid::from(id))
    .bind(slot)
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else {
        return Ok(Reencrypted::Skipped);
    };
    let (old_head, old_error): (Option<String>, Option<String>) =
        (row.try_get("head")?, row.try_get("error")?);
    let (status, body) = (row.try_get("http_status")?, row.try_get("body")?);
    let response = readable!(response(sealer, id, status, old_head.as_deref(), body));
    let class: Option<String> = row.try_get("error_class")?;
    let class = class.as_deref().unwrap_or_default();
    let error = match &old_error {
        Some(text) => Some(readable!(sealer.reseal_error_text(id, class, text.clone()))),
        None => None,
    };
    let done = sqlx::query(
        "UPDATE outcomes t
         SET head = coalesce($3, t.head), body = CASE WHEN $3 IS NULL THEN t.body ELSE $4 END,
            error = $5
         WHERE t.id = $1 AND t.slot = $2 AND t.id = ANY (ARRAY(
            SELECT o.id FROM outcomes o
            WHERE o.id = $1 AND o.slot = $2 AND o.head IS NOT DISTINCT FROM $6
                AND o.error IS NOT DISTINCT FROM $7
            FOR UPDATE SKIP LOCKED
         ))",
    )
    .bind(Uuid::from(id))
    .bind(slot)
    .bind(response.as_ref().map(|response| &*response.head))
    .bind(response.as_ref().and_then(|it| it.sealed_body.as_deref()))
    .bind(error)
    .bind(&old_head)
    .bind(&old_error)
    .execute(connection)
    .await?;
    Ok(changed(done.rows_affected()))
}

async fn attempt(
    connection: &mut PgConnection,
    place: &Place,
    sealer: &Sealer,
) -> Result<Reencrypted, sqlx::Error> {
    let id = place.id();
    let number: i32 = place.second.parse().unwrap_or_default();
    let old: Option<(String, String)> =
        sqlx::query_as("SELECT error_class, error FROM attempts WHERE id = $1 AND number = $2")
            .bind(Uuid::from(id))
            .bind(number)
            .fetch_optional(&mut *connection)
            .await?;
    let Some((class, old)) = old else {
        return Ok(Reencrypted::Skipped);
    };
    let new = readable!(sealer.reseal_error_text(id, &class, old.clone()));
    let done = sqlx::query(
        "UPDATE attempts t SET error = $3
         WHERE t.number = $2 AND t.id = ANY (ARRAY(
            SELECT a.id FROM attempts a WHERE a.id = $1 AND a.number = $2 AND a.error = $4
            FOR UPDATE SKIP LOCKED
         ))",
    )
    .bind(Uuid::from(id))
    .bind(number)
    .bind(new)
    .bind(old)
    .execute(connection)
    .await?;
    Ok(changed(done.rows_affected()))
}

async fn key(
    connection: &mut PgConnection,
    place: &Place,
    sealer: &Sealer,
) -> Result<Reencrypted, sqlx::Error> {
    let (channel, key) = (&*place.first, &*place.second);
    let old: Option<Vec<u8>> = sqlx::query_scalar(
        "SELECT fingerprint FROM request_keys WHERE channel_name = $1 AND key = $2",
    )
    .bind(channel)
    .bind(key)
    .fetch_optional(&mut *connection)
    .await?;
    let Some(old) = old else {
        return Ok(Reencrypted::Skipped);
    };
    let new = readable!(sealer.reseal_fingerprint(channel, key, &old));
    let done = sqlx::query(
        "UPDATE request_keys t SET fingerprint = $3
         WHERE t.channel_name = $1 AND t.key = ANY (ARRAY(
            SELECT k.key FROM request_keys k
            WHERE k.channel_name = $1 AND k.key = $2 AND k.fingerprint = $4
            FOR UPDATE SKIP LOCKED
         ))",
    )
    .bind(channel)
    .bind(key)
    .bind(&*new)
    .bind(old)
    .execute(connection)
    .await?;
    Ok(changed(done.rows_affected()))
}

async fn hand_over(
    connection: &mut PgConnection,
    place: &Place,
    sealer: &Sealer,
) -> Result<Reencrypted, sqlx::Error> {
    let id = place.id();
    let old: Option<Option<String>> =
        sqlx::query_scalar("SELECT error FROM unhandled WHERE id = $1")
            .bind(Uuid::from(id))
            .fetch_optional(&mut *connection)
            .await?;
    let Some(old) = old.flatten() else {
        return Ok(Reencrypted::Skipped);
    };
    let new = readable!(sealer.reseal_handler_error(id, old.clone()));
    let done = sqlx::query(
        "UPDATE unhandled t SET error = $2
         WHERE t.id = ANY (ARRAY(
            SELECT u.id FROM unhandled u WHERE u.id = $1 AND u.error = $3
            FOR UPDATE SKIP LOCKED
         ))",
    )
    .bind(Uuid::from(id))
    .bind(new)
    .bind(old)
    .execute(connection)
    .await?;
    Ok(changed(done.rows_affected()))
}
