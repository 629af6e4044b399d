//! What the tables of `CONTRIBUTING.md` promise, and how wide lines are.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Columns, for code, comments, SQL and Markdown prose.
const MAX_WIDTH: usize = 100;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// All files below these folders whose names end so, relative to the root.
fn files(folders: &[&str], endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = folders.iter().map(|name| root().join(name)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" {
                    folders.push(path);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    assert!(!found.is_empty());
    found
}

/// The cells of the table below a heading of `CONTRIBUTING.md`, without its head.
fn table(contributing: &str, heading: &str) -> Vec<Vec<String>> {
    let (_, section) = contributing.split_once(heading).unwrap();
    let rows = section
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2);
    let cells = |row: &str| -> Vec<String> {
        let row = row.trim_matches('|');
        row.split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    let rows: Vec<_> = rows.map(cells).collect();
    assert!(!rows.is_empty(), "{heading} has no table");
    rows
}

/// What stands between pairs of a quotation mark.
fn quoted(cell: &str, mark: char) -> Vec<String> {
    cell.split(mark)
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// A source file without its tests and its comments.
fn code(source: &str) -> String {
    let tests = ["\n#[cfg(test)]\nmod ", "\n#[cfg(all(test, "].map(|start| source.find(start));
    let end = tests.into_iter().flatten().min().unwrap_or(source.len());
    let lines = source[..end].lines();
    let code = lines.filter(|line| !line.trim_start().starts_with("//"));
    code.collect::<Vec<_>>().join("\n")
}

/// The source of a file with `super::` paths that lead to the crate's root written out.
fn from_root(path: &Path, source: &str) -> String {
    let depth = path.strip_prefix("src").unwrap().components().count();
    let is_root_of_folder = path.ends_with("mod.rs");
    let supers = "super::".repeat(depth - usize::from(is_root_of_folder));
    source.replace(&supers, "crate::")
}

/// The first names of the paths behind `crate::`: of `{id::RequestId, error::{Error, Kind}}` they
/// are `id` and `error`.
fn first_names(path: &str) -> Vec<String> {
    let name = |path: &str| -> String {
        let path = path.trim_start();
        let end = |char: char| !char.is_alphanumeric() && char != '_';
        // A glob, or anything else that is no name, is shown as it is.
        path[..path.find(end).unwrap_or(path.len()).max(1)].to_owned()
    };
    let Some(list) = path.strip_prefix('{') else {
        return vec![name(path)];
    };
    let mut names = Vec::new();
    let mut depth = 0;
    let mut start = 0;
    for (at, char) in list.char_indices() {
        match char {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                if !list[start..at].trim().is_empty() {
                    names.push(name(&list[start..at]));
                }
                start = at + 1;
                if char == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names
}

struct Layers {
    /// The row of each module, counted from the top.
    rows: BTreeMap<String, usize>,
    /// The module that each name at the crate's root comes from.
    exports: BTreeMap<String, String>,
}

impl Layers {
    fn new() -> Self {
        let rows = table(&read("CONTRIBUTING.md"), "## The layers")
            .iter()
            .enumerate()
            .flat_map(|(row, cells)| {
                let modules = quoted(&cells[1], '`').into_iter();
                modules.map(move |module| (module, row))
            })
            .collect();
        let exports = code(&read("src/lib.rs"))
            .split(';')
            .filter_map(|statement| statement.split_once("pub use "))
            .filter_map(|(_, path)| path.split_once("::"))
            .flat_map(|(module, names)| {
                let names = names.rsplit("::").next().unwrap_or_default();
                let names = names.trim_matches(['{', '}']).split(',');
                names.map(move |name| (name.trim().to_owned(), module.to_owned()))
            })
            .collect();
        Self { rows, exports }
    }

    /// The row of a module, or of a name at the crate's root.
    fn row(&self, name: &str) -> Option<usize> {
        let module = self.exports.get(name).map_or(name, |module| module);
        self.rows.get(module).copied()
    }

    /// What a source of this module imports from rows below its own.
    fn upward(&self, module: &str, source: &str) -> Vec<String> {
        let own = self.row(module);
        let code = code(source);
        let paths = code.split("crate::").skip(1).flat_map(first_names);
        let aliased = code.contains("use crate as ").then(|| "crate".to_owned());
        paths
            .chain(aliased)
            .filter(|name| match self.row(name) {
                Some(row) => own.is_none_or(|own| row > own),
                None => true,
            })
            .collect()
    }
}

/// The module that a file below `src/` belongs to.
fn module(path: &Path) -> String {
    let path = path.strip_prefix("src").unwrap();
    let first = path.iter().next().unwrap().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

#[test]
fn a_module_uses_only_its_own_layer_and_those_above() {
    let layers = Layers::new();
    let mut broken = Vec::new();
    for path in files(&["src"], &[".rs"]) {
        let module = module(&path);
        // The program is a crate of its own, over the public items.
        if matches!(&*module, "lib" | "bin") {
            continue;
        }
        assert!(layers.row(&module).is_some(), "{module} has no layer");
        for name in layers.upward(&module, &from_root(&path, &read(&path))) {
            broken.push(format!("{} uses {name}", path.display()));
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn the_layer_check_finds_imports_from_below() {
    let layers = Layers::new();
    let found = |module, source| layers.upward(module, source);
    assert_eq!(found("store", "use crate::engine::Engine;"), ["engine"]);
    assert_eq!(
        found(
            "store",
            "use crate::{options::{Guarantee, Options}, durable::Durable};"
        ),
        ["durable"]
    );
    assert_eq!(found("store", "use crate::*;"), ["*"]);
    assert_eq!(found("store", "use crate as root;"), ["crate"]);
    let finish = Path::new("src/store/settle/finish.rs");
    let source = from_root(finish, "use super::super::super::engine::Engine;");
    assert_eq!(found("store", &source), ["engine"]);
    let source = from_root(finish, "use super::super::Store;");
    assert!(found("store", &source).is_empty());
    assert_eq!(
        found("engine", "let _ = crate::Durable::new(pool);"),
        ["Durable"]
    );
    assert_eq!(found("id", "use crate::unheard_of;"), ["unheard_of"]);
    assert!(
        found(
            "engine",
            "use crate::store::Store;\nuse crate::error::Error;"
        )
        .is_empty()
    );
    assert!(found("store", "/// See [`Durable`](crate::Durable).").is_empty());
}

/// Whether a line of this module names a type of sqlx that it may not name, a table of the queue,
/// or SQL.
fn reaches_into_the_store(module: &str, line: &str) -> bool {
    // What callers pass in.
    let callers = [
        "PgPool",
        "PgExecutor",
        "PgConnection",
        "postgres::PgConnectOptions",
    ];
    let sql = [
        "mq_msgs",
        "mq_payloads",
        "SELECT ",
        "INSERT ",
        "UPDATE ",
        "DELETE ",
    ];
    let names_sqlx = line.contains("use sqlx as")
        || line.split("sqlx::").skip(1).any(|path| match module {
            "durable" | "layer" | "client" => {
                let path = path.trim_matches(['{', '}', ';']);
                !path.split(", ").all(|name| callers.contains(&name))
            }
            // The source of a database error.
            "error" => !path.starts_with("Error") && !path.starts_with("error::"),
            _ => true,
        });
    names_sqlx || sql.iter().any(|sql| line.contains(sql))
}

#[test]
fn only_the_store_names_sqlx_and_its_tables() {
    let mut found = Vec::new();
    for path in files(&["src"], &[".rs"]) {
        let module = module(&path);
        if matches!(&*module, "store" | "migrate" | "testkit" | "lib") {
            continue;
        }
        for line in code(&read(&path)).lines() {
            if reaches_into_the_store(&module, line) {
                found.push(format!("{}: {}", path.display(), line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_sqlx_check_finds_types_tables_and_statements() {
    let reaches = reaches_into_the_store;
    assert!(reaches("engine", "use sqlx::PgPool;"));
    assert!(reaches("durable", "use sqlx::{PgPool, Postgres};"));
    assert!(reaches("error", "Database(sqlx::Error), sqlx::PgPool"));
    assert!(reaches("engine", "use sqlx as db;"));
    assert!(reaches("engine", r#"let poll = "mq_msgs";"#));
    assert!(reaches("engine", r#"run("SELECT 1")"#));
    assert!(!reaches("durable", "use sqlx::{PgExecutor, PgPool};"));
    assert!(!reaches("error", "Database(sqlx::Error),"));
    assert!(!reaches("engine", "use sqlxmq::CurrentJob;"));
}

#[test]
fn the_core_does_no_io_and_takes_time_as_an_argument() {
    let layers = Layers::new();
    let io = [
        "tokio::",
        "sqlxmq",
        "hyper_util::client",
        "std::net",
        "std::fs",
        "std::io",
        "std::env",
        "std::process",
        "std::thread",
        "Instant::now",
        "SystemTime::now",
        "reqwest::Client",
        "fastrand",
        "tracing::",
    ];
    let mut found = Vec::new();
    let mut checked = 0;
    for path in files(&["src"], &[".rs"]) {
        if layers.row(&module(&path)) != Some(0) {
            continue;
        }
        checked += 1;
        for line in code(&read(&path)).lines() {
            if io.iter().any(|io| line.contains(io)) {
                found.push(format!("{}: {}", path.display(), line.trim()));
            }
        }
    }
    assert!(checked > 10);
    assert!(found.is_empty(), "{found:#?}");
}

/// The phrases that occur in a text, with the numbers of their lines.
fn occurring(phrases: &[String], text: &str) -> Vec<(usize, String)> {
    // In quotes, or in a line of passwd, `nobody` is a user.
    let apart = |char: char| !char.is_alphanumeric() && !"`\":".contains(char);
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = format!(" {} ", line.to_lowercase());
        for phrase in phrases {
            let mut places = line.match_indices(&**phrase);
            if places.any(|(at, _)| {
                line[..at].ends_with(apart) && line[at + phrase.len()..].starts_with(apart)
            }) {
                found.push((number + 1, phrase.clone()));
            }
        }
    }
    found
}

#[test]
fn words_have_the_meaning_that_contributing_gives_them() {
    let banned: Vec<String> = table(&read("CONTRIBUTING.md"), "## The words")
        .iter()
        .flat_map(|cells| quoted(&cells[2], '"'))
        .collect();
    assert!(banned.len() > 5);
    let mut found = Vec::new();
    let folders = ["src", "migrations", "tests", "benches", "examples", "docs"];
    for path in files(&folders, &[".rs", ".sql", ".md"]) {
        for (line, phrase) in occurring(&banned, &read(&path)) {
            found.push(format!("{}:{line}: {phrase}", path.display()));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_word_check_finds_words_but_no_parts_and_no_names() {
    let phrases = ["holds it".to_owned(), "user".to_owned()];
    let found = occurring(
        &phrases,
        "The users.\n// It holds it, the User\n`user` \"user\"",
    );
    assert_eq!(found, [(2, phrases[0].clone()), (2, phrases[1].clone())]);
}

/// The numbers of the lines that are too wide. URLs can't be broken, nor can rows of a table.
fn too_wide(text: &str, is_markdown: bool) -> Vec<usize> {
    let wide = text.lines().enumerate().filter(|(_, line)| {
        let is_row = is_markdown && line.starts_with('|');
        line.chars().count() > MAX_WIDTH && !is_row && !line.contains("://")
    });
    wide.map(|(number, _)| number + 1).collect()
}

#[test]
fn lines_are_no_wider_than_100_columns() {
    let mut found = Vec::new();
    let folders = ["src", "migrations", "tests", "benches", "examples", "docs"];
    let mut paths = files(&folders, &[".rs", ".sql", ".md"]);
    paths.extend(["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(PathBuf::from));
    for path in paths {
        // The schema of sqlxmq as its authors wrote it.
        if path.starts_with("benches/peers/migrations") {
            continue;
        }
        let is_markdown = path.extension().is_some_and(|ending| ending == "md");
        for line in too_wide(&read(&path), is_markdown) {
            found.push(format!("{}:{line}", path.display()));
        }
    }
    assert!(found.is_empty(), "{} lines: {found:#?}", found.len());
}

#[test]
fn the_width_check_finds_wide_lines_but_no_urls_and_rows() {
    let line = |length: usize| "x".repeat(length);
    let text = format!("{}\n{}\n| {}\n://{0}", line(100), line(101), line(100));
    assert_eq!(too_wide(&text, true), [2]);
    assert_eq!(too_wide(&text, false), [2, 3]);
}

/// The names of tests in the last cells of a page's tables.
fn named_tests(page: &str) -> Vec<String> {
    let rows = page.lines().filter(|line| line.starts_with("| "));
    let cells = rows.filter_map(|row| row.trim_end_matches([' ', '|']).rsplit(" | ").next());
    let names = cells.flat_map(|cell| quoted(cell, '`'));
    names.filter(|name| !name.ends_with('/')).collect()
}

/// Whether there is a test of this name: `module::of::a_test`, `a_test` anywhere in `tests/it`, or
/// a file.
fn is_test(name: &str, sources: &[(PathBuf, String)]) -> bool {
    if name.contains('/') {
        return root().join(name).is_file();
    }
    let (module, test) = match name.rsplit_once("::") {
        Some((module, test)) => (Some(module), test),
        None => (None, name),
    };
    let function = format!("fn {test}(");
    let is_in = |path: &Path| {
        let path = path.with_extension("");
        let path = if path.ends_with("mod") {
            path.parent().unwrap()
        } else {
            &path
        };
        let path: Vec<_> = path.iter().filter_map(|part| part.to_str()).collect();
        match (&*path, module) {
            (["tests", "it", ..], None) => true,
            (["tests", "it", rest @ ..] | ["src", rest @ ..], Some(module)) => {
                let path = rest.join("::");
                path == module || path + "::tests" == module
            }
            _ => false,
        }
    };
    let mut found = sources.iter().filter(|(path, _)| is_in(path));
    found.any(|(_, source)| source.contains(&function))
}

fn sources() -> Vec<(PathBuf, String)> {
    let files = files(&["src", "tests/it"], &[".rs"]).into_iter();
    files.map(|path| (path.clone(), read(path))).collect()
}

#[test]
fn the_tests_that_pages_name_exist() {
    let sources = sources();
    for page in ["SECURITY.md", "docs/faults.md"] {
        let names = named_tests(&read(page));
        assert!(names.len() > 30, "{page}: {names:?}");
        let missing: Vec<_> = names.iter().filter(|it| !is_test(it, &sources)).collect();
        assert_eq!(missing, [""; 0], "{page}");
    }
}

#[test]
fn the_check_of_named_tests_finds_modules_and_unknown_names() {
    let sources = sources();
    let page = "| a | b | `house::no_test`, `house` |\n| a | `x` | `house::the_tests_that_pages_\
                name_exist`, `error::tests::none` in `src/` |";
    let names = named_tests(page);
    let missing: Vec<_> = names.iter().filter(|it| !is_test(it, &sources)).collect();
    assert_eq!(missing, ["house::no_test", "house", "error::tests::none"]);
}
