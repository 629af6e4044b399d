//! Runs a cluster with `pg_ctl`, on systems without a shell to supervise it. On Windows, `pg_ctl`
//! also drops administrator rights, with which Postgres refuses to run.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::cluster::StopMode;
use super::run_as::RunAs;

const POLL: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Control {
    dir: TempDir,
    bin: PathBuf,
    settings: String,
}

impl Control {
    /// Begins to make a cluster in `dir`, which must not exist yet.
    pub(super) fn new(
        bin: &Path,
        dir: &Path,
        settings: &[(String, String)],
        _run_as: &RunAs,
    ) -> io::Result<Self> {
        let parent = dir.parent().unwrap_or(Path::new("."));
        let name = dir.file_name().unwrap_or_default();
        let dir = tempfile::Builder::new().prefix(name).tempdir_in(parent)?;
        let mut lines = String::new();
        for (name, value) in settings {
            let value = value.replace('\\', r"\\").replace('\'', "''");
            let _ = writeln!(lines, "{name} = '{value}'");
        }
        Ok(Self {
            dir,
            bin: bin.to_path_buf(),
            settings: lines,
        })
    }

    /// Runs `initdb` and writes the settings.
    pub(super) async fn prepared(&self) -> Result<(), String> {
        let mut initdb = Command::new(self.bin.join("initdb"));
        initdb
            .args(["--no-sync", "-A", "trust", "-U", "postgres", "-E", "UTF8"])
            .arg("--locale=C")
            .arg("-D")
            .arg(self.data());
        match self.quietly(initdb).await {
            Ok(true) => {}
            Ok(false) => return Err("initdb failed".to_owned()),
            Err(error) => return Err(format!("initdb can't be run: {error}")),
        }
        OpenOptions::new()
            .append(true)
            .open(self.data().join("postgresql.conf"))
            .and_then(|mut file| file.write_all(self.settings.as_bytes()))
            .map_err(|error| format!("postgresql.conf can't be written: {error}"))
    }

    /// Begins a run of the server. Call it only if no run is in progress.
    pub(super) fn start(&self, port: u16) -> io::Result<Run> {
        // Wait for `pg_ctl`: until it returns, a server that hasn't started looks like one that has
        // ended.
        let mut pg_ctl = self.pg_ctl("start");
        pg_ctl.arg("-w").arg("-o").arg(format!("-p {port}"));
        pg_ctl.arg("-l").arg(self.dir().join("log"));
        pg_ctl.status().map(|_| Run(()))
    }

    /// Tells the server to stop.
    pub(super) fn stop(&self, mode: StopMode) -> io::Result<()> {
        let mode = match mode {
            StopMode::Fast => "fast",
            StopMode::Immediate => "immediate",
        };
        self.pg_ctl("stop").args(["-W", "-m", mode]).status()?;
        Ok(())
    }

    /// Waits until that run has ended.
    pub(super) async fn ended(&self, _run: Run) {
        while self.pg_ctl("status").status().is_ok_and(|it| it.success()) {
            tokio::time::sleep(POLL).await;
        }
    }

    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn data(&self) -> PathBuf {
        self.dir().join("data")
    }

    /// Output must not go to a pipe: the server would inherit the pipe and keep its reader waiting.
    fn pg_ctl(&self, action: &str) -> Command {
        let mut command = Command::new(self.bin.join("pg_ctl"));
        command
            .arg(action)
            .arg("-D")
            .arg(self.data())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// Runs a command on a blocking thread, with its output in the log.
    async fn quietly(&self, mut command: Command) -> io::Result<bool> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir().join("log"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let status = tokio::task::spawn_blocking(move || command.status())
            .await
            .map_err(io::Error::other)??;
        Ok(status.success())
    }
}

/// One run of the server, from a start to its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run(());

impl Drop for Control {
    fn drop(&mut self) {
        // This waits for a bounded time, because the directory can't be removed while its files are
        // open.
        let _ = self
            .pg_ctl("stop")
            .args(["-w", "-t", "5", "-m", "immediate"])
            .status();
    }
}
