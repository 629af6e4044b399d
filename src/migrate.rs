//! Installs the schema.
//!
//! All of the crate's database objects, including the ledger of its migrations, are in their own
//! Postgres schema. They never clash with the application's own `sqlx::migrate!`, whichever runs
//! first, nor with a sqlxmq in another schema.

use sqlx::migrate::{Migrate, MigrateError};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection, PgPool};

use crate::runtime;
use crate::store::quoted;

/// The default name of the schema: `requeuest`.
pub const DEFAULT_SCHEMA: &str = "requeuest";

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// Installs or upgrades the schema [`DEFAULT_SCHEMA`].
///
/// Running it again, or from several processes at once, is harmless. It needs no extension and
/// works on Postgres 14 and later. Its role needs the right to create a schema in the database,
/// unless the schema exists and belongs to that role. Where there is nothing to migrate, any role
/// that may use the schema can run it.
///
/// # Errors
///
/// If the database can't be reached or refuses. A failed migration is rolled back completely.
///
/// # Cancel safety
///
/// Once begun it continues, awaited or not. Running it again waits for it.
///
/// # Examples
///
/// ```no_run
/// # async fn example(pool: sqlx::PgPool) -> Result<(), sqlx::migrate::MigrateError> {
/// requeuest::migrate(&pool).await?;
/// # Ok(()) }
/// ```
pub async fn migrate(pool: &PgPool) -> Result<(), MigrateError> {
    Migrator::new().run(pool).await
}

/// Installs or removes the schema, under a name of your choice.
///
/// # Examples
///
/// ```no_run
/// use requeuest::{Durable, migrate::Migrator};
///
/// # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// Migrator::new().schema("calls").run(&pool).await?;
/// let durable = Durable::builder(pool).schema("calls").build()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Migrator {
    schema: String,
}

impl Default for Migrator {
    fn default() -> Self {
        Self::new()
    }
}

impl Migrator {
    /// A migrator for [`DEFAULT_SCHEMA`].
    pub fn new() -> Self {
        Self {
            schema: DEFAULT_SCHEMA.to_owned(),
        }
    }

    /// The schema to install into: lower-case letters, digits and `_`, up to 63 bytes.
    #[must_use]
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// Installs or upgrades the schema. See [`migrate`].
    ///
    /// # Errors
    ///
    /// If the schema's name is not valid, or the database can't be reached or refuses.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not. Running it again waits for it.
    pub async fn run(&self, pool: &PgPool) -> Result<(), MigrateError> {
        let schema = self.checked()?;
        let connect = self.connect_options(pool);
        runtime::once(move || async move {
            let mut connection = connect.connect().await?;
            // `CREATE SCHEMA IF NOT EXISTS` fails if two sessions run it at once.
            let mut transaction = connection.begin().await?;
            lock(&mut transaction).await?;
            let create = format!("CREATE SCHEMA IF NOT EXISTS {schema}");
            if !exists(&mut transaction, &schema).await? {
                transaction.execute(&*create).await?;
            }
            transaction.commit().await?;
            if may_create(&mut connection, &schema).await? {
                MIGRATIONS.run(&mut connection).await?;
            } else if newest(&mut connection).await? < Some(wanted_version()) {
                return Err(MigrateError::Execute(forbidden(&schema)));
            }
            connection.close().await?;
            Ok(())
        })
        .await
        .map_err(sqlx::Error::Io)?
    }

    /// Undoes every migration and drops the schema, with all requests and outcomes in it.
    ///
    /// # Errors
    ///
    /// If the schema's name is not valid, the database can't be reached or refuses, or the schema
    /// contains objects that are not requeuest's.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not. Running it again waits for it.
    pub async fn undo(&self, pool: &PgPool) -> Result<(), MigrateError> {
        let schema = self.checked()?;
        let connect = self.connect_options(pool);
        runtime::once(move || async move {
            let mut connection = connect.connect().await?;
            if exists(&mut connection, &schema).await? {
                connection.ensure_migrations_table().await?;
                MIGRATIONS.undo(&mut connection, -1).await?;
                connection.execute("DROP TABLE _sqlx_migrations").await?;
                connection
                    .execute(&*format!("DROP SCHEMA {schema}"))
                    .await?;
            }
            connection.close().await?;
            Ok(())
        })
        .await
        .map_err(sqlx::Error::Io)?
    }

    fn checked(&self) -> Result<String, MigrateError> {
        validate_schema(&self.schema)
            .map(|()| quoted(&self.schema))
            .map_err(|reason| MigrateError::Execute(sqlx::Error::Configuration(reason.into())))
    }

    /// sqlx hard-codes the name of its ledger, so the search path decides which schema it is in.
    /// The functions keep this path: a temporary table of the calling session must not come before
    /// the schema's own tables.
    fn connect_options(&self, pool: &PgPool) -> PgConnectOptions {
        let path = format!("{},pg_temp", quoted(&self.schema));
        (*pool.connect_options())
            .clone()
            .options([("search_path", path)])
    }
}

/// The newest migration that this crate knows.
pub(crate) fn wanted_version() -> i64 {
    MIGRATIONS
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or_default()
}

pub(crate) fn validate_schema(schema: &str) -> Result<(), &'static str> {
    let mut bytes = schema.bytes();
    let first = bytes
        .next()
        .is_some_and(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let rest = bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    if first && rest && schema.len() <= 63 {
        Ok(())
    } else {
        Err("a schema's name must be 1 to 63 lower-case letters, digits or `_`, no digit first")
    }
}

async fn lock(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended('requeuest/migrate', 0))")
        .execute(connection)
        .await?;
    Ok(())
}

async fn exists(connection: &mut PgConnection, schema: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT to_regnamespace($1) IS NOT NULL")
        .bind(schema)
        .fetch_one(connection)
        .await
}

/// Whether the session's role may create objects in the schema.
async fn may_create(connection: &mut PgConnection, schema: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT has_schema_privilege(to_regnamespace($1)::oid, 'CREATE')")
        .bind(schema)
        .fetch_one(connection)
        .await
}

/// The newest migration in the ledger of the session's schema, if its role can see a ledger.
pub(crate) async fn newest(connection: &mut PgConnection) -> Result<Option<i64>, sqlx::Error> {
    // Checked first, so that a missing ledger leaves no error in the server's log.
    let ledger: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
        .fetch_one(&mut *connection)
        .await?;
    if !ledger {
        return Ok(None);
    }
    sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
        .fetch_one(connection)
        .await
}

fn forbidden(schema: &str) -> sqlx::Error {
    let text = format!(
        "the role may not create objects in the schema {schema}, which has migrations to run; run \
         migrate as the schema's owner"
    );
    sqlx::Error::Configuration(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_name_must_be_a_plain_identifier() {
        for good in ["requeuest", "_x", "a1_2"] {
            assert!(validate_schema(good).is_ok(), "{good}");
        }
        for bad in ["", "1a", "A", "a b", "a\"b", "a;b", &"x".repeat(64)] {
            assert!(validate_schema(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_migration_can_be_undone() {
        let count = |is: fn(&sqlx::migrate::MigrationType) -> bool| {
            MIGRATIONS
                .iter()
                .filter(|migration| is(&migration.migration_type))
                .count()
        };
        let up = count(sqlx::migrate::MigrationType::is_up_migration);
        assert!(up > 0);
        assert_eq!(up, count(sqlx::migrate::MigrationType::is_down_migration));
    }
}
