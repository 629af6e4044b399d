//! The program on a real terminal: colors, questions, and text that must not reach it raw.

use pty_process::{Command, Size};
use requeuest::Options;
use requeuest::testkit::TestDatabase;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{assert_nothing_persisted, in_time, migrated, other_process, post, rows};

/// Runs the program on a terminal. Answers its first question.
async fn on_terminal(
    database: &TestDatabase,
    settings: &[(&str, &str)],
    arguments: &[&str],
    answer: &str,
) -> (Option<i32>, String) {
    let (mut pty, pts) = pty_process::open().unwrap();
    pty.resize(Size::new(24, 200)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_requeuest"))
        .env_clear()
        .env("TERM", "xterm")
        .env("DATABASE_URL", database.url())
        .args(arguments);
    for (name, value) in settings {
        command = command.env(name, value);
    }
    let mut child = command.spawn(pts).unwrap();
    let mut screen = String::new();
    let mut has_answered = false;
    let mut buffer = [0; 4096];
    // When the program has ended, reading its terminal fails.
    while let Ok(read @ 1..) = in_time(pty.read(&mut buffer)).await {
        screen.push_str(&String::from_utf8_lossy(&buffer[..read]));
        if screen.contains("[y/N]") && !has_answered {
            pty.write_all(answer.as_bytes()).await.unwrap();
            has_answered = true;
        }
    }
    (in_time(child.wait()).await.unwrap().code(), screen)
}

#[tokio::test]
async fn a_terminal_gets_colors_and_no_control_characters_of_others() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let options = Options::default().ordered("\u{1b}]0;title\u{7}");
    let id = there
        .fire(post("http://localhost:1/", "").with(options))
        .await
        .unwrap()
        .to_string();
    let (code, screen) = on_terminal(&database, &[], &["show", &id], "").await;
    assert_eq!(code, Some(0), "{screen}");
    assert!(screen.contains("\u{1b}[2m"), "{screen:?}");
    assert!(
        !screen.contains("\u{1b}]0;") && screen.contains("\\u{1b}]0;title"),
        "{screen:?}"
    );
    for settings in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let (_, screen) = on_terminal(&database, &[settings], &["show", &id], "").await;
        assert!(!screen.contains('\u{1b}'), "{screen:?}");
    }
}

#[tokio::test]
async fn a_terminal_is_asked_before_a_serious_change() {
    let database = migrated().await;
    let down = ["migrate", "--down"];
    let (code, screen) = on_terminal(&database, &[], &down, "n\n").await;
    assert_eq!(code, Some(4), "{screen}");
    assert!(
        screen.contains("Remove the schema requeuest") && screen.contains("nothing was changed")
    );
    assert_nothing_persisted(&database).await;
    assert!(rows(&database, "_sqlx_migrations").await > 0);
    let (code, screen) = on_terminal(&database, &[], &down, "y\n").await;
    assert_eq!(code, Some(0), "{screen}");
    assert!(screen.contains("removed the schema"), "{screen}");
}
