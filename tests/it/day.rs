//! A day in production: odd settings, receivers with odd answers, a handler that fails now and
//! then, and in each hour another trouble with the database.
//!
//! The quick form has a short hour of each trouble. `REQUEUEST_LONG_FAULTS=1` runs a whole day.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use requeuest::{
    DeadLetterFilter, Durable, Error, Options, Outcome, Request, RequestId, Status, Uuid,
    outcome_fn_with,
};
use sqlx::{Executor, PgConnection, PgPool};

use crate::damaged::damage;
use crate::faults::is_long;
use crate::retry::answers::{answering, many_headers};
use crate::sessions::{DEMOTE, RETENTION, application_pool, odd_role, terminate, with_table};
use crate::support::{
    LONG, Role, Server, count, eventually, eventually_rows, in_time, post, quick,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    None,
    /// All sessions of the role are ended.
    SessionsEnd,
    /// The role loses a right that settles and polls need.
    RightIsRevoked,
    /// The server becomes a standby for the sessions that are open.
    IsDemoted,
    /// A row has a number that can't be counted up.
    RowIsDamaged,
    /// Another process takes requests, and stops without any grace.
    ProcessStops,
}

const TROUBLES: [Trouble; 6] = [
    Trouble::None,
    Trouble::SessionsEnd,
    Trouble::RightIsRevoked,
    Trouble::IsDemoted,
    Trouble::RowIsDamaged,
    Trouble::ProcessStops,
];

/// Where requests go, and how they end if they are fired.
struct Receiver {
    url: String,
    ends: Status,
}

async fn receivers(server: &Server, missing: &Server) -> Vec<Receiver> {
    let mut receivers = vec![
        Receiver {
            url: server.url("/"),
            ends: Status::Completed,
        },
        Receiver {
            url: missing.url("/"),
            ends: Status::Discarded,
        },
    ];
    for (answer, ends) in [
        (many_headers(900), Status::Completed),
        ("this is no HTTP\r\n\r\n".to_owned(), Status::Discarded),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf".to_owned(),
            Status::Discarded,
        ),
    ] {
        let (addr, _) = answering(answer).await;
        let url = format!("http://{addr}/");
        receivers.push(Receiver { url, ends });
    }
    receivers
}

/// Writes in its transaction. Every seventh call ignores an error, so nothing of it is committed.
async fn note(
    calls: &AtomicUsize,
    tx: &mut PgConnection,
    outcome: &Outcome,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO public.done (request) VALUES ($1)")
        .bind(Uuid::from(outcome.id()))
        .execute(&mut *tx)
        .await?;
    if calls.fetch_add(1, Ordering::SeqCst) % 7 == 6 {
        let _ = tx.execute("SELECT 1 / 0").await;
    }
    Ok(())
}

async fn fire_in_transaction(
    durable: &Durable,
    application: &PgPool,
    request: Request,
) -> Option<RequestId> {
    let mut transaction = application.begin().await.ok()?;
    let id = durable.fire_in(&mut *transaction, request).await.ok()?;
    transaction.commit().await.ok()?;
    Some(id)
}

/// The requests that were accepted in an hour, with their expected ends.
async fn calls(
    durable: &Durable,
    application: &PgPool,
    receivers: &[Receiver],
    trouble: Trouble,
) -> Vec<(RequestId, Status)> {
    let refused = |error: &Error| assert!(!matches!(trouble, Trouble::None), "{error:?}");
    let mut accepted = Vec::new();
    let rounds = if is_long() { 3 } else { 1 };
    for _ in 0..rounds {
        for Receiver { url, ends } in receivers {
            let mut kinds = vec![
                Options::default(),
                Options::default().key(Uuid::now_v7().to_string()),
                Options::default().delay(Duration::from_millis(20)),
            ];
            if *ends == Status::Completed {
                kinds.push(Options::default().ordered(&**url));
            }
            for options in kinds {
                let request = post(url, "x").with(options);
                let fired = in_time(durable.fire(request.clone())).await;
                accepted.extend(fired.inspect_err(refused).ok().map(|id| (id, *ends)));
                let alone = request.with(Options::default());
                let fired = fire_in_transaction(durable, application, alone).await;
                accepted.extend(fired.map(|id| (id, *ends)));
            }
        }
    }
    accepted
}

async fn begin(trouble: Trouble, durable: &Durable, role: &Role<'_>) -> Option<RequestId> {
    let database = role.database();
    match trouble {
        Trouble::None | Trouble::ProcessStops => {}
        Trouble::SessionsEnd => terminate(database, role).await,
        Trouble::RightIsRevoked => {
            role.granted("REVOKE UPDATE ON requeuest.mq_msgs FROM ROLE")
                .await;
        }
        Trouble::IsDemoted => {
            database.pool().execute(DEMOTE).await.unwrap();
            let always = "ALTER TABLE requeuest.mq_msgs ENABLE ALWAYS TRIGGER refuse";
            database.pool().execute(always).await.unwrap();
        }
        Trouble::RowIsDamaged => {
            let server = Server::always(200).await;
            let later = post(server.url("/"), "x").with(Options::default().delay(LONG));
            let id = durable.fire(later).await.unwrap();
            let damaged = "claim_no = 2147483647, created_at = 'infinity', attempt_at = now()";
            damage(database, id, "mq_msgs", damaged).await;
            // The receiver has to outlive the request.
            assert_eq!(outcome(durable, id).await.status(), Status::Completed);
            return Some(id);
        }
    }
    None
}

async fn end(trouble: Trouble, role: &Role<'_>) {
    match trouble {
        Trouble::RightIsRevoked => {
            role.granted("GRANT UPDATE ON requeuest.mq_msgs TO ROLE")
                .await;
        }
        Trouble::IsDemoted => {
            let undo = "DROP TABLE public.demoted; DROP FUNCTION public.refuse CASCADE";
            role.database().pool().execute(undo).await.unwrap();
        }
        _ => {}
    }
}

/// The outcome of a request, however long ago the last trouble was.
async fn outcome(durable: &Durable, id: RequestId) -> Outcome {
    let found = async {
        loop {
            match durable.outcome(id).await {
                Ok(outcome) => return outcome,
                Err(error) => assert!(error.is_database(), "{error:?}"),
            }
        }
    };
    in_time(found).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_day_of_odd_settings_roles_and_receivers_loses_nothing() {
    let database = with_table().await;
    let (role, _) = odd_role(&database).await;
    let application = application_pool(&role);
    in_time(requeuest::migrate(&application)).await.unwrap();
    let build = || {
        Durable::builder(application.clone())
            .lease(Duration::from_secs(1))
            .retention(RETENTION)
            .retry(quick())
            .build()
            .unwrap()
    };
    let durable = build();
    let handler = outcome_fn_with(
        Arc::new(AtomicUsize::new(0)),
        async |calls: &Arc<AtomicUsize>, tx: &mut PgConnection, outcome: &Outcome| {
            note(calls, tx, outcome).await
        },
    );
    let subscription = durable.on_outcome("default", handler).await.unwrap();
    let (server, missing) = (
        Server::in_turn(&[503, 200]).await,
        Server::always(404).await,
    );
    let receivers = receivers(&server, &missing).await;

    let hours = if is_long() { 24 } else { TROUBLES.len() };
    let mut accepted = Vec::new();
    for trouble in TROUBLES.into_iter().cycle().take(hours) {
        let other = (trouble == Trouble::ProcessStops).then(build);
        let handle = other.as_ref().unwrap_or(&durable);
        let early = calls(handle, &application, &receivers, Trouble::None).await;
        accepted.extend(begin(trouble, &durable, &role).await);
        let late = calls(&durable, &application, &receivers, trouble).await;
        if let Some(other) = other {
            in_time(other.shutdown(Duration::ZERO)).await.unwrap();
        }
        end(trouble, &role).await;
        for (id, ends) in early.into_iter().chain(late) {
            let status = outcome(&durable, id).await.status();
            assert_eq!(status, ends, "{id} in an hour with {trouble:?}");
            accepted.push(id);
        }
    }

    let accepted: Vec<_> = accepted.into_iter().map(Uuid::from).collect();
    let waiting = "SELECT count(*) FROM unnest($1::uuid[]) a(id)
                   WHERE NOT EXISTS (SELECT FROM public.done WHERE request = a.id)";
    eventually("each outcome is handled", || async {
        let waiting: i64 = sqlx::query_scalar(waiting)
            .bind(&accepted)
            .fetch_one(database.pool())
            .await
            .unwrap();
        waiting == 0
    })
    .await;
    eventually_rows(&database, "mq_msgs", 0).await;
    eventually_rows(&database, "unhandled", 0).await;
    let kept = count(&database, "SELECT count(*) FROM requeuest.outcomes_kept").await;
    let all = DeadLetterFilter::default();
    let purged = durable.purge_dead_letters(&all);
    assert_eq!(in_time(purged).await.unwrap(), u64::try_from(kept).unwrap());
    eventually_rows(&database, "mq_payloads", 0).await;
    assert!(durable.failed_hand_overs(None).await.unwrap().is_empty());
    eventually("each part of the sweep works", || async {
        durable.sweep_parts().iter().all(|part| part.failures == 0)
    })
    .await;
    assert!(
        durable
            .background_tasks()
            .iter()
            .all(|task| task.panics == 0)
    );
    drop(subscription);
    in_time(durable.shutdown(LONG)).await.unwrap();
    application.close().await;
    role.dropped().await;
}
