//! tokio-postgres.

use requeuest::OutboxStatement;
use tokio_postgres::{NoTls, Transaction};

use crate::Setting;

async fn persist(
    transaction: &Transaction<'_>,
    statement: &OutboxStatement,
) -> Result<(), tokio_postgres::Error> {
    let (request, body) = statement.parameters();
    transaction
        .execute(statement.sql(), &[&request, &body])
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_commit_sends_and_a_rollback_does_not() {
    let setting = Setting::new().await;
    let (mut client, connection) = tokio_postgres::connect(setting.url(), NoTls).await.unwrap();
    tokio::spawn(connection);
    let [left, sent] = ["rolled back", "committed"].map(|body| setting.statement(body));
    let insert = "INSERT INTO orders VALUES ($1)";

    let transaction = client.transaction().await.unwrap();
    transaction
        .execute(insert, &[&"rolled back"])
        .await
        .unwrap();
    persist(&transaction, &left).await.unwrap();
    transaction.rollback().await.unwrap();

    let transaction = client.transaction().await.unwrap();
    transaction.execute(insert, &[&"committed"]).await.unwrap();
    persist(&transaction, &sent).await.unwrap();
    transaction.commit().await.unwrap();
    drop(client);
    setting.assert_only(sent.id(), left.id()).await;
}
