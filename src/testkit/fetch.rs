//! The last resort: server binaries downloaded into the user's cache. Just the binaries; they are
//! then run like installed ones, so that a cluster is cleaned up, and root provided for, the same
//! way wherever its Postgres came from.

use std::path::PathBuf;
use std::time::Duration;

use postgresql_embedded::{PostgreSQL, Settings};

use super::run_as::RunAs;

/// Long enough for some 20 MB over a slow line.
const DEADLINE: Duration = Duration::from_secs(300);

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// The directory of the downloaded binaries, which may be there from an earlier time.
pub(super) async fn fetch(run_as: RunAs) -> Result<PathBuf, Cause> {
    tracing::info!("no installed Postgres was found: downloading one");
    // Making the settings makes two directories, which are kept unless someone removes them.
    let mut settings = Settings::new();
    let data = Scrap(settings.data_dir.clone());
    let password = Scrap(settings.password_file.clone());
    if let Some(dir) = run_as.installation_dir() {
        settings.installation_dir = dir;
    }
    // `setup` installs, then runs `initdb` unless it sees an initialised directory. Let it see one.
    std::fs::write(data.0.join("postgresql.conf"), "")?;

    let mut postgres = PostgreSQL::new(settings);
    tokio::time::timeout(DEADLINE, postgres.setup())
        .await
        .map_err(|_| format!("not done after {} s", DEADLINE.as_secs()))??;
    drop((data, password));
    #[cfg(unix)]
    open_to_others(&run_as, &postgres.settings().installation_dir)?;
    Ok(postgres.settings().binary_dir())
}

/// The archive is unpacked in a temporary directory, renamed when it's complete, and so still closed
/// to all but its owner.
#[cfg(unix)]
fn open_to_others(run_as: &RunAs, installation: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;

    if run_as.installation_dir().is_none() {
        return Ok(());
    }
    std::fs::set_permissions(installation, std::fs::Permissions::from_mode(0o755))
}

/// What the settings put on disk: a directory, or a file in a directory of its own.
struct Scrap(PathBuf);

impl Drop for Scrap {
    fn drop(&mut self) {
        let temp = std::env::temp_dir();
        let dir = if self.0.is_dir() {
            Some(self.0.as_path())
        } else {
            self.0.parent()
        };
        // Only where it was made by `tempfile`; the settings fall back on the current directory.
        if let Some(dir) = dir.filter(|dir| dir.parent() == Some(temp.as_path())) {
            let _ = std::fs::remove_file(dir.join("postgresql.conf"));
            let _ = std::fs::remove_dir(dir);
        }
    }
}
