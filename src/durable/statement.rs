//! Requests in the transactions of other drivers.

use super::Durable;
use super::submit::Mode;
use crate::error::Error;
use crate::outbox::OutboxStatement;
use crate::request::Request;

impl Durable {
    /// The statement that persists a request in the transaction of any driver. A commit sends the
    /// request, a rollback never does.
    ///
    /// It does what [`fire_in`](Self::fire_in) does, which takes a connection of sqlx 0.8: all
    /// [`Options`](crate::Options) and all settings of the handle apply, the request is checked
    /// here, and a handle with encryption keys encrypts it here. Each statement is one request, so
    /// run it once. Like `fire_in`, it may fail where the [`key`](crate::Options::key) or the
    /// [ordering key](crate::Options::ordered) belongs to another request: then Postgres reports
    /// SQLSTATE 23505 or 55006, with a text as that of `fire_in` and a hint.
    ///
    /// Delays and deadlines count from when the statement runs. Nothing waits for the database
    /// here. The request is in memory, because no statement can stream its body:
    /// [`Request::try_from`](crate::Request) makes one of a request of `http` or reqwest.
    ///
    /// # Errors
    ///
    /// If the request is refused, or the handle was shut down.
    ///
    /// # Examples
    ///
    /// With tokio-postgres. The guide has the call of each driver.
    ///
    /// ```no_run
    /// use requeuest::{Durable, Options, Request};
    ///
    /// # struct Transaction;
    /// # impl Transaction {
    /// #     async fn execute(&self, _: &str, _: &[&dyn std::fmt::Debug]) -> std::io::Result<u64> {
    /// #         Ok(1)
    /// #     }
    /// # }
    /// # async fn example(
    /// #     durable: Durable,
    /// #     transaction: Transaction,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// let order = http::Request::post("https://partner.example/orders").body("42")?;
    /// let order = Request::try_from(order)?.with(Options::default().ordered("customer-7"));
    /// let statement = durable.statement(&order)?;
    /// let (request, body) = statement.parameters();
    /// transaction.execute(statement.sql(), &[&request, &body]).await?;
    /// println!("{} is sent after the commit", statement.id());
    /// # Ok(()) }
    /// ```
    pub fn statement(&self, request: &Request) -> Result<OutboxStatement, Error> {
        let prepared = self.prepare(request.clone(), Mode::Fired)?;
        self.engine().ensure_not_closing()?;
        let statement = self.engine().store().statement(&prepared.row);
        self.engine().left_to_runners([&prepared.row.channel]);
        Ok(statement)
    }
}
