//! Errors of the database, as callers get them.
//!
//! The DETAIL of an error of Postgres may hold whole rows, and so the credentials of stored
//! requests. A caller finds the SQLSTATE, the constraint and the table of an error in any case; the
//! DETAIL only by asking for it.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use crate::redact::redact_urls;

/// The longest text that is shown of a database's error, in characters.
const MAX_DATABASE_TEXT: usize = 300;

/// Makes the error fit to be a source, of several callers if they shared a batch.
pub(crate) fn shared(error: sqlx::Error) -> Arc<sqlx::Error> {
    Arc::new(match error {
        sqlx::Error::Database(error) => sqlx::Error::Database(Box::new(Refusal(error))),
        other => other,
    })
}

/// Whether the error has a SQLSTATE that is one of these, or of one of these classes.
pub(crate) fn has_sqlstate(error: &sqlx::Error, any_of: &[&str]) -> bool {
    error
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code)
        .is_some_and(|code| any_of.iter().any(|wanted| code.starts_with(wanted)))
}

/// Whether the statement met a lock of another transaction (`lock_not_available`), and did nothing.
pub(crate) fn is_lock_timeout(error: &sqlx::Error) -> bool {
    has_sqlstate(error, &["55P03"])
}

/// What the database or the connection to it says, on one line. Of an error of Postgres only the
/// message and the SQLSTATE.
pub(crate) fn database_text(error: &sqlx::Error) -> String {
    let text = match error {
        sqlx::Error::Database(error) => return refusal_text(error.as_ref()),
        sqlx::Error::Io(error) => error.to_string(),
        sqlx::Error::Protocol(text) => text.clone(),
        // The crate's own pool reports its timeout as an error of the connection to the server.
        sqlx::Error::PoolTimedOut => "the application's pool had no connection to give within its \
             acquire_timeout"
            .to_owned(),
        other => other.to_string(),
    };
    first_line(&text)
}

fn refusal_text(error: &dyn sqlx::error::DatabaseError) -> String {
    let shown = first_line(error.message());
    match error.code() {
        Some(code) => format!("{shown} (SQLSTATE {code})"),
        None => shown,
    }
}

fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    redact_urls(line).chars().take(MAX_DATABASE_TEXT).collect()
}

/// An error of Postgres that shows neither its DETAIL nor the statement's parameters in any
/// format. `try_downcast_ref` leads to the driver's own error, which has them.
struct Refusal(Box<dyn sqlx::error::DatabaseError>);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&refusal_text(self.0.as_ref()))
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseError")
            .field("message", &first_line(self.0.message()))
            .field("code", &self.0.code())
            .field("table", &self.0.table())
            .field("constraint", &self.0.constraint())
            .finish_non_exhaustive()
    }
}

impl StdError for Refusal {}

impl sqlx::error::DatabaseError for Refusal {
    fn message(&self) -> &str {
        self.0.message()
    }

    fn code(&self) -> Option<Cow<'_, str>> {
        self.0.code()
    }

    fn as_error(&self) -> &(dyn StdError + Send + Sync + 'static) {
        self.0.as_error()
    }

    fn as_error_mut(&mut self) -> &mut (dyn StdError + Send + Sync + 'static) {
        self.0.as_error_mut()
    }

    fn into_error(self: Box<Self>) -> Box<dyn StdError + Send + Sync + 'static> {
        self.0.into_error()
    }

    fn is_transient_in_connect_phase(&self) -> bool {
        self.0.is_transient_in_connect_phase()
    }

    fn constraint(&self) -> Option<&str> {
        self.0.constraint()
    }

    fn table(&self) -> Option<&str> {
        self.0.table()
    }

    fn kind(&self) -> sqlx::error::ErrorKind {
        self.0.kind()
    }
}
