//! Handlers of outcomes, as async functions and closures.

use requeuest::{Durable, Outcome, OutcomeSubscription, RequestId, outcome_fn, outcome_fn_with};
use sqlx::PgConnection;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use crate::support::{Server, eventually_rows, in_time, migrated, post};

#[derive(Debug)]
struct Refused;

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("refused")
    }
}

impl std::error::Error for Refused {}

async fn function(_: &mut PgConnection, outcome: &Outcome) -> Result<(), Refused> {
    outcome.response().map(drop).ok_or(Refused)
}

async fn with_state(
    sender: &UnboundedSender<RequestId>,
    tx: &mut PgConnection,
    outcome: &Outcome,
) -> anyhow::Result<()> {
    sqlx::query("SELECT 1").execute(tx).await?;
    sender.send(outcome.id())?;
    Ok(())
}

async fn subscribed(
    durable: &Durable,
    sender: UnboundedSender<RequestId>,
) -> Result<Vec<OutcomeSubscription>, requeuest::Error> {
    let closure = outcome_fn(async |tx: &mut PgConnection, _: &Outcome| {
        sqlx::query("SELECT 1").execute(tx).await?;
        Ok::<_, sqlx::Error>(())
    });
    Ok(vec![
        durable.on_outcome("function", outcome_fn(function)).await?,
        durable.on_outcome("closure", closure).await?,
        durable
            .on_outcome("state", outcome_fn_with(sender, with_state))
            .await?,
    ])
}

#[tokio::test]
async fn handlers_are_async_functions_and_closures() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::builder(database.pool().clone())
        .deliver(["function", "closure", "state"])
        .build()
        .unwrap();
    let (sender, mut handled) = unbounded_channel();
    let _subscriptions = subscribed(&durable, sender).await.unwrap();
    let mut ids = Vec::new();
    for channel in ["function", "closure", "state"] {
        let options = requeuest::Options::default().channel(channel);
        let request = post(server.url("/"), "x").with(options);
        ids.push(durable.fire(request).await.unwrap());
    }
    assert_eq!(in_time(handled.recv()).await, Some(ids[2]));
    for id in ids {
        in_time(durable.response(id)).await.unwrap();
    }
    eventually_rows(&database, "unhandled", 0).await;
}
