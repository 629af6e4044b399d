//! The server that `DATABASE_URL` names. It isn't ours, so it is never configured, stopped or
//! started, and its password appears in no message.

use std::env;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection};

use super::Error;

const VARIABLE: &str = "DATABASE_URL";
const CONNECT_DEADLINE: Duration = Duration::from_secs(30);

pub(super) struct Given {
    url: String,
    options: PgConnectOptions,
}

impl Given {
    /// The server named by the environment variable, if it is set and not empty.
    pub(super) fn from_env() -> Result<Option<Self>, Error> {
        match env::var(VARIABLE) {
            Ok(url) if url.is_empty() => Ok(None),
            Ok(url) => Self::new(url).map(Some),
            Err(env::VarError::NotPresent) => Ok(None),
            Err(env::VarError::NotUnicode(_)) => {
                Err(Error::new(format!("{VARIABLE} is not valid Unicode")))
            }
        }
    }

    fn new(url: String) -> Result<Self, Error> {
        let scheme = url.split("://").next().unwrap_or_default();
        if !matches!(scheme, "postgres" | "postgresql") {
            return Err(Error::new(format!(
                "{VARIABLE} is not a Postgres URL: it must begin with `postgres://`"
            )));
        }
        let options = PgConnectOptions::from_str(&url).map_err(|error| {
            Error::new(format!("{VARIABLE} is not a valid URL")).caused_by(error)
        })?;
        Ok(Self { url, options })
    }

    /// Connects once, so that a server that is down is reported early.
    pub(super) async fn check(&self) -> Result<(), Error> {
        let failed = || {
            Error::new(format!(
                "connecting to the server of {VARIABLE} ({self:?}) failed"
            ))
        };
        let connected = async { self.options.connect().await?.close().await };
        match tokio::time::timeout(CONNECT_DEADLINE, connected).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(failed().caused_by(error)),
            Err(late) => Err(failed().caused_by(late)),
        }
    }

    pub(super) fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// The URL of another database on the server. The rest of the URL stays the same.
    pub(super) fn url_of(&self, database: &str) -> String {
        let (before, query) = match self.url.split_once('?') {
            Some((before, query)) => (before, Some(query)),
            None => (self.url.as_str(), None),
        };
        let authority = before.find("://").map_or(0, |at| at + 3);
        let path = before[authority..]
            .find('/')
            .map_or(before.len(), |at| authority + at);
        let mut url = format!("{}/{database}", &before[..path]);
        // `dbname` would override the path.
        let kept: Vec<&str> = query
            .into_iter()
            .flat_map(|query| query.split('&'))
            .filter(|pair| !pair.starts_with("dbname="))
            .collect();
        if !kept.is_empty() {
            url.push('?');
            url.push_str(&kept.join("&"));
        }
        url
    }
}

/// Shows host and port. The URL may contain a password.
impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.options.get_host(), self.options.get_port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_database_of_a_url_is_replaced() {
        for (given, expected) in [
            ("postgres://a:b@host:5/app", "postgres://a:b@host:5/new"),
            ("postgresql://host", "postgresql://host/new"),
            (
                "postgres:///app?host=/run&dbname=app&user=u",
                "postgres:///new?host=/run&user=u",
            ),
            (
                "postgres://a@h/app?sslmode=require&options=-c%20x=y",
                "postgres://a@h/new?sslmode=require&options=-c%20x=y",
            ),
        ] {
            let server = Given::new(given.to_owned()).unwrap();
            let url = server.url_of("new");
            assert_eq!(url, expected);
            let options = PgConnectOptions::from_str(&url).unwrap();
            assert_eq!(options.get_database(), Some("new"));
        }
    }

    #[test]
    fn a_password_is_in_no_message() {
        let server = Given::new("postgres://user:secret@host:5/app".to_owned()).unwrap();
        assert_eq!(format!("{server:?}"), "host:5");
        let error = Given::new("mysql://user:secret@host/app".to_owned()).err();
        assert!(!format!("{:?}", error.unwrap()).contains("secret"));
        let error = Given::new("postgres://user:secret@host:port/app".to_owned()).err();
        assert!(!format!("{:?}", error.unwrap()).contains("secret"));
    }
}
