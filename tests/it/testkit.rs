//! The test kit: mostly that no server, process or directory stays behind.

#[cfg(unix)]
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
#[cfg(unix)]
use std::time::{Duration, Instant};

use requeuest::testkit::{Postgres, StopMode};
use sqlx::{Connection, PgConnection};

use crate::support::{self, plays};

async fn number(url: &str, query: &str) -> i32 {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let number = sqlx::query_scalar(query).fetch_one(&mut connection).await;
    number.unwrap()
}

async fn text(url: &str, query: &str) -> String {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let text = sqlx::query_scalar(query).fetch_one(&mut connection).await;
    text.unwrap()
}

#[tokio::test]
async fn a_started_server_answers() {
    let postgres = Postgres::start().await.unwrap();
    assert_eq!(number(&postgres.url(), "SELECT 1").await, 1);

    let database = postgres.database().await.unwrap();
    let name: String = sqlx::query_scalar("SELECT current_database()::text")
        .fetch_one(database.pool())
        .await
        .unwrap();
    assert_eq!(name, database.name());
    assert_eq!(number(database.url(), "SELECT 2").await, 2);
}

#[tokio::test]
async fn databases_do_not_see_each_others_tables() {
    let postgres = Postgres::shared().await.unwrap();
    let one = postgres.database().await.unwrap();
    let other = postgres.database().await.unwrap();
    assert_ne!(one.name(), other.name());

    let create = "CREATE TABLE only_here (x int)";
    sqlx::query(create).execute(one.pool()).await.unwrap();
    let seen: Option<String> = sqlx::query_scalar("SELECT to_regclass('only_here')::text")
        .fetch_one(other.pool())
        .await
        .unwrap();
    assert_eq!(seen, None);
}

#[test]
fn two_runtimes_share_one_server() {
    let ask = || {
        std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let postgres = Postgres::shared().await.unwrap();
                let database = postgres.database().await.unwrap();
                assert_eq!(number(database.url(), "SELECT 1").await, 1);
                postgres.url()
            })
        })
    };
    // Two runtimes at the same time, then one after their end.
    let (one, other) = (ask(), ask());
    let urls = [one.join().unwrap(), other.join().unwrap()];
    assert_eq!(urls[0], urls[1]);
    assert_eq!(urls[0], ask().join().unwrap());
}

#[tokio::test]
async fn a_restart_keeps_the_data_and_the_url() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    let database = postgres.database().await.unwrap();
    let create = "CREATE TABLE t (x int)";
    sqlx::query(create).execute(database.pool()).await.unwrap();

    for (x, mode) in [(1, StopMode::Fast), (2, StopMode::Immediate)] {
        let insert = sqlx::query("INSERT INTO t VALUES ($1)").bind(x);
        insert.execute(database.pool()).await.unwrap();
        postgres.restart(mode).await.unwrap();
        let count = number(database.url(), "SELECT count(*)::int FROM t").await;
        assert_eq!(count, x);
    }
}

#[tokio::test]
async fn a_stopped_server_refuses_connections_until_it_is_resumed() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    postgres.stop(StopMode::Immediate).await.unwrap();
    postgres.stop(StopMode::Fast).await.unwrap();
    PgConnection::connect(&postgres.url()).await.unwrap_err();

    postgres.resume().await.unwrap();
    postgres.resume().await.unwrap();
    assert_eq!(number(&postgres.url(), "SELECT 1").await, 1);
}

#[cfg(unix)]
#[tokio::test]
async fn a_crashed_server_can_be_resumed() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    let trace = Trace::of(&postgres.url()).await;
    trace.signal("KILL");
    postgres.resume().await.unwrap();
    assert_eq!(number(&postgres.url(), "SELECT 1").await, 1);
}

#[tokio::test]
async fn settings_reach_the_server() {
    let postgres = Postgres::builder()
        .config("max_connections", "7")
        .config("application_name", "it's = a test")
        .start()
        .await
        .unwrap();
    assert_eq!(text(&postgres.url(), "SHOW fsync").await, "off");
    assert_eq!(text(&postgres.url(), "SHOW max_connections").await, "7");
    let name = text(&postgres.url(), "SHOW application_name").await;
    assert_eq!(name, "it's = a test");
}

#[tokio::test]
async fn a_refused_setting_fails_with_the_servers_log() {
    let builder = Postgres::builder().config("no_such_setting", "1");
    let error = builder.start().await.unwrap_err();
    assert!(error.to_string().contains("no_such_setting"), "{error}");
}

#[tokio::test]
async fn a_directory_without_postgres_is_named_in_the_error() {
    let builder = Postgres::builder().bin_dir("/nonexistent/bin");
    let error = builder.start().await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/bin"), "{error}");
}

#[tokio::test]
async fn starting_can_be_spawned() {
    let started = tokio::spawn(async { Postgres::shared().await?.database().await });
    started.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_server_of_database_url_is_used_and_left_tidy() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    let url = postgres.url().replace("postgres@", "postgres:secret@");
    let output = part("be_given_a_server")
        .env("DATABASE_URL", &url)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    let port = url
        .split(':')
        .next_back()
        .unwrap()
        .split('/')
        .next()
        .unwrap();
    assert!(said.contains(&format!("127.0.0.1:{port}")), "{said}");
    assert!(!said.contains("secret"), "{said}");

    let left = "SELECT count(*)::int FROM pg_database WHERE datname LIKE 'requeuest%'";
    assert_eq!(number(&postgres.url(), left).await, 0);
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn be_given_a_server() {
    if !plays("be_given_a_server") {
        return;
    }
    let postgres = Postgres::start().await.unwrap();
    assert_eq!(postgres.url(), std::env::var("DATABASE_URL").unwrap());
    let database = postgres.database().await.unwrap();
    sqlx::query("SELECT 1")
        .execute(database.pool())
        .await
        .unwrap();
    println!("{postgres:?} {database:?}");

    let error = postgres.restart(StopMode::Fast).await.unwrap_err();
    assert!(error.to_string().contains("DATABASE_URL"), "{error}");
    // Drops the database with a connection still open, on a thread that polls futures.
    drop(database);
}

#[tokio::test]
async fn an_unusable_database_url_fails_without_its_password() {
    for url in ["mysql://u:secret@h/d", "postgres://u:secret@127.0.0.1:1/d"] {
        let output = part("be_given_nonsense")
            .env("DATABASE_URL", url)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
        assert!(said.contains("DATABASE_URL"), "{said}");
        assert!(!said.contains("secret"), "{said}");
    }
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn be_given_nonsense() {
    if plays("be_given_nonsense") {
        println!("{:?}", Postgres::start().await.unwrap_err());
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_dropped_server_is_gone_at_once() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    let database = postgres.database().await.unwrap();
    sqlx::query("SELECT 1")
        .execute(database.pool())
        .await
        .unwrap();
    let trace = Trace::of(&postgres.url()).await;

    drop(postgres);
    assert!(trace.is_there(), "a database keeps its server");
    drop(database);
    assert!(!trace.is_there(), "{trace:?}");
}

#[cfg(unix)]
#[tokio::test]
async fn a_stopped_server_leaves_nothing() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    let trace = Trace::of(&postgres.url()).await;
    postgres.stop(StopMode::Fast).await.unwrap();
    drop(postgres);
    assert!(!trace.is_there(), "{trace:?}");
}

#[cfg(unix)]
#[tokio::test]
async fn a_cancelled_start_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let output = part("be_given_up")
        .env("TMPDIR", open_to_all(scratch.path()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    gone(|| scratch.path().read_dir().unwrap().next().is_none()).await;
}

#[cfg(unix)]
#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn be_given_up() {
    if plays("be_given_up") {
        for millis in [1, 50, 200, 400, 800] {
            let start = Postgres::builder().private().start();
            let _ = tokio::time::timeout(Duration::from_millis(millis), start).await;
        }
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_killed_process_leaves_nothing() {
    let mut child = part("be_killed").stdout(Stdio::piped()).spawn().unwrap();
    let trace = Trace::told_by(&mut child);
    assert!(trace.is_there(), "{trace:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    trace.gone().await;
}

#[cfg(unix)]
#[tokio::test]
async fn a_paused_server_ends_with_its_process() {
    let mut child = part("be_killed").stdout(Stdio::piped()).spawn().unwrap();
    let trace = Trace::told_by(&mut child);
    trace.signal("STOP");
    child.kill().unwrap();
    child.wait().unwrap();
    trace.gone().await;
}

#[cfg(unix)]
#[tokio::test]
async fn a_killed_process_group_leaves_nothing() {
    use std::os::unix::process::CommandExt;

    for signal in ["INT", "TERM", "HUP", "KILL"] {
        let mut child = part("be_killed")
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let trace = Trace::told_by(&mut child);
        let group = format!("-{}", child.id());
        let kill = Command::new("kill")
            .args(["-s", signal, "--", &group])
            .status();
        assert!(kill.unwrap().success());
        // The test's parent process may have set some of the signals to be ignored.
        let _ = child.kill();
        child.wait().unwrap();
        trace.gone().await;
    }
}

#[cfg(unix)]
#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn be_killed() {
    if plays("be_killed") {
        let postgres = Postgres::builder().private().start().await.unwrap();
        Trace::of(&postgres.url()).await.tell();
        // Long enough to be killed, but the process ends if it isn't.
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_panic_leaves_nothing() {
    let mut child = part("be_in_panic").stdout(Stdio::piped()).spawn().unwrap();
    let trace = Trace::told_by(&mut child);
    assert!(!child.wait().unwrap().success());
    trace.gone().await;
}

#[cfg(unix)]
#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn be_in_panic() {
    if plays("be_in_panic") {
        let postgres = Postgres::builder().private().start().await.unwrap();
        Trace::of(&postgres.url()).await.tell();
        panic!("as told");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn the_shared_server_ends_with_its_process() {
    let mut child = part("be_the_shared_one")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let trace = Trace::told_by(&mut child);
    child.wait().unwrap();
    trace.gone().await;
}

#[cfg(unix)]
#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn be_the_shared_one() {
    if plays("be_the_shared_one") {
        let postgres = Postgres::shared().await.unwrap();
        Trace::of(&postgres.url()).await.tell();
    }
}

fn part(name: &str) -> Command {
    let mut command = support::part(module_path!(), name);
    command.env_remove("DATABASE_URL").stderr(Stdio::null());
    command
}

/// The directory and the process of a cluster.
#[cfg(unix)]
#[derive(Debug)]
struct Trace {
    dir: String,
    pid: String,
}

#[cfg(unix)]
impl Trace {
    const MARK: &str = "trace of a cluster:";

    async fn of(url: &str) -> Self {
        let dir = text(url, "SHOW data_directory").await;
        let pid = text(
            url,
            "SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)",
        )
        .await;
        Self { dir, pid }
    }

    fn tell(&self) {
        println!("\n{} {} {}", Self::MARK, self.pid, self.dir);
    }

    fn told_by(child: &mut std::process::Child) -> Self {
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let told = lines.map_while(Result::ok).find_map(|line| {
            let (pid, dir) = line.strip_prefix(Self::MARK)?.trim().split_once(' ')?;
            Some((pid.to_owned(), dir.to_owned()))
        });
        let (pid, dir) = told.expect("no cluster was started");
        Self { dir, pid }
    }

    fn is_there(&self) -> bool {
        let cluster = std::path::Path::new(&self.dir).parent().unwrap();
        cluster.exists() || self.signal("0")
    }

    fn signal(&self, signal: &str) -> bool {
        Command::new("kill")
            .args(["-s", signal, &self.pid])
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    }

    async fn gone(&self) {
        gone(|| !self.is_there()).await;
    }
}

#[cfg(unix)]
async fn gone(is_gone: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_gone() {
        assert!(Instant::now() < deadline, "something is left behind");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(unix)]
fn open_to_all(dir: &std::path::Path) -> &std::path::Path {
    use std::os::unix::fs::PermissionsExt;

    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777)).unwrap();
    dir
}
