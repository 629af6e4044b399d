//! Many requests at once.

use sqlx::PgConnection;

use super::{Durable, Mode};
use crate::error::Error;
use crate::id::RequestId;
use crate::into_request::IntoRequest;
use crate::store::bulk::Chunk;
use crate::store::enqueue::NewRequest;

impl Durable {
    /// Persists many requests in one transaction: all of them, or none. They are delivered in the
    /// background. The ids come in the order of the requests, and requests of one ordering key keep
    /// their order.
    ///
    /// The requests are taken from the iterator as they are written, a thousand at a time, so a
    /// long iterator needs no long list. This is many times as fast as calling [`fire`](Self::fire)
    /// for each.
    ///
    /// Bodies that are streams are read while the transaction is open, except for those of the
    /// first chunk, and Postgres ends a transaction that is idle for 30 seconds. Read slow streams
    /// first.
    ///
    /// A key that another transaction holds is waited for, for up to five seconds. Then the call
    /// fails with [`Error::is_key_busy`]. Two calls of more than a thousand requests each that take
    /// two keys in opposite order deadlock, and Postgres ends one of them (SQLSTATE 40P01).
    ///
    /// # Errors
    ///
    /// If one of the requests is refused, or they can't be persisted. Then none will be sent,
    /// except after [`Error::is_indeterminate`], when all may be.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped before it returns, either all of the requests or
    /// none of them may have been persisted.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::{HeaderMap, Request, Url};
    ///
    /// let url: Url = "https://example.com/hook".parse().expect("a valid URL");
    /// let hooks = (0..100_000)
    ///     .map(|number| Request::post(url.clone(), vec![number as u8], HeaderMap::new()));
    /// let ids = durable.fire_many(hooks).await?;
    /// assert_eq!(ids.len(), 100_000);
    /// # Ok(()) }
    /// ```
    pub async fn fire_many<I>(&self, requests: I) -> Result<Vec<RequestId>, Error>
    where
        I: IntoIterator,
        I::Item: IntoRequest,
    {
        self.engine().ensure_open()?;
        let transaction = self.engine().begin_bulk();
        let mut chunk = Chunk::default();
        for request in requests {
            if let Some(full) = chunk.push(self.row(request).await?) {
                if !transaction.write(full).await {
                    return transaction.commit().await;
                }
            }
        }
        if !chunk.is_empty() {
            transaction.write(chunk).await;
        }
        transaction.commit().await
    }

    /// As [`fire_many`](Self::fire_many), in the caller's transaction: a commit sends all of the
    /// requests, a rollback none. Outside a transaction, requests that were written before an error
    /// stay persisted.
    ///
    /// The notes of [`fire_in`](Self::fire_in) on keys and runners apply here too.
    ///
    /// # Errors
    ///
    /// If one of the requests is refused, or a statement fails. The transaction should be rolled
    /// back.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, roll the transaction back.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     pool: sqlx::PgPool,
    /// #     durable: requeuest::Durable,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut tx = pool.begin().await?;
    /// let orders = (1..=3)
    ///     .map(|order| http::Request::post("https://example.com/orders").body(order.to_string()));
    /// let ids = durable.fire_many_in(&mut tx, orders.collect::<Result<Vec<_>, _>>()?).await?;
    /// tx.commit().await?;
    /// # Ok(()) }
    /// ```
    pub async fn fire_many_in<I>(
        &self,
        connection: &mut PgConnection,
        requests: I,
    ) -> Result<Vec<RequestId>, Error>
    where
        I: IntoIterator,
        I::Item: IntoRequest,
    {
        self.engine().ensure_not_closing()?;
        let mut ids = Vec::new();
        let mut chunk = Chunk::default();
        for request in requests {
            if let Some(full) = chunk.push(self.row(request).await?) {
                ids.append(&mut self.write_chunk_in(connection, &full).await?);
            }
        }
        if !chunk.is_empty() {
            ids.append(&mut self.write_chunk_in(connection, &chunk).await?);
        }
        Ok(ids)
    }

    async fn write_chunk_in(
        &self,
        connection: &mut PgConnection,
        chunk: &Chunk,
    ) -> Result<Vec<RequestId>, Error> {
        let engine = self.engine();
        let ids = engine
            .store()
            .write_chunk_for_caller(connection, chunk)
            .await?;
        engine.left_to_runners(chunk.channels());
        let meter = &engine.driver().meter;
        meter.enqueued(chunk.new_rows(&ids).map(|row| (row, None)));
        Ok(ids)
    }

    async fn row(&self, request: impl IntoRequest) -> Result<NewRequest, Error> {
        let request = self.read(request).await?;
        Ok(self.prepare(request, Mode::Fired)?.row)
    }
}
