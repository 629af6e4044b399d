//! Whether the way to the database is fit: clocks, notifications, advisory locks.

use std::time::{Duration, SystemTime};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Executor, PgConnection, PgPool};
use uuid::Uuid;

use super::spoken;
use crate::finding::{Check, Finding};

/// Clocks that differ by less are taken to be the same.
const SKEW: Duration = Duration::from_secs(2);
/// Times of the application and of receivers are of no use if they differ by more.
const LARGE_SKEW: Duration = Duration::from_secs(60);
/// The channel of the examination's own notification.
const CHANNEL: &str = "requeuest_doctor";
/// How long a notification may take. Usually it is there with the answer to `NOTIFY`.
const NOTIFIED_WITHIN: Duration = Duration::from_secs(2);
const POOLER: &str = "a pooler in transaction mode is likely in between: connect to the server \
    itself, with DurableBuilder::connect_options or another URL, or use the pooler in session mode";

/// Compares the clocks.
pub(super) async fn clock(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    let before = SystemTime::now();
    let micros: i64 =
        sqlx::query_scalar("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
            .persistent(false)
            .fetch_one(connection)
            .await?;
    let after = SystemTime::now();
    let database = SystemTime::UNIX_EPOCH + Duration::from_micros(micros.unsigned_abs());
    Ok(vec![clock_finding(before, after, database)])
}

/// What the database's time says, if it was asked and answered at these times of the process.
fn clock_finding(before: SystemTime, after: SystemTime, database: SystemTime) -> Finding {
    let check = Check::Clock;
    // By how much the clocks differ at least, however long each way took.
    let (behind, apart) = match (
        database.duration_since(after),
        before.duration_since(database),
    ) {
        (Ok(apart), _) => ("behind", apart),
        (_, Ok(apart)) => ("ahead of", apart),
        _ => ("", Duration::ZERO),
    };
    if apart < SKEW {
        return check.ok(format!(
            "this process and the database differ by less than {} s",
            SKEW.as_secs()
        ));
    }
    let time = spoken(apart.as_secs_f64());
    let summary = format!("the clock of this process is {time} {behind} the database's");
    let finding = if apart < LARGE_SKEW {
        check.warning(summary)
    } else {
        check.problem(summary)
    };
    finding.advise("synchronise the clocks of both machines, by NTP for example")
}

/// Listens with one connection, and notifies with another.
pub(super) async fn listen(options: &PgConnectOptions) -> Result<Vec<Finding>, sqlx::Error> {
    let pool = PgPoolOptions::new()
        .max_connections(2)
        .acquire_timeout(NOTIFIED_WITHIN)
        .connect_lazy_with(options.clone());
    let heard = heard(&pool).await;
    pool.close().await;
    Ok(vec![if heard? {
        Check::Listen.ok("notifications reach this process")
    } else {
        let summary = "notifications don't reach this process: its sessions are not its own";
        Check::Listen.problem(summary).advise(POOLER)
    }])
}

async fn heard(pool: &PgPool) -> Result<bool, sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(CHANNEL).await?;
    let wanted = Uuid::now_v7().to_string();
    match pool
        .execute(&*format!("NOTIFY {CHANNEL}, '{wanted}'"))
        .await
    {
        // A pooler has told the session that notifies, which expects nothing.
        Err(sqlx::Error::Protocol(_)) => return Ok(false),
        notified => notified?,
    };
    let heard = async {
        while listener.recv().await?.payload() != wanted {}
        Ok::<_, sqlx::Error>(())
    };
    match tokio::time::timeout(NOTIFIED_WITHIN, heard).await {
        Ok(heard) => heard.map(|()| true),
        Err(_elapsed) => Ok(false),
    }
}

/// Takes a lock with one connection, and asks for it with another.
pub(super) async fn advisory_locks(
    connection: &mut PgConnection,
    options: &PgConnectOptions,
) -> Result<Vec<Finding>, sqlx::Error> {
    let (key, _) = Uuid::now_v7().as_u64_pair();
    let key = i64::from_ne_bytes(key.to_ne_bytes());
    let first = try_lock(connection, key).await?;
    let mut other = options.connect().await?;
    other.execute("BEGIN").await?;
    let second = try_lock(&mut other, key).await;
    other.execute("ROLLBACK").await?;
    other.close().await?;
    Ok(vec![if first && !second? {
        Check::AdvisoryLocks.ok("advisory locks exclude each other")
    } else {
        Check::AdvisoryLocks
            .problem("advisory locks don't exclude each other, and ordering keys depend on them")
            .advise("use Postgres itself, not a server that only speaks its protocol")
    }])
}

async fn try_lock(connection: &mut PgConnection, key: i64) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT pg_try_advisory_xact_lock($1)")
        .bind(key)
        .persistent(false)
        .fetch_one(connection)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::Severity;

    #[test]
    fn clocks_that_differ_are_found_whatever_the_way_took() {
        let begin = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let at = |seconds| begin + Duration::from_secs(seconds);
        let found = |before, after, database| clock_finding(at(before), at(after), at(database));
        for same in [
            found(100, 101, 100),
            found(100, 109, 104),
            found(100, 100, 101),
        ] {
            assert_eq!(same.severity, Severity::Ok, "{same:?}");
        }
        let behind = found(100, 101, 105);
        assert_eq!(behind.severity, Severity::Warning);
        assert_eq!(
            behind.summary,
            "the clock of this process is 4 s behind the database's"
        );
        let ahead = found(1000, 1001, 400);
        assert_eq!(ahead.severity, Severity::Problem);
        assert_eq!(
            ahead.summary,
            "the clock of this process is 10 min ahead of the database's"
        );
        assert!(ahead.advice.is_some());
    }
}
