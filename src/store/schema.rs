//! Which schema a session finds, and whether the database answers at all.

use std::sync::atomic::Ordering;

use sqlx::PgConnection;

use super::{Store, StoreError, quoted};
use crate::error::{Error, Kind, MigrationState};
use crate::migrate::{newest, wanted_version};

/// The schema that a session of the crate's own pool sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Schema {
    Missing,
    /// It exists, and the session's role may not use it.
    Forbidden,
    /// The session looks into another schema than it was told to: a pooler dropped its settings.
    Elsewhere,
    Version(i64),
}

impl Store {
    /// Verifies, once, that the schema exists and is the one that the statements were written for.
    pub(crate) async fn verify(&self) -> Result<(), Error> {
        if self.inner.verified.load(Ordering::Relaxed) {
            return Ok(());
        }
        let schema = &self.config().schema;
        let found = self
            .run("schema.version", async |connection| {
                schema_version(connection, schema).await
            })
            .await?;
        let wanted = wanted_version();
        let state = match found {
            Schema::Missing => MigrationState::Missing,
            Schema::Forbidden => MigrationState::Forbidden,
            Schema::Elsewhere => MigrationState::SettingsDropped,
            Schema::Version(found) if found < wanted => MigrationState::Older { found, wanted },
            Schema::Version(found) if found > wanted => MigrationState::Newer { found, wanted },
            Schema::Version(_) => {
                self.inner.verified.store(true, Ordering::Relaxed);
                return Ok(());
            }
        };
        Err(Error::new(Kind::Migrations(state)))
    }

    /// Whether the database answers.
    pub(crate) async fn probe(&self) -> Result<(), StoreError> {
        self.run("probe", async |connection| {
            sqlx::query("SELECT 1").execute(connection).await?;
            Ok(())
        })
        .await
    }
}

/// The newest migration in the session's schema.
async fn schema_version(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Schema, sqlx::Error> {
    let current: Option<String> = sqlx::query_scalar("SELECT current_schema()::text")
        .fetch_one(&mut *connection)
        .await?;
    match current {
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
    let version = newest(connection).await?;
    Ok(version.map_or(Schema::Missing, Schema::Version))
}
