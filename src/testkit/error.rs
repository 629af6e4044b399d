//! One error for everything that can keep a test from its database. Code doesn't handle these
//! errors, so the message must tell the reader of the test's output what to do next.

use std::fmt;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// No Postgres could be found, started or used.
///
/// The message says what was tried and, if it helps, what to install. It never contains a password.
pub struct Error(Box<Inner>);

struct Inner {
    message: String,
    source: Option<Source>,
}

impl Error {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            message: message.into(),
            source: None,
        }))
    }

    pub(super) fn caused_by(mut self, source: impl Into<Source>) -> Self {
        self.0.source = Some(source.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

/// The message and its causes, because a test's `unwrap` prints only this.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, "\ncaused by: {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.0.source.as_ref()?;
        Some(source.as_ref())
    }
}
