//! Runs a cluster under a shell that outlives this process. A handle in a `static` is never dropped,
//! and nothing in a process can run after `SIGKILL`; a pipe whose other end closes is noticed either
//! way.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use tokio::sync::watch;

use super::cluster::StopMode;
use super::run_as::RunAs;

const SCRIPT: &str = include_str!("supervise.sh");

/// How long a drop waits for the cleaning, which goes on without it if need be.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Control {
    /// `None` only while dropping.
    orders: Mutex<Option<ChildStdin>>,
    progress: watch::Receiver<Progress>,
    /// Disconnected when the supervisor has exited and been reaped.
    exited: Mutex<mpsc::Receiver<()>>,
    dir: PathBuf,
}

#[derive(Debug, Default)]
struct Progress {
    prepared: bool,
    /// Counted rather than flagged: a server can start and end between two looks.
    ended: u64,
    complaints: Vec<String>,
    gone: bool,
}

impl Control {
    /// Begins to make a cluster in `dir`, which must not exist yet.
    pub(super) fn new(
        bin: &Path,
        dir: &Path,
        settings: &[(String, String)],
        run_as: &RunAs,
    ) -> io::Result<Self> {
        let mut child =
            run_as
                .command("/bin/sh")
                .args(["-c", SCRIPT, "requeuest-testkit"])
                .args([dir.as_os_str(), bin.as_os_str()])
                .args(settings.iter().flat_map(|(name, value)| {
                    [OsString::from("-c"), format!("{name}={value}").into()]
                }))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .process_group(0)
                .spawn()?;
        let orders = child.stdin.take();
        let stdout = child.stdout.take();
        let (report, progress) = watch::channel(Progress::default());
        let (alive, exited) = mpsc::channel::<()>();
        // A thread, not a task: a task would end with the runtime of the test that came first.
        thread::Builder::new()
            .name("requeuest-testkit".to_owned())
            .spawn(move || {
                let _alive = alive;
                for line in stdout
                    .into_iter()
                    .flat_map(|out| BufReader::new(out).lines())
                {
                    let Ok(line) = line else { break };
                    report.send_modify(|progress| progress.note(line));
                }
                // Reaps the shell: no zombie stays, even if nobody waits for the drop.
                let _ = child.wait();
                report.send_modify(|progress| progress.gone = true);
            })?;
        Ok(Self {
            orders: Mutex::new(orders),
            progress,
            exited: Mutex::new(exited),
            dir: dir.to_path_buf(),
        })
    }

    /// Waits until the cluster is made.
    pub(super) async fn prepared(&self) -> Result<(), String> {
        let mut progress = self.progress.clone();
        let seen = progress
            .wait_for(|now| now.prepared || now.gone || !now.complaints.is_empty())
            .await;
        match seen {
            Ok(now) if now.prepared => Ok(()),
            Ok(now) => Err(now.complaints.join("; ")),
            Err(_) => Err("the supervisor is gone".to_owned()),
        }
    }

    /// Begins a run of the server; only when none is under way. Returns its number.
    pub(super) fn start(&self, port: u16) -> io::Result<Run> {
        let run = Run(self.progress.borrow().ended + 1);
        self.order(&format!("start {port}"))?;
        Ok(run)
    }

    /// Tells the server to stop.
    pub(super) fn stop(&self, mode: StopMode) -> io::Result<()> {
        self.order(match mode {
            StopMode::Fast => "kill INT",
            StopMode::Immediate => "kill QUIT",
        })
    }

    /// Waits until no process of that run is left.
    pub(super) async fn ended(&self, run: Run) {
        let mut progress = self.progress.clone();
        let _ = progress
            .wait_for(|now| now.gone || now.ended >= run.0)
            .await;
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn order(&self, line: &str) -> io::Result<()> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        match orders.as_mut() {
            Some(orders) => orders.write_all(format!("{line}\n").as_bytes()),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// One run of the server, from a start to its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run(u64);

impl Progress {
    fn note(&mut self, line: String) {
        match line.as_str() {
            "prepared" => self.prepared = true,
            "ended" => self.ended += 1,
            _ => self.complaints.push(line),
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let orders = self
            .orders
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        drop(orders.take());
        let exited = self
            .exited
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if exited.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("a test cluster is slow to stop; it is left to its supervisor");
        }
    }
}
