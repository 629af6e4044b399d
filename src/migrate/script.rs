//! Migrations as a script, for a database that only a person or a tool of its own may change.

use std::fmt::Write as _;

use sqlx::migrate::Migrator;

use super::grants::{self, Grant};
use super::ledger;

/// One transaction that applies the migrations after a version, enters them in the ledger, and
/// gives roles their rights.
pub(super) fn of(schema: &str, migrations: &Migrator, after: i64, grants: &[Grant]) -> String {
    let mut script = format!(
        "BEGIN;\n\
         SET LOCAL client_min_messages = warning;\n\
         SET LOCAL standard_conforming_strings = on;\n\
         SET LOCAL lock_timeout = '2s';\n\
         SELECT pg_advisory_xact_lock(hashtextextended('requeuest/migrate/{}', 0));\n\
         CREATE SCHEMA IF NOT EXISTS {schema};\n\
         SET LOCAL search_path = {schema}, pg_temp;\n",
        schema.trim_matches('"'),
    );
    if after == 0 {
        let _ = writeln!(script, "\n{};", ledger::TABLE);
    }
    for migration in migrations.iter() {
        if migration.migration_type.is_down_migration() || migration.version <= after {
            continue;
        }
        let checksum: String = migration
            .checksum
            .iter()
            .fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            });
        let _ = writeln!(
            script,
            "\n-- {version} {description}\n{sql}\n\
             INSERT INTO _sqlx_migrations\n    \
             (version, description, success, checksum, execution_time)\n\
             VALUES ({version}, '{quoted}', true, '\\x{checksum}', 0);",
            version = migration.version,
            description = migration.description,
            sql = migration.sql.trim_end(),
            quoted = migration.description.replace('\'', "''"),
        );
    }
    let rights = if grants.is_empty() {
        grants::without_public(schema)
    } else {
        grants::statements(schema, grants)
    };
    let _ = writeln!(script, "\n{rights}");
    script.push_str("\nCOMMIT;\n");
    script
}
