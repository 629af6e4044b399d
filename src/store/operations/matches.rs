//! Which requests an operation meets next.
//!
//! Rows are read in an order that an index has, a bounded number at a time: dead letters as they
//! ended, so that the requests of an ordering key keep their order, and unfinished requests by
//! their ids. What no index has is looked at in these rows.

use sqlx::{PgConnection, Postgres, QueryBuilder, Row};
use uuid::Uuid;

use crate::dead_letter::{Position, Wanted};
use crate::id::RequestId;
use crate::inspection::{RequestFilter, RequestState, micros_of};
use crate::operation::Action;
use crate::sealer::Sealer;
use crate::status::Status;
use crate::store::columns::{QUEUED_STATUS, named_by_group, ordering_key};
use crate::store::dead_letters::{self, Page, answered};

/// How many rows one look reads.
const LOOK: u32 = 2000;

/// What an operation looks for.
#[derive(Clone, Debug)]
pub(super) struct Search<'a> {
    pub(super) action: Action,
    pub(super) filter: &'a RequestFilter,
    /// In microseconds since 1970. Requests that ended, or were enqueued, later are left out.
    pub(super) until: i64,
}

/// What a look found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// In the order of the walk.
    pub(super) matching: Vec<Position>,
    /// How many rows were looked at for them.
    pub(super) looked: u64,
    /// Where the next look begins. `None` once there are no more rows.
    pub(super) next: Option<Position>,
}

impl Search<'_> {
    /// Up to `limit` matches among the next rows.
    pub(super) async fn look(
        &self,
        connection: &mut PgConnection,
        after: Option<Position>,
        limit: usize,
        sealer: &Sealer,
    ) -> Result<Found, sqlx::Error> {
        let rows = self.rows(connection, after).await?;
        let is_last = self.filter.id.is_some() || rows.len() < LOOK as usize;
        let last = rows.last().copied();
        let mut matching = self.matching(connection, &rows, sealer).await?;
        if matching.len() > limit {
            matching.truncate(limit);
            let end = matching.last().copied();
            let place = rows.iter().position(|row| Some(*row) == end);
            return Ok(Found {
                matching,
                looked: place.map_or(0, |place| place as u64 + 1),
                next: end,
            });
        }
        Ok(Found {
            matching,
            looked: rows.len() as u64,
            next: if is_last { None } else { last },
        })
    }

    fn is_of_queue(&self) -> bool {
        self.action == Action::Cancel
    }

    /// The next rows, whether or not they match.
    async fn rows(
        &self,
        connection: &mut PgConnection,
        after: Option<Position>,
    ) -> Result<Vec<Position>, sqlx::Error> {
        if let Some(id) = self.filter.id {
            let only = Position { finished_at: 0, id };
            return Ok(if after.is_none() { vec![only] } else { vec![] });
        }
        if self.is_of_queue() {
            let rows: Vec<Uuid> = sqlx::query_scalar(
                "SELECT m.id FROM mq_msgs m WHERE m.id > $1 ORDER BY m.id LIMIT $2",
            )
            .bind(after.map_or(Uuid::nil(), |after| after.id.into()))
            .bind(i64::from(LOOK))
            // As for pages of dead letters.
            .persistent(false)
            .fetch_all(connection)
            .await?;
            let position = |id: Uuid| Position {
                finished_at: 0,
                id: id.into(),
            };
            return Ok(rows.into_iter().map(position).collect());
        }
        let Some(statuses) = self.statuses() else {
            return Ok(Vec::new());
        };
        // The column has origins only.
        let origin = self.filter.destination.clone();
        let origin = origin.filter(|name| name.contains("://"));
        let page = Page {
            wanted: Wanted {
                channel: self.filter.channel.clone(),
                destination: origin,
                status: match &*statuses {
                    [one] => Some(*one),
                    _ => None,
                },
                finished_within: None,
                finished_before: None,
                limit: None,
                after,
            },
            now: self.until,
            limit: LOOK,
        };
        dead_letters::ids(connection, &page).await
    }

    /// The statuses of dead letters that are meant. `None` if there are none.
    fn statuses(&self) -> Option<Vec<Status>> {
        let can_be: &[Status] = match self.action {
            Action::Resolve(_) => &[Status::Ambiguous],
            _ => &[Status::Discarded, Status::Ambiguous],
        };
        let wanted = &self.filter.status;
        let meant: Vec<_> = can_be
            .iter()
            .copied()
            .filter(|status| wanted.is_empty() || wanted.contains(status))
            .collect();
        (!meant.is_empty()).then_some(meant)
    }

    /// Those of the rows that match.
    async fn matching(
        &self,
        connection: &mut PgConnection,
        rows: &[Position],
        sealer: &Sealer,
    ) -> Result<Vec<Position>, sqlx::Error> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let mut statement = self.statement(rows);
        let query = statement.build().persistent(false);
        let found = query.fetch_all(connection).await?;
        let mut matching = Vec::with_capacity(found.len());
        for row in found {
            let place: i64 = row.try_get("place")?;
            let place = usize::try_from(place - 1).unwrap_or_default();
            let Some(position) = rows.get(place).copied() else {
                continue;
            };
            if let Some(text) = &self.filter.error_contains {
                let class: Option<String> = row.try_get("error_class")?;
                let error: Option<String> = row.try_get("error")?;
                let status: Option<i16> = row.try_get("http_status")?;
                let class = class.unwrap_or_default();
                let error = match error {
                    Some(error) => sealer.read_error_text(position.id, &class, error).ok(),
                    None => status.and_then(|status| answered(status.unsigned_abs())),
                };
                let text = text.to_lowercase();
                if !error.is_some_and(|error| error.to_lowercase().contains(&text)) {
                    continue;
                }
            }
            matching.push(position);
        }
        Ok(matching)
    }

    fn statement(&self, rows: &[Position]) -> QueryBuilder<'static, Postgres> {
        let filter = self.filter;
        let is_of_queue = self.is_of_queue();
        let ids: Vec<Uuid> = rows.iter().map(|row| row.id.into()).collect();
        let table = if is_of_queue {
            "mq_msgs"
        } else {
            "outcomes_kept"
        };
        let texts = match (&filter.error_contains, is_of_queue) {
            (None, _) => {
                "NULL::text AS error_class, NULL::text AS error, NULL::int2 AS http_status"
            }
            (Some(_), true) => "e.error_class, e.error, NULL::int2 AS http_status",
            (Some(_), false) => "m.error_class, m.error, m.http_status",
        };
        let mut statement = QueryBuilder::new(format!("SELECT i.place, {texts} FROM unnest("));
        statement.push_bind(ids);
        push(
            &mut statement,
            format_args!(
                ") WITH ORDINALITY AS i(id, place) JOIN {table} m ON m.id = ANY (ARRAY[i.id])"
            ),
        );
        if filter.error_contains.is_some() && is_of_queue {
            statement.push(
                " CROSS JOIN LATERAL (
                    SELECT a.error_class, a.error FROM attempts a
                    WHERE a.id = m.id AND m.attempts > 0 ORDER BY a.number DESC LIMIT 1
                ) e",
            );
        }
        push(
            &mut statement,
            format_args!(
                " WHERE m.{} <= 'epoch'::timestamptz + {} * interval '1 microsecond'",
                if is_of_queue {
                    "created_at"
                } else {
                    "finished_at"
                },
                self.until
            ),
        );
        self.push_conditions(&mut statement);
        statement.push(" ORDER BY i.place");
        statement
    }

    fn push_conditions(&self, statement: &mut QueryBuilder<'static, Postgres>) {
        let filter = self.filter;
        let group = "m.channel_args";
        if let Some(channel) = &filter.channel {
            statement.push(" AND m.channel_name = ");
            statement.push_bind(channel.clone());
        }
        if let Some(destination) = &filter.destination {
            let named = named_by_group(group);
            // A limit key is in the group of a dead letter, and its column has the origin.
            let column = if self.is_of_queue() || destination.contains("://") {
                format!("coalesce(m.destination, {named})")
            } else {
                named
            };
            push(statement, format_args!(" AND {column} = "));
            statement.push_bind(destination.clone());
        }
        if let Some(key) = &filter.ordering_key {
            push(statement, format_args!(" AND {} = ", ordering_key(group)));
            statement.push_bind(key.clone());
        }
        for (operator, time) in [(">=", filter.created_after), ("<", filter.created_before)] {
            let Some(time) = time else { continue };
            push(
                statement,
                format_args!(
                    " AND m.created_at {operator}
                        'epoch'::timestamptz + {} * interval '1 microsecond'",
                    micros_of(time)
                ),
            );
        }
        if self.is_of_queue() {
            self.push_queue_conditions(statement);
            return;
        }
        let statuses = self.statuses().unwrap_or_default();
        let names: Vec<_> = statuses.iter().map(|status| status.as_str()).collect();
        statement.push(" AND m.status = ANY (").push_bind(names);
        statement.push(")");
        if !filter.state.is_empty() {
            // Of dead letters, the queue has those that halt their keys.
            push(
                statement,
                format_args!(
                    " AND {} AND EXISTS (
                        SELECT FROM mq_msgs q WHERE q.id = m.id AND q.state = 'halted' OFFSET 0
                    )",
                    filter.state.contains(&RequestState::Halted)
                ),
            );
        }
    }

    fn push_queue_conditions(&self, statement: &mut QueryBuilder<'static, Postgres>) {
        let filter = self.filter;
        statement.push(" AND m.state <> 'halted'");
        if !filter.state.is_empty() {
            let names: Vec<_> = filter.state.iter().map(|state| state.as_str()).collect();
            statement
                .push(" AND m.state::text = ANY (")
                .push_bind(names);
            statement.push(")");
        }
        if !filter.status.is_empty() {
            let names: Vec<_> = filter.status.iter().map(|status| status.as_str()).collect();
            push(statement, format_args!(" AND {QUEUED_STATUS} = ANY ("));
            statement.push_bind(names);
            statement.push(")");
        }
    }
}

/// The filter with the id of the request that has its key. A key that no request has selects none.
pub(super) async fn resolved(
    connection: &mut PgConnection,
    filter: &RequestFilter,
) -> Result<RequestFilter, sqlx::Error> {
    let mut resolved = filter.clone();
    if let (Some(channel), Some(key)) = (&filter.channel, &filter.key) {
        let found: Option<Uuid> = sqlx::query_scalar(
            "SELECT k.id FROM request_keys k WHERE k.channel_name = $1 AND k.key = $2",
        )
        .bind(channel)
        .bind(key)
        .fetch_optional(connection)
        .await?;
        let found = RequestId::from(found.unwrap_or_default());
        resolved.id = match resolved.id {
            Some(id) if id != found => Some(RequestId::from(Uuid::nil())),
            _ => Some(found),
        };
    }
    Ok(resolved)
}

fn push(statement: &mut QueryBuilder<'static, Postgres>, text: std::fmt::Arguments<'_>) {
    statement.push(text);
}
