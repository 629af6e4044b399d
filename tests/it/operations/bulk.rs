//! Operations on many requests.

use std::time::Duration;

use requeuest::admin::{
    Action, Admin, NewOperation, Operation, OperationFilter, OperationId, OperationState,
    RequestFilter,
};
use requeuest::encryption::{Key, Keyring};
use requeuest::{Durable, Options, RequestId, Resolution, Status, Uuid};
use sqlx::Executor;

use super::crash::dead_letters;
use crate::support::{
    Server, builder, count, eventually, eventually_rows, eventually_some, in_time, migrated,
    outcome_of, passing, post, quick, rows,
};

const CHANNEL: &str = "emails";

fn all_of(channel: &str) -> RequestFilter {
    RequestFilter::new().channel(channel)
}

async fn ended(admin: &Admin, id: OperationId) -> Operation {
    eventually_some("the end of the operation", || async {
        let operation = admin.operation(id).await.unwrap().unwrap();
        (operation.state != OperationState::Running).then_some(operation)
    })
    .await
}

fn counts(operation: &Operation) -> (u64, u64, u64) {
    (operation.done, operation.skipped, operation.failed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operation_that_is_cancelled_does_nothing_more() {
    let database = migrated().await;
    let durable = builder(&database).build().unwrap();
    let later = Options::default()
        .channel(CHANNEL)
        .delay(Duration::from_secs(3600));
    let requests = (0..200).map(|_| post("http://127.0.0.1:9/", "x").with(later.clone()));
    let ids = durable.fire_many(requests).await.unwrap();
    let admin = durable.admin().by("ann");
    let slow = NewOperation::new(Action::Cancel, all_of(CHANNEL)).rate(20.0);
    let id = admin.start(&slow).await.unwrap();
    let running = OperationFilter::new().running();
    assert_eq!(admin.operations(&running).await.unwrap().len(), 1);
    eventually("some are cancelled", || async {
        admin.operation(id).await.unwrap().unwrap().done >= 10
    })
    .await;
    assert!(admin.cancel_operation(id).await.unwrap());
    assert!(!admin.cancel_operation(id).await.unwrap());
    let cancelled = ended(&admin, id).await;
    assert_eq!(cancelled.state, OperationState::Cancelled);
    passing(&database, Duration::from_secs(1)).await;
    assert_eq!(ended(&admin, id).await, cancelled);
    let left = rows(&database, "mq_msgs").await;
    assert_eq!(left as u64, 200 - cancelled.done);
    assert!(left > 100, "{left}");

    // The rest, of which one ends at the same time. The first of them is known as cancelled.
    assert!(durable.cancel(*ids.last().unwrap()).await.unwrap());
    let rest = NewOperation::new(Action::Cancel, all_of(CHANNEL));
    let rest = admin.start(&rest).await.unwrap();
    let rest = ended(&admin, rest).await;
    assert_eq!(counts(&rest), (left as u64 - 1, 0, 0));
    assert_eq!(
        outcome_of(&durable, ids[0]).await.status(),
        Status::Cancelled
    );

    assert!(admin.operations(&running).await.unwrap().is_empty());
    let listed = admin.operations(&OperationFilter::new()).await.unwrap();
    let listed: Vec<_> = listed.iter().map(|operation| operation.id).collect();
    assert_eq!(listed, [rest.id, id]);
    let before = OperationFilter::new().before(rest.id).limit(1);
    assert_eq!(admin.operations(&before).await.unwrap()[0].id, id);
    let unknown = OperationId::from(Uuid::nil());
    let error = admin.cancel_operation(unknown).await.unwrap_err();
    assert!(error.is_unknown_id(), "{error:?}");
    let actions = "SELECT string_agg(action, ' ' ORDER BY id) FROM requeuest.changes
                   WHERE operation IS NULL";
    let actions: String = sqlx::query_scalar(actions)
        .fetch_one(database.pool())
        .await
        .unwrap();
    assert_eq!(actions, "start_operation cancel_operation start_operation");
}

#[tokio::test]
async fn a_preview_counts_what_the_operation_then_does_and_nothing_else() {
    let database = migrated().await;
    let (a, b) = (Server::always(500).await, Server::always(404).await);
    let durable = builder(&database).channel(CHANNEL).build().unwrap();
    let once = |options: Options| options.retry(quick().max_attempts(1));
    for (server, number, options) in [
        (&a, 4, Options::default()),
        (&b, 2, Options::default()),
        (&b, 1, Options::default().ordered("o")),
        (&a, 1, Options::default().channel("other")),
    ] {
        for _ in 0..number {
            let request = post(server.url("/"), "x").with(once(options.clone()));
            durable.fire(request).await.unwrap();
        }
    }
    let other = builder(&database).channel("other").build().unwrap();
    eventually_rows(&database, "mq_msgs", 0).await;
    let failed = rows(&database, "outcomes_kept").await as u64;
    let admin = durable.admin();
    let preview = async |action, filter: &RequestFilter| {
        let preview = admin.preview(action, filter).await.unwrap();
        assert!(preview.count.is_exact);
        preview
    };
    let of_channel = preview(Action::Replay, &all_of(CHANNEL)).await;
    assert_eq!(of_channel.count.number, failed - 1);
    assert!(of_channel.oldest.unwrap() <= of_channel.newest.unwrap());
    assert_eq!(of_channel.by_destination[0].0, a.url(""));
    assert_eq!(of_channel.by_destination[0].1.to_string(), "4");
    let everything = preview(Action::Purge, &RequestFilter::new()).await;
    assert_eq!(everything.count.number, failed);
    for (filter, number) in [
        (RequestFilter::new().destination(a.url("")), 5),
        (all_of(CHANNEL).destination(a.url("")), 4),
        (all_of(CHANNEL).error_contains("ANSWERED WITH 500"), 4),
        (all_of(CHANNEL).error_contains("refused"), 0),
        (all_of(CHANNEL).status(Status::Ambiguous), 0),
        (all_of(CHANNEL).status(Status::Completed), 0),
        (all_of("unknown").status(Status::Discarded), 0),
    ] {
        let found = preview(Action::Replay, &filter).await.count.number;
        assert_eq!(found, number, "{filter:?}");
    }
    assert_eq!(
        preview(Action::Cancel, &all_of(CHANNEL)).await.count.number,
        0
    );

    // One that meets nothing has finished, also without a runner.
    let nothing = NewOperation::new(Action::Cancel, all_of(CHANNEL));
    let nothing = admin.start(&nothing).await.unwrap();
    let nothing = admin.operation(nothing).await.unwrap().unwrap();
    assert_eq!(nothing.state, OperationState::Finished);
    assert_eq!(counts(&nothing), (0, 0, 0));

    let purge = all_of(CHANNEL).error_contains("answered with 500");
    let purge = NewOperation::new(Action::Purge, purge);
    let id = admin.start(&purge).await.unwrap();
    assert_eq!(counts(&ended(&admin, id).await), (4, 0, 0));
    let left = preview(Action::Purge, &RequestFilter::new()).await;
    assert_eq!(left.count.number, failed - 4);
    drop(other);
}

#[tokio::test]
async fn what_can_not_be_changed_is_skipped_or_fails_alone() {
    let database = migrated().await;
    dead_letters(&database, 5).await;
    let ids: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM requeuest.outcomes_kept ORDER BY id")
        .fetch_all(database.pool())
        .await
        .unwrap();
    let (refused, gone) = (ids[1], ids[2]);
    let statements = format!(
        "DELETE FROM requeuest.mq_payloads WHERE id = '{gone}';
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN RAISE EXCEPTION USING MESSAGE = ''not this one''; END';
         CREATE TRIGGER refuse BEFORE DELETE ON requeuest.outcomes_kept
         FOR EACH ROW WHEN (OLD.id = '{refused}') EXECUTE FUNCTION refuse();"
    );
    database.pool().execute(&*statements).await.unwrap();
    let durable = builder(&database).channel("elsewhere").build().unwrap();
    let admin = durable.admin();
    let replay = NewOperation::new(Action::Replay, all_of(CHANNEL));
    let id = admin.start(&replay).await.unwrap();
    let operation = ended(&admin, id).await;
    assert_eq!(counts(&operation), (3, 1, 1));
    let skipped = operation.last_skipped.unwrap();
    assert!(skipped.contains("is gone"), "{skipped}");
    let failed = operation.last_error.unwrap();
    assert!(failed.contains("not this one"), "{failed}");
    // Only ambiguous requests can be resolved.
    let ambiguous = "UPDATE requeuest.outcomes_kept SET status = 'ambiguous' WHERE id = $1";
    crate::support::execute(&database, RequestId::from(gone), ambiguous).await;
    let resolve = Action::Resolve(Resolution::Sent);
    let resolve = NewOperation::new(resolve, RequestFilter::new()).all();
    let id = admin.start(&resolve).await.unwrap();
    assert_eq!(counts(&ended(&admin, id).await), (1, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_whose_ordering_key_is_held_is_tried_again_at_the_end() {
    let database = migrated().await;
    let server = Server::always(500).await;
    let failing = builder(&database).channel(CHANNEL).build().unwrap();
    for key in ["held", "free"] {
        let options = Options::default()
            .retry(quick().max_attempts(1))
            .ordered(key);
        let request = post(server.url("/"), "x").with(options);
        failing.fire(request).await.unwrap();
    }
    eventually_rows(&database, "outcomes_kept", 2).await;
    failing.shutdown(Duration::ZERO).await.unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let caller = builder(&database)
        .channel(CHANNEL)
        .runner(false)
        .build()
        .unwrap();
    let held = post(server.url("/"), "x").with(Options::default().ordered("held"));
    caller.fire_in(&mut *transaction, held).await.unwrap();
    let durable = builder(&database).channel("elsewhere").build().unwrap();
    let admin = durable.admin();
    let replay = NewOperation::new(Action::Replay, all_of(CHANNEL));
    let id = admin.start(&replay).await.unwrap();
    eventually("one waits", || async {
        let operation = admin.operation(id).await.unwrap().unwrap();
        (operation.done, operation.busy) == (1, 1)
    })
    .await;
    transaction.rollback().await.unwrap();
    let operation = ended(&admin, id).await;
    assert_eq!((counts(&operation), operation.busy), ((2, 0, 0), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encrypted_requests_are_replayed_by_a_process_with_their_keys() {
    let database = migrated().await;
    let keys = || Keyring::new(Key::new("k", (0..32).collect::<Vec<u8>>()).unwrap());
    let server = Server::always(500).await;
    let plain = |channel| {
        let handle = Durable::builder(database.pool().clone()).channel(channel);
        handle.retry(quick().max_attempts(1))
    };
    let failing = plain(CHANNEL).encryption(keys()).build().unwrap();
    let requests = (0..3).map(|_| post(server.url("/"), "x"));
    failing.fire_many(requests).await.unwrap();
    eventually_rows(&database, "outcomes_kept", 3).await;
    failing.shutdown(Duration::from_secs(5)).await.unwrap();
    let without = plain("elsewhere").build().unwrap();
    let admin = without.admin();
    let replay = NewOperation::new(Action::Replay, all_of(CHANNEL));
    let id = admin.start(&replay).await.unwrap();
    eventually("it says what it waits for", || async {
        let operation = admin.operation(id).await.unwrap().unwrap();
        assert_eq!(counts(&operation), (0, 0, 0));
        operation
            .last_error
            .is_some_and(|error| error.contains("keys"))
    })
    .await;
    let with = plain("elsewhere").encryption(keys()).build().unwrap();
    assert_eq!(counts(&ended(&admin, id).await), (3, 0, 0));
    with.shutdown(Duration::ZERO).await.unwrap();
    assert_eq!(rows(&database, "mq_msgs").await, 3);
}

#[tokio::test]
async fn an_operation_of_a_newer_version_is_left_alone() {
    let database = migrated().await;
    dead_letters(&database, 1).await;
    let newer = "INSERT INTO requeuest.operations (id, format, action, filter, actor)
        VALUES (gen_random_uuid(), 2, 'purge', '{}', 'x'),
            (gen_random_uuid(), 1, 'shred', '{}', 'x'),
            (gen_random_uuid(), 1, 'purge', '{\"colour\": \"blue\"}', 'x')";
    database.pool().execute(newer).await.unwrap();
    let durable = builder(&database).channel("elsewhere").build().unwrap();
    let admin = durable.admin();
    let known = NewOperation::new(Action::Replay, all_of(CHANNEL));
    let known = admin.start(&known).await.unwrap();
    assert_eq!(counts(&ended(&admin, known).await), (1, 0, 0));
    let running = OperationFilter::new().running();
    let left = admin.operations(&running).await.unwrap();
    assert_eq!(left.len(), 3);
    for operation in left {
        assert_eq!(operation.driven_at, None);
        assert!(operation.action.is_none() || operation.filter.is_none());
    }
    let letters = "SELECT count(*) FROM requeuest.outcomes_kept";
    assert_eq!(count(&database, letters).await, 0);
}

#[tokio::test]
async fn bad_input_of_an_operation_is_refused_and_starts_nothing() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    let admin = durable.admin();
    let new = |filter| NewOperation::new(Action::Purge, filter);
    for (bad, field) in [
        (new(RequestFilter::new()), "filter"),
        (new(all_of("")), "channel"),
        (new(all_of("c").key("\0")), "key"),
        (new(all_of("c")).rate(0.0), "rate"),
        (new(all_of("c")).rate(f64::NAN), "rate"),
    ] {
        let error = in_time(admin.start(&bad)).await.unwrap_err();
        assert_eq!(error.field(), Some(field), "{error}");
    }
    let too_many = OperationFilter::new().limit(1001);
    let error = admin.operations(&too_many).await.unwrap_err();
    assert_eq!(error.field(), Some("limit"));
    let unsigned = admin.clone().by("");
    let error = unsigned.start(&new(all_of("c"))).await.unwrap_err();
    assert_eq!(error.field(), Some("actor"));
    assert_eq!(rows(&database, "operations").await, 0);
    let none = admin
        .operation(OperationId::from(Uuid::nil()))
        .await
        .unwrap();
    assert_eq!(none, None);
}
