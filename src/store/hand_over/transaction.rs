//! The transaction of the caller's database in which a handler works.
//!
//! A handler gets a bare connection, so it can do anything to the transaction: abort it by an error
//! that it doesn't return, commit it, leave it open. So nothing is marked as handled before the
//! handler has returned, and then only in the transaction that took the outcome.

use sqlx::pool::PoolConnection;
use sqlx::{Connection, PgConnection, Postgres, Row, TransactionManager};
use uuid::Uuid;

use crate::error::{BoxError, has_sqlstate};
use crate::id::RequestId;
use crate::store::db::within;
use crate::store::quoted;

type Manager = <Postgres as sqlx::Database>::TransactionManager;

/// Postgres refuses every statement of the transaction but its end.
const IN_FAILED_TRANSACTION: &str = "25P02";

/// An open transaction on a connection of the caller's pool. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct CallerTransaction {
    connection: PoolConnection<Postgres>,
    /// The connection is outside a transaction and can go back to the pool.
    ended: bool,
}

/// Identifies a transaction that took an outcome, also to other sessions.
#[derive(Clone, Debug)]
pub(crate) struct Xact(pub(super) String);

impl CallerTransaction {
    pub(super) async fn begin(connection: PoolConnection<Postgres>) -> Result<Self, sqlx::Error> {
        let mut transaction = Self {
            connection,
            ended: false,
        };
        within(0, Manager::begin(&mut transaction.connection, None)).await?;
        Ok(transaction)
    }

    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// The outcome that is due. Its row stays locked until the transaction ends.
    pub(super) async fn take(
        &mut self,
        schema: &str,
        channel: &str,
        except: &[RequestId],
        prepared: bool,
    ) -> Result<Option<(RequestId, Xact)>, sqlx::Error> {
        // On the caller's connection nothing may depend on the search_path.
        let call = format!(
            "SELECT id, xact FROM {}.take_unhandled($1, $2)",
            quoted(schema)
        );
        let take = sqlx::query(&call)
            .bind(channel)
            .bind(except.iter().copied().map(Uuid::from).collect::<Vec<_>>())
            .persistent(prepared)
            .fetch_optional(&mut *self.connection);
        let Some(row) = within(0, take).await? else {
            return Ok(None);
        };
        let id: Uuid = row.try_get("id")?;
        Ok(Some((id.into(), Xact(row.try_get("xact")?))))
    }

    /// Marks the outcome as handled and commits.
    pub(super) async fn commit_handled(
        mut self,
        id: RequestId,
        xact: &Xact,
        schema: &str,
        prepared: bool,
    ) -> Result<(), BoxError> {
        if Manager::get_transaction_depth(&self.connection) != 1 {
            return Err("the handler left a nested transaction open".into());
        }
        let marked = self.mark(id, xact, schema, prepared).await;
        match marked {
            Ok(true) => {}
            Ok(false) => {
                self.roll_back().await?;
                return Err(
                    "the handler ended the transaction that it was given; leave its end \
                            to the caller"
                        .into(),
                );
            }
            Err(error) if has_sqlstate(&error, &[IN_FAILED_TRANSACTION]) => {
                self.roll_back().await?;
                return Err(
                    "the handler returned `Ok` after a database error that had aborted \
                            its transaction; return the error instead"
                        .into(),
                );
            }
            Err(error) => return Err(error.into()),
        }
        Ok(self.commit().await?)
    }

    /// Marks the outcome as handled, if this is the transaction that took it.
    pub(super) async fn mark(
        &mut self,
        id: RequestId,
        xact: &Xact,
        schema: &str,
        prepared: bool,
    ) -> Result<bool, sqlx::Error> {
        let call = format!("SELECT {}.mark_handled($1, $2)", quoted(schema));
        let mark = sqlx::query_scalar(&call)
            .bind(Uuid::from(id))
            .bind(&xact.0)
            .persistent(prepared)
            .fetch_one(&mut *self.connection);
        within(0, mark).await
    }

    /// Deferred constraints may still fail here.
    pub(super) async fn commit(mut self) -> Result<(), sqlx::Error> {
        Manager::commit(&mut self.connection).await?;
        self.ended = true;
        Ok(())
    }

    /// Rolls back and returns the connection to its pool.
    pub(super) async fn roll_back(mut self) -> Result<(), sqlx::Error> {
        within(0, Manager::rollback(&mut self.connection)).await?;
        self.ended = !self.connection.is_in_transaction();
        Ok(())
    }
}

impl Drop for CallerTransaction {
    fn drop(&mut self) {
        if !self.ended {
            // The pool would wait for a statement under way before it rolls back.
            self.connection.close_on_drop();
        }
    }
}
