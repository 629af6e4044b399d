//! `requeuest ops`: changes of many requests, under way and ended.

use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use requeuest::admin::{Admin, Operation, OperationFilter, OperationId, OperationState};
use serde_json::{Value, json};

use super::change::Author;
use crate::confirm::{self, Yes};
use crate::failure::{Code, Failure};
use crate::json;
use crate::out::{Out, Style};
use crate::table::{Cell, Table};
use crate::target::Target;
use crate::text;
use crate::when;

const LOOK_EVERY: Duration = Duration::from_millis(250);

#[derive(Args, Debug)]
pub(crate) struct Ops {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The newest operations
    List {
        /// Only those that have not ended
        #[arg(long)]
        running: bool,
    },
    /// One operation
    Show {
        #[arg(value_parser = operation_id)]
        id: OperationId,
    },
    /// Waits until an operation has ended, with its progress
    Wait {
        #[arg(value_parser = operation_id)]
        id: OperationId,
    },
    /// Ends an operation. What it has done stays done
    Cancel {
        #[arg(value_parser = operation_id)]
        id: OperationId,
        #[command(flatten)]
        author: Author,
        #[command(flatten)]
        yes: Yes,
    },
}

fn operation_id(text: &str) -> Result<OperationId, String> {
    text.parse()
        .map_err(|_| "must be the id of an operation, which `requeuest ops list` shows".to_owned())
}

impl Ops {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        match &self.command {
            Command::List { running } => list(&target.admin().await?, *running, out).await,
            Command::Show { id } => {
                let operation = find(&target.admin().await?, *id).await?;
                show(&operation, out)
            }
            Command::Wait { id } => wait(&target.admin().await?, *id, out).await,
            Command::Cancel { id, author, yes } => {
                confirm::change(out, target, yes)?;
                let admin = author.sign(target.admin().await?);
                if !admin.cancel_operation(*id).await? {
                    let text = format!("the operation {id} has ended");
                    return Err(Failure::new(Code::Refused, text));
                }
                show(&find(&admin, *id).await?, out)
            }
        }
    }
}

async fn find(admin: &Admin, id: OperationId) -> Result<Operation, Failure> {
    let found = admin.operation(id).await?;
    found.ok_or_else(|| Failure::new(Code::NotFound, format!("there is no operation {id}")))
}

async fn list(admin: &Admin, is_running: bool, out: &mut Out) -> Result<(), Failure> {
    let mut filter = OperationFilter::new();
    if is_running {
        filter = filter.running();
    }
    let operations = admin.operations(&filter).await?;
    if out.json {
        let operations: Vec<_> = operations.iter().map(document).collect();
        return out.document(&json!({ "operations": operations }));
    }
    let mut table = Table::new([
        "id", "action", "state", "done", "skipped", "failed", "started", "by", "reason",
    ]);
    for operation in &operations {
        table.row([
            operation.id.to_string().into(),
            action(operation).into(),
            state(operation),
            operation.done.to_string().into(),
            operation.skipped.to_string().into(),
            operation.failed.to_string().into(),
            when::relative(operation.started_at).into(),
            operation.actor.as_str().into(),
            Cell::short(operation.reason.as_deref().unwrap_or_default(), 40),
        ]);
    }
    if table.is_empty() {
        out.note("no operations");
        return Ok(());
    }
    out.table(&table)
}

fn action(operation: &Operation) -> &'static str {
    operation
        .action
        .map_or("unknown", requeuest::admin::Action::as_str)
}

fn state(operation: &Operation) -> Cell {
    let style = match operation.state {
        OperationState::Finished if operation.failed == 0 => Style::Good,
        OperationState::Running if operation.is_driven => Style::Plain,
        _ => Style::Doubtful,
    };
    Cell::styled(operation.state.as_str(), style)
}

fn document(operation: &Operation) -> Value {
    json!({
        "id": operation.id.to_string(),
        "action": operation.action.map(requeuest::admin::Action::as_str),
        "filter": operation.filter,
        "actor": operation.actor,
        "reason": operation.reason,
        "rate": operation.rate,
        "state": operation.state.as_str(),
        "is_driven": operation.is_driven,
        "started_at": json::time(operation.started_at),
        "finished_at": json::maybe_time(operation.finished_at),
        "done": operation.done,
        "skipped": operation.skipped,
        "failed": operation.failed,
        "last_error": operation.last_error,
    })
}

fn show(operation: &Operation, out: &mut Out) -> Result<(), Failure> {
    if out.json {
        return out.document(&document(operation));
    }
    out.field("operation", &operation.id.to_string())?;
    out.field("action", action(operation))?;
    out.field("state", operation.state.as_str())?;
    if operation.state == OperationState::Running && !operation.is_driven {
        let text = out.paint(Style::Doubtful, "no runner works at it now");
        out.field("", &text)?;
    }
    let filter = operation.filter.as_ref().map(serde_json::to_string);
    if let Some(Ok(filter)) = filter {
        out.field("filter", &text::line(&filter))?;
    }
    out.field("by", &text::line(&operation.actor))?;
    if let Some(reason) = &operation.reason {
        out.field("reason", &text::line(reason))?;
    }
    if let Some(rate) = operation.rate {
        out.field("rate", &format!("{rate} a second"))?;
    }
    out.field("started", &when::both(operation.started_at))?;
    if let Some(time) = operation.finished_at {
        out.field("ended", &when::both(time))?;
    }
    let progress = format!(
        "{} done, {} skipped, {} failed",
        operation.done, operation.skipped, operation.failed
    );
    out.field("progress", &progress)?;
    if let Some(error) = &operation.last_error {
        out.field("last error", &text::line(error))?;
    }
    Ok(())
}

/// Shows the progress on standard error until the operation has ended, and then the operation.
pub(crate) async fn wait(admin: &Admin, id: OperationId, out: &mut Out) -> Result<(), Failure> {
    // On a terminal only: a log is no place for a bar.
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {pos} requests {elapsed} {msg}") {
        bar.set_style(style);
    }
    let operation = loop {
        let operation = find(admin, id).await?;
        bar.set_position(operation.done + operation.skipped + operation.failed);
        let is_driven = operation.is_driven || operation.state != OperationState::Running;
        bar.set_message(if is_driven {
            ""
        } else {
            "(no runner works at it now)"
        });
        if operation.state != OperationState::Running {
            break operation;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    bar.finish_and_clear();
    show(&operation, out)?;
    match operation.state {
        OperationState::Finished if operation.failed == 0 => Ok(()),
        _ => Err(Failure::silent(Code::Failed)),
    }
}
