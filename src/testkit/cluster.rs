//! A private cluster: made for one test process, with its own port, and removed with its last
//! handle.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::Error;
use super::control::{Control, Run};
use super::run_as::RunAs;

/// The limit for one start of the server, on a machine that is busy with other tests.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// The limit for one stop. A fast stop writes a checkpoint first.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// The limit for one attempt to connect. Another program may listen on the port and never answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);
/// Another program may take a port between the check that it is free and the start of the server.
const PORTS_TRIED: u32 = 3;
/// How many lines of the log an error quotes.
const LOG_LINES: usize = 20;

/// How [`Postgres::stop`](super::Postgres::stop) ends the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopMode {
    /// Rolls back transactions, disconnects clients and writes everything out, as an operator's
    /// restart does.
    Fast,
    /// All processes quit at once and the next start recovers from the log, as after a crash.
    /// Committed transactions survive.
    Immediate,
}

pub(super) struct Cluster {
    control: Control,
    name: String,
    port: u16,
    /// The current run. Locked while starting and stopping, so that these don't overlap.
    run: Mutex<Option<Run>>,
}

impl Cluster {
    /// Makes a cluster and starts its server.
    pub(super) async fn launch(
        bin: &Path,
        run_as: &RunAs,
        settings: &[(String, String)],
    ) -> Result<Self, Error> {
        let name = format!("requeuest-{}", Uuid::now_v7().simple());
        let control = Control::new(
            bin,
            &run_as.temp_dir().join(&name),
            &all_settings(&name, settings),
            run_as,
        )
        .map_err(|error| Error::new("making the cluster failed").caused_by(error))?;
        if let Err(why) = control.prepared().await {
            return Err(failed(
                &control,
                &format!("making the cluster failed: {why}"),
            ));
        }
        let mut cluster = Self {
            control,
            name,
            port: 0,
            run: Mutex::new(None),
        };
        for _ in 0..PORTS_TRIED {
            cluster.port = free_port()
                .map_err(|error| Error::new("finding a free port failed").caused_by(error))?;
            let run = cluster.start()?;
            if cluster.answering(run).await? {
                *cluster.run.get_mut() = Some(run);
                return Ok(cluster);
            }
        }
        Err(failed(&cluster.control, "the server ended while starting"))
    }

    /// Stops the server. Does nothing if it is already stopped.
    pub(super) async fn stop(&self, mode: StopMode) -> Result<(), Error> {
        let mut run = self.run.lock().await;
        self.end(&mut run, mode).await
    }

    /// Starts the server again. Does nothing if it is running.
    pub(super) async fn resume(&self) -> Result<(), Error> {
        let mut run = self.run.lock().await;
        self.begin(&mut run).await
    }

    /// Stops and starts the server, with no other call in between.
    pub(super) async fn restart(&self, mode: StopMode) -> Result<(), Error> {
        let mut run = self.run.lock().await;
        self.end(&mut run, mode).await?;
        self.begin(&mut run).await
    }

    async fn end(&self, run: &mut Option<Run>, mode: StopMode) -> Result<(), Error> {
        let Some(number) = *run else { return Ok(()) };
        self.control.stop(mode).map_err(|error| {
            failed(&self.control, "the server can't be stopped").caused_by(error)
        })?;
        if timeout(STOP_DEADLINE, self.control.ended(number))
            .await
            .is_err()
        {
            return Err(failed(&self.control, "the server did not stop in time"));
        }
        // Cleared only now, so that a caller that gave up halfway can call again.
        *run = None;
        Ok(())
    }

    async fn begin(&self, run: &mut Option<Run>) -> Result<(), Error> {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            // Stored before the wait, so that a caller that gives up can call again.
            let number = match *run {
                Some(number) => number,
                None => *run.insert(self.start()?),
            };
            if self.answering(number).await? {
                return Ok(());
            }
            *run = None;
            // Clients know the port, so wait until it is free instead of choosing another one.
            if Instant::now() > deadline {
                return Err(failed(
                    &self.control,
                    "the server did not start again in time",
                ));
            }
            sleep(10 * PAUSE).await;
        }
    }

    fn start(&self) -> Result<Run, Error> {
        self.control
            .start(self.port)
            .map_err(|error| failed(&self.control, "the server can't be started").caused_by(error))
    }

    /// Waits until the server answers. Returns `false` if the server ends instead.
    async fn answering(&self, run: Run) -> Result<bool, Error> {
        let answered = async {
            while !matches!(timeout(CONNECT_TIMEOUT, self.answers()).await, Ok(Ok(true))) {
                sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = self.control.ended(run) => Ok(false),
            answered = timeout(START_DEADLINE, answered) => match answered {
                Ok(()) => Ok(true),
                Err(_) => Err(failed(
                    &self.control,
                    &format!("the server did not answer within {} s", START_DEADLINE.as_secs()),
                )),
            },
        }
    }

    /// Whether this server answers, not another one that took the port first.
    async fn answers(&self) -> Result<bool, sqlx::Error> {
        let mut connection = self.options().connect().await?;
        let name: String = sqlx::query_scalar("show cluster_name")
            .fetch_one(&mut connection)
            .await?;
        connection.close().await?;
        Ok(name == self.name)
    }

    pub(super) fn options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(self.port)
            .username("postgres")
            .database("postgres")
            .ssl_mode(PgSslMode::Disable)
    }

    pub(super) fn url(&self, database: &str) -> String {
        // `sslmode` is set explicitly, so that a `PGSSLMODE` meant for other servers has no effect.
        format!(
            "postgres://postgres@127.0.0.1:{}/{database}?sslmode=disable",
            self.port
        )
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("dir", &self.control.dir())
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

/// The server takes the last value of a setting. So the order is: defaults that a caller may
/// change, then the caller's own settings, then the settings that the cluster relies on.
fn all_settings(name: &str, settings: &[(String, String)]) -> Vec<(String, String)> {
    let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let mut all: Vec<_> = [("fsync", "off"), ("max_connections", "200")]
        .map(own)
        .into();
    all.extend_from_slice(settings);
    all.extend(
        [
            ("listen_addresses", "127.0.0.1"),
            ("unix_socket_directories", ""),
            ("logging_collector", "off"),
            ("cluster_name", name),
        ]
        .map(own),
    );
    all
}

/// Picks a port below the range of outgoing connections. A port in that range could be taken while
/// the server is stopped, even by a client that connects to itself.
fn free_port() -> io::Result<u16> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..100 {
        // The last bits of a UUID are random.
        let [.., high, low] = Uuid::now_v7().into_bytes();
        let port = 20_000 + u16::from_be_bytes([high, low]) % 12_000;
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(_) => return Ok(port),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// An error with the end of the server's log, which contains the reason.
fn failed(control: &Control, what: &str) -> Error {
    let path: PathBuf = control.dir().join("log");
    let Ok(log) = std::fs::read(path) else {
        return Error::new(what);
    };
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().collect();
    let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
    Error::new(format!("{what}; the end of its log:\n{}", tail.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_can_replace_defaults_but_not_required_settings() {
        let given = [("fsync", "on"), ("cluster_name", "mine")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let all = all_settings("ours", &given);
        let last = |wanted| {
            let found = all.iter().rfind(|(name, _)| name == wanted);
            found.map(|(_, value)| value.as_str())
        };
        assert_eq!(last("fsync"), Some("on"));
        assert_eq!(last("max_connections"), Some("200"));
        assert_eq!(last("cluster_name"), Some("ours"));
    }
}
