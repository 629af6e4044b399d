//! `requeuest show`.

use clap::Args;
use requeuest::RequestId;
use requeuest::admin::RequestInfo;

use super::status_style;
use crate::failure::{Code, Failure};
use crate::json;
use crate::out::{Out, Style};
use crate::table::{Cell, Table};
use crate::target::Target;
use crate::text;
use crate::when;

#[derive(Args, Debug)]
pub(crate) struct Show {
    /// The id of the request
    #[arg(value_parser = super::request_id)]
    id: RequestId,
}

impl Show {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        let admin = target.admin().await?;
        let Some(request) = admin.request(self.id).await? else {
            return Err(unknown(self.id));
        };
        if out.json {
            return out.document(&json::request(&request));
        }
        fields(&request, out)?;
        attempts(&request, out)
    }
}

pub(crate) fn unknown(id: RequestId) -> Failure {
    Failure::new(
        Code::NotFound,
        format!("there is no request {id}, or its outcome has expired"),
    )
}

fn fields(request: &RequestInfo, out: &mut Out) -> Result<(), Failure> {
    let method = request.method.as_deref().unwrap_or("?");
    let destination = request.destination.as_deref().unwrap_or("?");
    let status = request.status.as_str();
    out.field("request", &request.id.to_string())?;
    let status = out.paint(status_style(request.status), status);
    out.field("status", &status)?;
    if let Some(hold) = &request.hold {
        let hold = out.paint(Style::Bold, &text::line(&hold.to_string()));
        out.field("why not sent", &hold)?;
    }
    if let Some(error) = &request.error {
        let class = request.error_class.as_ref();
        let class = class.map_or(String::new(), |class| format!("{class}: "));
        out.field("error", &text::line(&format!("{class}{error}")))?;
    }
    if let Some(status) = request.http_status {
        out.field("HTTP status", &status.to_string())?;
    }
    out.field("sends", &text::line(&format!("{method} {destination}")))?;
    out.field("channel", &text::line(&request.channel))?;
    if let Some(key) = &request.ordering_key {
        out.field("ordering key", &text::line(key))?;
    }
    out.field("attempts", &request.attempts.to_string())?;
    for (name, time) in [
        ("enqueued", Some(request.created_at)),
        ("due", request.due_at),
        ("deadline", request.deadline),
        ("ended", request.finished_at),
    ] {
        if let Some(time) = time {
            out.field(name, &when::both(time))?;
        }
    }
    if let Some(id) = request.replayed_as {
        out.field("replayed as", &id.to_string())?;
    }
    Ok(())
}

fn attempts(request: &RequestInfo, out: &mut Out) -> Result<(), Failure> {
    if request.failed_attempts.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(["attempt", "ended", "took", "HTTP", "class", "error"]);
    for attempt in &request.failed_attempts {
        table.row([
            attempt.number.to_string().into(),
            when::both(attempt.ended_at).into(),
            when::rough(attempt.duration).into(),
            attempt
                .http_status
                .map_or(String::new(), |status| status.to_string())
                .into(),
            Cell::styled(&attempt.error_class, Style::Bad),
            attempt.error.as_str().into(),
        ]);
    }
    out.heading("Failed attempts")?;
    out.table(&table)
}
