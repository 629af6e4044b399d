//! Whether the schema is there and whole, and what the role may do with it.

use sqlx::{PgConnection, Row};

use super::listed;
use crate::error::{Error, Kind};
use crate::finding::{Check, Finding};
use crate::migrate::{DatabaseRole, Ledger, Right, Tables, expected_indexes, wanted_version};

const MIGRATE: &str = "run `requeuest migrate`, or call requeuest::migrate(&pool)";
const GRANT: &str = "give the role its rights with Migrator::grants, which has to be repeated \
    after an upgrade";

/// Whether the schema is there, whose it is, and whether the role may use it.
pub(super) async fn schema(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::Schema;
    let found = sqlx::query(
        "SELECT
            pg_get_userbyid(n.nspowner)::text AS owner, current_user::text AS role,
            has_schema_privilege(n.oid, 'USAGE') AS usable,
            EXISTS (
                SELECT FROM pg_class c
                WHERE c.relnamespace = n.oid AND c.relname = '_sqlx_migrations'
            ) AS migrated
         FROM pg_namespace n WHERE n.nspname = $1",
    )
    .bind(schema)
    .persistent(false)
    .fetch_optional(&mut *connection)
    .await?;
    let Some(found) = found else {
        let database: String = sqlx::query_scalar("SELECT current_database()::text")
            .persistent(false)
            .fetch_one(connection)
            .await?;
        let summary = format!("there is no schema `{schema}` in the database `{database}`");
        return Ok(vec![check.problem(summary).advise(MIGRATE)]);
    };
    let (owner, role): (String, String) = (found.try_get("owner")?, found.try_get("role")?);
    Ok(vec![if !found.try_get::<bool, _>("migrated")? {
        let summary = format!("the schema `{schema}` of `{owner}` has no ledger of migrations");
        let advice = format!("if it is empty, {MIGRATE}; else choose another name for the schema");
        check.problem(summary).advise(advice)
    } else if found.try_get("usable")? {
        check.ok(format!("the schema `{schema}` belongs to `{owner}`"))
    } else {
        let summary = format!("the role `{role}` may not use the schema `{schema}` of `{owner}`");
        check.problem(summary).advise(GRANT)
    }])
}

/// Whether the schema and this release fit.
pub(super) async fn version(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::Version;
    let row = sqlx::query(&format!("SELECT {}", Tables::COLUMNS))
        .persistent(false)
        .fetch_one(&mut *connection)
        .await?;
    let Some(ledger) = Ledger::read(connection, Tables::from_row(&row)?).await? else {
        let empty = check.problem("the ledger of migrations is empty");
        return Ok(vec![empty.advise(MIGRATE)]);
    };
    let (found, wanted) = (ledger.newest(), wanted_version());
    Ok(vec![match ledger.check(wanted) {
        // The error's text says what to do.
        Err(state) => check.problem(Error::new(Kind::Migrations(state)).to_string()),
        Ok(()) if found > wanted => check
            .note(format!(
                "the schema is at version {found}, newer than this release"
            ))
            .advise("this release works with it; upgrade this process when the others are"),
        Ok(()) => check.ok(format!(
            "the schema is at version {found}, as this release is"
        )),
    }])
}

/// What a role can do, and what it lacks for that.
#[derive(Debug)]
struct Door {
    what: &'static str,
    /// The right that only a role with this purpose has.
    sign: &'static str,
    lacks: Vec<String>,
}

/// Which doors are open to the role.
pub(super) async fn grants(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<Finding>, sqlx::Error> {
    let role: String = sqlx::query_scalar("SELECT current_user::text")
        .persistent(false)
        .fetch_one(&mut *connection)
        .await?;
    let mut doors = Vec::new();
    for (what, part, sign) in [
        ("enqueue", DatabaseRole::Enqueue, "EXECUTE on enqueue"),
        ("read", DatabaseRole::ReadOnly, "SELECT on mq_msgs"),
        (
            "deliver and administrate",
            DatabaseRole::Runner,
            "INSERT on mq_msgs",
        ),
    ] {
        let lacks = lacking(connection, schema, &part.needs()).await?;
        doors.push(Door { what, sign, lacks });
    }
    Ok(vec![grants_finding(&role, &doors)])
}

fn grants_finding(role: &str, doors: &[Door]) -> Finding {
    let check = Check::Grants;
    let (open, closed): (Vec<&Door>, Vec<&Door>) =
        doors.iter().partition(|door| door.lacks.is_empty());
    let names = |doors: &[&Door]| {
        let names: Vec<&str> = doors.iter().map(|door| door.what).collect();
        names.join(", ")
    };
    let half = closed
        .iter()
        .find(|door| !door.lacks.iter().any(|lacking| lacking == door.sign));
    if let Some(half) = half {
        let summary = format!(
            "the role `{role}` is meant to {}, and lacks {}",
            half.what,
            listed(&half.lacks)
        );
        return check.problem(summary).advise(GRANT);
    }
    if open.is_empty() {
        let summary = format!("the role `{role}` can do nothing with the schema");
        return check.problem(summary).advise(GRANT);
    }
    let can = format!("the role `{role}` can {}", names(&open));
    if closed.is_empty() {
        return check.ok(can);
    }
    check
        .note(format!("{can}; it can't {}", names(&closed)))
        .advise("if it should, give it the rights with Migrator::grants")
}

/// Which of these rights the role lacks, as `INSERT on mq_msgs`.
async fn lacking(
    connection: &mut PgConnection,
    schema: &str,
    rights: &[Right],
) -> Result<Vec<String>, sqlx::Error> {
    let part = |part: fn(&Right) -> &'static str| rights.iter().map(part).collect::<Vec<_>>();
    sqlx::query_scalar(
        "SELECT DISTINCT n.wanted || ' on ' || o.name
         FROM unnest($2::text[], $3::text[], $4::text[]) AS n(kind, name, wanted)
         CROSS JOIN LATERAL (
            SELECT c.relname::text, has_table_privilege(c.oid, n.wanted)
            FROM pg_class c
            WHERE n.kind = 'table' AND c.relnamespace = to_regnamespace(quote_ident($1))
                AND c.relkind IN ('r', 'p', 'v') AND (n.name = '*' OR c.relname = n.name)
            UNION ALL
            SELECT p.proname::text, has_function_privilege(p.oid, n.wanted)
            FROM pg_proc p
            WHERE n.kind = 'function' AND p.pronamespace = to_regnamespace(quote_ident($1))
                AND (n.name = '*' OR p.proname = n.name)
         ) AS o(name, granted)
         WHERE NOT o.granted ORDER BY 1",
    )
    .bind(schema)
    .bind(part(|right| right.kind))
    .bind(part(|right| right.object))
    .bind(part(|right| right.verb))
    .persistent(false)
    .fetch_all(connection)
    .await
}

/// Whether the role may empty the partitions of outcomes.
pub(super) async fn truncate(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::Truncate;
    let needs = |verb: &str| {
        let mut needs = DatabaseRole::Runner.needs();
        needs.retain(|needed| {
            needed.verb == verb
                && needed
                    .object
                    .strip_prefix("outcomes_")
                    .is_some_and(|slot| slot.parse::<u8>().is_ok())
        });
        needs
    };
    let lacks = lacking(connection, schema, &needs("TRUNCATE")).await?;
    if lacks.is_empty() {
        return Ok(vec![check.ok("expired outcomes are removed by TRUNCATE")]);
    }
    if !lacking(connection, schema, &needs("DELETE"))
        .await?
        .is_empty()
    {
        let note = "the role may not remove outcomes, so its processes don't sweep";
        return Ok(vec![check.note(note)]);
    }
    let summary = format!(
        "expired outcomes are deleted row by row: the role lacks {}",
        listed(&lacks)
    );
    Ok(vec![check.warning(summary).advise(GRANT)])
}

/// Indexes that Postgres maintains or keeps, and doesn't use.
pub(super) async fn invalid_indexes(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::InvalidIndexes;
    let invalid: Vec<(String, String, bool)> = sqlx::query_as(
        "SELECT
            c.relname::text, t.relname::text,
            EXISTS (SELECT FROM pg_stat_progress_create_index p WHERE p.index_relid = c.oid)
         FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
         JOIN pg_class t ON t.oid = i.indrelid
         WHERE c.relnamespace = to_regnamespace(quote_ident($1))
            AND NOT (i.indisvalid AND i.indisready AND i.indislive)
         ORDER BY 1 LIMIT 100",
    )
    .bind(schema)
    .persistent(false)
    .fetch_all(connection)
    .await?;
    let (building, left): (Vec<_>, Vec<_>) = invalid.into_iter().partition(|(_, _, built)| *built);
    let name = |(index, table, _): &(String, String, bool)| format!("{index} of {table}");
    let mut found = Vec::new();
    if !left.is_empty() {
        let names: Vec<String> = left.iter().map(name).collect();
        let summary = format!("invalid indexes: {}", listed(&names));
        found.push(check.warning(summary).advise(format!(
            "an index of your own: DROP INDEX CONCURRENTLY \"{schema}\".\"{index}\"; one of the \
             schema's: REINDEX INDEX CONCURRENTLY \"{schema}\".\"{index}\"",
            index = left[0].0
        )));
    }
    if !building.is_empty() {
        let names: Vec<String> = building.iter().map(name).collect();
        found.push(check.note(format!("indexes are being built: {}", listed(&names))));
    }
    if found.is_empty() {
        found.push(check.ok("all indexes are valid"));
    }
    Ok(found)
}

/// Indexes that a migration has made and that are gone.
pub(super) async fn missing_indexes(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::MissingIndexes;
    let missing: Vec<String> = sqlx::query_scalar(
        "SELECT x.name FROM unnest($2::text[]) AS x(name)
         WHERE NOT EXISTS (
            SELECT FROM pg_class c
            WHERE c.relnamespace = to_regnamespace(quote_ident($1))
                AND c.relname = x.name AND c.relkind IN ('i', 'I')
         )",
    )
    .bind(schema)
    .bind(expected_indexes())
    .persistent(false)
    .fetch_all(connection)
    .await?;
    Ok(vec![if missing.is_empty() {
        check.ok("all indexes of the schema are there")
    } else {
        let summary = format!("missing indexes: {}", listed(&missing));
        check.problem(summary).advise(
            "make them again as the migrations do, with CREATE INDEX CONCURRENTLY: \
             `requeuest migrate --print` shows the statements",
        )
    }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::Severity;

    #[test]
    fn a_role_that_lacks_a_part_of_its_rights_is_a_problem() {
        let door = |what, sign, lacks: &[&str]| Door {
            what,
            sign,
            lacks: lacks.iter().map(|&lacking| lacking.to_owned()).collect(),
        };
        let read = door("read", "SELECT on a", &[]);
        let no_run = door("run", "INSERT on a", &["INSERT on a", "INSERT on b"]);
        let half_run = door("run", "INSERT on a", &["INSERT on b"]);
        assert_eq!(grants_finding("r", &[]).severity, Severity::Problem);
        let note = grants_finding("r", &[read, no_run]);
        assert_eq!(note.severity, Severity::Note);
        assert_eq!(note.summary, "the role `r` can read; it can't run");
        let half = grants_finding("r", &[half_run]);
        assert_eq!(half.severity, Severity::Problem);
        assert!(half.summary.ends_with("lacks INSERT on b"), "{half:?}");
    }
}
