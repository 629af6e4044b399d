//! The program `requeuest`: what an operator needs at night, from a terminal or a script.
//!
//! It uses the library's public items only. Each command is a file of `commands`. Data goes to
//! standard output, and messages and progress to standard error.

// Doc comments of arguments are the help that a person reads, without any markup.
#![allow(clippy::doc_markdown)]

mod args;
mod commands;
mod config;
mod confirm;
mod failure;
mod filter;
mod health;
mod json;
mod out;
mod table;
mod target;
mod text;
mod when;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;
use crate::failure::Failure;
use crate::out::Out;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = Out::new(cli.global.json, cli.global.color);
    match run(&cli, &mut out).and_then(|()| Ok(out.flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // What was printed before the failure is still of use.
            let _ = out.flush();
            if let Some(message) = failure.message() {
                out.note(&format!("{} {message}", out.error_label()));
            }
            failure.code()
        }
    }
}

fn run(cli: &Cli, out: &mut Out) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let done = runtime.block_on(commands::run(cli, out));
    // A read of standard input that a command gave up can't be cancelled.
    runtime.shutdown_background();
    done
}
