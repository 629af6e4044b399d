//! What the server is, what room it has, and how it is set.

use sqlx::{PgConnection, Row};

use super::spoken;
use crate::finding::{Check, Finding};

/// The oldest version that the schema works with.
const OLDEST_SERVER: i32 = 140_000;
/// A standby that is this far behind, in seconds, shows what has long changed.
const FAR_BEHIND: f64 = 60.0;
/// What Postgres sets by itself. The partitions of outcomes need most of them.
const USUAL_LOCKS: i64 = 64;
/// What a handle with a runner needs: its pool, two for the runner and one to listen.
const HANDLE_CONNECTIONS: i64 = 12;

/// The server's version.
pub(super) async fn version(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::Postgres;
    let (number, name): (i32, String) = sqlx::query_as(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version')",
    )
    .persistent(false)
    .fetch_one(connection)
    .await?;
    Ok(vec![if number < OLDEST_SERVER {
        let summary = format!("the server is Postgres {name}");
        check
            .problem(summary)
            .advise("upgrade it to Postgres 14 or newer")
    } else {
        check.ok(format!("the server is Postgres {name}"))
    }])
}

/// Whether the server is a standby, and how far behind.
pub(super) async fn recovery(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    let (is_standby, behind): (bool, Option<f64>) = sqlx::query_as(
        "SELECT
            pg_is_in_recovery(),
            CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
                ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())
            END::float8",
    )
    .persistent(false)
    .fetch_one(connection)
    .await?;
    Ok(vec![recovery_finding(is_standby, behind)])
}

fn recovery_finding(is_standby: bool, behind: Option<f64>) -> Finding {
    let check = Check::Recovery;
    if !is_standby {
        return check.ok("the server takes changes");
    }
    let summary = match behind {
        Some(behind) => format!("the server is a standby, {} behind", spoken(behind)),
        None => "the server is a standby".to_owned(),
    };
    let finding = if behind.is_some_and(|behind| behind > FAR_BEHIND) {
        check.warning(summary)
    } else {
        check.note(summary)
    };
    finding
        .advise("it is good for reading alone: processes that enqueue or deliver need the primary")
}

/// Room for locks. All sessions share it.
pub(super) async fn locks(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT
            (SELECT count(*) FROM pg_locks l WHERE NOT l.fastpath) AS used,
            current_setting('max_locks_per_transaction')::bigint AS each,
            current_setting('max_connections')::bigint
                + current_setting('max_prepared_transactions')::bigint AS sessions",
    )
    .persistent(false)
    .fetch_one(connection)
    .await?;
    Ok(vec![locks_finding(
        row.try_get("used")?,
        row.try_get("each")?,
        row.try_get("sessions")?,
    )])
}

fn locks_finding(used: i64, each: i64, sessions: i64) -> Finding {
    let check = Check::Locks;
    let room = each * sessions;
    let summary = format!("{used} of {room} locks are taken");
    let advice = "raise max_locks_per_transaction and restart the server; each statement on \
        outcomes locks its 18 partitions and their indexes";
    if used * 10 > room * 7 {
        check.problem(summary).advise(advice)
    } else if each < USUAL_LOCKS {
        let summary = format!("{summary}; max_locks_per_transaction is {each}");
        check.note(summary).advise(advice)
    } else {
        check.ok(summary)
    }
}

/// A limit of connections.
#[derive(Debug)]
struct Limit {
    of: String,
    used: i64,
    /// Below zero there is none.
    bound: i64,
}

/// Room for connections: of the server, the database and the role.
pub(super) async fn connections(
    connection: &mut PgConnection,
) -> Result<Vec<Finding>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT 'max_connections' AS of,
            (SELECT sum(d.numbackends) FROM pg_stat_database d)::bigint AS used,
            current_setting('max_connections')::bigint
                - current_setting('superuser_reserved_connections')::bigint
                - coalesce(current_setting('reserved_connections', true), '0')::bigint AS bound
         UNION ALL
         SELECT 'the limit of the database ' || d.datname, s.numbackends::bigint,
            d.datconnlimit::bigint
         FROM pg_database d JOIN pg_stat_database s ON s.datid = d.oid
         WHERE d.datname = current_database()
         UNION ALL
         SELECT 'the limit of the role ' || r.rolname,
            (SELECT count(*) FROM pg_stat_activity a WHERE a.usename = r.rolname),
            r.rolconnlimit::bigint
         FROM pg_roles r WHERE r.rolname = current_user",
    )
    .persistent(false)
    .fetch_all(connection)
    .await?;
    let limit = |row: &sqlx::postgres::PgRow| {
        Ok(Limit {
            of: row.try_get("of")?,
            used: row.try_get("used")?,
            bound: row.try_get("bound")?,
        })
    };
    let limits: Result<Vec<Limit>, sqlx::Error> = rows.iter().map(limit).collect();
    Ok(vec![connections_finding(&limits?)])
}

fn connections_finding(limits: &[Limit]) -> Finding {
    let check = Check::Connections;
    let limits = limits.iter().filter(|limit| limit.bound >= 0);
    let Some(closest) = limits.min_by_key(|limit| limit.bound - limit.used) else {
        return check.ok("there is no limit");
    };
    let Limit { of, used, bound } = closest;
    let summary = format!("{used} of {bound} connections are open ({of})");
    if bound - used >= HANDLE_CONNECTIONS {
        return check.ok(summary);
    }
    check.warning(summary).advise(format!(
        "a handle with a runner opens up to {HANDLE_CONNECTIONS}: lower max_connections of \
         applications' pools and of handles, or raise the limit"
    ))
}

/// Settings that hurt.
pub(super) async fn settings(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    // What a session begins with. The examination has settings of its own.
    let set: Vec<(String, String)> = sqlx::query_as(
        "SELECT s.name, s.reset_val FROM pg_settings s
         WHERE s.name IN (
            'fsync', 'full_page_writes', 'synchronous_commit', 'statement_timeout',
            'transaction_timeout', 'idle_in_transaction_session_timeout', 'lock_timeout',
            'default_transaction_read_only'
         ) ORDER BY 1",
    )
    .persistent(false)
    .fetch_all(connection)
    .await?;
    Ok(settings_findings(&set))
}

fn settings_findings(set: &[(String, String)]) -> Vec<Finding> {
    let check = Check::Settings;
    let mut findings: Vec<Finding> =
        set.iter()
            .filter_map(|(name, value)| {
                match (name.as_str(), value.as_str()) {
            ("fsync" | "full_page_writes", "off") => Some(
                check
                    .problem(format!("{name} is off: a crash can lose or damage the database"))
                    .advise(format!("ALTER SYSTEM SET {name} = on, and SELECT pg_reload_conf()")),
            ),
            ("synchronous_commit", "off") => Some(
                check
                    .warning("synchronous_commit is off for the application's sessions")
                    .advise(
                        "a crash can lose what fire_in and fire_many_in have committed; handles \
                         set it to on for their own sessions",
                    ),
            ),
            ("default_transaction_read_only", "on") => Some(
                check
                    .warning("default_transaction_read_only is on for the application's sessions")
                    .advise("fire_in and handlers of outcomes can't write in them"),
            ),
            (
                "statement_timeout" | "transaction_timeout" | "lock_timeout"
                | "idle_in_transaction_session_timeout",
                value,
            ) if value != "0" => Some(
                check
                    .note(format!("{name} is {value} ms for the application's sessions"))
                    .advise(
                        "fire_in and handlers of outcomes have no more time; handles set their \
                         own for other sessions",
                    ),
            ),
            _ => None,
        }
            })
            .collect();
    if findings.is_empty() {
        findings.push(check.ok("the settings are fit"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::Severity;

    #[test]
    fn a_standby_is_a_note_until_it_is_far_behind() {
        assert_eq!(recovery_finding(false, None).severity, Severity::Ok);
        assert_eq!(recovery_finding(true, Some(0.0)).severity, Severity::Note);
        let late = recovery_finding(true, Some(3600.0));
        assert_eq!(late.severity, Severity::Warning);
        assert_eq!(late.summary, "the server is a standby, 60 min behind");
    }

    #[test]
    fn locks_and_connections_need_room() {
        assert_eq!(locks_finding(100, 64, 100).severity, Severity::Ok);
        assert_eq!(locks_finding(100, 10, 100).severity, Severity::Note);
        assert_eq!(locks_finding(5000, 64, 100).severity, Severity::Problem);
        let limit = |of: &str, used, bound| Limit {
            of: of.to_owned(),
            used,
            bound,
        };
        let server = || limit("max_connections", 20, 97);
        let roomy = connections_finding(&[server(), limit("database", 20, -1)]);
        assert_eq!(roomy.severity, Severity::Ok);
        let full = connections_finding(&[server(), limit("role app", 19, 20)]);
        assert_eq!(full.severity, Severity::Warning);
        assert_eq!(full.summary, "19 of 20 connections are open (role app)");
    }

    #[test]
    fn settings_that_hurt_are_named() {
        let set = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let fit = settings_findings(&[set("fsync", "on"), set("lock_timeout", "0")]);
        assert_eq!((fit.len(), fit[0].severity), (1, Severity::Ok));
        let found = settings_findings(&[
            set("fsync", "off"),
            set("synchronous_commit", "off"),
            set("statement_timeout", "500"),
        ]);
        let severities: Vec<_> = found.iter().map(|finding| finding.severity).collect();
        assert_eq!(
            severities,
            [Severity::Problem, Severity::Warning, Severity::Note]
        );
        assert!(found[2].summary.contains("statement_timeout is 500 ms"));
    }
}
