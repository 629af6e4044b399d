//! What the program shows.

use std::process::Stdio;

use requeuest::admin::{Change, ChangeFilter};
use requeuest::retry::RetryPolicy;
use requeuest::{Options, Uuid};
use tokio::io::AsyncReadExt;

use super::{on, program, run};
use crate::support::{Server, builder, in_time, migrated, other_process, outcome_of, post};

#[tokio::test]
async fn show_says_why_a_request_is_not_sent() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let id = there
        .fire(post("http://localhost:1/hunter2", "hunter2"))
        .await
        .unwrap();
    let id = id.to_string();
    let shown = on(&database, &["show", &id]).await.ok();
    assert!(
        shown.contains("no runner delivers the channel `default`"),
        "{shown}"
    );
    assert!(
        shown.contains("POST http://localhost:1") && shown.contains(&id),
        "{shown}"
    );
    assert!(!shown.contains("hunter2"), "{shown}");
    let json = on(&database, &["show", &id, "--json"]).await.json();
    assert_eq!(json["why_not_sent"]["reason"], "no_runner", "{json}");
    assert_eq!(
        (&json["status"], &json["attempts"]),
        (&"available".into(), &0.into())
    );
}

#[tokio::test]
async fn show_lists_failed_attempts_and_escapes_what_receivers_say() {
    let database = migrated().await;
    let server = Server::always(500).await;
    let durable = builder(&database)
        .retry(
            RetryPolicy::exponential()
                .max_attempts(2)
                .base(std::time::Duration::from_millis(1)),
        )
        .build()
        .unwrap();
    let channel = Options::default().ordered("\u{1b}[2Jkey");
    let id = durable
        .fire(post(server.url("/"), "").with(channel))
        .await
        .unwrap();
    outcome_of(&durable, id).await;
    let shown = on(&database, &["show", &id.to_string(), "--color", "never"])
        .await
        .ok();
    assert!(
        shown.contains("discarded") && shown.contains("Failed attempts"),
        "{shown}"
    );
    assert!(
        shown.contains("\\u{1b}[2Jkey") && !shown.contains('\u{1b}'),
        "{shown}"
    );
    let colored = on(&database, &["show", &id.to_string(), "--color", "always"])
        .await
        .ok();
    assert!(
        colored.contains("\u{1b}[31mdiscarded\u{1b}[0m"),
        "{colored}"
    );
}

#[tokio::test]
async fn an_unknown_request_has_an_exit_code_of_its_own() {
    let database = migrated().await;
    let id = Uuid::nil().to_string();
    let refused = on(&database, &["show", &id]).await.refused(3);
    assert!(refused.contains(&id), "{refused}");
}

#[tokio::test]
async fn a_reader_that_leaves_ends_the_program_quietly() {
    let mut child = program()
        .args(["migrate", "--print"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Longer than a pipe holds, so the program is still writing when its reader leaves.
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 100]).await.unwrap();
    drop(stdout);
    let output = in_time(child.wait_with_output()).await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stderr, b"", "{output:?}");
}

#[tokio::test]
async fn the_program_brings_its_completions_and_its_manual() {
    let script = run(&["completions", "bash"]).await.ok();
    assert!(script.contains("migrate") && script.contains("--context"));
    let page = run(&["man"]).await.ok();
    assert!(
        page.contains(".TH requeuest") && page.contains("requeuest send"),
        "{page}"
    );
}

#[tokio::test]
async fn list_pages_through_what_its_flags_select() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let requests = (0..7).map(|_| post("http://localhost:1/", ""));
    there.fire_many(requests).await.unwrap();
    let other = post("http://localhost:2/", "").with(Options::default().channel("other"));
    there.fire(other).await.unwrap();

    let one = on(&database, &["list", "--channel", "other"]).await.ok();
    assert_eq!(one.lines().count(), 2, "{one}");
    assert!(
        one.contains("available") && one.contains("POST http://localhost:2"),
        "{one}"
    );
    let arguments = [
        "list",
        "--destination",
        "http://localhost:1",
        "-n",
        "3",
        "--json",
    ];
    let mut ids = std::collections::HashSet::new();
    let mut token = String::new();
    for expected in [3, 3, 1] {
        let after = ["--after", &token];
        let after = if token.is_empty() {
            &[][..]
        } else {
            &after[..]
        };
        let page = on(&database, &[&arguments[..], after].concat())
            .await
            .json();
        let requests = page["requests"].as_array().unwrap();
        assert_eq!(requests.len(), expected, "{page}");
        ids.extend(
            requests
                .iter()
                .map(|it| it["id"].as_str().unwrap().to_owned()),
        );
        if let Some(next) = page["next"].as_str() {
            token = next.to_owned();
        }
    }
    assert_eq!(ids.len(), 7);
    let all = on(&database, &["list", "-n", "2", "--all-pages", "--json"])
        .await
        .ok();
    assert_eq!(all.lines().count(), 8, "{all}");
    // A token belongs to its filter.
    let refused = on(
        &database,
        &["list", "--channel", "other", "--after", &token],
    )
    .await;
    assert!(refused.refused(2).contains("cursor"));
    let none = on(&database, &["list", "--status", "discarded"]).await;
    assert!(
        none.err.contains("no such requests") && none.out.is_empty(),
        "{none:?}"
    );
}

#[tokio::test]
async fn stats_counts_requests_and_names_runners() {
    let database = migrated().await;
    let empty = on(&database, &["stats"]).await.ok();
    assert!(
        empty.contains("no requests") && empty.contains("requeuest work"),
        "{empty}"
    );
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let id = durable.fire(post(server.url("/"), "")).await.unwrap();
    outcome_of(&durable, id).await;
    let stats = on(&database, &["stats", "--json"]).await.json();
    assert_eq!(stats["by_status"]["completed"]["number"], 1, "{stats}");
    assert_eq!(stats["runners"][0]["pid"], std::process::id(), "{stats}");
    let shown = on(&database, &["stats", "--window", "day"]).await.ok();
    assert!(
        shown.contains("completed  1") && shown.contains("The last day"),
        "{shown}"
    );
}

#[tokio::test]
async fn show_has_bodies_and_secrets_only_where_they_are_asked_for() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let mut request = post("http://localhost:1/path", "a body");
    let headers = request.headers_mut();
    headers.insert("authorization", "Bearer hunter2".parse().unwrap());
    headers.insert("x-plain", "seen".parse().unwrap());
    let id = there.fire(request).await.unwrap().to_string();

    let shown = on(&database, &["show", &id]).await.ok();
    assert!(
        !shown.contains("a body") && !shown.contains("hunter2"),
        "{shown}"
    );
    let shown = on(&database, &["show", &id, "--bodies"]).await.ok();
    assert!(shown.contains("POST http://localhost:1/path"), "{shown}");
    assert!(
        shown.contains("x-plain: seen") && shown.contains("a body"),
        "{shown}"
    );
    assert!(shown.contains("authorization: ***"), "{shown}");
    assert!(!shown.contains("hunter2"), "{shown}");
    let changes = there.admin().changes(&ChangeFilter::new()).await.unwrap();
    assert_eq!(changes, []);

    let arguments = [
        "show",
        &id,
        "--secrets",
        "--json",
        "--actor",
        "ann",
        "--reason",
        "asked",
    ];
    let json = on(&database, &arguments).await.json();
    let headers = &json["content"]["request"]["headers"];
    let secret = serde_json::json!(["authorization", "Bearer hunter2"]);
    assert!(headers.as_array().unwrap().contains(&secret), "{json}");
    assert_eq!(json["content"]["request"]["body"], "a body");
    let changes = there.admin().changes(&ChangeFilter::new()).await.unwrap();
    let record = |change: &Change| (change.action.clone(), change.actor.clone());
    assert_eq!(
        changes.iter().map(record).collect::<Vec<_>>(),
        [("reveal".to_owned(), "ann".to_owned())]
    );
}

#[tokio::test]
async fn doctor_says_what_to_do_and_ends_with_a_code_of_its_own() {
    let database = migrated().await;
    let there = other_process(&database).await;
    there.fire(post("http://localhost:1/", "x")).await.unwrap();
    let ran = on(&database, &["doctor"]).await;
    assert_eq!(ran.code, Some(6), "{ran:?}");
    assert!(
        ran.out
            .contains("no runner delivers due requests of `default`")
            && ran
                .out
                .contains("start a process whose handle delivers the channel"),
        "{}",
        ran.out
    );
    let ran = on(&database, &["doctor", "--json"]).await;
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let findings = json["findings"].as_array().unwrap();
    let is_of = |check: &str, severity: &str| {
        findings
            .iter()
            .any(|it| it["check"] == check && it["severity"] == severity)
    };
    assert!(
        is_of("runners", "problem") && is_of("schema", "ok"),
        "{json}"
    );
}
