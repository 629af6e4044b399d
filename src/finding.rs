//! What an examination of the database has found.

use std::fmt;

use serde::Serialize;

/// What an examination looks at. See [`Admin::doctor`](crate::admin::Admin::doctor).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Check {
    /// The server's version.
    Postgres,
    /// Whether the server takes changes.
    Recovery,
    /// Whether the schema is there, and whose it is.
    Schema,
    /// Whether the schema and this release fit.
    Version,
    /// What the role may do.
    Grants,
    /// How far the clocks of this process and of the database are apart.
    Clock,
    /// Whether notifications reach this process.
    Listen,
    /// Whether advisory locks exclude each other.
    AdvisoryLocks,
    /// Whether expired outcomes can be removed by `TRUNCATE`.
    Truncate,
    /// How long due requests have waited.
    Lag,
    /// Whether each channel with due requests has a runner.
    Runners,
    /// Requests that no process could read.
    Parked,
    /// Destinations that take no requests.
    Destinations,
    /// Outcomes that wait for a handler.
    Handlers,
    /// Expired outcomes that are still there.
    PruneLag,
    /// Dead rows, and what keeps them.
    DeadRows,
    /// Transactions that have been open for long.
    Transactions,
    /// Replication slots that keep what the server would remove.
    ReplicationSlots,
    /// Whether autovacuum takes care of the tables.
    Autovacuum,
    /// Indexes that Postgres doesn't use.
    InvalidIndexes,
    /// Indexes that are not there.
    MissingIndexes,
    /// Room for locks.
    Locks,
    /// Room for connections.
    Connections,
    /// Settings of the server and of the role.
    Settings,
}

impl Check {
    pub(crate) const ALL: [Self; 24] = [
        Self::Postgres,
        Self::Recovery,
        Self::Schema,
        Self::Version,
        Self::Grants,
        Self::Clock,
        Self::Listen,
        Self::AdvisoryLocks,
        Self::Truncate,
        Self::Lag,
        Self::Runners,
        Self::Parked,
        Self::Destinations,
        Self::Handlers,
        Self::PruneLag,
        Self::DeadRows,
        Self::Transactions,
        Self::ReplicationSlots,
        Self::Autovacuum,
        Self::InvalidIndexes,
        Self::MissingIndexes,
        Self::Locks,
        Self::Connections,
        Self::Settings,
    ];

    /// The name of the check, such as `"dead-rows"`. It is also its form in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Recovery => "recovery",
            Self::Schema => "schema",
            Self::Version => "version",
            Self::Grants => "grants",
            Self::Clock => "clock",
            Self::Listen => "listen",
            Self::AdvisoryLocks => "advisory-locks",
            Self::Truncate => "truncate",
            Self::Lag => "lag",
            Self::Runners => "runners",
            Self::Parked => "parked",
            Self::Destinations => "destinations",
            Self::Handlers => "handlers",
            Self::PruneLag => "prune-lag",
            Self::DeadRows => "dead-rows",
            Self::Transactions => "transactions",
            Self::ReplicationSlots => "replication-slots",
            Self::Autovacuum => "autovacuum",
            Self::InvalidIndexes => "invalid-indexes",
            Self::MissingIndexes => "missing-indexes",
            Self::Locks => "locks",
            Self::Connections => "connections",
            Self::Settings => "settings",
        }
    }

    /// Whether the check looks into the schema.
    pub(crate) fn needs_schema(self) -> bool {
        matches!(
            self,
            Self::Version
                | Self::Grants
                | Self::Truncate
                | Self::Lag
                | Self::Runners
                | Self::Parked
                | Self::Destinations
                | Self::Handlers
                | Self::PruneLag
                | Self::DeadRows
                | Self::InvalidIndexes
                | Self::MissingIndexes
        )
    }

    pub(crate) fn ok(self, summary: impl Into<String>) -> Finding {
        Finding {
            check: self,
            severity: Severity::Ok,
            summary: summary.into(),
            advice: None,
        }
    }

    pub(crate) fn note(self, summary: impl Into<String>) -> Finding {
        Finding {
            severity: Severity::Note,
            ..self.ok(summary)
        }
    }

    pub(crate) fn warning(self, summary: impl Into<String>) -> Finding {
        Finding {
            severity: Severity::Warning,
            ..self.ok(summary)
        }
    }

    pub(crate) fn problem(self, summary: impl Into<String>) -> Finding {
        Finding {
            severity: Severity::Problem,
            ..self.ok(summary)
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How bad a finding is. Later ones are worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Severity {
    /// All is well.
    Ok,
    /// Worth knowing. Also where the role may not look.
    Note,
    /// It will become a problem, or makes everything slower.
    Warning,
    /// Requests are not delivered, or could be lost.
    Problem,
}

impl Severity {
    /// The name of the severity: `"ok"`, `"note"`, `"warning"` or `"problem"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What one check has found. [`Admin::doctor`](crate::admin::Admin::doctor) returns at least one of
/// each [`Check`]. None shows the text of a statement, or anything of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// What was looked at.
    pub check: Check,
    /// How bad it is.
    pub severity: Severity,
    /// What was found, in one sentence.
    pub summary: String,
    /// What to do about it. `None` if nothing has to be done.
    pub advice: Option<String>,
}

impl Finding {
    pub(crate) fn advise(self, advice: impl Into<String>) -> Self {
        Self {
            advice: Some(advice.into()),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_json() {
        for check in Check::ALL {
            let json = serde_json::to_string(&check).unwrap();
            assert_eq!(json, format!("\"{check}\""));
        }
        let finding = Check::DeadRows.warning("many").advise("vacuum");
        assert_eq!(
            serde_json::to_string(&finding).unwrap(),
            r#"{"check":"dead-rows","severity":"warning","summary":"many","advice":"vacuum"}"#
        );
        assert!(Severity::Ok < Severity::Note && Severity::Warning < Severity::Problem);
    }
}
