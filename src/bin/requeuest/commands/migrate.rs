//! `requeuest migrate`.

use clap::Args;
use requeuest::migrate::{DatabaseRole, MigrationStatus, Migrator};
use serde_json::json;

use crate::args::Global;
use crate::confirm::{self, Yes};
use crate::failure::Failure;
use crate::out::{Out, Style};
use crate::target::Target;

#[derive(Args, Debug)]
pub(crate) struct Migrate {
    /// Prints the script of the migrations instead, for psql or another tool. Needs no database
    #[arg(long, conflicts_with_all = ["down", "status"])]
    print: bool,
    /// With --print: only the migrations after this version
    #[arg(long, value_name = "VERSION", requires = "print", default_value_t = 0)]
    after: i64,
    /// Removes the schema, with all requests and outcomes in it
    #[arg(long, conflicts_with = "status")]
    down: bool,
    /// Shows which migrations the schema has, and changes nothing
    #[arg(long)]
    status: bool,
    /// Gives a role what its part needs: enqueue, runner, read-only or report
    #[arg(
        long,
        value_name = "PART=ROLE",
        value_parser = grant,
        conflicts_with_all = ["down", "status"]
    )]
    grant: Vec<(DatabaseRole, String)>,
    #[command(flatten)]
    yes: Yes,
}

fn grant(text: &str) -> Result<(DatabaseRole, String), String> {
    let wanted = "must be enqueue=ROLE, runner=ROLE, read-only=ROLE or report=ROLE";
    let (part, role) = text.split_once('=').ok_or(wanted)?;
    let part = match part {
        "enqueue" => DatabaseRole::Enqueue,
        "runner" => DatabaseRole::Runner,
        "read-only" => DatabaseRole::ReadOnly,
        "report" => DatabaseRole::Report,
        _ => return Err(wanted.to_owned()),
    };
    Ok((part, role.to_owned()))
}

impl Migrate {
    pub(crate) async fn run(&self, global: &Global, out: &mut Out) -> Result<(), Failure> {
        if self.print {
            return self.print(global, out);
        }
        let target = Target::find(global)?;
        let migrator = self.migrator(&target.schema);
        if self.status {
            return show(&status(&migrator, &target).await?, out);
        }
        if self.down {
            let question = format!(
                "Remove the schema {} with all requests and outcomes in it?",
                target.schema
            );
            confirm::serious(out, &target, &self.yes, &question)?;
            let done = migrator.undo_url(&target.url).await;
            done.map_err(|error| Failure::migrating(&error))?;
            if out.json {
                return out.document(&json!({ "schema": target.schema, "removed": true }));
            }
            return out.line(&format!("removed the schema {}", target.schema));
        }
        confirm::change(out, &target, &self.yes)?;
        let before = status(&migrator, &target).await?;
        let done = migrator.run_url(&target.url).await;
        done.map_err(|error| Failure::migrating(&error))?;
        if out.json {
            let schema = &target.schema;
            return out.document(&json!({ "schema": schema, "applied": before.pending }));
        }
        let done = match before.pending.len() {
            0 => "nothing to migrate".to_owned(),
            1 => "applied 1 migration".to_owned(),
            number => format!("applied {number} migrations"),
        };
        out.line(&done)
    }

    fn print(&self, global: &Global, out: &mut Out) -> Result<(), Failure> {
        let schema = global.schema.as_deref();
        let migrator = self.migrator(schema.unwrap_or(requeuest::migrate::DEFAULT_SCHEMA));
        let script = migrator.sql(self.after).map_err(Failure::usage)?;
        if out.json {
            return out.document(&json!({ "sql": script }));
        }
        out.bytes(script.as_bytes())
    }

    fn migrator(&self, schema: &str) -> Migrator {
        let migrator = Migrator::new().schema(schema);
        self.grant.iter().fold(migrator, |migrator, (part, role)| {
            migrator.grants(*part, role)
        })
    }
}

async fn status(migrator: &Migrator, target: &Target) -> Result<MigrationStatus, Failure> {
    let status = migrator.status_url(&target.url).await;
    status.map_err(|error| Failure::migrating(&error))
}

fn show(status: &MigrationStatus, out: &mut Out) -> Result<(), Failure> {
    if out.json {
        return out.document(&json!({
            "applied": status.applied,
            "pending": status.pending,
            "newer": status.newer,
        }));
    }
    for (versions, word, style) in [
        (&status.applied, "applied", Style::Good),
        (&status.pending, "pending", Style::Doubtful),
        (&status.newer, "of a newer release", Style::Plain),
    ] {
        for version in versions {
            let word = out.paint(style, word);
            out.line(&format!("{version} {word}"))?;
        }
    }
    Ok(())
}
