//! sqlx 0.9.

use requeuest::OutboxStatement;
use sqlx::{AssertSqlSafe, PgConnection, PgPool};

use crate::Setting;

async fn persist(
    transaction: &mut PgConnection,
    statement: &OutboxStatement,
) -> Result<(), sqlx::Error> {
    let (request, body) = statement.parameters();
    sqlx::query(AssertSqlSafe(statement.sql().to_owned()))
        .bind(request)
        .bind(body)
        .execute(transaction)
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_commit_sends_and_a_rollback_does_not() {
    let setting = Setting::new().await;
    let pool = PgPool::connect(setting.url()).await.unwrap();
    let [left, sent] = ["rolled back", "committed"].map(|body| setting.statement(body));
    let insert = "INSERT INTO orders VALUES ($1)";

    let mut transaction = pool.begin().await.unwrap();
    let order = sqlx::query(insert).bind("rolled back");
    order.execute(&mut *transaction).await.unwrap();
    persist(&mut transaction, &left).await.unwrap();
    transaction.rollback().await.unwrap();

    let mut transaction = pool.begin().await.unwrap();
    let order = sqlx::query(insert).bind("committed");
    order.execute(&mut *transaction).await.unwrap();
    persist(&mut transaction, &sent).await.unwrap();
    transaction.commit().await.unwrap();
    pool.close().await;
    setting.assert_only(sent.id(), left.id()).await;
}
