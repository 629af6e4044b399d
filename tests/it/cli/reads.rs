//! What the program shows.

use std::process::Stdio;

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
