//! Downloads server binaries into the user's cache, as a last resort. Only the binaries come from
//! there: they run like installed ones, so cleanup and running as root work the same way for every
//! Postgres.

use std::path::PathBuf;
use std::time::Duration;

use postgresql_embedded::{PostgreSQL, Settings};

use super::run_as::RunAs;

/// Long enough for about 20 MB over a slow connection.
const DEADLINE: Duration = Duration::from_secs(300);

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// The directory of the downloaded binaries. An earlier call may have downloaded them.
pub(super) async fn fetch(run_as: RunAs) -> Result<PathBuf, Cause> {
    tracing::info!("no installed Postgres was found; downloading one");
    // Making the settings creates two directories, which stay until they are removed here.
    let mut settings = Settings::new();
    let data = Leftover(settings.data_dir.clone());
    let password = Leftover(settings.password_file.clone());
    if let Some(dir) = run_as.installation_dir() {
        settings.installation_dir = dir;
    }
    // `setup` installs, then runs `initdb` unless it sees an initialised directory. This makes the
    // directory look initialised.
    std::fs::write(data.0.join("postgresql.conf"), "")?;

    let mut postgres = PostgreSQL::new(settings);
    tokio::time::timeout(DEADLINE, postgres.setup())
        .await
        .map_err(|_| format!("the download took longer than {} s", DEADLINE.as_secs()))??;
    drop((data, password));
    #[cfg(unix)]
    open_to_others(&run_as, &postgres.settings().installation_dir)?;
    Ok(postgres.settings().binary_dir())
}

/// Opens the installation to other users. The archive is unpacked in a temporary directory and then
/// renamed, so only its owner can read it.
#[cfg(unix)]
fn open_to_others(run_as: &RunAs, installation: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;

    if run_as.installation_dir().is_none() {
        return Ok(());
    }
    std::fs::set_permissions(installation, std::fs::Permissions::from_mode(0o755))
}

/// A path that the settings created: a directory, or a file in its own directory.
struct Leftover(PathBuf);

impl Drop for Leftover {
    fn drop(&mut self) {
        let temp = std::env::temp_dir();
        let dir = if self.0.is_dir() {
            Some(self.0.as_path())
        } else {
            self.0.parent()
        };
        // Only remove directories that `tempfile` made: the settings fall back on the current
        // directory.
        if let Some(dir) = dir.filter(|dir| dir.parent() == Some(temp.as_path())) {
            let _ = std::fs::remove_file(dir.join("postgresql.conf"));
            let _ = std::fs::remove_dir(dir);
        }
    }
}
