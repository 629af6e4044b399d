//! Which migrations a schema has, and which releases can work with it.
//!
//! A release is named by the newest migration that it knows. A schema may have newer ones, because
//! releases run side by side during a deployment, and after a rollback. `compatible_from` says how
//! old a release may be. Without it, a release could only refuse every newer schema, or use one
//! that has lost what the release needs.
//!
//! The ledger is sqlx's table, for the sake of its tools. The statements are not sqlx's, because
//! those are prepared under names, which collide behind a pooler in transaction mode.

use std::time::{Duration, Instant};

use sqlx::migrate::{MigrateError, Migration};
use sqlx::{Executor, PgConnection, Row};

use crate::error::MigrationState;

/// The ledger of the session's schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ledger {
    /// The newest migration.
    newest: i64,
    /// The oldest release that can work with the schema. `None` before the migration that adds it,
    /// or if its row was deleted.
    compatible_from: Option<i64>,
    /// A migration that a tool has marked as failed. This crate's own are rolled back instead.
    pub(super) failed: Option<i64>,
}

/// Which tables of the ledger a session can see. Looked at first, so that a missing table leaves no
/// error in the server's log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    pub(crate) migrations: bool,
    pub(crate) compatible_from: bool,
}

impl Tables {
    /// The columns of a statement that looks for the tables.
    pub(crate) const COLUMNS: &str = "to_regclass('_sqlx_migrations') IS NOT NULL AS migrations, \
         to_regclass('compatible_from') IS NOT NULL AS compatible_from";

    /// Reads [`COLUMNS`](Self::COLUMNS).
    pub(crate) fn from_row(row: &sqlx::postgres::PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            migrations: row.try_get("migrations")?,
            compatible_from: row.try_get("compatible_from")?,
        })
    }
}

impl Ledger {
    /// Reads the ledger of the session's schema. `None` if there is none, or if it is empty.
    pub(crate) async fn read(
        connection: &mut PgConnection,
        tables: Tables,
    ) -> Result<Option<Self>, sqlx::Error> {
        if !tables.migrations {
            return Ok(None);
        }
        let compatible_from = if tables.compatible_from {
            "(SELECT c.version FROM compatible_from c)"
        } else {
            "NULL::bigint"
        };
        let statement = format!(
            "SELECT max(m.version), {compatible_from}, min(m.version) FILTER (WHERE NOT m.success)
             FROM _sqlx_migrations m"
        );
        let (newest, compatible_from, failed): (Option<i64>, _, _) = sqlx::query_as(&statement)
            .persistent(false)
            .fetch_one(connection)
            .await?;
        Ok(newest.map(|newest| Self {
            newest,
            compatible_from,
            failed,
        }))
    }

    /// The newest migration.
    pub(crate) fn newest(self) -> i64 {
        self.newest
    }

    /// Whether a release whose newest migration is `wanted` can work with the schema.
    pub(crate) fn check(self, wanted: i64) -> Result<(), MigrationState> {
        if let Some(version) = self.failed {
            return Err(MigrationState::Failed { version });
        }
        // A schema that doesn't say so is only known to work with its newest release.
        let needed = self.compatible_from.unwrap_or(self.newest);
        if needed > wanted {
            return Err(MigrationState::Newer {
                found: self.newest,
                needed,
                wanted,
            });
        }
        if self.newest < wanted {
            return Err(MigrationState::Older {
                found: self.newest,
                wanted,
            });
        }
        Ok(())
    }
}

/// A migration in the ledger.
pub(super) struct Applied {
    pub(super) version: i64,
    pub(super) checksum: Vec<u8>,
}

/// The migrations in the ledger of the session's schema.
pub(super) async fn applied(connection: &mut PgConnection) -> Result<Vec<Applied>, sqlx::Error> {
    let rows: Vec<(i64, Vec<u8>)> =
        sqlx::query_as("SELECT version, checksum FROM _sqlx_migrations ORDER BY version")
            .persistent(false)
            .fetch_all(connection)
            .await?;
    let applied = |(version, checksum)| Applied { version, checksum };
    Ok(rows.into_iter().map(applied).collect())
}

/// The ledger, as sqlx has it.
pub(super) const TABLE: &str = "\
CREATE TABLE _sqlx_migrations (
    version bigint PRIMARY KEY,
    description text NOT NULL,
    installed_on timestamptz NOT NULL DEFAULT now(),
    success boolean NOT NULL,
    checksum bytea NOT NULL,
    execution_time bigint NOT NULL
)";

/// Creates the ledger in the session's schema.
pub(super) async fn create(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    connection.execute(TABLE).await?;
    Ok(())
}

/// Applies a migration, and enters it in the ledger.
pub(super) async fn apply(
    connection: &mut PgConnection,
    migration: &Migration,
) -> Result<(), MigrateError> {
    let took = execute(connection, migration).await?;
    let nanoseconds = i64::try_from(took.as_nanos()).unwrap_or(i64::MAX);
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES ($1, $2, true, $3, $4)",
    )
    .persistent(false)
    .bind(migration.version)
    .bind(&*migration.description)
    .bind(&*migration.checksum)
    .bind(nanoseconds)
    .execute(connection)
    .await?;
    Ok(())
}

/// Undoes a migration, and takes it out of the ledger.
pub(super) async fn revert(
    connection: &mut PgConnection,
    migration: &Migration,
) -> Result<(), MigrateError> {
    execute(connection, migration).await?;
    sqlx::query("DELETE FROM _sqlx_migrations WHERE version = $1")
        .persistent(false)
        .bind(migration.version)
        .execute(connection)
        .await?;
    Ok(())
}

async fn execute(
    connection: &mut PgConnection,
    migration: &Migration,
) -> Result<Duration, MigrateError> {
    let begun = Instant::now();
    connection
        .execute(&*migration.sql)
        .await
        .map_err(|error| MigrateError::ExecuteMigration(error, migration.version))?;
    Ok(begun.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(newest: i64, compatible_from: impl Into<Option<i64>>) -> Ledger {
        Ledger {
            newest,
            compatible_from: compatible_from.into(),
            failed: None,
        }
    }

    #[test]
    fn a_release_works_with_newer_schemas_that_are_compatible_with_it() {
        for compatible in [ledger(5, 5), ledger(7, 5), ledger(7, 1), ledger(5, None)] {
            assert_eq!(compatible.check(5), Ok(()), "{compatible:?}");
        }
        for (newer, found, needed) in [
            (ledger(7, 6), 7, 6),
            (ledger(7, 7), 7, 7),
            (ledger(7, None), 7, 7),
            // Rows changed by hand.
            (ledger(5, 6), 5, 6),
            (ledger(4, 6), 4, 6),
        ] {
            let state = MigrationState::Newer {
                found,
                needed,
                wanted: 5,
            };
            assert_eq!(newer.check(5), Err(state));
        }
        for older in [ledger(4, 4), ledger(4, None), ledger(4, 1)] {
            let state = MigrationState::Older {
                found: 4,
                wanted: 5,
            };
            assert_eq!(older.check(5), Err(state));
        }
    }

    #[test]
    fn a_failed_migration_is_named_first() {
        let failed = Ledger {
            failed: Some(3),
            ..ledger(4, 9)
        };
        let state = MigrationState::Failed { version: 3 };
        assert_eq!(failed.check(5), Err(state));
    }
}
