//! Connect options from a URL, for applications without sqlx 0.8.
//!
//! sqlx itself takes any scheme, logs the value of a parameter that it doesn't know, and shows
//! values in its errors. A URL has a password in it, so nothing of it is shown here.

use std::net::IpAddr;
use std::str::FromStr;

use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
use url::Url;

use crate::error::Error;

/// The parameters that sqlx knows.
const PARAMETERS: &str = "application_name, dbname, host, hostaddr, options, options[NAME], \
                          password, port, sslcert, sslkey, sslmode, sslrootcert, \
                          statement-cache-capacity, user";

/// The connect options that a URL of Postgres means. Errors name the field `url` and show nothing
/// of it.
pub(crate) fn connect_options(url: &str) -> Result<PgConnectOptions, Error> {
    let refused = |reason: String| Error::config("url", reason);
    let parsed = Url::parse(url)
        .map_err(|error| refused(format!("is not a URL, as {EXAMPLE} is: {error}")))?;
    if !matches!(parsed.scheme(), "postgres" | "postgresql") || parsed.cannot_be_a_base() {
        return Err(refused(format!(
            "must begin with `postgres://` or `postgresql://`, as {EXAMPLE} does"
        )));
    }
    for (number, (name, value)) in parsed.query_pairs().enumerate() {
        check(&name, &value).map_err(|reason| {
            // A name may be the rest of a password with `&` in it.
            refused(format!("parameter {} {reason}", number + 1))
        })?;
    }
    PgConnectOptions::from_str(url)
        .map_err(|_| refused("has a percent-encoded part that is not UTF-8".to_owned()))
}

const EXAMPLE: &str = "`postgres://user:password@host:5432/database`";

fn check(name: &str, value: &str) -> Result<(), String> {
    let reason = match name {
        "sslmode" | "ssl-mode" if PgSslMode::from_str(value).is_err() => {
            "(sslmode) must be disable, allow, prefer, require, verify-ca or verify-full"
        }
        "port" if !matches!(value.parse::<u16>(), Ok(1..)) => {
            "(port) must be a number from 1 to 65535"
        }
        "hostaddr" if value.parse::<IpAddr>().is_err() => "(hostaddr) must be an IP address",
        "statement-cache-capacity" if value.parse::<usize>().is_err() => {
            "(statement-cache-capacity) must be a number"
        }
        "sslmode"
        | "ssl-mode"
        | "sslrootcert"
        | "ssl-root-cert"
        | "ssl-ca"
        | "sslcert"
        | "ssl-cert"
        | "sslkey"
        | "ssl-key"
        | "statement-cache-capacity"
        | "host"
        | "hostaddr"
        | "port"
        | "dbname"
        | "user"
        | "password"
        | "application_name"
        | "options" => {
            return Ok(());
        }
        name if name.starts_with("options[") && name.ends_with(']') => return Ok(()),
        _ => return Err(format!("has an unknown name; known are {PARAMETERS}")),
    };
    Err(reason.to_owned())
}

/// A pool with sqlx's defaults that connects on first use. Must be called within a tokio runtime.
pub(crate) fn pool(options: PgConnectOptions) -> PgPool {
    PgPoolOptions::new().connect_lazy_with(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_of_postgres_is_read() {
        for url in [
            "postgres://localhost/app",
            "postgresql://web:hunter2@db.example:6543/app?sslmode=require",
            "postgres:///app?host=/run/postgresql&user=web&password=a%26b",
            "postgres://localhost/app?options[statement_timeout]=5s&options=-c%20x.y=1",
            "postgres://[::1]/app?hostaddr=::1&port=5432&statement-cache-capacity=0",
        ] {
            connect_options(url).unwrap();
        }
        let options = connect_options("postgres://web:x@db.example:6543/app").unwrap();
        assert_eq!(options.get_host(), "db.example");
        assert_eq!(options.get_port(), 6543);
        assert_eq!(options.get_database(), Some("app"));
        assert_eq!(options.get_username(), "web");
    }

    #[test]
    fn a_refused_url_names_the_field_and_shows_nothing_of_it() {
        for (url, reason) in [
            ("", "is not a URL"),
            ("hunter2", "is not a URL"),
            ("host=db password=hunter2", "is not a URL"),
            ("postgres://u:hunter2@a:b/app", "is not a URL"),
            ("postgres://u:hunter2@a:65536/app", "is not a URL"),
            ("postgres:hunter2", "must begin with"),
            ("mysql://u:hunter2@a/app", "must begin with"),
            ("hunter2://a/app", "must begin with"),
            (
                "postgres://a/app?passwort=hunter2",
                "parameter 1 has an unknown",
            ),
            (
                "postgres://a/app?password=a&hunter2",
                "parameter 2 has an unknown",
            ),
            (
                "postgres://a/app?options[hunter2=1",
                "parameter 1 has an unknown",
            ),
            (
                "postgres://a/app?sslmode=hunter2",
                "parameter 1 (sslmode) must be",
            ),
            (
                "postgres://a/app?port=hunter2",
                "parameter 1 (port) must be",
            ),
            ("postgres://a/app?port=0", "parameter 1 (port) must be"),
            (
                "postgres://a/app?hostaddr=hunter2",
                "(hostaddr) must be an IP",
            ),
            (
                "postgres://a/app?statement-cache-capacity=hunter2",
                "(statement-cache-capacity) must be",
            ),
            ("postgres://u:hunter2%ff@a/app", "not UTF-8"),
        ] {
            let error = connect_options(url).unwrap_err();
            assert!(error.is_config());
            assert_eq!(error.field(), Some("url"), "{url}");
            let shown = format!("{error} {error:?}");
            assert!(shown.contains(reason), "{url}: {shown}");
            assert!(!shown.contains("hunter2"), "{shown}");
        }
    }
}
