//! An operator's program that has a URL and no engine.

use std::time::Duration;

use requeuest::admin::{Admin, Hold, PageRequest, RequestFilter};
use requeuest::migrate::DatabaseRole;
use requeuest::testkit::Postgres;

use crate::support::{Role, count, migrated, other_process, post};

#[tokio::test]
async fn a_program_with_a_url_reads_requests_and_runs_nothing() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let id = there.fire(post("http://localhost:1/", "x")).await.unwrap();
    let admin = Admin::builder(database.url()).connect().await.unwrap();
    let found = admin.request(id).await.unwrap().unwrap();
    assert!(
        matches!(found.hold, Some(Hold::NoRunner { .. })),
        "{found:?}"
    );
    let page = admin
        .requests(&RequestFilter::new(), &PageRequest::new())
        .await;
    assert_eq!(page.unwrap().requests[0].id, id);
    assert_eq!(admin.count(&RequestFilter::new()).await.unwrap().number, 1);
    let runners = "SELECT count(*) FROM requeuest.runners";
    assert_eq!(count(&database, runners).await, 0);
}

#[tokio::test]
async fn a_role_that_only_reads_may_look_at_everything() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let id = there.fire(post("http://localhost:1/", "x")).await.unwrap();
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::ReadOnly).await;
    let reader = requeuest::Durable::builder(role.pool()).runner(false);
    let admin = reader.build().unwrap().admin();
    let needle = RequestFilter::new().error_contains("x");
    assert!(admin.request(id).await.unwrap().is_some());
    assert_eq!(admin.count(&RequestFilter::new()).await.unwrap().number, 1);
    admin.requests(&needle, &PageRequest::new()).await.unwrap();
    admin.counts().await.unwrap();
}

#[tokio::test]
async fn what_is_wrong_with_a_connection_is_said() {
    let field = async |builder: requeuest::admin::AdminBuilder| {
        let error = builder.connect().await.unwrap_err();
        assert!(error.is_config(), "{error}");
        error.field()
    };
    let local = || Admin::builder("postgres://localhost/app");
    assert_eq!(field(Admin::builder("hunter2")).await, Some("url"));
    assert_eq!(field(local().schema("")).await, Some("schema"));
    assert_eq!(
        field(local().max_connections(0)).await,
        Some("max_connections")
    );
    let timeout = local().statement_timeout(Duration::ZERO);
    assert_eq!(field(timeout).await, Some("statement_timeout"));

    let empty = Postgres::shared().await.unwrap().database().await.unwrap();
    let error = Admin::connect(empty.url()).await.unwrap_err();
    assert!(error.is_not_migrated(), "{error}");
}
