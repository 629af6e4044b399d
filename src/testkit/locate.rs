//! Finds installed server binaries. Most Linux distributions put them outside `PATH`, so the usual
//! places are searched too. A directory counts only if its `postgres` runs.

use std::env;
use std::ffi::OsString;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Error;
use super::run_as::RunAs;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why nothing was downloaded.
#[cfg(any(test, not(feature = "testkit-download")))]
pub(super) const NO_DOWNLOAD: &str =
    "needs requeuest's feature `testkit-download`, which is not enabled";

/// Everything that the search reads from its environment. It is an argument, so that tests can
/// replace it.
#[derive(Clone, Debug)]
pub(super) struct Environment {
    pub(super) path: Option<OsString>,
    pub(super) places: Vec<Place>,
}

/// The directories `{parent}/{prefix}*/bin`.
#[derive(Clone, Debug)]
pub(super) struct Place {
    parent: PathBuf,
    prefix: &'static str,
}

impl Environment {
    pub(super) fn current() -> Self {
        let place = |parent: &str, prefix| Place {
            parent: PathBuf::from(parent),
            prefix,
        };
        let mut places = vec![
            place("/usr/lib/postgresql", ""),
            place("/usr", "pgsql-"),
            place("/usr/lib", "postgresql"),
            place("/usr/libexec", "postgresql"),
            place("/opt/homebrew/opt", "postgresql"),
            place("/usr/local/opt", "postgresql"),
            place("/Applications/Postgres.app/Contents/Versions", ""),
        ];
        if let Some(programs) = env::var_os("ProgramFiles") {
            places.push(Place {
                parent: PathBuf::from(programs).join("PostgreSQL"),
                prefix: "",
            });
        }
        Self {
            path: env::var_os("PATH"),
            places,
        }
    }
}

/// The directory of the binaries to use: an installed one, or the one that `fetch` provides.
pub(super) async fn binaries<F>(
    environment: Environment,
    run_as: RunAs,
    fetch: F,
) -> Result<PathBuf, Error>
where
    F: Future<Output = Result<PathBuf, Cause>>,
{
    let user = run_as.clone();
    let mut tried = match blocking(move || installed(&environment, &user)).await? {
        Ok(found) => return Ok(found),
        Err(tried) => tried,
    };
    let cause = match fetch.await {
        Ok(fetched) => {
            let dir = fetched.clone();
            match blocking(move || check(&dir, &run_as)).await? {
                Ok(()) => return Ok(fetched),
                Err(why) => why.into(),
            }
        }
        Err(cause) => cause,
    };
    tried.push(format!("a download of the binaries: {cause}"));
    Err(Error::new(format!(
        "no Postgres was found to test with. Tried:\n- {}\nInstall one \
         (`apt-get install postgresql`, `dnf install postgresql-server`, \
         `brew install postgresql`), or set DATABASE_URL to a server in which databases may be \
         created",
        tried.join("\n- ")
    ))
    .caused_by(cause))
}

/// The given directory, if Postgres runs from it.
pub(super) async fn from_dir(dir: PathBuf, run_as: RunAs) -> Result<PathBuf, Error> {
    blocking(move || {
        let absolute = std::path::absolute(&dir).unwrap_or(dir);
        match check(&absolute, &run_as) {
            Ok(()) => Ok(absolute),
            Err(why) => Err(Error::new(format!(
                "Postgres can't be run from the directory given as `bin_dir`: {why}"
            ))),
        }
    })
    .await?
}

/// The first directory from which Postgres runs, or the list of what was tried.
fn installed(environment: &Environment, run_as: &RunAs) -> Result<PathBuf, Vec<String>> {
    let mut tried = vec![
        "DATABASE_URL: not set, or ignored because a private cluster was requested".to_owned(),
    ];
    let mut checked: Vec<PathBuf> = Vec::new();
    for (origin, candidates) in candidates(environment) {
        let mut found = false;
        for dir in candidates {
            if checked.contains(&dir) {
                continue;
            }
            found = true;
            match check(&dir, run_as) {
                Ok(()) => {
                    tracing::debug!(dir = %dir.display(), %origin, "found a Postgres");
                    return Ok(dir);
                }
                Err(why) => tried.push(format!("{origin}: {why}")),
            }
            checked.push(dir);
        }
        if !found {
            tried.push(format!(
                "{origin}: no directory with `initdb` and `postgres`"
            ));
        }
    }
    Err(tried)
}

/// Where binaries may be, with the most deliberate choice first.
fn candidates(environment: &Environment) -> Vec<(String, Vec<PathBuf>)> {
    let path: Vec<PathBuf> = environment
        .path
        .iter()
        .flat_map(env::split_paths)
        .filter(|dir| dir.is_absolute())
        .collect();
    let mut all = vec![
        (
            "PATH".to_owned(),
            path.iter().filter_map(|dir| server_dir(dir)).collect(),
        ),
        (
            "pg_config --bindir".to_owned(),
            path.iter()
                .find_map(|dir| configured(&dir.join(executable("pg_config"))))
                .and_then(|dir| server_dir(&dir))
                .into_iter()
                .collect(),
        ),
    ];
    for place in &environment.places {
        let pattern = place.parent.join(format!("{}*", place.prefix)).join("bin");
        let found = place.newest_first();
        all.push((
            pattern.display().to_string(),
            found.iter().filter_map(|dir| server_dir(dir)).collect(),
        ));
    }
    all
}

impl Place {
    fn newest_first(&self) -> Vec<PathBuf> {
        let Ok(entries) = self.parent.read_dir() else {
            return Vec::new();
        };
        let mut found: Vec<(u32, PathBuf)> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| {
                let name = entry.file_name();
                let rest = name.to_str()?.strip_prefix(self.prefix)?;
                Some((major(rest), entry.path().join("bin")))
            })
            .collect();
        found.sort_by(|one, other| other.cmp(one));
        found.into_iter().map(|(_, dir)| dir).collect()
    }
}

/// Parses 16 from `16`, `@16` or `16.2`. Returns 0 if there is no number, so that names with a
/// version come first.
fn major(text: &str) -> u32 {
    let digits: String = text
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().unwrap_or(0)
}

/// The directory that contains the server's binaries. Distributions link `initdb` from elsewhere.
fn server_dir(dir: &Path) -> Option<PathBuf> {
    let complete = |dir: &Path| {
        ["initdb", "postgres"]
            .iter()
            .all(|name| dir.join(executable(name)).is_file())
    };
    if complete(dir) {
        return Some(dir.to_path_buf());
    }
    let real = dir.join(executable("initdb")).canonicalize().ok()?;
    let parent = real.parent()?;
    complete(parent).then(|| parent.to_path_buf())
}

fn configured(pg_config: &Path) -> Option<PathBuf> {
    let output = Command::new(pg_config)
        .arg("--bindir")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let dir = String::from_utf8(output.stdout).ok()?;
    (output.status.success()).then(|| PathBuf::from(dir.trim()))
}

/// Runs `postgres --version` as the user that will run the server. An installation in a home
/// directory, or for another processor, may exist and still be unusable.
fn check(dir: &Path, run_as: &RunAs) -> Result<(), String> {
    let missing = ["initdb", "postgres"]
        .iter()
        .find(|name| !dir.join(executable(name)).is_file());
    if let Some(name) = missing {
        return Err(format!("{} has no `{name}`", dir.display()));
    }
    let program = dir.join(executable("postgres"));
    let by = run_as
        .describe()
        .map_or_else(String::new, |user| format!(" as the user `{user}`"));
    let output = run_as
        .command(&program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{} can't be run{by}: {error}", program.display()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!(
            "{} can't be run{by}: {}",
            program.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}

fn executable(name: &str) -> String {
    format!("{name}{}", env::consts::EXE_SUFFIX)
}

/// Runs programs and reads directories on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::new("the search for a Postgres was interrupted").caused_by(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nowhere() -> Environment {
        Environment {
            path: None,
            places: vec![Place {
                parent: PathBuf::from("/nonexistent"),
                prefix: "postgresql",
            }],
        }
    }

    #[tokio::test]
    async fn the_error_says_what_was_tried_and_what_to_install() {
        let run_as = RunAs::detect().unwrap();
        let error = binaries(nowhere(), run_as, async { Err("no route to host".into()) })
            .await
            .unwrap_err();
        let message = error.to_string();
        for part in [
            "DATABASE_URL",
            "PATH",
            "pg_config --bindir",
            "postgresql*",
            "a download of the binaries: no route to host",
            "apt-get install postgresql",
            "brew install postgresql",
        ] {
            assert!(message.contains(part), "{part:?} is not in: {message}");
        }
        let cause = std::error::Error::source(&error).unwrap();
        assert_eq!(cause.to_string(), "no route to host");
    }

    #[tokio::test]
    async fn without_the_downloader_the_error_names_its_feature() {
        let run_as = RunAs::detect().unwrap();
        let error = binaries(nowhere(), run_as, async { Err(NO_DOWNLOAD.into()) })
            .await
            .unwrap_err();
        let message = error.to_string();
        for part in [
            "postgresql*",
            "a download of the binaries: needs requeuest's feature `testkit-download`",
            "set DATABASE_URL",
        ] {
            assert!(message.contains(part), "{part:?} is not in: {message}");
        }
    }

    #[tokio::test]
    async fn a_download_without_binaries_is_an_error() {
        let run_as = RunAs::detect().unwrap();
        let error = binaries(nowhere(), run_as, async { Ok("/nonexistent/bin".into()) })
            .await
            .unwrap_err();
        assert!(error.to_string().contains("has no `initdb`"), "{error}");
    }

    #[tokio::test]
    async fn installed_binaries_are_preferred_to_a_download() {
        let run_as = RunAs::detect().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("postgresql@16").join("bin");
        std::fs::create_dir_all(&bin).unwrap();
        for name in ["initdb", "postgres"] {
            std::fs::write(bin.join(executable(name)), "").unwrap();
        }
        let environment = Environment {
            path: None,
            places: vec![Place {
                parent: dir.path().to_path_buf(),
                prefix: "postgresql",
            }],
        };
        assert_eq!(candidates(&environment)[2].1, [bin]);
        // The files can't be executed, so the search reports that and continues.
        let tried = installed(&environment, &run_as).unwrap_err();
        assert!(
            tried.iter().any(|line| line.contains("can't be run")),
            "{tried:?}"
        );
    }

    #[test]
    fn the_newest_major_version_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["9.6", "15", "17", "16", "doc"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let place = Place {
            parent: dir.path().to_path_buf(),
            prefix: "",
        };
        let names: Vec<_> = place
            .newest_first()
            .iter()
            .map(|bin| bin.parent().unwrap().file_name().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["17", "16", "15", "9.6", "doc"]);
    }
}
