//! How a command ends without success: a message of one line, and an exit code that says what kind
//! of failure it was.

use std::error::Error as StdError;
use std::fmt::Display;
use std::io;
use std::process::ExitCode;

use requeuest::Error;

use crate::text;

/// The meaning of an exit code. Documented in `docs/cli.md` and in the help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// The command failed, or the request that it waited for was not completed.
    Failed = 1,
    /// The command line, a file or an input is not valid.
    Usage = 2,
    /// There is no such request, operation or destination.
    NotFound = 3,
    /// The state of the request doesn't allow it, or `--yes` is missing.
    Refused = 4,
    /// The database can't be reached, or its schema can't be used.
    Database = 5,
    /// `doctor` found a problem.
    Problems = 6,
}

/// Why a command ended. From [`Failure::new`] or an error.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    /// `None` if the reader of the output has gone, which is its right.
    message: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Display) -> Self {
        Self {
            code: code as u8,
            message: Some(text::line(&message.to_string())),
        }
    }

    pub(crate) fn usage(message: impl Display) -> Self {
        Self::new(Code::Usage, message)
    }

    /// The output has said it all.
    pub(crate) fn silent(code: Code) -> Self {
        Self {
            code: code as u8,
            message: None,
        }
    }

    /// A failure of a migration. Its source is the library's own error in many cases.
    pub(crate) fn migrating(error: &(dyn StdError + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(known) = error.downcast_ref::<Error>() {
                return known.into();
            }
            cause = error.source();
        }
        Self::new(Code::Database, chain(error))
    }

    pub(crate) fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }

    pub(crate) fn code(&self) -> ExitCode {
        self.code.into()
    }
}

/// The sentences of an error and its sources, without repetitions.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let sentence = error.to_string();
        if !text.contains(&sentence) {
            text = format!("{text}: {sentence}");
        }
        cause = error.source();
    }
    text
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        if error.is_not_migrated() {
            let text = format!("{error} (here: `requeuest migrate`)");
            return Self::new(Code::Database, text);
        }
        let code = if error.is_database() || error.is_closed() {
            Code::Database
        } else if error.is_unknown_id() || error.is_unknown_destination() {
            Code::NotFound
        } else if error.is_wrong_state() || error.is_forbidden() || error.is_key_conflict() {
            Code::Refused
        } else if error.is_request() || error.is_config() {
            Code::Usage
        } else {
            Code::Failed
        };
        Self::new(code, chain(error))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

/// Of standard output, for the most part.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            // As for other programs in a pipe that `head` or a pager has left.
            return Self {
                code: 0,
                message: None,
            };
        }
        Self::new(Code::Failed, error)
    }
}
