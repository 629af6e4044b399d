//! Which database a command means, and how to reach it.

use requeuest::admin::{Admin, AdminBuilder};
use requeuest::migrate::DEFAULT_SCHEMA;
use requeuest::{Durable, DurableBuilder, Url};

use crate::args::Global;
use crate::config::Config;
use crate::failure::Failure;

/// One database and schema.
pub(crate) struct Target {
    pub(crate) url: String,
    pub(crate) schema: String,
    context: Option<String>,
    /// Ask before a change.
    pub(crate) production: bool,
}

impl Target {
    /// The first of: `--url`, `--context`, `REQUEUEST_CONTEXT`, `REQUEUEST_URL`, `DATABASE_URL`,
    /// and the default context of the configuration file.
    pub(crate) fn find(global: &Global) -> Result<Self, Failure> {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let schema = || global.schema.clone().or_else(|| set("REQUEUEST_SCHEMA"));
        let plain = |url| Self {
            url,
            schema: schema().unwrap_or_else(|| DEFAULT_SCHEMA.to_owned()),
            context: None,
            production: false,
        };
        let config = || Config::read(global.config.as_deref());
        let named = |config: &Config, name: String| {
            let context = config.context(&name)?;
            let schema = schema().or_else(|| context.schema.clone());
            Ok::<_, Failure>(Self {
                url: context.url.clone(),
                schema: schema.unwrap_or_else(|| DEFAULT_SCHEMA.to_owned()),
                production: context.production,
                context: Some(name),
            })
        };
        let target = if let Some(url) = &global.url {
            plain(url.clone())
        } else if let Some(name) = global.context.clone().or_else(|| set("REQUEUEST_CONTEXT")) {
            named(&config()?, name)?
        } else if let Some(url) = set("REQUEUEST_URL").or_else(|| set("DATABASE_URL")) {
            plain(url)
        } else {
            let config = config()?;
            let Some(name) = config.default.clone() else {
                return Err(Failure::usage(
                    "no database is named: give --url or --context, set REQUEUEST_URL or \
                     DATABASE_URL, or put a `default` context into the configuration file",
                ));
            };
            named(&config, name)?
        };
        check_schema(&target.schema)?;
        Ok(target)
    }

    /// A handle that only enqueues and reads.
    pub(crate) async fn durable(&self) -> Result<Durable, Failure> {
        let durable = self.builder().runner(false).build()?;
        // Connects and checks the schema, so that a command fails before it has begun.
        durable.runners().await?;
        Ok(durable)
    }

    pub(crate) fn builder(&self) -> DurableBuilder {
        Durable::builder_from_url(&*self.url).schema(&*self.schema)
    }

    pub(crate) async fn admin(&self) -> Result<Admin, Failure> {
        Ok(self.admin_builder().connect().await?)
    }

    pub(crate) fn admin_builder(&self) -> AdminBuilder {
        Admin::builder(&*self.url).schema(&*self.schema)
    }

    /// The database for a person to recognise, without its password.
    pub(crate) fn shown(&self) -> String {
        let place = match Url::parse(&self.url) {
            Ok(url) => place(&url),
            Err(_) => "an invalid URL".to_owned(),
        };
        let mut shown = format!("{place}, schema {}", self.schema);
        if let Some(context) = &self.context {
            shown += ", context ";
            shown += context;
        }
        shown
    }

    /// The name that a person calls it.
    pub(crate) fn name(&self) -> &str {
        self.context.as_deref().unwrap_or("the database")
    }
}

/// User, host, port and database. Parameters may have a password among them.
fn place(url: &Url) -> String {
    let mut host = url.host_str().unwrap_or_default().to_owned();
    if let Some((_, directory)) = url.query_pairs().find(|(name, _)| name == "host") {
        host = directory.into_owned();
    }
    if host.is_empty() {
        "localhost".clone_into(&mut host);
    }
    let user = match url.username() {
        "" => String::new(),
        user => format!("{user}@"),
    };
    let port = url
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    let path = url.path().trim_start_matches('/');
    format!("{user}{host}{port}/{path}")
}

/// The library's rule, before anything connects.
fn check_schema(schema: &str) -> Result<(), Failure> {
    requeuest::migrate::Migrator::new()
        .schema(schema)
        .sql(0)
        .map(drop)
        .map_err(|_| {
            Failure::usage(format!(
                "schema {schema:?}: a schema's name must be 1 to 63 lower-case letters, digits or \
                 `_`, no digit first"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_shown_without_its_password() {
        for (url, shown) in [
            (
                "postgres://app:hunter2@db:5433/main?password=hunter2",
                "app@db:5433/main, schema s",
            ),
            (
                "postgres:///main?host=/run/postgresql",
                "/run/postgresql/main, schema s",
            ),
            ("hunter2", "an invalid URL, schema s"),
        ] {
            let target = Target {
                url: url.to_owned(),
                schema: "s".to_owned(),
                context: None,
                production: false,
            };
            assert_eq!(target.shown(), shown);
        }
        assert!(check_schema("calls_2").is_ok() && check_schema("Calls").is_err());
    }
}
