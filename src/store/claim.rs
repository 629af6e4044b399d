//! What a claim needs of the database while its attempt is made. The claiming itself is `mq_poll`,
//! which sqlxmq's runner calls.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use sqlx::PgConnection;
use uuid::Uuid;

use super::enqueue::{CLAIMED, SENDING_ONCE};
use super::settle::Fence;
use super::{Store, StoreError, millis};
use crate::classify::Earlier;
use crate::codec::Unreadable;
use crate::error::Error;
use crate::id::RequestId;
use crate::metadata::Metadata;

/// What `mq_poll` returns for a claimed request.
#[derive(Debug, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "they are what `mq_poll` returns"
)]
pub(crate) struct PolledRow {
    pub(crate) claim_no: i32,
    pub(crate) attempts: u32,
    #[serde(rename = "age_ms")]
    age_ms: i64,
    /// The time since the request was enqueued.
    #[serde(default)]
    lived_ms: i64,
    /// The time since the request was due, where that is measured.
    #[serde(default)]
    waited_ms: i64,
    /// Another claim has lapsed, where that is measured.
    #[serde(default)]
    pub(crate) taken_over: bool,
    /// The time left until the deadline, if there is one.
    deadline_ms: Option<i64>,
    /// The process with the last claim died. The request may have been sent and must not be sent
    /// again.
    pub(crate) lost: bool,
    /// The attempts in a row before this claim whose results were never recorded.
    pub(crate) lost_attempts: u32,
    /// The poll claimed as many requests as it asked for, so more may be due.
    pub(crate) more: bool,
    /// The body is too large to come with the claim.
    pub(crate) fetch_body: bool,
    #[serde(deserialize_with = "shared")]
    pub(crate) channel: Arc<str>,
    /// The request's stored head, or `None` if its payload is gone.
    head: Option<Box<RawValue>>,
    metadata: Option<Box<RawValue>>,
    /// The head is not JSON.
    #[serde(skip)]
    damaged: Option<Unreadable>,
}

/// What comes before the head and before the metadata in the claim. Neither can be in the text
/// before it: a quote within a string is escaped.
const HEAD: &str = ",\"head\":";
const METADATA: &str = ",\"metadata\":";

/// Text that is copied once. Serde's own way to an `Arc<str>` copies it twice.
fn shared<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<str>, D::Error> {
    struct Shared;

    impl Visitor<'_> for Shared {
        type Value = Arc<str>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }

        fn visit_str<E>(self, text: &str) -> Result<Arc<str>, E> {
            Ok(text.into())
        }
    }

    deserializer.deserialize_str(Shared)
}

impl PolledRow {
    pub(crate) fn parse(json: &str) -> Result<Self, Unreadable> {
        serde_json::from_str(json).or_else(|error| {
            Self::parse_around_head(json, &error)
                .ok_or_else(|| Unreadable::json("the claim", &error, 0))
        })
    }

    /// A claim whose head is not JSON, so that the claim as a whole isn't either.
    fn parse_around_head(json: &str, error: &serde_json::Error) -> Option<Self> {
        let (before, rest) = json.split_once(HEAD)?;
        let mut claim: Self = serde_json::from_str(&format!("{before},\"head\":null}}")).ok()?;
        // A part of the head may look like metadata, but is followed by more than a bracket.
        claim.metadata = rest.match_indices(METADATA).find_map(|(at, _)| {
            let metadata = rest[at + METADATA.len()..].strip_suffix('}')?;
            serde_json::from_str(metadata).ok()
        });
        let start = before.len() + HEAD.len();
        claim.damaged = Some(Unreadable::json("the head", error, start));
        Some(claim)
    }

    pub(crate) fn age(&self) -> Duration {
        Duration::from_millis(self.age_ms.max(0) as u64)
    }

    pub(crate) fn lived(&self) -> Duration {
        Duration::from_millis(self.lived_ms.max(0) as u64)
    }

    pub(crate) fn waited(&self) -> Duration {
        Duration::from_millis(self.waited_ms.max(0) as u64)
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.deadline_ms
            .map(|ms| Duration::from_millis(ms.max(0) as u64))
    }

    /// The stored head, or `None` if the payload is gone.
    pub(crate) fn head(&self) -> Result<Option<&str>, Unreadable> {
        match &self.damaged {
            Some(damaged) => Err(damaged.clone()),
            None => Ok(self.head.as_deref().map(RawValue::get)),
        }
    }

    pub(crate) fn metadata(&self) -> Option<Metadata> {
        let metadata = self.metadata.as_deref()?;
        Some(Metadata::stored(metadata.get()))
    }
}

impl Store {
    /// Fetches a body that was too large to come with its claim, if it has at most this many bytes
    /// and the head is still this one.
    pub(crate) async fn fetch_body(
        &self,
        id: RequestId,
        head: &str,
        limit: usize,
    ) -> Result<StoredBody, StoreError> {
        self.run_large("claim.body", limit, async |connection| {
            body(connection, id.into(), head, limit).await
        })
        .await
    }

    /// The recorded attempts of a request: its first ones and its last ones.
    pub(crate) async fn earlier_attempts(&self, id: RequestId) -> Result<Vec<Earlier>, Error> {
        self.run_verified("claim.earlier", async |connection| {
            earlier_attempts(connection, id.into()).await
        })
        .await
    }

    /// Takes a fresh lease if the claim is still the latest. Returns whether it is.
    pub(crate) async fn confirm(&self, fence: Fence, how: Confirm) -> Result<bool, Error> {
        let lease = self.config().lease;
        self.run_verified("claim.confirm", async |connection| {
            confirm(connection, fence, lease, how, self.instance()).await
        })
        .await
    }

    /// Renews the leases of these claims, sorted by id, where they are still the latest.
    pub(crate) async fn renew(&self, fences: &[Fence]) -> Result<(), StoreError> {
        let lease = self.config().lease;
        self.run("claim.renew", async |connection| {
            renew(connection, fences, lease, self.instance()).await
        })
        .await
    }
}

async fn earlier_attempts(
    connection: &mut PgConnection,
    id: Uuid,
) -> Result<Vec<Earlier>, sqlx::Error> {
    let rows: Vec<(i32, String, Option<i16>)> = sqlx::query_as(
        "SELECT a.number, a.error_class, a.http_status FROM attempts a WHERE a.id = $1",
    )
    .bind(id)
    .fetch_all(connection)
    .await?;
    let earlier = rows.into_iter().map(|(number, class, status)| Earlier {
        number: number as u32,
        class,
        status: status.map(|status| status as u16),
    });
    Ok(earlier.collect())
}

/// A stored body, as far as it is wanted.
#[derive(Debug)]
pub(crate) enum StoredBody {
    Whole(Option<Vec<u8>>),
    /// It has this many bytes, and was not read.
    Larger(usize),
    /// Head and body were encrypted anew since the head was read.
    Changed,
}

/// Postgres knows the length of a body without reading it. The head came without the white space
/// around it.
async fn body(
    connection: &mut PgConnection,
    id: Uuid,
    head: &str,
    limit: usize,
) -> Result<StoredBody, sqlx::Error> {
    let row: Option<(bool, Option<i32>, Option<Vec<u8>>)> = sqlx::query_as(
        r"SELECT btrim(head, E' \t\n\r') = $3, octet_length(body),
            CASE WHEN octet_length(body) <= $2 THEN body END
         FROM mq_payloads WHERE id = $1",
    )
    .bind(id)
    .bind(i32::try_from(limit).unwrap_or(i32::MAX))
    .bind(head)
    .fetch_optional(connection)
    .await?;
    Ok(match row {
        Some((false, _, _)) => StoredBody::Changed,
        Some((_, Some(length), None)) => StoredBody::Larger(length as usize),
        Some((_, _, body)) => StoredBody::Whole(body),
        None => StoredBody::Whole(None),
    })
}

/// What an attempt has confirmed before it sends, where its claim may have been lost unnoticed:
/// after a backoff, and before a request that must not be sent twice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Confirm {
    /// The attempt has not been counted yet.
    pub(crate) count: bool,
    /// The request must not be sent twice.
    pub(crate) once: bool,
}

async fn confirm(
    connection: &mut PgConnection,
    fence: Fence,
    lease: Duration,
    how: Confirm,
    owner: Uuid,
) -> Result<bool, sqlx::Error> {
    let confirmed = sqlx::query(
        "UPDATE mq_msgs m
         SET attempt_at = clock_timestamp() + $3 * interval '1 millisecond',
            attempts = least(m.attempts, 2147483646) + $4::int, state = $5::text::mq_state,
            owner = $6
         WHERE m.id = $1 AND m.claim_no = $2",
    )
    .bind(Uuid::from(fence.id))
    .bind(fence.claim_no)
    .bind(millis(lease))
    .bind(i32::from(how.count))
    .bind(if how.once { SENDING_ONCE } else { CLAIMED })
    .bind(owner)
    .execute(connection)
    .await?;
    Ok(confirmed.rows_affected() > 0)
}

/// Rows that a settle has locked are skipped: they need no lease any more, and waiting for them in
/// another order than the settle's would deadlock.
async fn renew(
    connection: &mut PgConnection,
    fences: &[Fence],
    lease: Duration,
    owner: Uuid,
) -> Result<(), sqlx::Error> {
    let (ids, claim_nos): (Vec<Uuid>, Vec<i32>) = fences
        .iter()
        .map(|fence| (Uuid::from(fence.id), fence.claim_no))
        .unzip();
    sqlx::query(
        "WITH locked AS MATERIALIZED (
            SELECT m.id FROM mq_msgs m
            JOIN unnest($1::uuid[], $2::int[]) AS i(id, claim_no)
                ON m.id = ANY (ARRAY[i.id]) AND m.claim_no = i.claim_no
            ORDER BY i.id FOR UPDATE OF m SKIP LOCKED
        )
        UPDATE mq_msgs m
        SET attempt_at = clock_timestamp() + $3 * interval '1 millisecond', owner = $4
        FROM locked WHERE m.id = ANY (ARRAY[locked.id])",
    )
    .bind(ids)
    .bind(claim_nos)
    .bind(millis(lease))
    .bind(owner)
    .execute(connection)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(head: &str, metadata: &str) -> String {
        [
            r#"{"claim_no":2,"attempts":1,"age_ms":5,"deadline_ms":null,"lost":true,"#,
            r#""lost_attempts":0,"more":false,"fetch_body":false,"channel":"a,\"head\":b","head":"#,
            head,
            r#","metadata":"#,
            metadata,
            "}",
        ]
        .concat()
    }

    #[test]
    fn a_claim_is_read_whatever_its_head() {
        let nested = r#"{"a":1,"head":{"b":1,"metadata":2}}"#;
        for (head, damaged) in [
            (r#"{"a":1}"#, None),
            (
                "hunter2",
                Some("the head: it is not JSON, at line 1, column 1"),
            ),
            (
                r#"{"a":1"#,
                Some("the head: it is not JSON, at line 1, column "),
            ),
            (
                r#"{},"more":1"#,
                Some("the head: duplicate field `more`, at line 1, column 9"),
            ),
            (r#"{"a":"#, Some("the head: it is not JSON")),
            (r#"{"a":1,"metadata":3"#, Some("the head: it is not JSON")),
            ("", Some("the head: it is not JSON, at line 1, column 1")),
        ] {
            for metadata in ["7", r#""a""#, nested] {
                let row = PolledRow::parse(&claim(head, metadata)).unwrap();
                assert_eq!((row.claim_no, row.lost), (2, true));
                assert_eq!(&*row.channel, r#"a,"head":b"#);
                assert_eq!(row.metadata().unwrap().json(), metadata, "{head}");
                match damaged {
                    None => assert_eq!(row.head().unwrap(), Some(head)),
                    Some(reason) => {
                        let error = row.head().unwrap_err();
                        assert!(error.as_str().starts_with(reason), "{error}");
                    }
                }
            }
        }
        let error = PolledRow::parse(r#"{"claim_no":"hunter2"}"#).unwrap_err();
        assert!(!error.as_str().contains("hunter2"), "{error}");
    }
}
