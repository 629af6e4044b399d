//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands;
use crate::out::Color;

/// Durable outgoing HTTP: looks into the queue, changes it, and delivers
#[derive(Debug, Parser)]
#[command(name = "requeuest", version, arg_required_else_help = true, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 not found, 4 refused or --yes is missing,
5 the database can't be reached or used, 6 doctor found problems.";

/// What every command takes.
#[derive(Args, Debug)]
pub(crate) struct Global {
    /// The database: postgres://user:password@host/database [env: REQUEUEST_URL, DATABASE_URL]
    #[arg(
        long,
        global = true,
        value_name = "URL",
        help_heading = "Global options"
    )]
    pub(crate) url: Option<String>,
    /// A database of the configuration file [env: REQUEUEST_CONTEXT]
    #[arg(
        long,
        short = 'c',
        global = true,
        value_name = "NAME",
        conflicts_with = "url",
        help_heading = "Global options"
    )]
    pub(crate) context: Option<String>,
    /// The configuration file [default: $XDG_CONFIG_HOME/requeuest/config.toml]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Global options"
    )]
    pub(crate) config: Option<PathBuf>,
    /// The schema of the requests [default: requeuest] [env: REQUEUEST_SCHEMA]
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        help_heading = "Global options"
    )]
    pub(crate) schema: Option<String>,
    /// Prints JSON: one document, or one a line where there are many
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,
    /// When to use colors
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = true,
        help_heading = "Global options"
    )]
    pub(crate) color: Color,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Installs, upgrades or removes the schema
    Migrate(commands::migrate::Migrate),
    /// Enqueues a request, with flags as curl has them
    Send(commands::send::Send),
    /// Shows one request: its attempts, and why it has not been sent
    Show(commands::show::Show),
    /// Prints a script for a shell's completion
    Completions(commands::pages::Completions),
    /// Prints the manual page
    Man,
}
