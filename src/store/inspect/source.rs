//! Where requests are looked for, and how far.
//!
//! A list is in the order of the ids, which is that in which requests were enqueued, and each
//! statement reads a bounded number of rows. If the filter has a condition with an index and few
//! rows fulfil it, all of them are read. Otherwise the rows are read in the order of the list, up
//! to the bound.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use sqlx::{Postgres, QueryBuilder};
use uuid::Uuid;

use crate::destination::{channel_ordered_group, ordered_group};
use crate::inspection::{RequestFilter, RequestState, micros_of};
use crate::status::Status;
use crate::store::columns::{QUEUED_STATUS, named_by_group, ordering_key};

/// How many rows of a source a statement looks at.
pub(super) const WINDOW: usize = 10_000;
/// How far the clocks of processes, which make the ids, may be from the database's.
const CLOCKS: Duration = Duration::from_secs(3600);
/// The states that have an index of their own.
const ASIDE: [RequestState; 4] = [
    RequestState::Behind,
    RequestState::Deferred,
    RequestState::Parked,
    RequestState::Halted,
];

/// What a statement has of requests. A request is in one of them, except that a halted one is in
/// two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Unfinished requests, without those that halt their keys unless the filter asks for them.
    Queue,
    DeadLetters,
    /// Other outcomes, which expire.
    Outcomes,
}

/// What is looked for.
#[derive(Clone, Debug)]
pub(super) struct Search<'a> {
    pub(super) filter: &'a RequestFilter,
    /// Only this request: the filter's id, or that of its key.
    pub(super) id: Option<Uuid>,
    /// Only requests before this one, if any.
    pub(super) before: Option<Uuid>,
    /// Errors have to be decrypted to be searched.
    pub(super) has_keys: bool,
}

type Statement = QueryBuilder<'static, Postgres>;

impl Search<'_> {
    /// The sources that can have matches.
    pub(super) fn sources(&self) -> Vec<Source> {
        fn is_letter(status: Status) -> bool {
            matches!(status, Status::Discarded | Status::Ambiguous)
        }
        let filter = self.filter;
        let wanted = |of: fn(Status) -> bool| {
            filter.status.is_empty() || filter.status.iter().copied().any(of)
        };
        let mut sources = Vec::with_capacity(3);
        if filter.state.contains(&RequestState::Halted) || wanted(|status| !status.is_terminal()) {
            sources.push(Source::Queue);
        }
        if filter.state.is_empty() {
            if wanted(is_letter) {
                sources.push(Source::DeadLetters);
            }
            if wanted(|status| status.is_terminal() && !is_letter(status)) {
                sources.push(Source::Outcomes);
            }
        }
        sources
    }

    /// Counts up to one more than [`WINDOW`] of the rows that fulfil the condition with an index.
    /// `None` if there is no such condition.
    pub(super) fn probe(&self, source: Source) -> Option<Statement> {
        let mut statement = QueryBuilder::new("SELECT count(*) FROM (");
        self.narrow(source, &mut statement)?;
        statement.push(") narrow");
        Some(statement)
    }

    /// The matches among the rows that fulfil the condition with an index, the last one first.
    pub(super) fn narrowed(&self, source: Source, limit: usize) -> Option<Statement> {
        self.matches(source, limit, |statement| self.narrow(source, statement))
    }

    /// The matches among the next rows, the last one first.
    pub(super) fn walked(&self, source: Source, limit: usize) -> Option<Statement> {
        self.matches(source, limit, |statement| {
            self.walk(source, statement);
            Some(())
        })
    }

    /// The last of the rows that [`walked`](Self::walked) looks at, if there are so many.
    pub(super) fn end_of_walk(&self, source: Source) -> Statement {
        let mut statement = QueryBuilder::new("SELECT s.id FROM (");
        self.walk(source, &mut statement);
        write_to(&mut statement, format_args!(") s OFFSET {}", WINDOW - 1));
        statement
    }

    /// Counts the matches among the rows that fulfil the condition with an index, or among the next
    /// rows if there is no such condition.
    pub(super) fn counted(&self, source: Source) -> Statement {
        let mut statement = QueryBuilder::new("SELECT count(*) FROM (");
        let rows = |statement: &mut Statement| {
            if self.narrow(source, statement).is_none() {
                self.walk(source, statement);
            }
            Some(())
        };
        self.push_matches(source, "m.id", &mut statement, rows);
        statement.push(") k");
        statement
    }

    fn matches(
        &self,
        source: Source,
        limit: usize,
        rows: impl FnOnce(&mut Statement) -> Option<()>,
    ) -> Option<Statement> {
        let error = self.filter.error_contains.is_some();
        let texts = if error {
            "e.error_class, e.error"
        } else {
            "NULL, NULL"
        };
        let mut statement = QueryBuilder::new("");
        self.push_matches(source, &format!("m.id, {texts}"), &mut statement, rows)?;
        // All that may match are decrypted, and then fewer do.
        let limit = if error && self.has_keys {
            WINDOW
        } else {
            limit
        };
        write_to(
            &mut statement,
            format_args!(" ORDER BY m.id DESC LIMIT {limit}"),
        );
        Some(statement)
    }

    fn push_matches(
        &self,
        source: Source,
        columns: &str,
        statement: &mut Statement,
        rows: impl FnOnce(&mut Statement) -> Option<()>,
    ) -> Option<()> {
        write_to(statement, format_args!("SELECT {columns} FROM ("));
        rows(statement)?;
        statement.push(") m");
        if self.filter.error_contains.is_some() {
            statement.push(match source {
                Source::Queue => {
                    " CROSS JOIN LATERAL (
                        SELECT a.error_class, a.error, NULL::smallint AS http_status
                        FROM attempts a WHERE a.id = m.id AND m.attempts > 0
                        ORDER BY a.number DESC LIMIT 1
                    ) e"
                }
                Source::DeadLetters | Source::Outcomes => {
                    " CROSS JOIN LATERAL (SELECT m.error_class, m.error, m.http_status) e"
                }
            });
        }
        statement.push(" WHERE true");
        self.push_conditions(source, statement);
        Some(())
    }

    fn push_conditions(&self, source: Source, statement: &mut Statement) {
        let filter = self.filter;
        let group = "m.channel_args";
        let named = named_by_group(group);
        if let Some(before) = self.before {
            statement.push(" AND m.id < ").push_bind(before);
        }
        if let Some(channel) = &filter.channel {
            let channel = channel.clone();
            statement.push(" AND m.channel_name = ").push_bind(channel);
        }
        if let Some(destination) = &filter.destination {
            let destination = destination.clone();
            // A limit key is in the group of a dead letter, and its column has the origin.
            let column = if source == Source::Queue || destination.contains("://") {
                format!("coalesce(m.destination, {named})")
            } else {
                named
            };
            write_to(statement, format_args!(" AND {column} = "));
            statement.push_bind(destination);
        }
        if let Some(key) = &filter.ordering_key {
            write_to(statement, format_args!(" AND {} = ", ordering_key(group)));
            statement.push_bind(key.clone());
        }
        for (operator, time) in [(">=", filter.created_after), ("<", filter.created_before)] {
            if let Some(time) = time {
                write_to(
                    statement,
                    format_args!(
                        " AND m.created_at {operator} 'epoch'::timestamptz
                            + {} * interval '1 microsecond'",
                        micros_of(time)
                    ),
                );
            }
        }
        if source == Source::Queue {
            self.push_queue_conditions(statement);
        } else if !filter.status.is_empty() {
            let names: Vec<_> = filter.status.iter().map(|status| status.as_str()).collect();
            statement.push(" AND m.status = ANY (").push_bind(names);
            statement.push(")");
            if source == Source::Outcomes {
                // A dead letter that was replayed isn't one any more.
                statement.push(" AND m.status IN ('completed', 'cancelled')");
            }
        }
        if let Some(text) = &filter.error_contains {
            self.push_error(source, text, statement);
        }
    }

    fn push_queue_conditions(&self, statement: &mut Statement) {
        let filter = self.filter;
        if filter.state.is_empty() {
            statement.push(" AND m.state <> 'halted'");
        } else {
            let names: Vec<_> = filter.state.iter().map(|state| state.as_str()).collect();
            statement
                .push(" AND m.state::text = ANY (")
                .push_bind(names);
            statement.push(")");
        }
        if !filter.status.is_empty() {
            let names: Vec<_> = filter.status.iter().map(|status| status.as_str()).collect();
            write_to(
                statement,
                format_args!(
                    " AND CASE WHEN m.state = 'halted'
                        THEN (SELECT o.status FROM outcomes_kept o WHERE o.id = m.id LIMIT 1)
                        ELSE {QUEUED_STATUS} END = ANY ("
                ),
            );
            statement.push_bind(names).push(")");
        }
    }

    fn push_error(&self, source: Source, text: &str, statement: &mut Statement) {
        let text = text.to_lowercase();
        let http_statuses: Vec<i16> = (100..1000)
            .filter(|status| {
                let shown = super::answered(*status).unwrap_or_default();
                shown.to_lowercase().contains(&text)
            })
            .map(|status| status as i16)
            .collect();
        statement
            .push(" AND (strpos(lower(e.error), ")
            .push_bind(text);
        statement.push(") > 0");
        if source != Source::Queue {
            statement
                .push(" OR e.error IS NULL AND m.status <> 'completed' AND e.http_status = ANY (");
            statement.push_bind(http_statuses).push(")");
        }
        if self.has_keys {
            statement.push(" OR e.error LIKE 'sealed:%'");
        }
        statement.push(")");
    }

    /// The rows that fulfil a condition with an index, at most one more than [`WINDOW`].
    fn narrow(&self, source: Source, statement: &mut Statement) -> Option<()> {
        if let Some(id) = self.id {
            write_to(
                statement,
                format_args!("SELECT m.* FROM {} m", source.table()),
            );
            statement.push(" WHERE m.id = ").push_bind(id);
            if source == Source::Outcomes {
                statement.push(" AND m.slot <> -1");
            }
            return Some(());
        }
        match source {
            Source::Queue => self.narrow_queue(statement)?,
            Source::DeadLetters => self.narrow_letters(statement)?,
            Source::Outcomes => return None,
        }
        write_to(statement, format_args!(" LIMIT {}", WINDOW + 1));
        Some(())
    }

    fn narrow_queue(&self, statement: &mut Statement) -> Option<()> {
        let filter = self.filter;
        let waits_for_destination =
            filter.state == [RequestState::Deferred] || filter.status == [Status::Deferred];
        let aside: Vec<&str> = match (&*filter.state, &*filter.status) {
            ([], [Status::Parked]) => vec!["parked"],
            ([], [Status::Deferred]) => vec!["deferred"],
            (states, _) if !states.is_empty() && states.iter().all(|s| ASIDE.contains(s)) => {
                states.iter().map(|state| state.as_str()).collect()
            }
            _ => Vec::new(),
        };
        if let Some(key) = &filter.ordering_key {
            let groups = vec![ordered_group(key), channel_ordered_group(key)];
            statement.push("SELECT m.* FROM mq_msgs m WHERE m.seq IS NOT NULL");
            statement
                .push(" AND m.channel_args = ANY (")
                .push_bind(groups);
            statement.push(")");
        } else if let (Some(destination), true) = (&filter.destination, waits_for_destination) {
            statement.push("SELECT m.* FROM mq_msgs m WHERE m.state = 'deferred'");
            statement.push(" AND m.destination = ");
            statement.push_bind(destination.clone());
        } else if !aside.is_empty() {
            statement.push(
                "SELECT m.* FROM mq_msgs m
                 WHERE m.state IN ('behind', 'deferred', 'parked', 'halted')
                    AND m.state = ANY (",
            );
            statement.push_bind(aside).push("::mq_state[])");
            if let Some(channel) = &filter.channel {
                statement.push(" AND m.channel_name = ");
                statement.push_bind(channel.clone());
            }
        } else {
            let channel = filter.channel.as_ref()?;
            statement.push("SELECT * FROM (");
            for (number, states) in CHANNEL_INDEXES.iter().enumerate() {
                let union = if number == 0 { "" } else { " UNION ALL " };
                write_to(
                    statement,
                    format_args!(
                        "{union}(SELECT * FROM mq_msgs m WHERE m.state {states}
                            AND m.channel_name = "
                    ),
                );
                statement.push_bind(channel.clone());
                write_to(statement, format_args!(" LIMIT {})", WINDOW + 1));
            }
            statement.push(") m");
        }
        Some(())
    }

    fn narrow_letters(&self, statement: &mut Statement) -> Option<()> {
        let filter = self.filter;
        // The column has origins only.
        let destination = filter
            .destination
            .as_ref()
            .filter(|name| name.contains("://"));
        let statuses: Vec<Status> = [Status::Discarded, Status::Ambiguous]
            .into_iter()
            .filter(|status| filter.status.is_empty() || filter.status.contains(status))
            .collect();
        let indexed = match (&filter.channel, destination) {
            (None, None) if statuses.len() == 1 => "m.status",
            (None, None) => return None,
            (Some(_), None) => "(m.channel_name || ' ' || m.status)",
            (None, Some(_)) => "(m.destination || ' ' || m.status)",
            (Some(_), Some(_)) => "(m.channel_name || ' ' || m.destination || ' ' || m.status)",
        };
        let wanted = statuses.iter().map(|status| {
            let mut wanted = String::new();
            if let Some(channel) = &filter.channel {
                let _ = write!(wanted, "{channel} ");
            }
            if let Some(destination) = destination {
                let _ = write!(wanted, "{} ", cut(destination));
            }
            wanted + status.as_str()
        });
        let wanted: Vec<String> = wanted.collect();
        write_to(
            statement,
            format_args!("SELECT m.* FROM outcomes_kept m WHERE {indexed} = ANY ("),
        );
        statement.push_bind(wanted).push(")");
        Some(())
    }

    /// The next rows in the order of the list, at most [`WINDOW`].
    fn walk(&self, source: Source, statement: &mut Statement) {
        let filter = self.filter;
        let latest = filter
            .created_before
            .and_then(|time| time.checked_add(CLOCKS));
        let latest = latest.map(first_id);
        let upper = match (self.before, latest) {
            (Some(before), Some(latest)) => before.min(latest),
            (before, latest) => before.or(latest).unwrap_or(Uuid::max()),
        };
        write_to(
            statement,
            format_args!("SELECT m.* FROM {} m WHERE m.id < ", source.table()),
        );
        statement.push_bind(upper);
        if let Some(earliest) = filter.created_after {
            let earliest = earliest
                .checked_sub(CLOCKS)
                .unwrap_or(SystemTime::UNIX_EPOCH);
            statement
                .push(" AND m.id >= ")
                .push_bind(first_id(earliest));
        }
        if source == Source::Outcomes {
            statement.push(" AND m.slot <> -1");
        }
        write_to(
            statement,
            format_args!(" ORDER BY m.id DESC LIMIT {WINDOW}"),
        );
    }
}

/// The conditions of the indexes that begin with the channel. Together they have all rows.
const CHANNEL_INDEXES: [&str; 3] = [
    "= 'waiting'",
    "IN ('claimed', 'held', 'sending_once')",
    "IN ('behind', 'deferred', 'parked', 'halted')",
];

impl Source {
    fn table(self) -> &'static str {
        match self {
            Self::Queue => "mq_msgs",
            Self::DeadLetters => "outcomes_kept",
            Self::Outcomes => "outcomes",
        }
    }
}

/// The column has so many characters.
fn cut(destination: &str) -> String {
    destination.chars().take(500).collect()
}

/// The least id that can be made at this time.
fn first_id(time: SystemTime) -> Uuid {
    let millis = u128::from(micros_of(time) / 1000);
    Uuid::from_u128(millis << 80)
}

fn write_to(statement: &mut Statement, text: std::fmt::Arguments<'_>) {
    statement.push(text);
}
