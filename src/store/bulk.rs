//! Persisting many requests in one transaction.

use std::collections::HashMap;
use std::sync::Arc;

use sqlx::{Executor, PgConnection, Row};
use uuid::Uuid;

use super::db::within;
use super::enqueue::{
    Inserted, Inserting, MESSAGE_NAME, NewRequest, bind_columns, from_hex, insert_one,
    unless_all_none,
};
use super::idle::Checkout;
use super::{Store, StoreError, quoted};
use crate::error::{Error, Kind};
use crate::id::RequestId;

/// How many rows one statement has at most. More gain nothing and make the statement long.
const MAX_ROWS: usize = 1000;
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// Rows for one statement: many, or one with a supersede key.
#[derive(Default)]
pub(crate) struct Chunk {
    rows: Vec<NewRequest>,
    bytes: usize,
}

impl Chunk {
    /// Adds a row. Returns the chunk that must be written before it, if this one was full.
    pub(crate) fn push(&mut self, row: NewRequest) -> Option<Self> {
        let bytes = row.size();
        let alone = |row: &NewRequest| row.supersede.is_some();
        let full = self.rows.len() >= MAX_ROWS
            || self.bytes + bytes > MAX_BYTES
            || alone(&row)
            || self.rows.last().is_some_and(alone);
        let before = (full && !self.rows.is_empty()).then(|| std::mem::take(self));
        self.bytes += bytes;
        self.rows.push(row);
        before
    }

    /// The channels of the rows.
    pub(crate) fn channels(&self) -> impl Iterator<Item = &Arc<str>> {
        self.rows.iter().map(|row| &row.channel)
    }

    /// The rows that were inserted, where `ids` is what writing the chunk returned.
    pub(crate) fn new_rows<'a>(
        &'a self,
        ids: &'a [RequestId],
    ) -> impl Iterator<Item = &'a NewRequest> {
        let rows = self.rows.iter().zip(ids);
        rows.filter(|(row, id)| row.id == **id).map(|(row, _)| row)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The caller's error for a failed statement on one of the crate's own connections, which wait
    /// for locks for a while.
    fn refused(&self, error: Error) -> Error {
        let busy = error.is_lock_timeout();
        let field = self.rows.iter().find_map(NewRequest::last_key);
        match (&*self.rows, field) {
            ([row], Some(field)) if busy => row.key_busy(field),
            ([row, ..], Some(field)) if busy => Error::new(Kind::KeyBusy {
                field: field.name(),
                key: None,
                channel: Arc::clone(&row.channel),
            }),
            _ => error,
        }
    }
}

impl Store {
    /// Begins a transaction on the crate's own pool.
    pub(crate) async fn begin_bulk(&self) -> Result<BulkInsert<'_>, Error> {
        self.verify().await?;
        let mut bulk = BulkInsert {
            store: self,
            checkout: Some(self.db().acquire().await?),
        };
        within(0, execute(bulk.connection()?, "BEGIN")).await?;
        Ok(bulk)
    }

    /// Writes a chunk in the transaction that the caller's connection is in. Returns the ids of its
    /// requests: new ones, or those of earlier requests with the same keys.
    pub(crate) async fn write_chunk_for_caller(
        &self,
        connection: &mut PgConnection,
        chunk: &Chunk,
    ) -> Result<Vec<RequestId>, Error> {
        let how = self.inserting_for_caller();
        write(connection, &self.config().schema, how, chunk).await
    }
}

/// A transaction that writes chunks. Dropping it before its commit rolls back.
#[derive(Debug)]
pub(crate) struct BulkInsert<'a> {
    store: &'a Store,
    checkout: Option<Checkout<'a>>,
}

impl BulkInsert<'_> {
    /// Writes a chunk. Returns the ids of its requests, as
    /// [`write_chunk_for_caller`](Store::write_chunk_for_caller) does.
    pub(crate) async fn write(&mut self, chunk: &Chunk) -> Result<Vec<RequestId>, Error> {
        let (store, how) = (self.store, self.store.inserting());
        let schema = &store.config().schema;
        let written = within(chunk.bytes, write(self.connection()?, schema, how, chunk)).await;
        if let Some(error) = written.as_ref().err().and_then(sqlx_error) {
            store.db().note_failure(error);
        }
        written.map_err(|error| chunk.refused(error))
    }

    pub(crate) async fn commit(mut self) -> Result<(), Error> {
        let committed = within(0, execute(self.connection()?, "COMMIT")).await;
        match committed.map_err(|error| StoreError::new("bulk.commit", error)) {
            Ok(()) => {
                // Back to the pool, whose next user gets a clean session.
                drop(self.checkout.take());
                Ok(())
            }
            Err(error) if error.is_unknown() => Err(error.into_indeterminate()),
            Err(error) => Err(error.into()),
        }
    }

    fn connection(&mut self) -> Result<&mut PgConnection, Error> {
        match &mut self.checkout {
            Some(checkout) => Ok(&mut checkout.connection),
            None => Err(Error::new(Kind::Closed)),
        }
    }
}

impl Drop for BulkInsert<'_> {
    fn drop(&mut self) {
        if let Some(checkout) = self.checkout.take() {
            // Closing the connection rolls back, whatever state the transaction is in.
            drop(checkout.connection.detach());
        }
    }
}

fn sqlx_error(error: &Error) -> Option<&sqlx::Error> {
    std::error::Error::source(error)?.downcast_ref()
}

async fn execute(
    connection: &mut PgConnection,
    statement: &'static str,
) -> Result<(), sqlx::Error> {
    connection.execute(statement).await?;
    Ok(())
}

async fn write(
    connection: &mut PgConnection,
    schema: &str,
    how: Inserting<'_>,
    chunk: &Chunk,
) -> Result<Vec<RequestId>, Error> {
    let rows = &chunk.rows;
    if let [row] = &**rows {
        let inserted = insert_one(connection, schema, row, how).await?;
        return inserted.persisted(row).map(|id| vec![id]);
    }
    // Fingerprints of the same requests that other keys encrypted.
    let mut stored = HashMap::new();
    loop {
        let refused = insert_many(connection, schema, rows, how, &stored).await?;
        let mut again = false;
        let mut ids: Vec<RequestId> = rows.iter().map(|row| row.id).collect();
        for (id, fingerprint, inserted) in refused {
            if let Some(number) = rows.iter().position(|row| row.id == id) {
                ids[number] = inserted.persisted(&rows[number])?;
                if let Some(fingerprint) = fingerprint {
                    stored.insert(id, fingerprint);
                    // A conflict that is none: nothing was inserted.
                    again = true;
                }
            }
        }
        if !again {
            return Ok(ids);
        }
    }
}

/// A request that was not inserted, the stored fingerprint of a conflict, and why.
type Refused = (RequestId, Option<Vec<u8>>, Inserted);

/// Inserts requests in order, through a function of the schema. Returns those that were not
/// inserted. Unless they are attached to earlier requests, no row was inserted.
pub(super) async fn insert_many(
    connection: &mut PgConnection,
    schema: &str,
    requests: &[NewRequest],
    how: Inserting<'_>,
    stored: &HashMap<RequestId, Vec<u8>>,
) -> Result<Vec<Refused>, sqlx::Error> {
    let call = format!(
        "SELECT request_id, verdict, earlier, elsewhere
         FROM {}.enqueue_many(
            $1, $2, $3, $4, $5, $6, $7, $10, $11, $12, $13, $8, $14, $15, $9, $16
         )",
        quoted(schema)
    );
    let notify = how.notify && requests.iter().any(NewRequest::needs_runner);
    let keys = requests.iter().map(|r| r.key.as_ref());
    let fingerprints = requests.iter().map(|request| {
        let key = request.key.as_ref()?;
        let stored = stored.get(&request.id);
        Some(stored.map_or_else(|| key.stored_fingerprint(), Vec::as_slice))
    });
    let refused = bind_columns(sqlx::query(&call), requests)
        .bind(requests.iter().map(|r| r.ordered).collect::<Vec<_>>())
        .bind(requests.iter().map(|r| r.halts).collect::<Vec<_>>())
        .bind(MESSAGE_NAME)
        .bind(notify)
        .bind(unless_all_none(keys.map(|key| key.map(|key| &*key.text))))
        .bind(unless_all_none(fingerprints))
        .bind(unless_all_none(
            requests.iter().map(NewRequest::unusual_priority),
        ))
        .persistent(how.prepared)
        .fetch_all(connection)
        .await?;
    let mut inserted = Vec::with_capacity(refused.len());
    for row in &refused {
        let id = RequestId::from(row.try_get::<Uuid, _>(0)?);
        let (verdict, earlier): (&str, _) = (row.try_get(1)?, row.try_get(2)?);
        let elsewhere: Option<String> = row.try_get(3)?;
        let Some(request) = requests.iter().find(|request| request.id == id) else {
            continue;
        };
        let fingerprint = elsewhere.as_deref().filter(|_| verdict == "conflict");
        let fingerprint = fingerprint.and_then(from_hex);
        let why = Inserted::read(request, verdict, earlier, elsewhere, how.sealer);
        inserted.push((id, fingerprint, why));
    }
    Ok(inserted)
}
