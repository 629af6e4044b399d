//! Runs a cluster under a shell that outlives this process. A handle in a `static` is never
//! dropped, and no code of a process runs after `SIGKILL`, but in both cases the pipe to the shell
//! closes, and the shell notices.

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

/// How long a drop waits for the cleanup. After that the cleanup continues in the background.
const CLEANUP_WAIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Control {
    /// `None` only during drop.
    orders: Mutex<Option<ChildStdin>>,
    progress: watch::Receiver<Progress>,
    /// Disconnected once the supervisor has exited and been reaped.
    exited: Mutex<mpsc::Receiver<()>>,
    dir: PathBuf,
}

#[derive(Debug, Default)]
struct Progress {
    prepared: bool,
    /// A count, not a flag: a server can start and end between two reads.
    ended: u64,
    errors: Vec<String>,
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
        // A thread, not a task: a task would end with the runtime of the test that started it.
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
                // Reaps the shell, so that no zombie is left, even if the drop doesn't wait for it.
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

    /// Waits until the cluster has been made.
    pub(super) async fn prepared(&self) -> Result<(), String> {
        let mut progress = self.progress.clone();
        let seen = progress
            .wait_for(|now| now.prepared || now.gone || !now.errors.is_empty())
            .await;
        match seen {
            Ok(now) if now.prepared => Ok(()),
            Ok(now) => Err(now.errors.join("; ")),
            Err(_) => Err("the supervising shell has ended".to_owned()),
        }
    }

    /// Begins a run of the server, and returns its number. Call it only if no run is in progress.
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

    /// Waits until all processes of that run have ended.
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
            _ => self.errors.push(line),
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
        if exited.recv_timeout(CLEANUP_WAIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("a test cluster is slow to stop; its supervisor will remove it");
        }
    }
}
