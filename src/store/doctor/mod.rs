//! An examination of the database: what keeps requests from being sent, or will.
//!
//! It has connections of its own, with the settings of the role. Those of the store's pool are
//! pinned, and would hide what a check looks for. Each check is a transaction that only reads, with
//! a limit of time, so one that fails or hangs doesn't hide the others. What is set in it is set
//! for the transaction, so that all of this works through a pooler too. Statements have no name,
//! for the same reason.

mod connection;
mod queue;
mod schema;
mod server;
mod vacuum;

use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection};

use super::connect::located;
use super::{Store, quoted};
use crate::error::{Error, database_text, has_sqlstate};
use crate::finding::{Check, Finding, Severity};

/// A statement that takes longer is ended by the server.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(3);
/// A check that takes longer is given up.
const CHECK_TIMEOUT: Duration = Duration::from_secs(6);
/// How many things a summary names.
const NAMED: usize = 5;

impl Store {
    /// Everything that [`Check`] lists, at least one finding each.
    pub(crate) async fn doctor(&self) -> Result<Vec<Finding>, Error> {
        let options = self.db().options();
        let schema = &self.config().schema;
        let mut session = Session {
            connection: Some(connect(&options).await?),
            options: &options,
            schema,
        };
        let mut has_schema = true;
        let mut findings = Vec::new();
        for check in Check::ALL {
            if check.needs_schema() && !has_schema {
                let reason = format!("could not be checked: it needs the schema `{schema}`");
                findings.push(check.note(reason));
                continue;
            }
            let found = session.check(check).await;
            if check == Check::Schema {
                has_schema = found
                    .iter()
                    .all(|finding| finding.severity < Severity::Problem);
            }
            findings.extend(found);
        }
        if let Some(connection) = session.connection {
            // Nothing depends on it.
            let _ = connection.close().await;
        }
        Ok(findings)
    }
}

/// The connection of the checks, replaced if one of them loses it.
struct Session<'a> {
    options: &'a PgConnectOptions,
    schema: &'a str,
    connection: Option<PgConnection>,
}

impl Session<'_> {
    async fn check(&mut self, check: Check) -> Vec<Finding> {
        let examined = Box::pin(self.examine(check));
        let reason = match tokio::time::timeout(CHECK_TIMEOUT, examined).await {
            Ok(Ok(findings)) => return findings,
            Ok(Err(error)) => {
                if error.as_database_error().is_none() {
                    self.connection = None;
                }
                return vec![unchecked(check, &error)];
            }
            Err(_elapsed) => format!("no answer within {} s", CHECK_TIMEOUT.as_secs()),
        };
        self.connection = None;
        vec![check.warning(format!("could not be checked: {reason}"))]
    }

    async fn examine(&mut self, check: Check) -> Result<Vec<Finding>, sqlx::Error> {
        let (options, schema) = (self.options, self.schema);
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(options.connect().await?),
        };
        let settings = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;
             SET LOCAL search_path = {};
             SET LOCAL statement_timeout = {};
             SET LOCAL lock_timeout = '1s';
             SET LOCAL enable_seqscan = off;
             SET LOCAL enable_sort = off;
             SET LOCAL jit = off",
            quoted(schema),
            STATEMENT_TIMEOUT.as_millis(),
        );
        connection.execute(&*settings).await?;
        let found = match check {
            Check::Postgres => server::version(connection).await,
            Check::Recovery => server::recovery(connection).await,
            Check::Schema => schema::schema(connection, schema).await,
            Check::Version => schema::version(connection).await,
            Check::Grants => schema::grants(connection, schema).await,
            Check::Truncate => schema::truncate(connection, schema).await,
            Check::InvalidIndexes => schema::invalid_indexes(connection, schema).await,
            Check::MissingIndexes => schema::missing_indexes(connection, schema).await,
            Check::Clock => connection::clock(connection).await,
            Check::Listen => connection::listen(options).await,
            Check::AdvisoryLocks => connection::advisory_locks(connection, options).await,
            Check::Lag => queue::lag(connection).await,
            Check::Runners => queue::runners(connection).await,
            Check::Parked => queue::parked(connection).await,
            Check::Destinations => queue::destinations(connection).await,
            Check::Handlers => queue::handlers(connection).await,
            Check::PruneLag => queue::prune_lag(connection).await,
            Check::DeadRows => vacuum::dead_rows(connection, schema).await,
            Check::Transactions => vacuum::transactions(connection).await,
            Check::ReplicationSlots => vacuum::replication_slots(connection).await,
            Check::Autovacuum => vacuum::autovacuum(connection, schema).await,
            Check::Locks => server::locks(connection).await,
            Check::Connections => server::connections(connection).await,
            Check::Settings => server::settings(connection).await,
        };
        if found
            .as_ref()
            .is_err_and(|error| error.as_database_error().is_none())
        {
            return found;
        }
        connection.execute("ROLLBACK").await?;
        found
    }
}

async fn connect(options: &PgConnectOptions) -> Result<PgConnection, Error> {
    let connected = tokio::time::timeout(CHECK_TIMEOUT, options.connect()).await;
    connected
        .unwrap_or_else(|_elapsed| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())))
        .map_err(|error| located(error, options).into())
}

/// What there is to say about a check that failed. A role that may not look is no reason for alarm,
/// nor is a standby.
fn unchecked(check: Check, error: &sqlx::Error) -> Finding {
    let summary = format!("could not be checked: {}", database_text(error));
    if has_sqlstate(error, &["42501"]) {
        check
            .note(summary)
            .advise("run it as a role that may read the schema and pg_monitor's views")
    } else if has_sqlstate(error, &["25006"]) {
        check.note(summary).advise("run it on the primary server")
    } else {
        check.warning(summary)
    }
}

/// A time as people say it: `40 s`, `12 min`, `3 h`, `5 days`.
fn spoken(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    let (number, unit) = if seconds < 120.0 {
        (seconds, "s")
    } else if seconds < 7200.0 {
        (seconds / 60.0, "min")
    } else if seconds < 172_800.0 {
        (seconds / 3600.0, "h")
    } else {
        (seconds / 86_400.0, "days")
    };
    format!("{:.0} {unit}", number.floor())
}

/// `a`, `a, b`, or the first of them and how many there are.
fn listed(names: &[String]) -> String {
    let shown = names.iter().take(NAMED).map(String::as_str);
    let shown = shown.collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(NAMED) {
        None | Some(0) => shown,
        Some(more) => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_lists_are_short() {
        let times = [0.4, 119.0, 120.0, 7300.0, 400_000.0].map(spoken);
        assert_eq!(times, ["0 s", "119 s", "2 min", "2 h", "4 days"]);
        let names: Vec<String> = (1..8).map(|number| number.to_string()).collect();
        assert_eq!(listed(&names[..1]), "1");
        assert_eq!(listed(&names[..5]), "1, 2, 3, 4, 5");
        assert_eq!(listed(&names), "1, 2, 3, 4, 5 and 2 more");
    }
}
