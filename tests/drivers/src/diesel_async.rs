//! diesel-async.

use diesel::QueryResult;
use diesel::sql_types::{Binary, Nullable, Text};
use diesel_async::{
    AnsiTransactionManager, AsyncConnection, AsyncPgConnection, RunQueryDsl, TransactionManager,
};
use requeuest::OutboxStatement;

use crate::Setting;

async fn persist(
    transaction: &mut AsyncPgConnection,
    statement: &OutboxStatement,
) -> QueryResult<()> {
    let (request, body) = statement.parameters();
    diesel::sql_query(statement.sql())
        .bind::<Text, _>(request)
        .bind::<Nullable<Binary>, _>(body)
        .execute(transaction)
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_commit_sends_and_a_rollback_does_not() {
    let setting = Setting::new().await;
    let mut connection = AsyncPgConnection::establish(setting.url()).await.unwrap();
    let [left, sent] = ["rolled back", "committed"].map(|body| setting.statement(body));
    let insert = |note| {
        let insert = diesel::sql_query("INSERT INTO orders VALUES ($1)");
        insert.bind::<Text, _>(note)
    };

    AnsiTransactionManager::begin_transaction(&mut connection)
        .await
        .unwrap();
    insert("rolled back")
        .execute(&mut connection)
        .await
        .unwrap();
    persist(&mut connection, &left).await.unwrap();
    AnsiTransactionManager::rollback_transaction(&mut connection)
        .await
        .unwrap();

    AnsiTransactionManager::begin_transaction(&mut connection)
        .await
        .unwrap();
    insert("committed").execute(&mut connection).await.unwrap();
    persist(&mut connection, &sent).await.unwrap();
    AnsiTransactionManager::commit_transaction(&mut connection)
        .await
        .unwrap();
    drop(connection);
    setting.assert_only(sent.id(), left.id()).await;
}
