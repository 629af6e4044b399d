//! The content of one request.

use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::list::request_of_key;
use crate::change::{Entry, Signed};
use crate::codec::{Unreadable, check_outcome_format};
use crate::error::Error;
use crate::id::RequestId;
use crate::inspection::RequestContent;
use crate::request::Request;
use crate::response::Response;
use crate::sealer::Sealer;
use crate::store::Store;

impl Store {
    /// What a request sends and what it got. `None` if there is no such request.
    pub(crate) async fn content(&self, id: RequestId) -> Result<Option<RequestContent>, Error> {
        let config = self.config();
        let bytes = config.max_request_body + 2 * config.max_response_body;
        let stored = self
            .run_verified_large("inspect.content", bytes, async |connection| {
                stored(connection, id).await
            })
            .await?;
        let read = |stored: Stored| {
            let request = stored.request(id, self.sealer())?;
            Ok(RequestContent::masked(
                request,
                stored.response(id, self.sealer())?,
            ))
        };
        let content = stored.map(read).transpose();
        content.map_err(|unreadable: Unreadable| Error::from(unreadable).with_id(id))
    }

    /// As [`content`](Self::content), with what is secret, on the record.
    pub(crate) async fn reveal(
        &self,
        id: RequestId,
        author: &Signed,
    ) -> Result<Option<RequestContent>, Error> {
        self.verify().await?;
        let config = self.config();
        let bytes = config.max_request_body + 2 * config.max_response_body;
        let stored = self
            .recorded_large("inspect.reveal", bytes, author, async |connection| {
                let stored = stored(connection, id).await?;
                let entry = stored
                    .as_ref()
                    .map(|_| Entry::new("reveal", id.to_string()));
                Ok((stored, entry))
            })
            .await;
        let stored = match stored {
            Ok(stored) => stored,
            Err(error) => return Err(self.refused(error).await),
        };
        let read = |stored: Stored| {
            Ok(RequestContent {
                request: stored.request(id, self.sealer())?,
                response: stored.response(id, self.sealer())?,
            })
        };
        let content = stored.map(read).transpose();
        content.map_err(|unreadable: Unreadable| Error::from(unreadable).with_id(id))
    }

    /// The request that has a caller's key.
    pub(crate) async fn request_of_key(
        &self,
        channel: &str,
        key: &str,
    ) -> Result<Option<RequestId>, Error> {
        self.run_verified("inspect.key", async |connection| {
            request_of_key(connection, channel, key).await
        })
        .await
    }
}

/// As it is stored.
struct Stored {
    head: Option<String>,
    body: Option<Vec<u8>>,
    /// Of the outcome.
    format: Option<i16>,
    http_status: Option<i16>,
    response_head: Option<String>,
    response_body: Option<Vec<u8>>,
}

impl Stored {
    fn request(&self, id: RequestId, sealer: &Sealer) -> Result<Option<Request>, Unreadable> {
        let Some(head) = &self.head else {
            return Ok(None);
        };
        let read = sealer.read_request(id, head)?;
        let mut request = read.request;
        request.body = read.body.open(self.body.clone())?;
        Ok(Some(request))
    }

    fn response(self, id: RequestId, sealer: &Sealer) -> Result<Option<Response>, Unreadable> {
        if let Some(format) = self.format {
            check_outcome_format(format)?;
        }
        let (Some(status), Some(head)) = (self.http_status, self.response_head) else {
            return Ok(None);
        };
        let response =
            sealer.read_response(id, status.unsigned_abs(), &head, self.response_body)?;
        Ok(Some(response))
    }
}

async fn stored(
    connection: &mut PgConnection,
    id: RequestId,
) -> Result<Option<Stored>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT
            p.head, p.body, o.format,
            CASE WHEN o.id IS NULL THEN p.response_status ELSE o.http_status END AS http_status,
            CASE WHEN o.id IS NULL THEN p.response_head ELSE o.head END AS response_head,
            CASE WHEN o.id IS NULL THEN p.response_body ELSE o.body END AS response_body
         FROM (SELECT $1::uuid AS id) i
         LEFT JOIN mq_msgs m ON m.id = ANY (ARRAY[i.id])
         LEFT JOIN outcomes o ON o.id = ANY (ARRAY[i.id])
         LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[i.id])
         WHERE m.claim_no IS NOT NULL OR o.id IS NOT NULL",
    )
    .bind(Uuid::from(id))
    .fetch_optional(connection)
    .await?;
    row.map(|row| {
        Ok(Stored {
            head: row.try_get("head")?,
            body: row.try_get("body")?,
            format: row.try_get("format")?,
            http_status: row.try_get("http_status")?,
            response_head: row.try_get("response_head")?,
            response_body: row.try_get("response_body")?,
        })
    })
    .transpose()
}
