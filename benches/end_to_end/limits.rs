//! The limits of a durable call: the exchange alone, and bare statements that write the same rows.

use std::time::Instant;

use bytes::Bytes;
use requeuest::sqlx::{self, PgPool};

use crate::common::AnyError;
use crate::common::load::{Measured, each};
use crate::common::receiver::Receiver;

pub(crate) async fn exchange(
    receiver: &Receiver,
    body: &Bytes,
    callers: usize,
    count: usize,
) -> Result<Measured, AnyError> {
    let client = reqwest::Client::new();
    let (url, body) = (receiver.url.clone(), body.clone());
    each(callers, count, move || {
        let (client, url, body) = (client.clone(), url.clone(), body.clone());
        async move {
            client.post(&url).body(body).send().await?.bytes().await?;
            Ok(())
        }
    })
    .await
}

/// Copies of the tables that an insert writes to, with their indexes.
pub(crate) async fn tables(pool: &PgPool) -> Result<(), AnyError> {
    sqlx::raw_sql(
        "CREATE SCHEMA bare;
         CREATE TABLE bare.mq_msgs (LIKE requeuest.mq_msgs INCLUDING ALL);
         CREATE TABLE bare.mq_payloads (LIKE requeuest.mq_payloads INCLUDING ALL);
         CREATE TABLE bare.outcomes (LIKE requeuest.outcomes INCLUDING ALL);",
    )
    .execute(pool)
    .await?;
    Ok(())
}

const COMMIT: &str = "
    WITH payload AS (
        INSERT INTO bare.mq_payloads (id, name, head, body) VALUES ($1, 'requeuest', $2, $3)
    )
    INSERT INTO bare.mq_msgs (id, channel_name, channel_args, attempt_at)
    VALUES ($1, 'default', 'a840|d|http://127.0.0.1:12345', now())";

/// Inserts a row into each table that a durable insert writes to, with one statement per call.
pub(crate) async fn commits(
    pool: &PgPool,
    body: &Bytes,
    callers: usize,
    count: usize,
) -> Result<Measured, AnyError> {
    let (pool, body) = (pool.clone(), body.clone());
    each(callers, count, move || {
        let (pool, body) = (pool.clone(), body.clone());
        async move {
            sqlx::query(COMMIT)
                .bind(requeuest::Uuid::now_v7())
                .bind("x".repeat(400))
                .bind(&body[..])
                .execute(&pool)
                .await?;
            Ok(())
        }
    })
    .await
}

/// Inserts the same rows in batches of one statement each, on one connection, and deletes them
/// likewise.
pub(crate) async fn batches(
    pool: &PgPool,
    body: &Bytes,
    size: usize,
    count: usize,
) -> Result<(Measured, Measured), AnyError> {
    let mut connection = pool.acquire().await?;
    sqlx::query("TRUNCATE bare.mq_payloads, bare.mq_msgs")
        .execute(&mut *connection)
        .await?;
    let (head, rounds) = ("x".repeat(400), count / size);
    let mut inserted = Vec::new();
    let began = Instant::now();
    for _ in 0..rounds {
        let ids: Vec<_> = (0..size).map(|_| requeuest::Uuid::now_v7()).collect();
        sqlx::query(
            "WITH input AS MATERIALIZED (SELECT unnest($1::uuid[]) AS id),
             payloads AS (
                INSERT INTO bare.mq_payloads (id, name, head, body)
                SELECT id, 'requeuest', $2, $3 FROM input
             )
             INSERT INTO bare.mq_msgs (id, channel_name, channel_args, attempt_at)
             SELECT id, 'default', 'a840|d|http://127.0.0.1:12345', now() FROM input",
        )
        .bind(&ids)
        .bind(&head)
        .bind(&body[..])
        .execute(&mut *connection)
        .await?;
        inserted.push(ids);
    }
    let inserts = Measured::total(rounds * size, began.elapsed());
    let began = Instant::now();
    for ids in inserted {
        sqlx::query(
            "WITH gone AS (DELETE FROM bare.mq_payloads WHERE id = ANY ($1))
             DELETE FROM bare.mq_msgs WHERE id = ANY ($1)",
        )
        .bind(&ids)
        .execute(&mut *connection)
        .await?;
    }
    Ok((inserts, Measured::total(rounds * size, began.elapsed())))
}
