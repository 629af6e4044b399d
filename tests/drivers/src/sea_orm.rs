//! `SeaORM` 2.

use requeuest::OutboxStatement;
use sea_orm::{
    ConnectionTrait, Database, DatabaseTransaction, DbBackend, DbErr, Statement, TransactionTrait,
};

use crate::Setting;

async fn persist(
    transaction: &DatabaseTransaction,
    statement: &OutboxStatement,
) -> Result<(), DbErr> {
    let (request, body) = statement.parameters();
    let parameters = [request.into(), body.map(<[u8]>::to_vec).into()];
    let statement =
        Statement::from_sql_and_values(DbBackend::Postgres, statement.sql(), parameters);
    transaction.execute_raw(statement).await?;
    Ok(())
}

#[tokio::test]
async fn a_commit_sends_and_a_rollback_does_not() {
    let setting = Setting::new().await;
    let database = Database::connect(setting.url()).await.unwrap();
    let [left, sent] = ["rolled back", "committed"].map(|body| setting.statement(body));

    let transaction = database.begin().await.unwrap();
    let insert = "INSERT INTO orders VALUES ('rolled back')";
    transaction.execute_unprepared(insert).await.unwrap();
    persist(&transaction, &left).await.unwrap();
    transaction.rollback().await.unwrap();

    let transaction = database.begin().await.unwrap();
    let insert = "INSERT INTO orders VALUES ('committed')";
    transaction.execute_unprepared(insert).await.unwrap();
    persist(&transaction, &sent).await.unwrap();
    transaction.commit().await.unwrap();
    database.close().await.unwrap();
    setting.assert_only(sent.id(), left.id()).await;
}
