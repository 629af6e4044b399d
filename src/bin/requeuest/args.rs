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
    /// Lists requests, the newest first
    List(commands::list::List),
    /// Shows one request: its attempts, and why it has not been sent
    Show(commands::show::Show),
    /// Follows requests as they change
    Tail(commands::list::Tail),
    /// Shows how many requests there are, which runners, and what happened lately
    Stats(commands::stats::Stats),
    /// Sends dead letters again: one, or those of a filter
    Replay(commands::change::Change),
    /// Cancels unfinished requests: one, or those of a filter
    Cancel(commands::change::Change),
    /// Says what became of ambiguous requests: one, or those of a filter
    Resolve(commands::change::Resolve),
    /// Deletes dead letters for good: one, or those of a filter
    Purge(commands::change::Change),
    /// Stops delivering a channel, or to a destination
    Pause(commands::pause::Pause),
    /// Delivers a channel again, or to a destination
    Resume(commands::pause::Resume),
    /// Shows, awaits and cancels changes of many requests
    Ops(commands::ops::Ops),
    /// Examines the database, and says what to do
    Doctor,
    /// Delivers requests until it is stopped
    Work(commands::work::Work),
    /// Measures how fast this database and machine enqueue and deliver
    Bench(commands::bench::Bench),
    /// Prints a script for a shell's completion
    Completions(commands::pages::Completions),
    /// Prints the manual page
    Man,
}
