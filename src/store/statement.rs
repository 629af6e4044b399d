//! Persisting a request by a statement that another driver runs.

use std::fmt::Write;

use serde_json::json;

use super::enqueue::{Key, NewRequest};
use super::{Store, millis, quoted};
use crate::outbox::OutboxStatement;

impl Store {
    /// The statement that persists a request on any connection.
    ///
    /// What differs from request to request is a text and bytes. Drivers differ in which other
    /// types they can bind, and in how they bind a NULL.
    pub(crate) fn statement(&self, request: &NewRequest) -> OutboxStatement {
        let config = self.config();
        let notify = config.notify_in_transactions;
        // What the function reads, by its names.
        let row = json!({
            "id": request.id,
            "channel": &*request.channel,
            "group": request.group,
            "ordered": request.ordered,
            "halts": request.halts,
            "delay_ms": millis(request.delay),
            "deadline_ms": request.deadline.map(millis),
            "head": request.head,
            "key": request.key.as_ref().map(|key| &*key.text),
            "fingerprint": request.key.as_ref().map(Key::stored_fingerprint).map(hex),
            "supersede": request.supersede.as_deref(),
            "retention_ms": millis(config.retention),
            "notify": notify.then(|| request.needs_runner()),
            // A text, so that it is stored as it is.
            "metadata": request.metadata(),
            "destination": request.destination,
            "priority": request.priority.name(),
        });
        // Nothing may depend on the caller's search_path.
        let sql = format!(
            "SELECT {}.fire_prepared($1::pg_catalog.text, $2::pg_catalog.bytea)",
            quoted(&config.schema)
        );
        OutboxStatement::new(request.id, sql, row.to_string(), request.body.clone())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut digits, byte| {
        // Writing to a text can't fail.
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}
