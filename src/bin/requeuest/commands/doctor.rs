//! `requeuest doctor`: what the library's examination of the database finds.

use requeuest::admin::{Finding, Severity};
use serde_json::json;

use crate::failure::{Code, Failure};
use crate::out::{Out, Style};
use crate::table::{Cell, Table};
use crate::target::Target;
use crate::text;

/// Fails with a code of its own if there is a problem. Warnings are shown only.
pub(crate) async fn run(target: &Target, out: &mut Out) -> Result<(), Failure> {
    let findings = target.admin_builder().doctor().await?;
    let has_problem = findings.iter().any(|it| it.severity == Severity::Problem);
    if out.json {
        out.document(&json!({ "findings": findings }))?;
    } else {
        print(&findings, out)?;
    }
    if has_problem {
        return Err(Failure::silent(Code::Problems));
    }
    Ok(())
}

fn print(findings: &[Finding], out: &mut Out) -> Result<(), Failure> {
    let mut table = Table::new(["check", "", "finding"]);
    for finding in findings {
        let style = match finding.severity {
            Severity::Ok => Style::Good,
            Severity::Warning => Style::Doubtful,
            Severity::Problem => Style::Bad,
            _ => Style::Plain,
        };
        table.row([
            finding.check.as_str().into(),
            Cell::styled(finding.severity.as_str(), style),
            finding.summary.as_str().into(),
        ]);
    }
    out.table(&table)?;
    let advised = findings
        .iter()
        .filter_map(|it| Some((it, it.advice.as_ref()?)));
    let advised: Vec<_> = advised.collect();
    if advised.is_empty() {
        return Ok(());
    }
    out.heading("What to do")?;
    for (finding, advice) in advised {
        out.line(&format!(
            "{}: {}",
            finding.check.as_str(),
            text::line(advice)
        ))?;
    }
    Ok(())
}
