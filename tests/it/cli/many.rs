//! Changes of one request and of many, and pauses.

use requeuest::Options;

use super::on;
use crate::support::{Server, handle, migrated, other_process, outcome_of, post, rows};

#[tokio::test]
async fn one_request_is_cancelled_replayed_and_purged_by_its_id() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let id = there
        .fire(post("http://localhost:1/", ""))
        .await
        .unwrap()
        .to_string();
    assert_eq!(on(&database, &["cancel", &id]).await.ok(), "cancelled\n");
    assert!(
        on(&database, &["cancel", &id])
            .await
            .refused(4)
            .contains("has ended")
    );
    let refused = on(&database, &["replay", &id]).await.refused(4);
    assert!(refused.contains("only discarded or ambiguous"), "{refused}");

    let server = Server::in_turn(&[400, 200]).await;
    let durable = handle(&database);
    let failed = durable.fire(post(server.url("/"), "")).await.unwrap();
    outcome_of(&durable, failed).await;
    let failed = failed.to_string();
    let replayed = on(
        &database,
        &["replay", &failed, "--reason", "as asked", "--json"],
    )
    .await
    .json();
    let new = replayed["new_id"].as_str().unwrap().parse().unwrap();
    assert_eq!(
        outcome_of(&durable, new).await.status(),
        requeuest::Status::Completed
    );
    assert_eq!(
        rows(&database, "changes WHERE reason = 'as asked'").await,
        1
    );
    assert!(
        on(&database, &["purge", &failed])
            .await
            .refused(4)
            .contains("--yes")
    );
    let both = ["cancel", &failed, "--channel", "c"];
    assert!(on(&database, &both).await.refused(2).contains("not both"));
}

#[tokio::test]
async fn many_are_changed_only_with_a_filter_or_all_and_after_a_preview() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let delayed = || Options::default().delay(std::time::Duration::from_secs(3600));
    for number in 0..3 {
        let channel = if number == 0 { "one" } else { "two" };
        let options = delayed().channel(channel);
        there
            .fire(post("http://localhost:1/", "").with(options))
            .await
            .unwrap();
    }
    assert!(
        on(&database, &["cancel", "--yes"])
            .await
            .refused(4)
            .contains("--all")
    );
    let two = ["cancel", "--channel", "two", "--json"];
    let refused = on(&database, &two).await;
    let preview: serde_json::Value = serde_json::from_str(&refused.out).unwrap();
    assert_eq!(
        (refused.code, &preview["operation"]),
        (Some(4), &serde_json::Value::Null)
    );
    assert_eq!(preview["preview"]["count"]["number"], 2, "{preview}");
    let none = on(&database, &["cancel", "--channel", "none", "--yes"])
        .await
        .ok();
    assert!(none.contains("nothing to do"), "{none}");
    assert_eq!(rows(&database, "operations").await, 0);

    let _durable = handle(&database);
    let ended = on(&database, &[&two[..], &["--yes", "--wait"]].concat())
        .await
        .json();
    assert_eq!(
        (&ended["done"], &ended["action"]),
        (&2.into(), &"cancel".into()),
        "{ended}"
    );
    let id = ended["id"].as_str().unwrap();
    assert!(on(&database, &["ops", "list"]).await.ok().contains(id));
    assert!(
        on(&database, &["ops", "show", id])
            .await
            .ok()
            .contains("2 done")
    );
    assert!(
        on(&database, &["ops", "cancel", id])
            .await
            .refused(4)
            .contains("has ended")
    );
    let left = on(&database, &["list", "--status", "scheduled", "--json"])
        .await
        .json();
    assert_eq!(left["requests"].as_array().unwrap().len(), 1, "{left}");
}

#[tokio::test]
async fn a_paused_channel_or_destination_is_said_by_show() {
    let database = migrated().await;
    let (server, name) = {
        let server = Server::always(200).await;
        let name = server.url("");
        (server, name)
    };
    on(&database, &["pause", "--channel", "default"]).await.ok();
    let again = on(&database, &["pause", "--channel", "default"]).await.ok();
    assert!(again.contains("already"), "{again}");
    let durable = handle(&database);
    let id = durable.fire(post(server.url("/"), "")).await.unwrap();
    let shown = on(&database, &["show", &id.to_string()]).await.ok();
    assert!(shown.contains("paused"), "{shown}");
    on(
        &database,
        &["pause", "--destination", &name, "--until", "1h"],
    )
    .await
    .ok();
    on(&database, &["resume", "--channel", "default"])
        .await
        .ok();
    on(&database, &["resume", "--destination", &name])
        .await
        .ok();
    outcome_of(&durable, id).await;
    assert_eq!(on(&database, &["pause"]).await.code, Some(2));
}
