//! The program `requeuest`: the real binary, as a person or a script runs it.

mod changes;
mod input;
mod many;
mod night;
mod reads;
mod terminal;
mod work;

use std::process::{Output, Stdio};

use requeuest::testkit::TestDatabase;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::support::in_time;

/// The program, with an environment that names no database.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_requeuest"));
    for name in [
        "DATABASE_URL",
        "REQUEUEST_URL",
        "REQUEUEST_CONTEXT",
        "REQUEUEST_SCHEMA",
        "NO_COLOR",
        "XDG_CONFIG_HOME",
        "RUST_LOG",
    ] {
        command.env_remove(name);
    }
    command
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// A run of the program that has ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// Its output, if it succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    /// The JSON document that it printed.
    #[track_caller]
    pub fn json(self) -> Value {
        let out = self.ok();
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
    }

    /// The one line of its error, if it ended with this code and printed no data.
    #[track_caller]
    pub fn refused(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.out, "", "{self:?}");
        let mut lines = self.err.lines().filter(|line| line.starts_with("error: "));
        let line = lines.next().unwrap_or_else(|| panic!("{self:?}"));
        line.to_owned()
    }
}

/// Runs the program with these arguments.
pub async fn run(arguments: &[&str]) -> Ran {
    in_time(program().args(arguments).output())
        .await
        .unwrap()
        .into()
}

/// The same on this database.
pub async fn on(database: &TestDatabase, arguments: &[&str]) -> Ran {
    let mut command = program();
    command.env("DATABASE_URL", database.url()).args(arguments);
    in_time(command.output()).await.unwrap().into()
}

/// Starts the program on this database.
pub fn start(database: &TestDatabase, arguments: &[&str]) -> Child {
    let mut command = program();
    command.env("DATABASE_URL", database.url()).args(arguments);
    command.spawn().unwrap()
}

/// Runs the program on this database with something to read.
pub async fn fed(database: &TestDatabase, arguments: &[&str], input: &[u8]) -> Ran {
    let mut command = program();
    command.env("DATABASE_URL", database.url()).args(arguments);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input).await.unwrap();
    drop(stdin);
    in_time(child.wait_with_output()).await.unwrap().into()
}
