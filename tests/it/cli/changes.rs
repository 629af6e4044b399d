//! What the program changes: the schema, and new requests.

use requeuest::admin::Window;
use requeuest::{RequestId, Status};

use super::{fed, on};
use crate::support::{Server, count, empty, handle, migrated, outcome_of, rows};

#[tokio::test]
async fn migrate_installs_shows_and_removes_the_schema() {
    let database = empty().await;
    let status = on(&database, &["migrate", "--status", "--json"])
        .await
        .json();
    let pending = status["pending"].as_array().unwrap().len();
    assert!(pending > 10, "{status}");
    assert_eq!(status["applied"].as_array().unwrap().len(), 0);

    let ran = on(&database, &["migrate"]).await;
    assert!(ran.err.contains("schema requeuest"), "{ran:?}");
    assert_eq!(ran.ok(), format!("applied {pending} migrations\n"));
    assert_eq!(
        on(&database, &["migrate"]).await.ok(),
        "nothing to migrate\n"
    );
    let shown = on(&database, &["migrate", "--status"]).await.ok();
    assert_eq!(shown.matches(" applied\n").count(), pending, "{shown}");

    let refused = on(&database, &["migrate", "--down"]).await.refused(4);
    assert!(refused.contains("--yes"), "{refused}");
    let applied = rows(&database, "_sqlx_migrations").await;
    assert_eq!(applied, i64::try_from(pending).unwrap());
    on(&database, &["migrate", "--down", "--yes"]).await.ok();
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'requeuest'";
    assert_eq!(count(&database, schemas).await, 0);
}

#[tokio::test]
async fn the_printed_script_installs_what_migrate_installs() {
    let database = empty().await;
    let script = on(&database, &["migrate", "--print"]).await.ok();
    sqlx::raw_sql(&script)
        .execute(database.pool())
        .await
        .unwrap();

    assert_eq!(
        on(&database, &["migrate"]).await.ok(),
        "nothing to migrate\n"
    );
    let server = Server::always(200).await;
    let durable = handle(&database);
    let id = on(&database, &["send", &server.url("/")]).await.ok();
    let id: RequestId = id.trim().parse().unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    // It is counted, although its process has ended.
    let activity = durable.admin().activity(Window::Hour).await.unwrap();
    let enqueued: u64 = activity.points.iter().map(|point| point.enqueued).sum();
    assert_eq!(enqueued, 1);
}

#[tokio::test]
async fn send_takes_the_flags_of_curl() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = handle(&database);
    let url = server.url("/path?query=1");
    let arguments = [
        "send", &url, "-H", "X-One: 1", "-H", "x-two:2", "-d", "-", "--wait",
    ];
    let ran = fed(&database, &arguments, b"from stdin").await;
    assert!(
        ran.err.contains("completed after 1 attempts: 200 OK"),
        "{ran:?}"
    );
    assert_eq!(ran.ok(), "from stdin");
    let seen = &server.seen()[0];
    assert_eq!((seen.method.as_str(), seen.uri.path()), ("POST", "/path"));
    assert_eq!(
        (&*seen.body, seen.headers["x-two"].as_bytes()),
        (&b"from stdin"[..], &b"2"[..])
    );

    let keyed = [
        "send",
        &url,
        "-X",
        "PUT",
        "-d",
        "x",
        "--key",
        "k",
        "--json",
        "--wait=20s",
    ];
    let sent = on(&database, &keyed).await.json();
    assert_eq!(sent["status"], "completed", "{sent}");
    assert_eq!(sent["response"]["body"], "x");
    let again = on(&database, &keyed).await.json();
    assert_eq!((&again["id"], server.count()), (&sent["id"], 2));
    drop(durable);
}

#[tokio::test]
async fn send_says_how_a_request_ended_by_its_exit_code() {
    let database = migrated().await;
    let server = Server::always(400).await;
    let _durable = handle(&database);
    let ran = on(&database, &["send", &server.url("/"), "--wait"]).await;
    assert!(ran.refused(1).contains("ended as discarded"));
    let ran = on(
        &database,
        &[
            "send",
            &server.url("/"),
            "--channel",
            "none",
            "--wait=100ms",
        ],
    )
    .await;
    assert!(ran.err.contains("requeuest work --channel none"), "{ran:?}");
    assert!(ran.refused(1).contains("has not ended in 100ms"));
}
