//! Named databases: the contexts of a configuration file.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::failure::Failure;

/// The configuration file. An unknown name in it is an error: a misspelt `production` would be
/// dangerous.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The context of a command line and an environment that name no database.
    pub(crate) default: Option<String>,
    #[serde(default)]
    pub(crate) contexts: BTreeMap<String, Context>,
}

/// One database.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    pub(crate) url: String,
    pub(crate) schema: Option<String>,
    /// Ask before a command changes anything.
    #[serde(default)]
    pub(crate) production: bool,
}

/// Without the URL, which has a password.
impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("schema", &self.schema)
            .field("production", &self.production)
            .finish_non_exhaustive()
    }
}

impl Config {
    /// Reads the file. Without `--config`, there may be none.
    pub(crate) fn read(given: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = given.map(Path::to_owned).or_else(usual_path) else {
            return Ok(Self::default());
        };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if given.is_none() && error.kind() == ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => {
                return Err(Failure::usage(format!("{}: {error}", path.display())));
            }
        };
        Self::parse(&text).map_err(|reason| Failure::usage(format!("{}: {reason}", path.display())))
    }

    /// Errors name the place and show nothing of the file, which has passwords.
    fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start).min(text.len());
            let before = text.as_bytes().get(..at).unwrap_or_default();
            let line = before.split(|&byte| byte == b'\n').count();
            format!("line {line}: {}", error.message())
        })
    }

    pub(crate) fn context(&self, name: &str) -> Result<&Context, Failure> {
        self.contexts.get(name).ok_or_else(|| {
            let known: Vec<_> = self.contexts.keys().map(String::as_str).collect();
            Failure::usage(if known.is_empty() {
                format!(
                    "there is no context {name:?}: the configuration file has none; add \
                     [contexts.{name}] with a url"
                )
            } else {
                format!(
                    "there is no context {name:?}; there are {}",
                    known.join(", ")
                )
            })
        })
    }
}

/// `$XDG_CONFIG_HOME/requeuest/config.toml`, or the same under `~/.config`.
fn usual_path() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let home = set("XDG_CONFIG_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(set("HOME")?).join(".config")))?;
    Some(home.join("requeuest").join("config.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_names_databases() {
        let config = Config::parse(
            "default = 'dev'\n[contexts.dev]\nurl = 'postgres://localhost/app'\n\
             [contexts.live]\nurl = 'postgres://live/app'\nschema = 'calls'\nproduction = true\n",
        )
        .unwrap();
        assert_eq!(config.default.as_deref(), Some("dev"));
        let live = config.context("live").unwrap();
        assert!(live.production && live.schema.as_deref() == Some("calls"));
        assert!(!config.context("dev").unwrap().production);
        let error = config.context("prod").unwrap_err();
        assert!(error.message().unwrap().contains("dev, live"));
    }

    #[test]
    fn a_wrong_file_is_named_by_its_line_without_its_values() {
        for (text, line, word) in [
            (
                "[contexts.a]\nurl = 'hunter2'\nprod = true\n",
                "line 3",
                "prod",
            ),
            ("[contexts.a]\nurl = 'hunter2\n", "line 2", ""),
            ("[contexts.a]\nschema = 'x'\n", "line 1", "url"),
        ] {
            let reason = Config::parse(text).unwrap_err();
            assert!(reason.contains(line) && reason.contains(word), "{reason}");
            assert!(!reason.contains("hunter2"), "{reason}");
        }
    }
}
