//! Before a change: which database it is, and whether the operator means it.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;

use crate::failure::{Code, Failure};
use crate::out::Out;
use crate::target::Target;

/// The answer to a question, given beforehand.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Yes {
    /// Doesn't ask: the change is meant
    #[arg(long, short = 'y')]
    pub(crate) yes: bool,
}

/// Says which database is about to be changed. Asks, where that is a production database.
pub(crate) fn change(out: &Out, target: &Target, yes: &Yes) -> Result<(), Failure> {
    announce(out, target);
    if !target.production || yes.yes {
        return Ok(());
    }
    let question = format!("{} is a production database. Change it?", target.name());
    ask(out, &question)
}

/// The same for a change that can't be taken back or concerns many requests. Always asks.
pub(crate) fn serious(
    out: &Out,
    target: &Target,
    yes: &Yes,
    question: &str,
) -> Result<(), Failure> {
    announce(out, target);
    if yes.yes {
        return Ok(());
    }
    ask(out, question)
}

fn announce(out: &Out, target: &Target) {
    let production = if target.production {
        out.loud(" PRODUCTION")
    } else {
        String::new()
    };
    out.note(&format!("on {}{production}", target.shown()));
}

fn ask(out: &Out, question: &str) -> Result<(), Failure> {
    let refused = || Failure::new(Code::Refused, "nothing was changed; repeat it with --yes");
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(refused());
    }
    let _ = write!(io::stderr(), "{question} [y/N] ");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    out.note("");
    Err(Failure::new(Code::Refused, "nothing was changed"))
}
