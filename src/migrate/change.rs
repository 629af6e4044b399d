//! Changes a schema beside everything else that uses its database.
//!
//! - A change has a lock of its own for each schema. sqlx's lock is one for the whole database: a
//!   host that holds it while it calls this crate would wait for itself.
//! - What waits holds neither a lock nor a snapshot. `CREATE INDEX CONCURRENTLY` waits for every
//!   older snapshot in the database, and a host may well run it meanwhile.
//! - A statement waits for a table for [`LOCK_TIMEOUT`] only, because every later statement on that
//!   table queues behind it. Then all is rolled back, the queue drains, and the change begins anew.
//! - Each change is one transaction. It pins its settings itself, for two reasons: the caller's
//!   may be anything, and a pooler in transaction mode drops those of a session. For the same
//!   pooler, no statement is prepared under a name.

use std::time::{Duration, Instant};

use sqlx::migrate::{MigrateError, Migration, Migrator};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection, Postgres, Row, Transaction};

use super::MigrationStatus;
use super::grants::{self, Grant};
use super::ledger::{self, Applied, Ledger, Tables};
use crate::error::{Error, Kind, MigrationState, has_sqlstate};
use crate::store::connect::located;

/// How long a statement waits for a lock on a table.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// A frozen process loses its transaction, and with it the locks, after this time.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// The pauses between two tries while another process changes the schema. They double.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// The same after a lock on a table was not to be had. Other statements run for at least as long as
/// the try kept them waiting.
const LOCK_PAUSES: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(10));

/// A schema to change.
pub(super) struct Target {
    pub(super) connect: PgConnectOptions,
    /// The schema's name, as an identifier.
    pub(super) schema: String,
    pub(super) migrations: &'static Migrator,
    pub(super) max_wait: Duration,
    pub(super) grants: Vec<Grant>,
}

/// What a change needs to know of its schema.
struct Found {
    exists: bool,
    /// The role whose transaction this is.
    role: String,
    /// The schema's owner.
    owner: Option<String>,
    /// The role may create objects in the schema or, if there is none yet, create it.
    may_create: bool,
    tables: Tables,
    ledger: Option<Ledger>,
    applied: Vec<Applied>,
}

impl Found {
    /// The entry of a migration in the ledger.
    fn get(&self, migration: &Migration) -> Option<&Applied> {
        let mut applied = self.applied.iter();
        applied.find(|applied| applied.version == migration.version)
    }
}

/// What a change waits for.
#[derive(Clone, Copy)]
enum Obstacle {
    OtherChange,
    TableLock,
}

impl Target {
    /// Applies the migrations that the schema doesn't have yet.
    pub(super) async fn install(&self) -> Result<(), MigrateError> {
        let mut connection = self.connect().await?;
        // Without a lock, since there is nothing to do most of the time.
        let mut transaction = self.begin(&mut connection, "").await?;
        let (_, pending) = self.pending(&mut transaction).await?;
        transaction.rollback().await?;
        if !pending.is_empty() || !self.grants.is_empty() {
            self.locked(&mut connection, async |transaction| {
                let (found, pending) = self.pending(transaction).await?;
                if !found.exists {
                    let create = format!("CREATE SCHEMA {}", self.schema);
                    transaction.execute(&*create).await?;
                }
                self.verify_place(transaction).await?;
                if !found.tables.migrations {
                    ledger::create(transaction).await?;
                }
                if !pending.is_empty() {
                    for migration in pending {
                        ledger::apply(transaction, migration).await?;
                    }
                    let without_public = grants::without_public(&self.schema);
                    transaction.execute(&*without_public).await?;
                }
                if !self.grants.is_empty() {
                    self.verify_grants(&found)?;
                    grants::apply(transaction, &self.schema, &self.grants).await?;
                }
                Ok(())
            })
            .await?;
        }
        connection.close().await?;
        Ok(())
    }

    /// Which migrations the schema has. Changes nothing.
    pub(super) async fn status(&self) -> Result<MigrationStatus, MigrateError> {
        let mut connection = self.connect().await?;
        let mut transaction = self.begin(&mut connection, "").await?;
        let found = self.find(&mut transaction, true).await?;
        transaction.rollback().await?;
        connection.close().await?;
        let known = self.migrations.iter();
        let known = known.filter(|migration| !migration.migration_type.is_down_migration());
        let pending = known.filter(|migration| found.get(migration).is_none());
        let pending = pending.map(|migration| migration.version).collect();
        let applied = found.applied.iter().map(|applied| applied.version);
        let (applied, newer) =
            applied.partition(|version| self.migrations.version_exists(*version));
        Ok(MigrationStatus {
            applied,
            pending,
            newer,
        })
    }

    /// Undoes all migrations and drops the schema.
    pub(super) async fn remove(&self) -> Result<(), MigrateError> {
        let mut connection = self.connect().await?;
        self.locked(&mut connection, async |transaction| {
            let found = self.find(transaction, false).await?;
            if let Some(version) = found.ledger.and_then(|ledger| ledger.failed) {
                return Err(MigrateError::Dirty(version));
            }
            if let Some(unknown) = found
                .applied
                .iter()
                .find(|applied| !self.migrations.version_exists(applied.version))
            {
                return Err(MigrateError::VersionMissing(unknown.version));
            }
            for migration in self.migrations.iter().rev() {
                if migration.migration_type.is_down_migration() && found.get(migration).is_some() {
                    ledger::revert(transaction, migration).await?;
                }
            }
            if found.tables.migrations {
                transaction.execute("DROP TABLE _sqlx_migrations").await?;
            }
            if found.exists {
                let drop = format!("DROP SCHEMA {}", self.schema);
                transaction.execute(&*drop).await?;
            }
            Ok(())
        })
        .await?;
        connection.close().await?;
        Ok(())
    }

    /// Connects. An error of the connection names the server.
    async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        let connected = self.connect.connect().await;
        connected.map_err(|error| located(error, &self.connect))
    }

    /// Begins a transaction that sees the schema. `mode` is more for `SET TRANSACTION`.
    async fn begin<'c>(
        &self,
        connection: &'c mut PgConnection,
        mode: &str,
    ) -> Result<Transaction<'c, Postgres>, sqlx::Error> {
        let mut transaction = connection.begin().await?;
        // sqlx doesn't qualify the name of its ledger, so the search path decides which schema that
        // is in. Functions keep this path: a temporary table of the session that calls one must not
        // come before the schema's own tables.
        //
        // `transaction_timeout` is new in Postgres 17.
        let pins = format!(
            "SET TRANSACTION ISOLATION LEVEL READ COMMITTED{mode};
             SET LOCAL search_path = {schema}, pg_temp;
             SET LOCAL lock_timeout = {lock};
             SET LOCAL idle_in_transaction_session_timeout = {idle};
             SET LOCAL exit_on_error = off;
             SET LOCAL client_min_messages = warning;
             SET LOCAL standard_conforming_strings = on;
             SET LOCAL default_table_access_method = heap;
             SET LOCAL synchronous_commit = on;
             SELECT set_config(name, '0', true) FROM pg_settings
             WHERE name IN ('statement_timeout', 'transaction_timeout')",
            schema = self.schema,
            lock = LOCK_TIMEOUT.as_millis(),
            idle = IDLE_TIMEOUT.as_millis(),
        );
        transaction.execute(&*pins).await?;
        Ok(transaction)
    }

    /// Makes a change, all of it or nothing, as the only one of the schema at that time.
    async fn locked(
        &self,
        connection: &mut PgConnection,
        change: impl AsyncFn(&mut PgConnection) -> Result<(), MigrateError>,
    ) -> Result<(), MigrateError> {
        let begun = Instant::now();
        let mut pause = Duration::ZERO;
        loop {
            // A session that was idle between two tries may have been ended for that.
            if !pause.is_zero() && connection.ping().await.is_err() {
                *connection = self.connect().await?;
            }
            let mut transaction = self.begin(connection, ", READ WRITE").await?;
            let obstacle = if self.try_lock(&mut transaction).await? {
                match change(&mut transaction).await {
                    Ok(()) => return Ok(transaction.commit().await?),
                    Err(error) if is_lock(&error) => Obstacle::TableLock,
                    Err(error) => {
                        // The connection may be lost, and the first error says why.
                        let _ = transaction.rollback().await;
                        return Err(error);
                    }
                }
            } else {
                Obstacle::OtherChange
            };
            transaction.rollback().await?;
            if begun.elapsed() >= self.max_wait {
                return Err(self.waited(connection, obstacle).await);
            }
            let (first, longest) = match obstacle {
                Obstacle::OtherChange => PAUSES,
                Obstacle::TableLock => LOCK_PAUSES,
            };
            pause = pause.clamp(first, longest);
            let left = self.max_wait.saturating_sub(begun.elapsed());
            let jittered = pause.mul_f64(0.5 + fastrand::f64() / 2.0);
            tokio::time::sleep(jittered.min(left)).await;
            pause *= 2;
        }
    }

    async fn try_lock(&self, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar("SELECT pg_try_advisory_xact_lock(hashtextextended($1, 0))")
            .persistent(false)
            .bind(self.lock_name())
            .fetch_one(connection)
            .await
    }

    fn lock_name(&self) -> String {
        format!("requeuest/migrate/{}", self.schema.trim_matches('"'))
    }

    /// The migrations to apply.
    ///
    /// # Errors
    ///
    /// If the schema can't be used by this release, or the role may not apply migrations.
    async fn pending(
        &self,
        connection: &mut PgConnection,
    ) -> Result<(Found, Vec<&'static Migration>), MigrateError> {
        let found = self.find(connection, true).await?;
        if let Some(ledger) = found.ledger {
            match ledger.check(super::newest_of(self.migrations)) {
                Ok(()) | Err(MigrationState::Older { .. }) => {}
                Err(MigrationState::Failed { version }) => {
                    return Err(MigrateError::Dirty(version));
                }
                Err(state) => return Err(refused(state)),
            }
        }
        let mut pending = Vec::new();
        for migration in self.migrations.iter() {
            if migration.migration_type.is_down_migration() {
                continue;
            }
            match found.get(migration) {
                Some(applied) if applied.checksum != *migration.checksum => {
                    return Err(MigrateError::VersionMismatch(migration.version));
                }
                Some(_) => {}
                None => pending.push(migration),
            }
        }
        if !pending.is_empty() || !self.grants.is_empty() {
            if !found.may_create {
                return Err(MigrateError::Execute(self.forbidden(found.exists)));
            }
            self.verify_owner(found.owner.as_deref(), &found.role)?;
        }
        Ok((found, pending))
    }

    /// Makes sure that the schema is the role's own. The owner of a schema can put functions into
    /// it, and remove what other roles have put there.
    fn verify_owner(&self, owner: Option<&str>, role: &str) -> Result<(), MigrateError> {
        match owner {
            Some(owner) if owner != role => {
                let kind = Kind::ForeignSchema {
                    schema: self.schema.trim_matches('"').into(),
                    owner: owner.into(),
                    role: role.into(),
                };
                Err(MigrateError::Source(Box::new(Error::new(kind))))
            }
            _ => Ok(()),
        }
    }

    /// The owner's own rights must not be taken away.
    fn verify_grants(&self, found: &Found) -> Result<(), MigrateError> {
        if self.grants.iter().any(|grant| grant.role == found.role) {
            let text = format!(
                "grants: {:?} owns the schema {}; grant rights to other roles",
                found.role, self.schema
            );
            return Err(MigrateError::Execute(sqlx::Error::Configuration(
                text.into(),
            )));
        }
        Ok(())
    }

    /// Makes sure that what the transaction creates comes into the schema.
    async fn verify_place(&self, connection: &mut PgConnection) -> Result<(), MigrateError> {
        let current: bool =
            sqlx::query_scalar("SELECT coalesce(current_schema()::text = $1, false)")
                .persistent(false)
                .bind(self.schema.trim_matches('"'))
                .fetch_one(connection)
                .await?;
        if current {
            Ok(())
        } else {
            Err(refused(MigrationState::SettingsDropped))
        }
    }

    /// Looks at the schema. To use it, its owner must be the role itself, the database's owner or a
    /// superuser.
    async fn find(
        &self,
        connection: &mut PgConnection,
        for_use: bool,
    ) -> Result<Found, MigrateError> {
        let statement = format!(
            "SELECT
                to_regnamespace($1) IS NOT NULL,
                coalesce(
                    has_schema_privilege(to_regnamespace($1)::oid, 'CREATE'),
                    has_database_privilege(current_database(), 'CREATE')
                ),
                coalesce(has_schema_privilege(to_regnamespace($1)::oid, 'USAGE'), true),
                current_user::text,
                (
                    SELECT pg_get_userbyid(n.nspowner)::text FROM pg_namespace n
                    WHERE n.oid = to_regnamespace($1)
                ),
                EXISTS (
                    SELECT FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner
                    WHERE n.oid = to_regnamespace($1) AND (r.rolsuper OR EXISTS (
                        SELECT FROM pg_database d
                        WHERE d.datname = current_database() AND d.datdba = r.oid
                    ))
                ),
                {}",
            Tables::COLUMNS
        );
        let row = sqlx::query(&statement)
            .persistent(false)
            .bind(&self.schema)
            .fetch_one(&mut *connection)
            .await?;
        // A schema that the role may not use looks empty to it.
        if !row.try_get::<bool, _>(2)? {
            return Err(refused(MigrationState::Forbidden));
        }
        let (role, owner): (String, Option<String>) = (row.try_get(3)?, row.try_get(4)?);
        // Before anything is read there: its ledger could be a view that calls the owner's code.
        if for_use && !row.try_get::<bool, _>(5)? {
            self.verify_owner(owner.as_deref(), &role)?;
        }
        let tables = Tables::from_row(&row)?;
        Ok(Found {
            exists: row.try_get(0)?,
            may_create: row.try_get(1)?,
            role,
            owner,
            tables,
            ledger: Ledger::read(connection, tables).await?,
            applied: if tables.migrations {
                ledger::applied(connection).await?
            } else {
                Vec::new()
            },
        })
    }

    fn forbidden(&self, exists: bool) -> sqlx::Error {
        let schema = &self.schema;
        let text = if exists {
            format!(
                "the role may not create objects in the schema {schema}, which has migrations to \
                 run; run migrate as the schema's owner, or grant the role CREATE on the schema"
            )
        } else {
            format!(
                "the role may not create the schema {schema}; grant it CREATE on the database, or \
                 create the schema with the role as its owner"
            )
        };
        sqlx::Error::Configuration(text.into())
    }

    /// The error for a change that has waited long enough. It names what is in the way.
    async fn waited(&self, connection: &mut PgConnection, obstacle: Obstacle) -> MigrateError {
        let holders = self.holders(connection, obstacle).await;
        let sessions = match &holders {
            Ok(pids) if !pids.is_empty() => format!(" Postgres processes {pids:?}"),
            _ => String::new(),
        };
        let (what, advice) = match obstacle {
            Obstacle::OtherChange => (
                "another migrate or undo",
                "once it has ended, run this again",
            ),
            Obstacle::TableLock => (
                "transactions that have used its tables",
                "once they have ended, run this again",
            ),
        };
        let text = format!(
            "the schema {} is unchanged: after {:?}, it still waited for {what}{sessions}; \
             {advice}",
            self.schema, self.max_wait
        );
        let timed_out = std::io::Error::new(std::io::ErrorKind::TimedOut, text);
        MigrateError::Source(Box::new(timed_out))
    }

    /// The sessions in the way.
    async fn holders(
        &self,
        connection: &mut PgConnection,
        obstacle: Obstacle,
    ) -> Result<Vec<i32>, sqlx::Error> {
        let (statement, name) = match obstacle {
            Obstacle::OtherChange => (
                "SELECT DISTINCT l.pid
                 FROM pg_locks l, pg_database d, hashtextextended($1, 0) AS key
                 WHERE l.locktype = 'advisory' AND l.granted AND l.pid IS NOT NULL
                    AND l.database = d.oid AND d.datname = current_database()
                    AND l.objsubid = 1
                    AND (l.classid::bigint << 32 | l.objid::bigint) = key
                 ORDER BY l.pid",
                self.lock_name(),
            ),
            Obstacle::TableLock => (
                "SELECT DISTINCT l.pid FROM pg_class c JOIN pg_locks l ON l.relation = c.oid
                    JOIN pg_database d ON d.oid = l.database
                 WHERE c.relnamespace = to_regnamespace($1) AND l.granted
                    AND d.datname = current_database() AND l.pid <> pg_backend_pid()
                 ORDER BY l.pid",
                self.schema.clone(),
            ),
        };
        sqlx::query_scalar(statement)
            .persistent(false)
            .bind(name)
            .fetch_all(connection)
            .await
    }
}

fn refused(state: MigrationState) -> MigrateError {
    MigrateError::Source(Box::new(Error::new(Kind::Migrations(state))))
}

/// Whether a lock was not to be had in time, or the wait for it would never have ended.
fn is_lock(error: &MigrateError) -> bool {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return false;
    };
    // lock_not_available, deadlock_detected
    has_sqlstate(error, &["55P03", "40P01"])
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use std::borrow::Cow;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use sqlx::migrate::MigrationType;

    use super::*;
    use crate::migrate::{MIGRATIONS, wanted_version};
    use crate::store::quoted;
    use crate::testkit::{Postgres, TestDatabase};
    use crate::{Durable, Request, migrate, runtime};

    const LONG: Duration = Duration::from_secs(30);

    async fn migrated() -> TestDatabase {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        migrate(database.pool()).await.unwrap();
        database
    }

    /// A release with these migrations more.
    fn next_release(connect: PgConnectOptions, added: &[&'static str]) -> Target {
        let added = (1..).zip(added).map(|(number, sql)| {
            let kind = MigrationType::ReversibleUp;
            let version = wanted_version() + number;
            Migration::new(version, "added".into(), kind, Cow::Borrowed(*sql), false)
        });
        let migrations = Migrator {
            migrations: MIGRATIONS.iter().cloned().chain(added).collect(),
            ..Migrator::DEFAULT
        };
        Target {
            connect,
            schema: quoted("requeuest"),
            migrations: Box::leak(Box::new(migrations)),
            max_wait: LONG,
            grants: Vec::new(),
        }
    }

    async fn install(target: Target) -> Result<(), MigrateError> {
        let installing = runtime::once(move || async move { target.install().await });
        tokio::time::timeout(LONG, installing)
            .await
            .expect("took too long")
            .unwrap()
    }

    async fn is_true(database: &TestDatabase, query: &str) -> bool {
        sqlx::query_scalar(query)
            .fetch_one(database.pool())
            .await
            .unwrap()
    }

    async fn eventually(database: &TestDatabase, query: &str) {
        let deadline = Instant::now() + LONG;
        while !is_true(database, query).await {
            assert!(Instant::now() < deadline, "never true: {query}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    const ADDED: &str = "SELECT count(*) > 0 FROM information_schema.columns
        WHERE table_schema = 'requeuest' AND column_name LIKE 'added%'";

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_alter_behind_a_long_transaction_delays_calls_only_briefly() {
        let database = migrated().await;
        let durable = Durable::new(database.pool().clone());
        let mut host = database.pool().begin().await.unwrap();
        host.execute("SELECT FROM requeuest.mq_msgs").await.unwrap();

        let alter = "ALTER TABLE mq_msgs ADD COLUMN added int NOT NULL DEFAULT 0";
        let upgrade = next_release(database.options(), &[alter]);
        let upgrading = tokio::spawn(install(upgrade));
        let stop = Arc::new(AtomicBool::new(false));
        let calling = tokio::spawn({
            let stop = Arc::clone(&stop);
            async move {
                let mut longest = Duration::ZERO;
                while !stop.load(Ordering::Relaxed) {
                    let request = http::Request::post("http://localhost:1/").body("x");
                    let request = Request::try_from(request.unwrap()).unwrap();
                    let begun = Instant::now();
                    durable.fire(request).await.unwrap();
                    longest = longest.max(begun.elapsed());
                }
                longest
            }
        });
        let waits = "SELECT count(*) > 0 FROM pg_locks
            WHERE relation = 'requeuest.mq_msgs'::regclass AND NOT granted
                AND mode = 'AccessExclusiveLock'";
        eventually(&database, waits).await;
        eventually(&database, &format!("SELECT NOT ({waits})")).await;
        assert!(!upgrading.is_finished());
        host.commit().await.unwrap();
        upgrading.await.unwrap().unwrap();
        stop.store(true, Ordering::Relaxed);
        let longest = calling.await.unwrap();
        println!("the longest of the calls beside the upgrade took {longest:?}");
        assert!(
            longest < LOCK_TIMEOUT + Duration::from_secs(2),
            "{longest:?}"
        );
        assert!(is_true(&database, ADDED).await);
    }

    #[tokio::test]
    async fn what_is_in_the_way_for_too_long_is_named() {
        let database = migrated().await;
        let mut host = database.pool().begin().await.unwrap();
        host.execute("SELECT FROM requeuest.outcomes")
            .await
            .unwrap();
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
            .fetch_one(&mut *host)
            .await
            .unwrap();
        let alters = [
            "ALTER TABLE mq_msgs ADD COLUMN added int",
            "ALTER TABLE outcomes ADD COLUMN added int",
        ];
        let mut upgrade = next_release(database.options(), &alters);
        upgrade.max_wait = Duration::ZERO;
        let error = install(upgrade).await.unwrap_err();
        let MigrateError::Source(source) = &error else {
            panic!("{error:?}");
        };
        let source = source.downcast_ref::<std::io::Error>().unwrap();
        assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
        let text = error.to_string();
        assert!(text.contains(&format!("[{pid}]")), "{text}");
        assert!(
            text.contains("the schema \"requeuest\" is unchanged"),
            "{text}"
        );
        assert!(!is_true(&database, ADDED).await);

        host.rollback().await.unwrap();
        install(next_release(database.options(), &alters))
            .await
            .unwrap();
        assert!(is_true(&database, ADDED).await);
    }

    #[tokio::test]
    async fn a_run_that_fails_is_rolled_back_whole() {
        let database = migrated().await;
        let added = [
            "ALTER TABLE mq_msgs ADD COLUMN added int",
            "ALTER TABLE mq_msgs ADD COLUMN added int",
        ];
        let error = install(next_release(database.options(), &added)).await;
        let error = error.unwrap_err();
        let second = wanted_version() + 2;
        assert!(
            matches!(&error, MigrateError::ExecuteMigration(_, version) if *version == second),
            "{error:?}"
        );
        assert!(!is_true(&database, ADDED).await);
        install(next_release(database.options(), &added[..1]))
            .await
            .unwrap();
        assert!(is_true(&database, ADDED).await);
    }

    #[tokio::test]
    async fn long_migrations_are_not_bound_by_the_callers_timeouts() {
        let database = migrated().await;
        let mut settings = vec![("statement_timeout", "300"), ("lock_timeout", "1")];
        if is_true(
            &database,
            "SELECT count(*) > 0 FROM pg_settings WHERE name = 'transaction_timeout'",
        )
        .await
        {
            settings.push(("transaction_timeout", "300"));
        }
        let connect = database.options().options(settings);
        let added = ["SELECT pg_sleep(0.5); ALTER TABLE mq_msgs ADD COLUMN added int"];
        install(next_release(connect, &added)).await.unwrap();
        assert!(is_true(&database, ADDED).await);
    }
}
