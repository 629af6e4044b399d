//! A request as one SQL statement, for the transaction of any driver.

use std::fmt;

use bytes::Bytes;

use crate::id::RequestId;

/// One SQL statement that persists a request in the transaction in which it runs: see
/// [`Durable::statement`](crate::Durable::statement).
///
/// Its parameters are a text and bytes that may be NULL, which every driver can bind. They contain
/// the request, with its headers, so don't log them. `Debug` shows the id and the statement.
#[derive(Clone)]
pub struct OutboxStatement {
    id: RequestId,
    sql: String,
    request: String,
    body: Option<Bytes>,
}

impl OutboxStatement {
    pub(crate) fn new(id: RequestId, sql: String, request: String, body: Option<Bytes>) -> Self {
        Self {
            id,
            sql,
            request,
            body,
        }
    }

    /// The id that the request gets. With a [`key`](crate::Options::key) that an earlier request
    /// has, nothing is persisted, and the statement returns the id of that request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The statement, a `SELECT` that returns one row with one `uuid`: [`id`](Self::id), or the id
    /// of the earlier request with the same [`key`](crate::Options::key). Its text depends on
    /// the name of the schema alone, so that drivers can keep it prepared.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// The parameters `$1`, of type `text`, and `$2`, of type `bytea`.
    pub fn parameters(&self) -> (&str, Option<&[u8]>) {
        (&self.request, self.body.as_deref())
    }
}

impl fmt::Debug for OutboxStatement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutboxStatement")
            .field("id", &self.id)
            .field("sql", &self.sql)
            .finish_non_exhaustive()
    }
}
