//! `requeuest replay`, `cancel`, `resolve` and `purge`: one request by its id, or many by a filter.
//!
//! A change of many is an operation of the database, and runners carry it out. This process only
//! starts it, so its end is not the operation's.

use clap::{Args, ValueEnum};
use requeuest::admin::{Action, Admin, Count, NewOperation, Preview};
use requeuest::{RequestId, Resolution};
use serde_json::{Value, json};

use super::ops;
use crate::confirm::{self, Yes};
use crate::failure::{Code, Failure};
use crate::filter::FilterArgs;
use crate::json;
use crate::out::Out;
use crate::table::Table;
use crate::target::Target;
use crate::when;

/// Who changes, and why: for the record.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Author {
    /// Why, for the record of changes
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Who, for the record of changes [default: the user and host of this process]
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
}

impl Author {
    pub(crate) fn sign(&self, mut admin: Admin) -> Admin {
        if let Some(actor) = &self.actor {
            admin = admin.by(actor);
        }
        if let Some(reason) = &self.reason {
            admin = admin.because(reason);
        }
        admin
    }
}

/// How a change of many requests goes.
#[derive(Args, Debug)]
pub(crate) struct Many {
    #[command(flatten)]
    filter: FilterArgs,
    /// All requests, without a filter
    #[arg(long, conflicts_with = "id")]
    all: bool,
    /// At most this many requests a second
    #[arg(long, value_name = "NUMBER", conflicts_with = "id")]
    rate: Option<f64>,
    /// Waits until the operation has ended
    #[arg(long, conflicts_with = "id")]
    wait: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Change {
    /// One request. Without it, those of a filter
    #[arg(value_parser = super::request_id)]
    id: Option<RequestId>,
    #[command(flatten)]
    many: Many,
    #[command(flatten)]
    author: Author,
    #[command(flatten)]
    yes: Yes,
}

/// What became of an ambiguous request.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Arrived {
    /// The receiver has it: it ends as completed
    Sent,
    /// The receiver never got it: it is sent again
    NotSent,
}

#[derive(Args, Debug)]
pub(crate) struct Resolve {
    /// What became of the ambiguous request
    #[arg(long = "as", value_name = "sent|not-sent")]
    arrived: Arrived,
    #[command(flatten)]
    change: Change,
}

impl Resolve {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        let resolution = match self.arrived {
            Arrived::Sent => Resolution::Sent,
            Arrived::NotSent => Resolution::NotSent,
        };
        self.change
            .run(Action::Resolve(resolution), target, out)
            .await
    }
}

impl Change {
    pub(crate) async fn run(
        &self,
        action: Action,
        target: &Target,
        out: &mut Out,
    ) -> Result<(), Failure> {
        match self.id {
            Some(id) => self.one(id, action, target, out).await,
            None => self.many(action, target, out).await,
        }
    }

    async fn one(
        &self,
        id: RequestId,
        action: Action,
        target: &Target,
        out: &mut Out,
    ) -> Result<(), Failure> {
        if !self.many.filter.filter()?.is_empty() {
            return Err(Failure::usage("give an id or a filter, and not both"));
        }
        if action == Action::Purge {
            let question = format!("Delete the dead letter {id} for good?");
            confirm::serious(out, target, &self.yes, &question)?;
        } else {
            confirm::change(out, target, &self.yes)?;
        }
        let admin = self.author.sign(target.admin().await?);
        let mut new_id = None;
        let done = match action {
            Action::Replay => {
                let replayed = admin.replay(id).await?;
                new_id = Some(replayed);
                format!("replayed as {replayed}")
            }
            Action::Cancel => {
                if !admin.cancel(id).await? {
                    let text = format!("request {id} has ended, so it can't be cancelled");
                    return Err(Failure::new(Code::Refused, text));
                }
                "cancelled".to_owned()
            }
            Action::Resolve(resolution) => {
                admin.resolve(id, resolution).await?;
                "resolved".to_owned()
            }
            Action::Purge => {
                if !admin.purge(id).await? {
                    return Err(Failure::new(
                        Code::NotFound,
                        format!("there is no dead letter {id}"),
                    ));
                }
                "purged".to_owned()
            }
            other => return Err(Failure::usage(format!("{other} needs a filter"))),
        };
        if out.json {
            return out.document(&json!({
                "id": id.to_string(),
                "action": action.as_str(),
                "new_id": new_id.map(|id| id.to_string()),
            }));
        }
        out.line(&done)
    }

    async fn many(&self, action: Action, target: &Target, out: &mut Out) -> Result<(), Failure> {
        let filter = self.many.filter.filter()?;
        if filter.is_empty() && !self.many.all {
            return Err(Failure::new(
                Code::Refused,
                "this would change all requests: give an id, a filter such as --destination, or \
                 --all",
            ));
        }
        let mut new = NewOperation::new(action, filter.clone());
        if let Some(rate) = self.many.rate {
            new = new.rate(rate);
        }
        if self.many.all {
            new = new.all();
        }
        let admin = self.author.sign(target.admin().await?);
        let preview = admin.preview(action, &filter).await?;
        if preview.count.number == 0 {
            if out.json {
                let preview = preview_json(&preview);
                return out.document(&json!({ "preview": preview, "operation": null }));
            }
            return out.line("no such requests: nothing to do");
        }
        if !out.json {
            show_preview(&preview, action, out)?;
            out.flush()?;
        }
        let question = format!("{} {} requests?", verb(action), preview.count);
        if let Err(refused) = confirm::serious(out, target, &self.yes, &question) {
            if out.json {
                let preview = preview_json(&preview);
                out.document(&json!({ "preview": preview, "operation": null }))?;
            }
            return Err(refused);
        }
        let id = admin.start(&new).await?;
        if !self.many.wait {
            if out.json {
                let (preview, id) = (preview_json(&preview), id.to_string());
                return out.document(&json!({ "preview": preview, "operation": id }));
            }
            out.line(&format!("operation {id}"))?;
            out.note(&format!(
                "runners carry it out; follow it: requeuest ops wait {id}"
            ));
            return Ok(());
        }
        out.note(&format!("operation {id}"));
        ops::wait(&admin, id, out).await
    }
}

fn verb(action: Action) -> &'static str {
    match action {
        Action::Replay => "Replay",
        Action::Cancel => "Cancel",
        Action::Resolve(Resolution::Sent) => "Resolve as sent",
        Action::Resolve(Resolution::NotSent) => "Resolve as not sent, and send again,",
        Action::Purge => "Delete for good",
        _ => "Change",
    }
}

fn preview_json(preview: &Preview) -> Value {
    let destinations = preview.by_destination.iter();
    let count = |count: &Count| json!({ "number": count.number, "is_exact": count.is_exact });
    json!({
        "count": count(&preview.count),
        "oldest": json::maybe_time(preview.oldest),
        "newest": json::maybe_time(preview.newest),
        "by_destination": destinations
            .map(|(name, number)| json!({ "destination": name, "count": count(number) }))
            .collect::<Vec<_>>(),
    })
}

fn show_preview(preview: &Preview, action: Action, out: &mut Out) -> Result<(), Failure> {
    out.line(&format!("{action}: {} requests", preview.count))?;
    if let (Some(oldest), Some(newest)) = (preview.oldest, preview.newest) {
        out.field("oldest", &when::both(oldest))?;
        out.field("newest", &when::both(newest))?;
    }
    let mut table = Table::new(["destination", "requests"]);
    for (name, count) in &preview.by_destination {
        table.row([name.as_str().into(), count.to_string().into()]);
    }
    if table.is_empty() {
        return Ok(());
    }
    out.table(&table)
}
