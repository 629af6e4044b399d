//! Wrong input: a line that says what is right, and an exit code.

use super::{on, program, run};
use crate::support::{assert_nothing_persisted, closed_port, empty, in_time, migrated};

#[tokio::test]
async fn wrong_input_is_refused_before_anything_is_done() {
    let database = migrated().await;
    for (arguments, says) in [
        (&["show", "7"][..], "the id of a request"),
        (&["send", "not a url"], "https://host/path"),
        (&["send", "http://localhost", "-H", "x"], "Name: value"),
        (
            &["send", "http://localhost", "-d", "@/nonexistent"],
            "@/nonexistent",
        ),
        (
            &["send", "http://localhost", "--delay", "soon"],
            "30s or 2h",
        ),
        (&["list", "--after", "x"], "first page"),
        (&["list", "--status", "dead"], "discarded"),
        (&["list", "--since", "soon"], "2h"),
        (&["list", "--key", "k"], "--channel"),
        (&["list", "-n", "0"], "limit"),
        (&["send", "http://localhost", "--channel", ""], "channel"),
        (
            &["send", "http://localhost", "--schema", "A b"],
            "lower-case letters",
        ),
        (&["migrate", "--grant", "all=web"], "read-only=ROLE"),
        (
            &["send", "http://localhost", "--context", "x"],
            "there is no context \"x\"",
        ),
        (
            &[
                "send",
                "http://localhost",
                "--config",
                "/nonexistent",
                "-c",
                "x",
            ],
            "/nonexistent",
        ),
    ] {
        let ran = on(&database, arguments).await;
        assert_eq!(ran.code, Some(2), "{arguments:?}: {ran:?}");
        assert!(ran.err.contains(says), "{arguments:?}: {ran:?}");
        assert_eq!(ran.out, "");
    }
    assert_nothing_persisted(&database).await;
}

#[tokio::test]
async fn a_database_that_is_not_named_away_or_foreign_is_said_in_one_line() {
    let refused = run(&["show", "01890a5d-ac96-774b-bcce-b302099a8057"])
        .await
        .refused(2);
    assert!(refused.contains("--url or --context"), "{refused}");

    let away = format!("postgres://app:hunter2@{}/app", closed_port().await);
    let id = "01890a5d-ac96-774b-bcce-b302099a8057";
    for arguments in [
        &["show", id, "--url", &away][..],
        &["migrate", "--url", &away],
    ] {
        let ran = run(arguments).await;
        assert!(!ran.err.contains("hunter2"), "{ran:?}");
        assert!(ran.refused(5).contains("127.0.0.1"));
    }
    let wrong = run(&["show", id, "--url", "mysql://app:hunter2@localhost"]).await;
    assert!(!wrong.err.contains("hunter2"), "{wrong:?}");
    assert!(wrong.refused(2).contains("postgres://"));

    let database = empty().await;
    let refused = on(&database, &["show", id]).await.refused(5);
    assert!(refused.contains("`requeuest migrate`"), "{refused}");
}

#[tokio::test]
async fn a_production_context_asks_before_a_change() {
    let database = migrated().await;
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("requeuest").join("config.toml");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let text = format!(
        "default = 'live'\n[contexts.live]\nurl = '{}'\nproduction = true\n",
        database.url()
    );
    std::fs::write(&file, text).unwrap();
    let ran = async |arguments: &[&str]| {
        let mut command = program();
        command.env("XDG_CONFIG_HOME", home.path()).args(arguments);
        super::Ran::from(in_time(command.output()).await.unwrap())
    };
    let send = ["send", "http://localhost:1/"];
    let refused = ran(&send).await;
    assert!(
        refused.err.contains("context live PRODUCTION"),
        "{refused:?}"
    );
    assert!(refused.refused(4).contains("--yes"));
    assert_nothing_persisted(&database).await;
    let id = ran(&[&send[..], &["--yes"]].concat()).await.ok();
    assert!(ran(&["show", id.trim()]).await.ok().contains("available"));

    std::fs::write(&file, "[contexts.live]\nprod = true\n").unwrap();
    let refused = ran(&send).await.refused(2);
    assert!(
        refused.contains("line 2") && refused.contains("prod"),
        "{refused}"
    );
}
