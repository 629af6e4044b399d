//! Which schema a session finds, and whether the database answers at all.

use std::sync::atomic::Ordering;

use sqlx::{PgConnection, Row};

use super::{Store, StoreError, quoted};
use crate::error::{Error, Kind, MigrationState};
use crate::migrate::{Ledger, Tables, wanted_version};

/// The schema that a session of the crate's own pool sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Schema {
    Missing,
    /// It exists, and the session's role may not use it.
    Forbidden,
    /// The session looks into another schema than it was told to: a pooler dropped its settings.
    Elsewhere,
    Installed {
        ledger: Ledger,
        rights: Rights,
    },
}

/// What the session's role may do, as far as a handle acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rights {
    /// Insert requests, and not only call the functions that do.
    insert: bool,
    /// Read responses.
    read: bool,
}

impl Store {
    /// Verifies, once, that the schema exists and works with the statements of this release.
    pub(crate) async fn verify(&self) -> Result<(), Error> {
        if self.inner.verified.load(Ordering::Relaxed) {
            return Ok(());
        }
        let schema = &self.config().schema;
        let found = self
            .run("schema.version", async |connection| {
                find_schema(connection, schema).await
            })
            .await?;
        let checked = match found {
            Schema::Missing => Err(MigrationState::Missing),
            Schema::Forbidden => Err(MigrationState::Forbidden),
            Schema::Elsewhere => Err(MigrationState::SettingsDropped),
            Schema::Installed { ledger, rights } => {
                let Rights { insert, read } = rights;
                self.inner.may_insert.store(insert, Ordering::Relaxed);
                self.inner.may_read.store(read, Ordering::Relaxed);
                ledger.check(wanted_version())
            }
        };
        checked.map_err(|state| Error::new(Kind::Migrations(state)))?;
        self.inner.verified.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the role may write the tables of requests. If not, it may enqueue through functions.
    /// True before the schema is verified.
    pub(crate) fn may_insert(&self) -> bool {
        self.inner.may_insert.load(Ordering::Relaxed)
    }

    /// Whether the role may read responses. True before the schema is verified.
    pub(crate) fn may_read(&self) -> bool {
        self.inner.may_read.load(Ordering::Relaxed)
    }

    /// Whether the database answers. A runner's supervisor calls it all the time, so that the
    /// runner's new connections use the options that the caller's pool has by then.
    pub(crate) async fn probe(&self) -> Result<(), StoreError> {
        self.db().follow();
        self.run("probe", async |connection| {
            sqlx::query("SELECT 1").execute(connection).await?;
            Ok(())
        })
        .await
    }
}

/// What the session sees of the schema.
async fn find_schema(connection: &mut PgConnection, schema: &str) -> Result<Schema, sqlx::Error> {
    let statement = format!(
        "SELECT
            current_schema()::text AS current,
            coalesce(has_table_privilege(to_regclass('mq_msgs'), 'INSERT'), true) AS insert,
            coalesce(has_table_privilege(to_regclass('outcomes'), 'SELECT'), true) AS read,
            {}",
        Tables::COLUMNS
    );
    let row = sqlx::query(&statement).fetch_one(&mut *connection).await?;
    match row.try_get::<Option<String>, _>("current")? {
        None => {
            // A schema that the role may not use is in no search path.
            let exists: bool = sqlx::query_scalar("SELECT to_regnamespace($1) IS NOT NULL")
                .bind(quoted(schema))
                .fetch_one(connection)
                .await?;
            return Ok(if exists {
                Schema::Forbidden
            } else {
                Schema::Missing
            });
        }
        Some(current) if current != schema => return Ok(Schema::Elsewhere),
        Some(_) => {}
    }
    let rights = Rights {
        insert: row.try_get("insert")?,
        read: row.try_get("read")?,
    };
    let ledger = Ledger::read(connection, Tables::from_row(&row)?).await?;
    Ok(ledger.map_or(Schema::Missing, |ledger| Schema::Installed {
        ledger,
        rights,
    }))
}
