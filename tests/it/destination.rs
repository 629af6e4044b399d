//! Each stored request names its destination: in its group, or in a column of its own.

use requeuest::client::{Channels, Client};
use requeuest::{Durable, Options};

use crate::support::{LONG, builder, migrated, outcome_of, post, quick};

/// The destination of each row, in the order of arrival.
const DESTINATIONS: &str = "
    SELECT coalesce(destination, substr(channel_args, 8)) FROM requeuest.mq_msgs
    ORDER BY created_at, seq";

/// Its port refuses connections, so that requests stay in the queue.
const URL: &str = "http://user:secret@Localhost:1/path?token";
const DESTINATION: &str = "http://localhost:1";

#[tokio::test]
async fn every_way_into_the_queue_stores_the_destination() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone())
        .deliver(["another"])
        .build()
        .unwrap();
    let client = Client::new(database.pool().clone(), Channels::List(&["another"]))
        .await
        .unwrap();
    let request = |options| post(URL, "x").with(options);
    let ordered = || Options::default().ordered("key");

    durable.fire(request(Options::default())).await.unwrap();
    durable.fire(request(ordered())).await.unwrap();
    durable
        .fire_in(database.pool(), request(ordered().supersede("s")))
        .await
        .unwrap();
    let many = [request(Options::default()), request(ordered())];
    durable.fire_many(many).await.unwrap();
    client
        .spawn_cfg("c", &post(URL, "x"), |job| {
            job.set_channel_args("a group of its own");
        })
        .await
        .unwrap();

    let stored: Vec<String> = sqlx::query_scalar(DESTINATIONS)
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(stored, [DESTINATION; 6]);
}

#[tokio::test]
async fn a_replayed_request_keeps_its_destination() {
    let database = migrated().await;
    let durable = builder(&database)
        .retry(quick().max_attempts(1))
        .build()
        .unwrap();
    let request = post(URL, "x").with(Options::default().ordered("key"));
    let id = durable.fire(request).await.unwrap();
    outcome_of(&durable, id).await;
    durable.shutdown(LONG).await.unwrap();
    let elsewhere = builder(&database).deliver(["another"]).build().unwrap();
    elsewhere.replay(id).await.unwrap();
    let stored: Vec<String> = sqlx::query_scalar(DESTINATIONS)
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(stored, [DESTINATION]);
}
