//! Connections from the pool, and why there is none.
//!
//! While a server refuses connections, or isn't ready for them, sqlx's pool tries again until its
//! timeout, and then reports the timeout alone. That helps through a failover, but in a longer
//! outage every caller would wait for an error that doesn't name its cause.
//!
//! All of this runs only where no idle connection is at hand.

use std::io::{Error as IoError, ErrorKind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection, PgPool, Postgres};

use super::db::ACQUIRE_TIMEOUT;

/// How long a server may refuse connections before the first caller is told: a failover should not
/// show. Later callers are told at once, until the server accepts a connection again.
const PATIENCE: Duration = Duration::from_secs(3);

/// Takes connections from a pool.
#[derive(Debug, Default)]
pub(super) struct Connector {
    /// The server has refused connections for [`PATIENCE`], and accepted none since.
    away: AtomicBool,
}

impl Connector {
    /// A connection from the pool. An error of the connection names the server.
    pub(super) async fn connect(
        &self,
        pool: &PgPool,
    ) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        let options = pool.connect_options();
        self.acquire(pool, &options)
            .await
            .map_err(|error| located(error, &options))
    }

    async fn acquire(
        &self,
        pool: &PgPool,
        options: &PgConnectOptions,
    ) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        if self.away.load(Ordering::Relaxed) && !pool.is_closed() {
            match tokio::time::timeout(PATIENCE, failure(options)).await {
                Ok(Some(refused)) if is_refused(&refused) => return Err(refused),
                Ok(_) => {}
                // Not worth the pool's timeout on top.
                Err(_elapsed) => return Err(sqlx::Error::Io(ErrorKind::TimedOut.into())),
            }
        }
        let mut acquiring = pin!(pool.acquire());
        let acquired = match tokio::time::timeout(PATIENCE, &mut acquiring).await {
            Ok(acquired) => acquired,
            Err(_elapsed) => tokio::select! {
                biased;
                acquired = &mut acquiring => acquired,
                cause = failure(options) => match cause {
                    Some(refused) if is_refused(&refused) => {
                        self.away.store(true, Ordering::Relaxed);
                        return Err(refused);
                    }
                    // The server answers. It may be starting, or have no room at the moment.
                    cause => acquiring.await.map_err(|error| match (error, cause) {
                        (sqlx::Error::PoolTimedOut, Some(cause)) => cause,
                        (error, _) => error,
                    }),
                },
            },
        };
        if acquired.is_ok() {
            self.away.store(false, Ordering::Relaxed);
        }
        acquired
    }
}

/// Why a connection outside the pool can't be made, or `None` if it can.
async fn failure(options: &PgConnectOptions) -> Option<sqlx::Error> {
    match PgConnection::connect_with(options).await {
        Ok(connection) => {
            // Closed politely, or the server would log a lost client.
            let _ = connection.close().await;
            None
        }
        Err(error) => Some(error),
    }
}

fn is_refused(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused)
}

/// Adds the server's address to an error of the connection.
pub(crate) fn located(error: sqlx::Error, options: &PgConnectOptions) -> sqlx::Error {
    let (kind, text) = match error {
        sqlx::Error::Io(error) => match error.kind() {
            // Without the number that the operating system gives it.
            kind @ (ErrorKind::ConnectionRefused | ErrorKind::TimedOut) => (kind, kind.to_string()),
            kind => (kind, error.to_string()),
        },
        sqlx::Error::PoolTimedOut => {
            let text = format!("no connection within {} s", ACQUIRE_TIMEOUT.as_secs());
            (ErrorKind::TimedOut, text)
        }
        other => return other,
    };
    let server = server(options);
    sqlx::Error::Io(IoError::new(kind, format!("{text} ({server})")))
}

/// Host and port, or the directory of the socket and the port.
fn server(options: &PgConnectOptions) -> String {
    let port = options.get_port();
    match options.get_socket() {
        Some(socket) => format!("{}:{port}", socket.display()),
        None if options.get_host().contains(':') => format!("[{}]:{port}", options.get_host()),
        None => format!("{}:{port}", options.get_host()),
    }
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use std::time::Instant;

    use sqlx::postgres::PgPoolOptions;
    use tokio::net::TcpListener;

    use super::*;
    use crate::testkit::{Postgres, TestDatabase};

    fn shown(error: &sqlx::Error) -> String {
        match error {
            sqlx::Error::Io(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    /// A port on which no server listens, and a pool of connections to it.
    async fn away(database: &TestDatabase) -> (u16, PgPool) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let options = database.options().host("127.0.0.1").port(port);
        let pool = PgPoolOptions::new()
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(options);
        (port, pool)
    }

    #[tokio::test]
    async fn a_long_refusal_is_told_at_once_until_the_server_is_back() {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        let (port, pool) = away(&database).await;
        let connector = Connector::default();
        let began = Instant::now();
        let error = connector.connect(&pool).await.unwrap_err();
        let took = began.elapsed();
        assert_eq!(
            shown(&error),
            format!("connection refused (127.0.0.1:{port})")
        );
        assert!((PATIENCE..ACQUIRE_TIMEOUT).contains(&took), "{took:?}");
        let began = Instant::now();
        assert!(is_refused(&connector.connect(&pool).await.unwrap_err()));
        assert!(began.elapsed() < PATIENCE);

        pool.set_connect_options(database.options());
        drop(connector.connect(&pool).await.unwrap());
        assert!(!connector.away.load(Ordering::Relaxed));
        pool.close().await;
        let closed = connector.connect(&pool).await.unwrap_err();
        assert!(matches!(closed, sqlx::Error::PoolClosed), "{closed:?}");
    }

    #[tokio::test]
    async fn a_short_refusal_does_not_show() {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        let (_, pool) = away(&database).await;
        let connector = Connector::default();
        let back = async {
            tokio::time::sleep(PATIENCE / 2).await;
            pool.set_connect_options(database.options());
        };
        let (connected, ()) = tokio::join!(connector.connect(&pool), back);
        connected.unwrap();
    }

    #[tokio::test]
    async fn a_server_that_does_not_answer_is_named() {
        let silent = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = silent.local_addr().unwrap().port();
        let options = PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(port)
            .password("hunter2");
        let pool = PgPoolOptions::new()
            .acquire_timeout(PATIENCE + Duration::from_millis(100))
            .connect_lazy_with(options);
        let error = Connector::default().connect(&pool).await.unwrap_err();
        assert_eq!(
            shown(&error),
            format!("no connection within 5 s (127.0.0.1:{port})")
        );
    }
}
