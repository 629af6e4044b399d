//! The user that runs Postgres. Postgres refuses to run as root, but tests in containers mostly do.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

use super::Error;

#[derive(Clone, Debug)]
pub(super) struct RunAs {
    #[cfg(unix)]
    user: Option<User>,
}

#[cfg(unix)]
#[derive(Clone, Debug, PartialEq)]
struct User {
    name: String,
    uid: u32,
    gid: u32,
}

#[cfg(unix)]
impl RunAs {
    pub(super) fn detect() -> Result<Self, Error> {
        use std::os::unix::fs::MetadataExt;

        // std can't tell the effective user, but that user owns the files that it creates.
        let owner = tempfile::tempfile()
            .and_then(|file| file.metadata())
            .map_err(|error| {
                let temp = std::env::temp_dir();
                Error::new(format!("no file can be created in {}", temp.display())).caused_by(error)
            })?
            .uid();
        if owner != 0 {
            return Ok(Self { user: None });
        }
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let user = unprivileged(&passwd).ok_or_else(|| {
            Error::new(
                "Postgres refuses to run as root, and /etc/passwd has neither a user `postgres` \
                 nor `nobody` to run it as: add one, or set DATABASE_URL",
            )
        })?;
        Ok(Self { user: Some(user) })
    }

    /// A command that runs as the user, in a directory that this user can enter.
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        use std::os::unix::process::CommandExt;

        let mut command = Command::new(program);
        if let Some(user) = &self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command.current_dir("/");
        command
    }

    /// A directory in which that user can create a cluster.
    pub(super) fn temp_dir(&self) -> PathBuf {
        let temp = std::env::temp_dir();
        let temp = std::path::absolute(&temp).unwrap_or(temp);
        if self.user.is_none() {
            return temp;
        }
        let accessible = self
            .command("/bin/sh")
            .args(["-c", r#"cd "$1" && test -w ."#, "sh"])
            .arg(&temp)
            .stdin(std::process::Stdio::null())
            .output()
            .is_ok_and(|output| output.status.success());
        if accessible {
            temp
        } else {
            PathBuf::from("/tmp")
        }
    }

    /// Where to download to for that user, if the home directory is unsuitable: other users can't
    /// read root's.
    #[cfg(feature = "testkit-download")]
    pub(super) fn installation_dir(&self) -> Option<PathBuf> {
        // Not in /tmp, where any user could plant a program in advance.
        self.user
            .as_ref()
            .map(|_| PathBuf::from("/var/cache/requeuest-testkit/postgresql"))
    }

    pub(super) fn describe(&self) -> Option<&str> {
        self.user.as_ref().map(|user| user.name.as_str())
    }
}

#[cfg(not(unix))]
impl RunAs {
    #[expect(
        clippy::unnecessary_wraps,
        reason = "the signature is the same as on Unix"
    )]
    pub(super) fn detect() -> Result<Self, Error> {
        Ok(Self {})
    }

    #[expect(clippy::unused_self, reason = "the signature is the same as on Unix")]
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        Command::new(program)
    }

    #[expect(clippy::unused_self, reason = "the signature is the same as on Unix")]
    pub(super) fn temp_dir(&self) -> PathBuf {
        let temp = std::env::temp_dir();
        std::path::absolute(&temp).unwrap_or(temp)
    }

    #[cfg(feature = "testkit-download")]
    #[expect(clippy::unused_self, reason = "the signature is the same as on Unix")]
    pub(super) fn installation_dir(&self) -> Option<PathBuf> {
        None
    }

    #[expect(clippy::unused_self, reason = "the signature is the same as on Unix")]
    pub(super) fn describe(&self) -> Option<&str> {
        None
    }
}

#[cfg(unix)]
fn unprivileged(passwd: &str) -> Option<User> {
    ["postgres", "_postgres", "nobody"]
        .iter()
        .find_map(|wanted| {
            passwd.lines().find_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next().filter(|name| name == wanted)?;
                Some(User {
                    name: name.to_owned(),
                    uid: id(fields.nth(1)?)?,
                    gid: id(fields.next()?)?,
                })
            })
        })
        .filter(|user| user.uid != 0)
}

/// macOS writes the ids of `nobody` as -2.
#[cfg(unix)]
fn id(text: &str) -> Option<u32> {
    text.parse()
        .ok()
        .or_else(|| Some(u32::from_ne_bytes(text.parse::<i32>().ok()?.to_ne_bytes())))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn the_postgres_user_is_preferred_to_any_other() {
        let passwd = "root:x:0:0::/root:/bin/sh\n\
                      nobody:x:65534:65533::/:/bin/false\n\
                      postgres:x:101:104:,,,:/var/lib/postgresql:/bin/bash\n";
        let user = unprivileged(passwd).unwrap();
        assert_eq!(
            (user.name.as_str(), user.uid, user.gid),
            ("postgres", 101, 104)
        );
    }

    #[test]
    fn negative_ids_wrap_around() {
        let user = unprivileged("nobody:*:-2:-2:Unprivileged User:/:/usr/bin/false").unwrap();
        assert_eq!((user.uid, user.gid), (u32::MAX - 1, u32::MAX - 1));
    }

    #[test]
    fn root_is_never_chosen() {
        assert_eq!(unprivileged("root:x:0:0::/:/bin/sh"), None);
        assert_eq!(unprivileged("nobody:x:0:0::/:/bin/sh"), None);
    }
}
