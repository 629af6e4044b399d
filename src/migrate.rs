//! Installs the schema.
//!
//! All of the crate's database objects, including the ledger of its migrations, are in their own
//! Postgres schema. They never clash with the application's own `sqlx::migrate!`, whichever runs
//! first, nor with a sqlxmq in another schema.

mod change;
mod grants;
mod ledger;
mod script;

use std::fmt;
use std::time::Duration;

use sqlx::PgPool;
use sqlx::migrate::MigrateError;
use sqlx::postgres::PgConnectOptions;

use self::change::Target;
pub use self::grants::DatabaseRole;
use self::grants::Grant;
pub(crate) use self::grants::Right;
pub(crate) use self::ledger::{Ledger, Tables};
use crate::runtime;
use crate::store::{self, quoted};

/// The default name of the schema: `requeuest`.
pub const DEFAULT_SCHEMA: &str = "requeuest";

/// How long [`migrate`] waits for other sessions, unless [`Migrator::max_wait`] says otherwise: 5
/// minutes.
pub const DEFAULT_MAX_WAIT: Duration = Duration::from_secs(300);

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// Installs or upgrades the schema [`DEFAULT_SCHEMA`].
///
/// Running it again, or from several processes at once, is harmless. It needs no extension and
/// works on Postgres 14 and later. Its role needs the right to create a schema in the database,
/// unless the schema exists and belongs to that role. Where there is nothing to migrate, any role
/// that may use the schema can run it, if the schema's owner is the database's owner or a
/// superuser: any other owner could have put code of its own there. Roles other than the schema's
/// owner get no rights: see [`Migrator::grants`].
///
/// It runs beside processes at work, also older and newer ones. A schema that a newer release has
/// upgraded is left as it is, for as long as it is compatible with this one.
///
/// All migrations of a run are one transaction, with settings of its own. It waits up to 2 s for
/// each lock on a table. If a transaction has that table for longer, everything is rolled back and
/// tried again some seconds later, for up to [`DEFAULT_MAX_WAIT`] in all. So other statements don't
/// queue behind it for long. While it waits it has no transaction, and it takes no lock of sqlx: a
/// `CREATE INDEX CONCURRENTLY` or a `sqlx::migrate!` of the application's own can run meanwhile.
///
/// # Errors
///
/// If the database can't be reached or refuses. A failed run is rolled back completely. Some
/// failures are:
///
/// - [`MigrateError::Source`] with an [`Error`](crate::Error) for which
///   [`is_not_migrated`](crate::Error::is_not_migrated) is true: a newer release has upgraded the
///   schema, and it can't be used by this one any more.
/// - The same: the role may not use the schema, the schema belongs to another role, or a pooler did
///   not keep the settings of the transaction.
/// - [`MigrateError::Source`] with a [`std::io::Error`] of the kind `TimedOut`: other sessions
///   still had the locks that it needs.
/// - [`MigrateError::Execute`] with a [`sqlx::Error::Configuration`]: the role may not create the
///   schema, or may not create objects in it.
/// - [`MigrateError::Dirty`]: a tool has marked a migration as failed.
/// - [`MigrateError::VersionMismatch`]: a migration in the ledger is not the one of this release.
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

/// As [`migrate`], in the database at a URL such as
/// `postgres://user:password@host:5432/database`. The application needs no sqlx.
///
/// # Errors
///
/// As for [`migrate`]. For a URL that is not valid, [`MigrateError::Source`] with an
/// [`Error`](crate::Error) whose [`field`](crate::Error::field) is `url` and which shows nothing of
/// the URL.
///
/// # Cancel safety
///
/// Once begun it continues, awaited or not. Running it again waits for it.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> Result<(), sqlx::migrate::MigrateError> {
/// requeuest::migrate_url("postgres://localhost/app").await?;
/// # Ok(()) }
/// ```
pub async fn migrate_url(url: &str) -> Result<(), MigrateError> {
    Migrator::new().run_url(url).await
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
#[derive(Clone)]
pub struct Migrator {
    schema: String,
    max_wait: Duration,
    connect_options: Option<PgConnectOptions>,
    grants: Vec<Grant>,
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
            max_wait: DEFAULT_MAX_WAIT,
            connect_options: None,
            grants: Vec::new(),
        }
    }

    /// The schema to install into: lower-case letters, digits and `_`, up to 63 bytes.
    #[must_use]
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// How long [`run`](Self::run) and [`undo`](Self::undo) wait for other sessions, in all: for
    /// another migrator of the schema, and for transactions that have used its tables. The
    /// migrations themselves may take longer. With zero there is one try. Defaults to
    /// [`DEFAULT_MAX_WAIT`].
    #[must_use]
    pub fn max_wait(mut self, max_wait: Duration) -> Self {
        self.max_wait = max_wait;
        self
    }

    /// Connect options for [`run`](Self::run) and [`undo`](Self::undo), which open one connection
    /// of their own: those of the schema's owner, or of a direct connection where the application's
    /// pool goes through a pooler. Defaults to the options of the application's pool.
    ///
    /// What the pool's `after_connect` does, such as a `SET ROLE`, doesn't apply to this
    /// connection. The startup option `role` does the same.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::migrate::Migrator;
    ///
    /// # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
    /// let owner = (*pool.connect_options()).clone().options([("role", "app_owner")]);
    /// Migrator::new().connect_options(owner).run(&pool).await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn connect_options(mut self, options: PgConnectOptions) -> Self {
        self.connect_options = Some(options);
        self
    }

    /// Gives a role of the database what its part needs, with each [`run`](Self::run) and in the
    /// same transaction: a release may add what its parts use. May be called for several roles.
    ///
    /// A role has exactly the rights of its parts afterwards: others on the schema and its tables
    /// and functions are taken away. The role must exist, and can't be the owner of the schema, who
    /// must be the one that runs this.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::migrate::{DatabaseRole, Migrator};
    ///
    /// # async fn example(owner: sqlx::PgPool) -> Result<(), sqlx::migrate::MigrateError> {
    /// Migrator::new()
    ///     .grants(DatabaseRole::Enqueue, "web")
    ///     .grants(DatabaseRole::Runner, "worker")
    ///     .grants(DatabaseRole::ReadOnly, "support")
    ///     .run(&owner)
    ///     .await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn grants(mut self, part: DatabaseRole, role: impl Into<String>) -> Self {
        let role = role.into();
        self.grants.push(Grant { part, role });
        self
    }

    /// The statements by which [`run`](Self::run) gives roles their rights, for a tool or a person
    /// to run as the schema's owner, in one transaction, after each migration.
    ///
    /// # Errors
    ///
    /// If the name of the schema or of a role is not valid.
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::migrate::{DatabaseRole, Migrator};
    ///
    /// # fn example() -> Result<(), sqlx::migrate::MigrateError> {
    /// println!("{}", Migrator::new().grants(DatabaseRole::Enqueue, "web").grants_sql()?);
    /// # Ok(()) }
    /// ```
    pub fn grants_sql(&self) -> Result<String, MigrateError> {
        self.validate()?;
        Ok(grants::statements(&quoted(&self.schema), &self.grants))
    }

    /// The migrations after a version, or all of them after 0, as a script of one transaction for a
    /// tool such as `psql`. It enters them in the ledger as [`run`](Self::run) does, and gives the
    /// roles of [`grants`](Self::grants) their rights. It creates the schema if there is none.
    ///
    /// # Errors
    ///
    /// If the name of the schema or of a role is not valid.
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::migrate::Migrator;
    ///
    /// # fn example() -> Result<(), sqlx::migrate::MigrateError> {
    /// println!("{}", Migrator::new().sql(0)?);
    /// # Ok(()) }
    /// ```
    pub fn sql(&self, after: i64) -> Result<String, MigrateError> {
        self.validate()?;
        let schema = quoted(&self.schema);
        Ok(script::of(&schema, &MIGRATIONS, after, &self.grants))
    }

    /// Which migrations the schema in the database at a URL has. Changes nothing.
    ///
    /// # Errors
    ///
    /// If the schema's name or the URL is not valid, the database can't be reached, or the schema
    /// belongs to a role that could have put code of its own there.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::migrate::Migrator;
    ///
    /// # async fn example(url: &str) -> Result<(), sqlx::migrate::MigrateError> {
    /// let status = Migrator::new().status_url(url).await?;
    /// println!("{} migrations to apply", status.pending.len());
    /// # Ok(()) }
    /// ```
    pub async fn status_url(&self, url: &str) -> Result<MigrationStatus, MigrateError> {
        let target = self.target(&options_of(url)?)?;
        runtime::once(move || async move { target.status().await })
            .await
            .map_err(sqlx::Error::Io)?
    }

    /// Installs or upgrades the schema. See [`migrate`].
    ///
    /// # Errors
    ///
    /// If the schema's name is not valid, or as [`migrate`].
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not. Running it again waits for it.
    pub async fn run(&self, pool: &PgPool) -> Result<(), MigrateError> {
        self.install(&pool.connect_options()).await
    }

    /// As [`run`](Self::run), in the database at a URL. See [`migrate_url`].
    ///
    /// # Errors
    ///
    /// As for [`run`](Self::run) and [`migrate_url`].
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not. Running it again waits for it.
    pub async fn run_url(&self, url: &str) -> Result<(), MigrateError> {
        self.install(&options_of(url)?).await
    }

    async fn install(&self, options: &PgConnectOptions) -> Result<(), MigrateError> {
        let target = self.target(options)?;
        runtime::once(move || async move { target.install().await })
            .await
            .map_err(sqlx::Error::Io)?
    }

    /// Undoes every migration and drops the schema, with all requests and outcomes in it.
    ///
    /// All of it is one transaction, which waits as [`run`](Self::run) does.
    ///
    /// # Errors
    ///
    /// If the schema's name is not valid, the database can't be reached or refuses, other sessions
    /// still use the tables, a newer release has upgraded the schema
    /// ([`MigrateError::VersionMissing`]), or the schema contains objects that are not requeuest's.
    /// A failed run is rolled back completely.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not. Running it again waits for it.
    pub async fn undo(&self, pool: &PgPool) -> Result<(), MigrateError> {
        self.remove(&pool.connect_options()).await
    }

    /// As [`undo`](Self::undo), in the database at a URL.
    ///
    /// # Errors
    ///
    /// As for [`undo`](Self::undo), and for a URL as for [`migrate_url`].
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not. Running it again waits for it.
    pub async fn undo_url(&self, url: &str) -> Result<(), MigrateError> {
        self.remove(&options_of(url)?).await
    }

    async fn remove(&self, options: &PgConnectOptions) -> Result<(), MigrateError> {
        let target = self.target(options)?;
        runtime::once(move || async move { target.remove().await })
            .await
            .map_err(sqlx::Error::Io)?
    }

    fn validate(&self) -> Result<(), MigrateError> {
        let refused =
            |reason: String| MigrateError::Execute(sqlx::Error::Configuration(reason.into()));
        validate_schema(&self.schema).map_err(|reason| refused(reason.to_owned()))?;
        for grant in &self.grants {
            grant.validate().map_err(refused)?;
        }
        Ok(())
    }

    fn target(&self, options: &PgConnectOptions) -> Result<Target, MigrateError> {
        self.validate()?;
        let connect = self.connect_options.as_ref();
        Ok(Target {
            connect: connect.unwrap_or(options).clone(),
            schema: quoted(&self.schema),
            migrations: &MIGRATIONS,
            max_wait: self.max_wait,
            grants: self.grants.clone(),
        })
    }
}

/// Which migrations a schema has, by their versions. [`Migrator::status_url`] returns it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigrationStatus {
    /// Those of this release that it has. None if there is no schema.
    pub applied: Vec<i64>,
    /// Those of this release that it doesn't have.
    pub pending: Vec<i64>,
    /// Those of a newer release.
    pub newer: Vec<i64>,
}

/// Without the connect options, which have a password.
impl fmt::Debug for Migrator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Migrator")
            .field("schema", &self.schema)
            .field("max_wait", &self.max_wait)
            .field("grants", &self.grants)
            .finish_non_exhaustive()
    }
}

fn options_of(url: &str) -> Result<PgConnectOptions, MigrateError> {
    store::url::connect_options(url).map_err(|error| MigrateError::Source(Box::new(error)))
}

/// The newest migration that this crate knows, which names its release.
pub(crate) fn wanted_version() -> i64 {
    newest_of(&MIGRATIONS)
}

/// The names of the indexes that the migrations make, except those of constraints and partitions.
pub(crate) fn expected_indexes() -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for migration in MIGRATIONS
        .iter()
        .filter(|one| !one.migration_type.is_down_migration())
    {
        for line in migration.sql.lines() {
            let of = |prefix: &str| {
                let rest = line.strip_prefix(prefix)?;
                rest.split([' ', ';']).next().map(str::to_owned)
            };
            if let Some(name) = of("CREATE INDEX ").or_else(|| of("CREATE UNIQUE INDEX ")) {
                names.push(name);
            } else if let Some(gone) = of("DROP INDEX ") {
                names.retain(|name| *name != gone);
            }
        }
    }
    names
}

fn newest_of(migrations: &sqlx::migrate::Migrator) -> i64 {
    let versions = migrations.iter().map(|migration| migration.version);
    versions.max().unwrap_or_default()
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
