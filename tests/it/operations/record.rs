//! The record of changes.

use std::time::{Duration, SystemTime};

use requeuest::admin::{Admin, Change, ChangeFilter};
use requeuest::migrate::DatabaseRole;
use requeuest::{
    DeadLetterFilter, DestinationPolicy, Durable, Error, Options, RequestId, Resolution, Status,
};
use sqlx::Executor;

use crate::support::{
    LONG, Role, Server, builder, end_three, eventually_rows, in_time, migrated, other_process,
    outcome_of, post, quick, rows,
};

const CHANNEL: &str = "emails";
const SECRET: &str = "hunter2";

async fn changes(admin: &Admin) -> Vec<Change> {
    admin.changes(&ChangeFilter::new()).await.unwrap()
}

/// The record must name the same actions and targets, the last one first.
async fn assert_recorded(admin: &Admin, expected: &[(&str, String)]) {
    let recorded = changes(admin).await;
    let shown: Vec<_> = recorded
        .iter()
        .map(|change| (&*change.action, change.target.clone()))
        .collect();
    assert_eq!(shown, expected);
    for change in recorded {
        assert_eq!(change.actor, "ann", "{change:?}");
        assert_eq!(change.reason.as_deref(), Some("as agreed"), "{change:?}");
        assert!(!format!("{change:?} {change}").contains(SECRET));
        let age = SystemTime::now().duration_since(change.at);
        assert!(age.unwrap_or_default() < LONG, "{change:?}");
    }
}

/// Dead letters, the last of which halts its ordering key.
async fn letters(durable: &Durable, server: &Server) -> Vec<RequestId> {
    let path = format!("/{SECRET}?token={SECRET}");
    let once = || Options::default().retry(quick().max_attempts(1));
    end_three(durable, &server.url(&path), 1, once).await;
    let letters = durable
        .dead_letters(&DeadLetterFilter::default())
        .await
        .unwrap();
    letters.iter().map(|letter| letter.id).collect()
}

#[tokio::test]
async fn each_change_of_a_request_is_on_the_record() {
    let database = migrated().await;
    let server = Server::always(500).await;
    let durable = builder(&database).channel(CHANNEL).build().unwrap();
    let letters = letters(&durable, &server).await;
    let operator = other_process(&database).await;
    let admin = operator.admin().by("ann").because("as agreed");
    let target = |id: RequestId| id.to_string();
    let mut expected = Vec::new();

    let new = admin.replay(letters[0]).await.unwrap();
    expected.insert(0, ("replay", target(letters[0])));
    let error = admin.replay(letters[0]).await.unwrap_err();
    assert!(error.is_wrong_state(), "{error:?}");
    let detail = changes(&admin).await[0].detail.clone().unwrap();
    assert!(detail.contains(&new.to_string()), "{detail}");
    assert!(admin.purge(letters[1]).await.unwrap());
    expected.insert(0, ("purge", target(letters[1])));
    assert!(!admin.purge(letters[1]).await.unwrap());
    assert!(admin.release_key(CHANNEL, "halted 1").await.unwrap());
    expected.insert(0, ("release_key", CHANNEL.to_owned()));
    assert!(!admin.release_key(CHANNEL, "halted 1").await.unwrap());
    let ambiguous = "UPDATE requeuest.outcomes_kept SET status = 'ambiguous' WHERE id = $1";
    crate::support::execute(&database, letters[2], ambiguous).await;
    admin.resolve(letters[2], Resolution::Sent).await.unwrap();
    expected.insert(0, ("resolve", target(letters[2])));
    let error = admin.resolve(letters[2], Resolution::Sent).await;
    assert!(error.unwrap_err().is_wrong_state());

    let later = Options::default().delay(Duration::from_secs(3600));
    let waiting = durable.fire(post(server.url("/"), "x").with(later));
    let waiting = waiting.await.unwrap();
    assert!(admin.cancel(waiting).await.unwrap());
    expected.insert(0, ("cancel", target(waiting)));
    assert!(!admin.cancel(waiting).await.unwrap());
    assert_eq!(
        outcome_of(&durable, waiting).await.status(),
        Status::Cancelled
    );
    let unknown = admin.cancel(RequestId::from(requeuest::Uuid::nil())).await;
    assert!(unknown.unwrap_err().is_unknown_id());
    assert_recorded(&admin, &expected).await;

    // By target, and page by page.
    let of_one = ChangeFilter::new().target(target(waiting));
    assert_eq!(admin.changes(&of_one).await.unwrap().len(), 1);
    let page = ChangeFilter::new().limit(2);
    let first = admin.changes(&page).await.unwrap();
    let second = admin.changes(&page.before(first[1].number)).await.unwrap();
    let both: Vec<_> = first.into_iter().chain(second).collect();
    assert_eq!(both[..], changes(&admin).await[..4]);
}

#[tokio::test]
async fn each_change_of_a_channel_or_a_destination_is_on_the_record() {
    let database = migrated().await;
    let operator = other_process(&database).await;
    let admin = operator.admin().by("ann").because("as agreed");
    let name = "https://a.example:443";
    assert!(admin.pause_channel(CHANNEL).await.unwrap());
    assert!(admin.resume_channel(CHANNEL).await.unwrap());
    admin.pause_destination(name, None).await.unwrap();
    admin.resume_destination(name).await.unwrap();
    admin.disable_destination(name).await.unwrap();
    admin.enable_destination(name).await.unwrap();
    let policy = DestinationPolicy::default().max_concurrency(2);
    admin.set_destination_policy(name, policy).await.unwrap();
    admin.reset_destination(name).await.unwrap();
    let name = || name.to_owned();
    let expected = [
        ("reset_destination", name()),
        ("set_destination_policy", name()),
        ("enable_destination", name()),
        ("disable_destination", name()),
        ("resume_destination", name()),
        ("pause_destination", name()),
        ("resume_channel", CHANNEL.to_owned()),
        ("pause_channel", CHANNEL.to_owned()),
    ];
    assert_recorded(&admin, &expected).await;
    let detail = changes(&admin).await[1].detail.clone().unwrap();
    assert!(detail.contains("max_concurrency"), "{detail}");

    // What fails or changes nothing leaves no record.
    let unknown = admin.resume_destination("https://b.example").await;
    assert!(unknown.is_err());
    let unnamed = operator.admin();
    let no_reason = unnamed.disable_destination("https://b.example");
    assert_eq!(no_reason.await.unwrap_err().field(), Some("reason"));
    assert_eq!(changes(&admin).await.len(), expected.len());
    // Nor does what an application does by itself.
    let handle = operator.destination("https://a.example").unwrap();
    handle.pause(None).await.unwrap();
    assert_eq!(changes(&admin).await.len(), expected.len());
    // An operator who names no one is a user of this host.
    operator.admin().pause_channel(CHANNEL).await.unwrap();
    let last = &changes(&admin).await[0];
    assert!(last.actor.contains('@'), "{last:?}");
    assert_eq!(last.reason, None);
}

#[tokio::test]
async fn no_role_deletes_the_record_before_its_time() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Runner).await;
    // It sweeps every few seconds.
    let durable = Durable::builder(role.pool())
        .retention(Duration::from_secs(60))
        .build()
        .unwrap();
    for channel in ["old", "new"] {
        durable.admin().pause_channel(channel).await.unwrap();
    }
    for statement in [
        "DELETE FROM requeuest.changes",
        "UPDATE requeuest.changes SET actor = 'x'",
        "TRUNCATE requeuest.changes",
    ] {
        let refused = role.pool().execute(statement).await.unwrap_err();
        assert!(refused.to_string().contains("permission denied"));
    }
    let old = "UPDATE requeuest.changes SET at = now() - interval '91 days' WHERE target = 'old'";
    database.pool().execute(old).await.unwrap();
    eventually_rows(&database, "changes", 1).await;
    assert_eq!(rows(&database, "changes WHERE target = 'new'").await, 1);
    in_time(durable.shutdown(LONG)).await.unwrap();

    // A role that only reads sees the record, and changes nothing.
    role.plays(DatabaseRole::ReadOnly).await;
    let reader = Durable::builder(role.pool()).runner(false).build().unwrap();
    assert_eq!(changes(&reader.admin()).await.len(), 1);
    let refused = |result: Result<bool, Error>| {
        assert!(result.unwrap_err().is_forbidden());
    };
    refused(reader.admin().pause_channel("a").await);
    refused(reader.admin().resume_channel("new").await);
    in_time(reader.shutdown(LONG)).await.unwrap();
    role.dropped().await;
}
