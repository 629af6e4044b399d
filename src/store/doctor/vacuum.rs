//! What keeps dead rows and old files: transactions, replication slots, autovacuum that is off.

use sqlx::PgConnection;

use super::{listed, spoken};
use crate::finding::{Check, Finding};

/// Tables with fewer dead rows are as a busy fleet leaves them.
const MANY_DEAD: i64 = 10_000;
/// So many are too many, whatever the load.
const TOO_MANY_DEAD: i64 = 1_000_000;
/// A transaction that has been open for this long, in seconds, holds something up.
const LONG: f64 = 300.0;
/// The same for one that waits for its client.
const LONG_IDLE: f64 = 60.0;
/// An unused slot that keeps this much of the log may fill the disk.
const MUCH_LOG: i64 = 1 << 30;

/// A table with many dead rows.
#[derive(Debug, sqlx::FromRow)]
struct DeadRows {
    name: String,
    dead: i64,
    /// How many seconds ago vacuum was there. `None` if it never was.
    vacuumed: Option<f64>,
}

/// What keeps rows from being removed. The oldest comes first.
#[derive(Debug, sqlx::FromRow)]
struct Holder {
    /// `session`, `prepared transaction` or `replication slot`.
    kind: String,
    /// The process id, or the name.
    name: String,
    /// The application's name, or the owner.
    application: String,
    state: String,
    /// How many seconds its transaction has lasted. Not known of a slot.
    lasts: Option<f64>,
}

impl Holder {
    fn shown(&self) -> String {
        let Self { kind, name, .. } = self;
        let mut shown = format!("{kind} {name}");
        let lasts = self.lasts.map(|seconds| format!("for {}", spoken(seconds)));
        let details = [&self.application, &self.state].map(String::as_str);
        let details = details.into_iter().chain(lasts.as_deref());
        let details: Vec<&str> = details.filter(|detail| !detail.is_empty()).collect();
        if !details.is_empty() {
            shown = format!("{shown} ({})", details.join(", "));
        }
        shown
    }

    fn remedy(&self) -> String {
        let name = &self.name;
        match self.kind.as_str() {
            "session" => format!("end the transaction, or SELECT pg_terminate_backend({name})"),
            "replication slot" => {
                format!("bring its standby back, or SELECT pg_drop_replication_slot('{name}')")
            }
            _ => format!("COMMIT PREPARED or ROLLBACK PREPARED '{name}'"),
        }
    }
}

/// Dead rows of the tables, and what keeps vacuum from removing them.
pub(super) async fn dead_rows(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<Finding>, sqlx::Error> {
    let tables: Vec<DeadRows> = sqlx::query_as(
        "SELECT
            s.relname::text AS name, s.n_dead_tup AS dead,
            extract(epoch FROM
                clock_timestamp() - greatest(s.last_vacuum, s.last_autovacuum)
            )::float8 AS vacuumed
         FROM pg_stat_user_tables s
         WHERE s.schemaname = $1 AND s.n_dead_tup >= $2 ORDER BY s.n_dead_tup DESC",
    )
    .bind(schema)
    .bind(MANY_DEAD)
    .persistent(false)
    .fetch_all(&mut *connection)
    .await?;
    if tables.is_empty() {
        let ok = format!("no table has {MANY_DEAD} dead rows");
        return Ok(vec![Check::DeadRows.ok(ok)]);
    }
    // Sessions of other databases don't count for the rows of this one, and slots of logical
    // replication only for catalogs.
    let holders: Vec<Holder> = sqlx::query_as(
        "SELECT h.kind, h.name, h.application, h.state, h.lasts
         FROM (
            SELECT
                'session', a.pid::text, coalesce(a.application_name, ''), coalesce(a.state, ''),
                extract(epoch FROM
                    clock_timestamp() - coalesce(a.xact_start, a.backend_start)
                )::float8,
                greatest(age(a.backend_xmin), age(a.backend_xid))
            FROM pg_stat_activity a
            WHERE a.pid <> pg_backend_pid()
                AND (a.datname = current_database() OR a.backend_type = 'walsender')
                AND coalesce(a.backend_type, '') <> 'autovacuum worker'
            UNION ALL
            SELECT
                'prepared transaction', p.gid, p.owner::text, '',
                extract(epoch FROM clock_timestamp() - p.prepared)::float8, age(p.transaction)
            FROM pg_prepared_xacts p WHERE p.database = current_database()
            UNION ALL
            SELECT 'replication slot', s.slot_name::text, '', '', NULL, age(s.xmin)
            FROM pg_replication_slots s
         ) AS h(kind, name, application, state, lasts, age)
         WHERE h.age IS NOT NULL ORDER BY h.age DESC LIMIT 100",
    )
    .persistent(false)
    .fetch_all(&mut *connection)
    .await?;
    let sees_all = sees_all(connection).await?;
    Ok(vec![dead_rows_finding(&tables, &holders, sees_all)])
}

fn dead_rows_finding(tables: &[DeadRows], holders: &[Holder], sees_all: bool) -> Finding {
    let check = Check::DeadRows;
    let names: Vec<String> = tables
        .iter()
        .map(|table| format!("{} has {}", table.name, table.dead))
        .collect();
    let summary = format!("dead rows: {}", listed(&names));
    // Vacuum came by since then, or should have: it looks once a minute.
    let keeps = |lasts: f64| {
        let vacuumed = tables.iter().filter_map(|table| table.vacuumed);
        lasts > LONG || vacuumed.into_iter().any(|ago| lasts > ago)
    };
    let keeping: Vec<&Holder> = holders
        .iter()
        .filter(|holder| holder.lasts.is_none_or(keeps))
        .collect();
    let too_many = tables.iter().any(|table| table.dead >= TOO_MANY_DEAD);
    if let Some(oldest) = keeping.first() {
        let shown: Vec<String> = keeping.iter().map(|holder| holder.shown()).collect();
        let summary = format!("{summary}; kept by {}", listed(&shown));
        let finding = if too_many {
            check.problem(summary)
        } else {
            check.warning(summary)
        };
        return finding.advise(oldest.remedy());
    }
    if !too_many {
        return check.note(summary);
    }
    check.warning(summary).advise(if sees_all {
        "autovacuum doesn't keep up: look at its workers and its cost limit"
    } else {
        "run it as a role with pg_read_all_stats, to see which session keeps them"
    })
}

/// Whether the role sees what sessions of other roles do.
async fn sees_all(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')")
        .persistent(false)
        .fetch_one(connection)
        .await
}

/// A transaction that is open.
#[derive(Debug, sqlx::FromRow)]
struct Open {
    holder: String,
    lasts: f64,
    is_idle: bool,
    remedy: String,
}

/// The oldest transactions of the database.
pub(super) async fn transactions(
    connection: &mut PgConnection,
) -> Result<Vec<Finding>, sqlx::Error> {
    let open: Vec<Open> = sqlx::query_as(
        "SELECT
            concat(
                'session ', a.pid, ' (' || nullif(a.application_name, '') || ')', ' ', a.state
            ) AS holder,
            extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS lasts,
            a.state LIKE 'idle in%' AS is_idle,
            'SELECT pg_terminate_backend(' || a.pid || ')' AS remedy
         FROM pg_stat_activity a
         WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
            AND a.xact_start IS NOT NULL AND a.state IS NOT NULL
            AND coalesce(a.backend_type, '') <> 'autovacuum worker'
         UNION ALL
         SELECT
            'prepared transaction ' || p.gid,
            extract(epoch FROM clock_timestamp() - p.prepared)::float8, true,
            'COMMIT PREPARED or ROLLBACK PREPARED ' || quote_literal(p.gid)
         FROM pg_prepared_xacts p WHERE p.database = current_database()
         ORDER BY lasts DESC LIMIT 100",
    )
    .persistent(false)
    .fetch_all(&mut *connection)
    .await?;
    let mut findings = vec![transactions_finding(&open)];
    if !sees_all(connection).await? {
        let note = Check::Transactions.note("could not be checked for sessions of other roles");
        findings.push(note.advise("grant the role pg_monitor, or pg_read_all_stats"));
    }
    Ok(findings)
}

fn transactions_finding(open: &[Open]) -> Finding {
    let check = Check::Transactions;
    let shown = |open: &Open| format!("{} for {}", open.holder, spoken(open.lasts));
    let is_long = |open: &&Open| open.lasts > if open.is_idle { LONG_IDLE } else { LONG };
    let long: Vec<&Open> = open.iter().filter(is_long).collect();
    if let Some(first) = long.first() {
        let names: Vec<String> = long.iter().map(|open| shown(open)).collect();
        let summary = format!("long transactions: {}", listed(&names));
        return check.warning(summary).advise(format!(
            "they keep dead rows, and partitions from being emptied: end them, or {}",
            first.remedy
        ));
    }
    match open.first() {
        Some(oldest) => check.ok(format!("the oldest transaction is {}", shown(oldest))),
        None => check.ok("no transaction is open"),
    }
}

/// A replication slot.
#[derive(Debug, sqlx::FromRow)]
struct Slot {
    name: String,
    active: bool,
    /// How many bytes of the log it keeps.
    kept: i64,
}

/// What replication slots keep.
pub(super) async fn replication_slots(
    connection: &mut PgConnection,
) -> Result<Vec<Finding>, sqlx::Error> {
    let slots: Vec<Slot> = sqlx::query_as(
        "SELECT
            s.slot_name::text AS name, s.active,
            coalesce(pg_wal_lsn_diff(
                CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                    ELSE pg_current_wal_lsn() END,
                s.restart_lsn
            ), 0)::bigint AS kept
         FROM pg_replication_slots s ORDER BY kept DESC",
    )
    .persistent(false)
    .fetch_all(connection)
    .await?;
    Ok(vec![slots_finding(&slots)])
}

fn slots_finding(slots: &[Slot]) -> Finding {
    let check = Check::ReplicationSlots;
    let unused: Vec<&Slot> = slots.iter().filter(|slot| !slot.active).collect();
    let Some(first) = unused.first() else {
        return check.ok("no replication slot is unused");
    };
    let names: Vec<String> = unused
        .iter()
        .map(|slot| format!("{} keeps {} MiB of the log", slot.name, slot.kept >> 20))
        .collect();
    let summary = format!("unused replication slots: {}", listed(&names));
    let finding = if first.kept < MUCH_LOG {
        check.note(summary)
    } else {
        check.warning(summary)
    };
    finding.advise(format!(
        "bring its reader back, or SELECT pg_drop_replication_slot('{}')",
        first.name
    ))
}

/// Whether autovacuum takes care of the schema's tables.
pub(super) async fn autovacuum(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::Autovacuum;
    let off: Vec<String> = sqlx::query_scalar(
        "SELECT s.name FROM pg_settings s
         WHERE s.name IN ('autovacuum', 'track_counts') AND s.setting = 'off' ORDER BY 1",
    )
    .persistent(false)
    .fetch_all(&mut *connection)
    .await?;
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text
         FROM pg_class c LEFT JOIN pg_class t ON t.oid = c.reltoastrelid
         WHERE c.relnamespace = to_regnamespace(quote_ident($1)) AND c.relkind = 'r'
            AND EXISTS (
                SELECT FROM unnest(c.reloptions || t.reloptions) AS o(option)
                WHERE o.option ~* '^autovacuum_enabled=(f|n|off?$|0)'
            )
         ORDER BY 1",
    )
    .bind(schema)
    .persistent(false)
    .fetch_all(connection)
    .await?;
    let mut findings = Vec::new();
    if !off.is_empty() {
        let summary = format!("autovacuum doesn't run: {} off", listed(&off));
        findings.push(check.problem(summary).advise(
            "ALTER SYSTEM SET it to on, and SELECT pg_reload_conf(); without vacuum, each poll \
             reads ever more dead rows",
        ));
    }
    if let Some(first) = tables.first() {
        let summary = format!("autovacuum is off for {}", listed(&tables));
        findings.push(check.problem(summary).advise(format!(
            "ALTER TABLE \"{schema}\".\"{first}\" RESET (autovacuum_enabled, \
             toast.autovacuum_enabled)"
        )));
    }
    if findings.is_empty() {
        findings.push(check.ok("autovacuum is on for all tables"));
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::Severity;

    fn holder(kind: &str, name: &str, lasts: Option<f64>) -> Holder {
        Holder {
            kind: kind.to_owned(),
            name: name.to_owned(),
            application: String::new(),
            state: String::new(),
            lasts,
        }
    }

    #[test]
    fn dead_rows_are_bad_if_something_keeps_them() {
        let tables = |dead, vacuumed| {
            vec![DeadRows {
                name: "mq_msgs".to_owned(),
                dead,
                vacuumed,
            }]
        };
        let found = |dead, vacuumed, holders: &[Holder]| {
            dead_rows_finding(&tables(dead, vacuumed), holders, true)
        };
        assert_eq!(found(20_000, Some(1.0), &[]).severity, Severity::Note);
        assert_eq!(found(2_000_000, None, &[]).severity, Severity::Warning);
        let young = holder("session", "7", Some(3.0));
        assert_eq!(found(20_000, Some(9.0), &[young]).severity, Severity::Note);
        let slot = holder("replication slot", "standby", None);
        let kept = found(2_000_000, None, &[slot]);
        assert_eq!(kept.severity, Severity::Problem);
        assert!(kept.summary.ends_with("kept by replication slot standby"));
        assert!(
            kept.advice
                .unwrap()
                .contains("pg_drop_replication_slot('standby')")
        );
        let mut old = holder("session", "7", Some(400.0));
        old.application = "report".to_owned();
        let kept = found(20_000, None, &[old]);
        assert_eq!(kept.severity, Severity::Warning);
        assert!(
            kept.summary.ends_with("session 7 (report, for 6 min)"),
            "{kept:?}"
        );
    }

    #[test]
    fn a_transaction_may_be_idle_for_a_shorter_time_than_it_may_work() {
        let open = |lasts, is_idle| {
            transactions_finding(&[Open {
                holder: "session 7 (app) idle in transaction".to_owned(),
                lasts,
                is_idle,
                remedy: "SELECT pg_terminate_backend(7)".to_owned(),
            }])
        };
        assert_eq!(open(61.0, true).severity, Severity::Warning);
        assert_eq!(open(61.0, false).severity, Severity::Ok);
        let long = open(301.0, false);
        assert_eq!(long.severity, Severity::Warning);
        assert!(long.advice.unwrap().contains("pg_terminate_backend(7)"));
    }

    #[test]
    fn an_unused_slot_that_keeps_much_of_the_log_is_a_warning() {
        let slot = |active, kept| {
            let name = "old".to_owned();
            slots_finding(&[Slot { name, active, kept }]).severity
        };
        assert_eq!(slot(true, MUCH_LOG), Severity::Ok);
        assert_eq!(slot(false, 0), Severity::Note);
        assert_eq!(slot(false, MUCH_LOG), Severity::Warning);
    }
}
