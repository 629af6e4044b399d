//! `requeuest list` and `requeuest tail`.

use std::collections::HashMap;
use std::time::Duration;

use clap::Args;
use requeuest::RequestId;
use requeuest::admin::{
    Admin, Cursor, DEFAULT_PAGE_LIMIT, MAX_PAGE_LIMIT, PageRequest, RequestFilter, RequestSummary,
};
use serde_json::json;

use super::status_style;
use crate::failure::Failure;
use crate::filter::FilterArgs;
use crate::json;
use crate::out::{Out, Style};
use crate::table::{Cell, Table};
use crate::target::Target;
use crate::text;
use crate::when;

/// As long as an error is shown in a list.
const ERROR_WIDTH: usize = 60;

#[derive(Args, Debug)]
pub(crate) struct List {
    #[command(flatten)]
    filter: FilterArgs,
    /// At most this many requests: 1 to 1000
    #[arg(long, short = 'n', value_name = "NUMBER", default_value_t = DEFAULT_PAGE_LIMIT)]
    limit: u32,
    /// Continues where a page ended: the `next` of that page
    #[arg(long, value_name = "TOKEN", value_parser = cursor)]
    after: Option<Cursor>,
    /// All pages, and not only one
    #[arg(long)]
    all_pages: bool,
}

fn cursor(text: &str) -> Result<Cursor, String> {
    text.parse()
        .map_err(|error: requeuest::Error| error.to_string())
}

impl List {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        let filter = self.filter.filter()?;
        let admin = target.admin().await?;
        let mut page = PageRequest::new().limit(self.limit);
        if let Some(cursor) = &self.after {
            page = page.after(cursor.clone());
        }
        let mut shown = 0;
        loop {
            let found = admin.requests(&filter, &page).await?;
            shown += found.requests.len();
            // A table of many pages has one header, and columns of the first page's width.
            if out.json && self.all_pages {
                for request in &found.requests {
                    out.json_line(&json::summary(request))?;
                }
            } else if out.json {
                let next = found.next.as_ref().map(ToString::to_string);
                let requests: Vec<_> = found.requests.iter().map(json::summary).collect();
                return out.document(&json!({ "requests": requests, "next": next }));
            } else if !found.requests.is_empty() {
                out.table(&table(&found.requests))?;
                out.flush()?;
            }
            // A page that looked at many requests may have found none.
            let goes_to_next = self.all_pages || found.requests.is_empty();
            match found.next {
                Some(next) if goes_to_next => page = page.after(next),
                Some(next) => {
                    out.note(&format!("more: --after {next}, or --all-pages"));
                    return Ok(());
                }
                None => break,
            }
        }
        if shown == 0 && !out.json {
            out.note("no such requests");
        }
        Ok(())
    }
}

fn table(requests: &[RequestSummary]) -> Table {
    let mut table = Table::new([
        "id", "status", "channel", "attempts", "enqueued", "request", "HTTP", "error",
    ]);
    for request in requests {
        let method = request.method.as_deref().unwrap_or("?");
        let destination = request.destination.as_deref().unwrap_or("?");
        table.row([
            request.id.to_string().into(),
            status(request),
            request.channel.as_str().into(),
            request.attempts.to_string().into(),
            when::relative(request.created_at).into(),
            format!("{method} {destination}").into(),
            request
                .http_status
                .map_or(String::new(), |status| status.to_string())
                .into(),
            Cell::short(error(request), ERROR_WIDTH),
        ]);
    }
    table
}

fn status(request: &RequestSummary) -> Cell {
    match request.status {
        Some(status) => Cell::styled(status.as_str(), status_style(status)),
        None => Cell::styled("unknown", Style::Doubtful),
    }
}

fn error(request: &RequestSummary) -> String {
    match (&request.error_class, &request.error) {
        (Some(class), Some(error)) => format!("{class}: {error}"),
        (Some(error), None) | (None, Some(error)) => error.clone(),
        (None, None) => String::new(),
    }
}

/// How many of the newest requests `tail` looks at.
const TAILED: u32 = MAX_PAGE_LIMIT;

#[derive(Args, Debug)]
pub(crate) struct Tail {
    #[command(flatten)]
    filter: FilterArgs,
    /// How often it looks, such as 500ms or 5s
    #[arg(long, value_name = "TIME", value_parser = when::duration, default_value = "1s")]
    every: Duration,
    /// Ends after this time, such as 10m
    #[arg(long = "for", value_name = "TIME", value_parser = when::duration)]
    time: Option<Duration>,
}

impl Tail {
    /// Prints each change of one of the newest requests. What changed and changed again between two
    /// looks is one line.
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        let filter = self.filter.filter()?;
        let admin = target.admin().await?;
        let mut known = HashMap::new();
        look(&admin, &filter, &mut known).await?;
        out.note("waiting for changes; Ctrl-C ends it");
        let follow = async {
            loop {
                tokio::time::sleep(self.every.max(Duration::from_millis(50))).await;
                for request in look(&admin, &filter, &mut known).await? {
                    if out.json {
                        out.json_line(&json::summary(&request))?;
                    } else {
                        out.line(&line(&request, out))?;
                        out.flush()?;
                    }
                }
            }
        };
        match self.time {
            None => follow.await,
            Some(time) => match tokio::time::timeout(time, follow).await {
                Ok(ended) => ended,
                Err(_) => Ok(()),
            },
        }
    }
}

type Seen = (Option<requeuest::Status>, u32);

/// What changed since the last look, the oldest request first.
async fn look(
    admin: &Admin,
    filter: &RequestFilter,
    known: &mut HashMap<RequestId, Seen>,
) -> Result<Vec<RequestSummary>, Failure> {
    let page = PageRequest::new().limit(TAILED);
    let mut requests = admin.requests(filter, &page).await?.requests;
    let now: HashMap<_, _> = requests
        .iter()
        .map(|request| (request.id, (request.status, request.attempts)))
        .collect();
    requests.retain(|request| known.get(&request.id) != now.get(&request.id));
    requests.reverse();
    *known = now;
    Ok(requests)
}

fn line(request: &RequestSummary, out: &Out) -> String {
    let (name, style) = match request.status {
        Some(status) => (status.as_str(), status_style(status)),
        None => ("unknown", Style::Doubtful),
    };
    let error = error(request);
    let error = if error.is_empty() {
        String::new()
    } else {
        format!("  {}", text::shortened(&text::line(&error), ERROR_WIDTH))
    };
    format!(
        "{}  {}  {}  attempt {}{error}",
        request.id,
        out.paint(style, &format!("{name:<10}")),
        text::line(request.destination.as_deref().unwrap_or("?")),
        request.attempts,
    )
}
