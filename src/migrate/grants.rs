//! What each kind of database role may do in the schema.
//!
//! A role gets no more than its part needs. In particular, a role that enqueues has no right to any
//! table of requests: it calls functions that run with the rights of the schema's owner and return
//! nothing of what is stored.

use sqlx::{Executor, PgConnection};

/// Postgres cuts longer names.
const MAX_NAME_LEN: usize = 63;

/// Functions that a role which only enqueues may execute. Those that read or write a table are
/// `SECURITY DEFINER`.
const ENQUEUE: &[&str] = &[
    "enqueue",
    "enqueue_many",
    "fire",
    "fire_prepared",
    "is_delivered",
    "known_formats",
    "note_activity",
];
/// Functions in the statements of calls that only read. None of them changes anything.
const READ_ONLY: &[&str] = &[
    "epoch_us",
    "is_delivered",
    "is_known",
    "is_ordered",
    "known_formats",
    "refuse_id",
    "response",
    "status",
];
/// What reports read. They show nothing of what is sent or answered.
const VIEWS: &[&str] = &["attempts_view", "requests"];
/// What tells a handle whether it fits the schema. It has numbers of versions only.
const LEDGER: &[&str] = &["_sqlx_migrations", "compatible_from"];

/// What a runner reads and writes, by rows.
const TABLES: &[&str] = &[
    "activity",
    "attempts",
    "claimed_keys",
    "destination_leases",
    "destinations",
    "handled_channels",
    "handler_heartbeats",
    "mq_freed_keys",
    "mq_msgs",
    "mq_payloads",
    "operations",
    "outcomes",
    "outcomes_kept",
    "outcomes_late",
    "paused_channels",
    "queue_observer",
    "request_keys",
    "runners",
    "undelivered",
    "undelivered_channels",
    "unhandled",
];
/// The record of changes, which no role changes afterwards. A function with the rights of the
/// schema's owner deletes what is old.
const RECORD: &[&str] = &["changes"];
/// The partitions of outcomes that are emptied whole.
const SLOTS: &[&str] = &[
    "outcomes_0",
    "outcomes_1",
    "outcomes_2",
    "outcomes_3",
    "outcomes_4",
    "outcomes_5",
    "outcomes_6",
    "outcomes_7",
    "outcomes_8",
    "outcomes_9",
    "outcomes_10",
    "outcomes_11",
    "outcomes_12",
    "outcomes_13",
    "outcomes_14",
    "outcomes_15",
];

/// The part that a role of the database plays: see [`Migrator::grants`](super::Migrator::grants).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DatabaseRole {
    /// Persists requests, with [`fire`](crate::Durable::fire),
    /// [`fire_in`](crate::Durable::fire_in),
    /// [`fire_many`](crate::Durable::fire_many) and
    /// [`fire_many_in`](crate::Durable::fire_many_in), through a handle with
    /// [`runner(false)`](crate::DurableBuilder::runner), with
    /// [`statement`](crate::Durable::statement), and with the SQL function `fire`. It can't read a
    /// request, a response or a status, its own included, and can't cancel. Other calls fail with
    /// [`Error::is_forbidden`](crate::Error::is_forbidden).
    Enqueue,
    /// Does everything that a handle does, and can't change the schema. It reads and writes all
    /// requests and responses.
    Runner,
    /// Reads everything: statuses, outcomes with their responses, dead letters, runners,
    /// destinations, and with SQL the requests too. It changes nothing.
    ReadOnly,
    /// Reads two views with SQL, `requests` and `attempts_view`: channels, destinations, statuses,
    /// times, numbers, and texts of errors that are not encrypted. It sees no path or query of a
    /// URL, no header, body, metadata or [`key`](crate::Options::key), and no table. For reports,
    /// not for a handle.
    Report,
}

/// A right that a part needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Right {
    /// `table` or `function`.
    pub(crate) kind: &'static str,
    /// Its name, or `*` for all of the kind.
    pub(crate) object: &'static str,
    pub(crate) verb: &'static str,
}

impl DatabaseRole {
    /// The rights of a part on tables, views and functions, one by one.
    pub(crate) fn needs(self) -> Vec<Right> {
        let mut needs = Vec::new();
        let mut add = |kind, objects: &[&'static str], verbs: &[&'static str]| {
            for &object in objects {
                needs.extend(verbs.iter().map(|&verb| Right { kind, object, verb }));
            }
        };
        match self {
            Self::Enqueue => {
                add("table", LEDGER, &["SELECT"]);
                add("function", ENQUEUE, &["EXECUTE"]);
            }
            Self::Runner => {
                let change = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE"];
                add("table", LEDGER, &change[..1]);
                add("table", VIEWS, &change[..1]);
                add("table", TABLES, &change[..4]);
                add("table", RECORD, &change[..2]);
                add("table", SLOTS, &change);
                add("function", &["*"], &["EXECUTE"]);
            }
            Self::ReadOnly => {
                add("table", &["*"], &["SELECT"]);
                add("function", READ_ONLY, &["EXECUTE"]);
            }
            Self::Report => add("table", VIEWS, &["SELECT"]),
        }
        needs
    }
}

/// A role that gets the rights of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    pub(super) part: DatabaseRole,
    pub(super) role: String,
}

impl Grant {
    /// Why the role's name can't be used.
    pub(super) fn validate(&self) -> Result<(), String> {
        let role = &self.role;
        let reason = if role.is_empty() || role.len() > MAX_NAME_LEN {
            "has 1 to 63 bytes"
        } else if role.contains('\0') {
            "has no NUL"
        } else if role == "public" || role == "none" {
            "is that of a role, and `public` and `none` are words of SQL"
        } else {
            return Ok(());
        };
        Err(format!("grants: the name of a role {reason}: {role:?}"))
    }

    fn quoted_role(&self) -> String {
        format!("\"{}\"", self.role.replace('"', "\"\""))
    }
}

/// The statements that give each role its rights, and no others. `schema` is an identifier.
pub(super) fn statements(schema: &str, grants: &[Grant]) -> String {
    let mut statements = vec![without_public(schema)];
    // All of them first: a role may be named for several parts.
    for grant in grants {
        let role = grant.quoted_role();
        for objects in ["TABLES", "SEQUENCES", "FUNCTIONS"] {
            let all = format!("REVOKE ALL ON ALL {objects} IN SCHEMA {schema} FROM {role};\n");
            statements.push(all);
        }
        statements.push(format!("REVOKE ALL ON SCHEMA {schema} FROM {role};\n"));
    }
    for grant in grants {
        let role = grant.quoted_role();
        for rights in rights(grant.part, schema) {
            statements.push(format!("GRANT {rights} TO {role};\n"));
        }
    }
    statements.concat()
}

/// The rights of a part.
fn rights(part: DatabaseRole, schema: &str) -> Vec<String> {
    let within = |names: &[&str]| {
        let names: Vec<_> = names
            .iter()
            .map(|name| format!("{schema}.{name}"))
            .collect();
        names.join(", ")
    };
    let mut rights = vec![format!("USAGE ON SCHEMA {schema}")];
    rights.extend(match part {
        DatabaseRole::Enqueue => vec![
            format!("SELECT ON {}", within(LEDGER)),
            format!("EXECUTE ON FUNCTION {}", within(ENQUEUE)),
        ],
        DatabaseRole::Runner => vec![
            format!("SELECT ON {}", within(LEDGER)),
            format!("SELECT ON {}", within(VIEWS)),
            format!("SELECT, INSERT, UPDATE, DELETE ON {}", within(TABLES)),
            format!("SELECT, INSERT ON {}", within(RECORD)),
            // Outcomes expire by the slot.
            format!(
                "SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON {}",
                within(SLOTS)
            ),
            format!("USAGE ON ALL SEQUENCES IN SCHEMA {schema}"),
            format!("EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema}"),
        ],
        DatabaseRole::ReadOnly => vec![
            format!("SELECT ON ALL TABLES IN SCHEMA {schema}"),
            format!("EXECUTE ON FUNCTION {}", within(READ_ONLY)),
        ],
        DatabaseRole::Report => vec![format!("SELECT ON {}", within(VIEWS))],
    });
    rights
}

/// Takes every right from roles that weren't given any: Postgres lets all roles execute a new
/// function.
pub(super) fn without_public(schema: &str) -> String {
    ["TABLES", "SEQUENCES", "FUNCTIONS"]
        .map(|objects| format!("REVOKE ALL ON ALL {objects} IN SCHEMA {schema} FROM PUBLIC;\n"))
        .concat()
}

/// Gives the roles their rights in the current transaction.
pub(super) async fn apply(
    connection: &mut PgConnection,
    schema: &str,
    grants: &[Grant],
) -> Result<(), sqlx::Error> {
    connection.execute(&*statements(schema, grants)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(part: DatabaseRole, role: &str) -> Grant {
        Grant {
            part,
            role: role.to_owned(),
        }
    }

    #[test]
    fn a_roles_name_is_quoted_and_never_sql() {
        let sql = statements(
            "\"s\"",
            &[grant(DatabaseRole::Enqueue, "a\"; DROP TABLE x; --")],
        );
        assert!(sql.contains("TO \"a\"\"; DROP TABLE x; --\";"), "{sql}");
        for bad in ["", "public", "none", "a\0b", &"x".repeat(64)] {
            let refused = grant(DatabaseRole::Runner, bad).validate().unwrap_err();
            assert!(refused.starts_with("grants: "), "{refused}");
        }
        grant(DatabaseRole::Runner, "Web App").validate().unwrap();
    }

    #[test]
    fn a_role_that_enqueues_gets_no_table_of_requests() {
        let sql = statements("\"s\"", &[grant(DatabaseRole::Enqueue, "web")]);
        let given: Vec<_> = sql
            .lines()
            .filter(|line| line.starts_with("GRANT"))
            .collect();
        assert_eq!(
            given,
            [
                "GRANT USAGE ON SCHEMA \"s\" TO \"web\";",
                "GRANT SELECT ON \"s\"._sqlx_migrations, \"s\".compatible_from TO \"web\";",
                "GRANT EXECUTE ON FUNCTION \"s\".enqueue, \"s\".enqueue_many, \
                 \"s\".fire, \"s\".fire_prepared, \"s\".is_delivered, \"s\".known_formats, \
                 \"s\".note_activity TO \"web\";",
            ]
        );
    }
}
