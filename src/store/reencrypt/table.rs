//! The tables with encrypted content, and which keys their rows need.

use uuid::Uuid;

use crate::id::RequestId;

/// A table with encrypted content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    Requests,
    Outcomes,
    Attempts,
    Keys,
    HandOvers,
}

impl Table {
    pub(crate) const ALL: [Self; 5] = [
        Self::Requests,
        Self::Outcomes,
        Self::Attempts,
        Self::Keys,
        Self::HandOvers,
    ];

    /// The next rows after a position. `keys` has the ids of the keys that the row needs, an empty
    /// one for content that is not encrypted, and NULL where there is no content.
    pub(super) fn page(self) -> &'static str {
        match self {
            Self::Requests => concat!(
                "SELECT t.id::text AS first, '' AS second, ARRAY[",
                // A key of a plain head is never taken for one: quotes are escaped within strings.
                r#"coalesce(substring(left(t.head, 4096) FROM
                    '^\{"method":"[^"\\]*","url":"[^"\\]*","sealed":"[0-9]+:([^:"]*):'), ''),
                CASE WHEN t.response_head IS NOT NULL THEN coalesce(
                    substring(left(t.response_head, 96) FROM '^\{"sealed":"[0-9]+:([^:"]*):'), ''
                ) END] AS keys
                FROM mq_payloads t WHERE t.id > $1::uuid AND $2 = $2 ORDER BY t.id LIMIT $3"#
            ),
            Self::Outcomes => {
                r#"SELECT t.id::text AS first, t.slot::text AS second, ARRAY[
                    CASE WHEN t.head IS NOT NULL THEN coalesce(
                        substring(left(t.head, 96) FROM '^\{"sealed":"[0-9]+:([^:"]*):'), ''
                    ) END,
                    CASE WHEN t.error IS NOT NULL THEN coalesce(
                        substring(left(t.error, 96) FROM '^sealed:[0-9]+:([^:]*):'), ''
                    ) END
                ] AS keys
                FROM outcomes t WHERE (t.id, t.slot) > ($1::uuid, $2::smallint)
                ORDER BY t.id, t.slot LIMIT $3"#
            }
            Self::Attempts => {
                "SELECT t.id::text AS first, t.number::text AS second, ARRAY[
                    coalesce(substring(left(t.error, 96) FROM '^sealed:[0-9]+:([^:]*):'), '')
                ] AS keys
                FROM attempts t WHERE (t.id, t.number) > ($1::uuid, $2::int)
                ORDER BY t.id, t.number LIMIT $3"
            }
            Self::Keys => {
                "SELECT t.channel_name AS first, t.key AS second, ARRAY[
                    CASE WHEN octet_length(t.fingerprint) > 32 THEN encode(
                        substr(t.fingerprint, 3, get_byte(t.fingerprint, 1)), 'escape'
                    ) ELSE '' END
                ] AS keys
                FROM request_keys t WHERE (t.channel_name, t.key) > ($1, $2)
                ORDER BY t.channel_name, t.key LIMIT $3"
            }
            Self::HandOvers => {
                "SELECT t.id::text AS first, '' AS second, ARRAY[
                    CASE WHEN t.error IS NOT NULL THEN coalesce(
                        substring(left(t.error, 96) FROM '^sealed:[0-9]+:([^:]*):'), ''
                    ) END
                ] AS keys
                FROM unhandled t WHERE t.id > $1::uuid AND $2 = $2 ORDER BY t.id LIMIT $3"
            }
        }
    }

    /// A position before all rows.
    pub(crate) fn start(self) -> Place {
        let (first, second) = match self {
            Self::Keys => (String::new(), String::new()),
            Self::Requests | Self::HandOvers => (Uuid::nil().to_string(), String::new()),
            Self::Outcomes => (Uuid::nil().to_string(), i16::MIN.to_string()),
            Self::Attempts => (Uuid::nil().to_string(), i32::MIN.to_string()),
        };
        Place { first, second }
    }
}

/// A row's primary key, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(super) first: String,
    pub(super) second: String,
}

impl Place {
    pub(super) fn id(&self) -> RequestId {
        // It came from a column of this type.
        self.first.parse().unwrap_or_else(|_| Uuid::nil().into())
    }
}
