//! Many requests at once.

use sqlx::PgConnection;

use super::{Durable, Mode};
use crate::engine::bulk::{self, Chunk, How, Transaction};
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::request::Request;
use crate::store::enqueue::NewRequest;

impl Durable {
    /// Persists many requests in one transaction of its own: all of them, or none. They are delivered in the background; their ids come in
    /// the order of the requests, and requests of one ordering key keep theirs.
    ///
    /// It takes the requests as they are written, a thousand at a time, so a long iterator needs no long list. Many times as fast as
    /// [`fire`](Self::fire) for each.
    ///
    /// Keys that a caller's transaction has are waited for, for five seconds. Two calls of more than a thousand requests each that
    /// take two keys in opposite order deadlock, and Postgres ends one of them (SQLSTATE 40P01).
    ///
    /// # Errors
    ///
    /// If one of the requests is refused, or they can't be persisted: then none will be sent, except after
    /// [`Error::is_indeterminate`], when all may be.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: dropped before it returns, all of the requests or none may have been persisted.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::{HeaderMap, Request, Url};
    ///
    /// let url: Url = "https://example.com/hook".parse().expect("a valid URL");
    /// let hooks = (0..100_000).map(|number| Request::post(url.clone(), vec![number as u8], HeaderMap::new()));
    /// let ids = durable.fire_many(hooks).await?;
    /// assert_eq!(ids.len(), 100_000);
    /// # Ok(()) }
    /// ```
    pub async fn fire_many<I>(&self, requests: I) -> Result<Vec<RequestId>, Error>
    where
        I: IntoIterator,
        I::Item: TryInto<Request>,
        <I::Item as TryInto<Request>>::Error: Into<Error>,
    {
        if self.engine().is_closing() || self.pool().is_closed() {
            return Err(Error::new(Kind::Closed));
        }
        let transaction = Transaction::begin(self.engine());
        let mut chunk = Chunk::default();
        for request in requests {
            if let Some(full) = chunk.push(self.row(request)?) {
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

    /// As [`fire_many`](Self::fire_many), in the caller's transaction: a commit sends all of them, a rollback none. Outside a
    /// transaction those are persisted that were written before an error.
    ///
    /// What [`fire_in`](Self::fire_in) says of keys and runners holds here too.
    ///
    /// # Errors
    ///
    /// If one of the requests is refused, or a statement fails. The transaction should be rolled back.
    ///
    /// # Cancel safety
    ///
    /// As safe as the connection: dropped before it returns, the transaction should be rolled back.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(pool: sqlx::PgPool, durable: requeuest::Durable) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut tx = pool.begin().await?;
    /// let orders = (1..=3).map(|order| http::Request::post("https://example.com/orders").body(order.to_string()));
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
        I::Item: TryInto<Request>,
        <I::Item as TryInto<Request>>::Error: Into<Error>,
    {
        if self.engine().is_closing() {
            return Err(Error::new(Kind::Closed));
        }
        let config = self.engine().config();
        let how = How {
            schema: &config.schema,
            inserting: config.inserting_for_caller(),
        };
        let mut ids = Vec::new();
        let mut chunk = Chunk::default();
        for request in requests {
            if let Some(full) = chunk.push(self.row(request)?) {
                ids.append(&mut bulk::write(connection, how, &full).await?);
            }
        }
        if !chunk.is_empty() {
            ids.append(&mut bulk::write(connection, how, &chunk).await?);
        }
        Ok(ids)
    }

    fn row<R>(&self, request: R) -> Result<NewRequest, Error>
    where
        R: TryInto<Request>,
        R::Error: Into<Error>,
    {
        let request = request.try_into().map_err(Into::into)?;
        Ok(self.prepare(request, Mode::Fired)?.row)
    }
}
