//! A file for each command, or for a few that are alike.

pub(crate) mod bench;
pub(crate) mod change;
pub(crate) mod doctor;
pub(crate) mod list;
pub(crate) mod migrate;
pub(crate) mod ops;
pub(crate) mod pages;
pub(crate) mod pause;
pub(crate) mod send;
pub(crate) mod show;
pub(crate) mod stats;
pub(crate) mod work;

use requeuest::admin::Action;
use requeuest::{RequestId, Status};

use crate::args::{Cli, Command};
use crate::failure::Failure;
use crate::out::{Out, Style};
use crate::target::Target;

pub(crate) async fn run(cli: &Cli, out: &mut Out) -> Result<(), Failure> {
    let target = || Target::find(&cli.global);
    match &cli.command {
        Command::Migrate(migrate) => migrate.run(&cli.global, out).await,
        Command::Send(send) => send.run(&target()?, out).await,
        Command::List(list) => list.run(&target()?, out).await,
        Command::Tail(tail) => tail.run(&target()?, out).await,
        Command::Stats(stats) => stats.run(&target()?, out).await,
        Command::Replay(change) => change.run(Action::Replay, &target()?, out).await,
        Command::Cancel(change) => change.run(Action::Cancel, &target()?, out).await,
        Command::Resolve(resolve) => resolve.run(&target()?, out).await,
        Command::Purge(change) => change.run(Action::Purge, &target()?, out).await,
        Command::Pause(pause) => pause.run(&target()?, out).await,
        Command::Resume(resume) => resume.run(&target()?, out).await,
        Command::Ops(ops) => ops.run(&target()?, out).await,
        Command::Doctor => doctor::run(&target()?, out).await,
        Command::Work(work) => work.run(&target()?, out).await,
        Command::Bench(bench) => bench.run(&target()?, out).await,
        Command::Show(show) => show.run(&target()?, out).await,
        Command::Completions(completions) => completions.run(out),
        Command::Man => pages::man(out),
    }
}

/// An id on the command line.
fn request_id(text: &str) -> Result<RequestId, String> {
    text.parse().map_err(|_| {
        "must be the id of a request, such as 01890a5d-ac96-774b-bcce-b302099a8057".to_owned()
    })
}

fn status_style(status: Status) -> Style {
    match status {
        Status::Completed => Style::Good,
        Status::Discarded | Status::Ambiguous => Style::Bad,
        Status::Retryable | Status::Parked | Status::Deferred => Style::Doubtful,
        _ => Style::Plain,
    }
}
