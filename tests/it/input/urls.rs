//! Handles and migrations of a database at a URL, without a pool of the application's.

use requeuest::migrate::Migrator;
use requeuest::testkit::Postgres;
use requeuest::{Durable, Error, migrate_url};
use sqlx::migrate::MigrateError;

use crate::support::{LONG, Server, closed_port, in_time, outcome_of, post};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_is_enough_to_migrate_and_to_deliver() {
    let database = Postgres::shared().await.unwrap().database().await.unwrap();
    let missing = in_time(Durable::connect(database.url())).await.unwrap_err();
    assert!(missing.is_not_migrated(), "{missing:?}");

    in_time(migrate_url(database.url())).await.unwrap();
    let server = Server::always(200).await;
    let durable = in_time(Durable::connect(database.url())).await.unwrap();
    let id = in_time(durable.fire(post(server.url("/"), "x")))
        .await
        .unwrap();
    assert!(outcome_of(&durable, id).await.status().is_terminal());
    let mut transaction = durable.pool().begin().await.unwrap();
    let id = durable
        .fire_in(&mut *transaction, post(server.url("/"), "in"))
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    outcome_of(&durable, id).await;
    assert_eq!(server.bodies(), ["x", "in"]);
    in_time(durable.shutdown(LONG)).await.unwrap();

    in_time(Migrator::new().undo_url(database.url()))
        .await
        .unwrap();
    let missing = in_time(Durable::connect(database.url())).await.unwrap_err();
    assert!(missing.is_not_migrated(), "{missing:?}");
}

#[tokio::test]
async fn a_bad_url_is_an_error_of_the_field_that_does_not_show_it() {
    let bad = "postgres://web:hunter2@localhost:x/app";
    let assert_names_it = |error: &Error| {
        assert!(error.is_config(), "{error:?}");
        assert_eq!(error.field(), Some("url"));
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("hunter2"), "{shown}");
    };
    assert_names_it(&Durable::connect(bad).await.unwrap_err());
    assert_names_it(&Durable::builder_from_url(bad).build().unwrap_err());
    for failed in [
        migrate_url(bad).await,
        Migrator::new().run_url(bad).await,
        Migrator::new().undo_url(bad).await,
    ] {
        let error = failed.unwrap_err();
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
        match error {
            MigrateError::Source(source) => assert_names_it(source.downcast_ref().unwrap()),
            other => panic!("{other:?}"),
        }
    }

    // A database that is away: the error names the server.
    let addr = closed_port().await;
    let away = format!("postgres://web:hunter2@{addr}/app");
    let error = in_time(Durable::connect(&away)).await.unwrap_err();
    assert!(error.is_database(), "{error:?}");
    let shown = format!("{error} {error:?}");
    assert!(shown.contains(&addr.to_string()), "{shown}");
    assert!(!shown.contains("hunter2"), "{shown}");
}
