//! Lists and counts of requests.

use sqlx::{Connection, PgConnection, Postgres, QueryBuilder, Row};
use uuid::Uuid;

use super::source::{Search, Source, WINDOW};
use super::summary::summaries;
use crate::error::Error;
use crate::id::RequestId;
use crate::inspection::{Count, MAX_COUNT, RequestFilter, RequestSummary};
use crate::sealer::Sealer;
use crate::store::Store;

/// One moment of the database: a request that moves on meanwhile is shown once.
pub(super) const SNAPSHOT: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

impl Store {
    /// The requests that match, the newest first, from behind a request on. Returns behind which
    /// request the list continues.
    pub(crate) async fn requests(
        &self,
        filter: &RequestFilter,
        before: Option<RequestId>,
        limit: usize,
    ) -> Result<(Vec<RequestSummary>, Option<RequestId>), Error> {
        self.run_verified("inspect.requests", async |connection| {
            let mut snapshot = connection.begin_with(SNAPSHOT).await?;
            let Some(search) = search(&mut snapshot, filter, before, self.sealer()).await? else {
                return Ok((Vec::new(), None));
            };
            let page = page(&mut snapshot, &search, limit, self.sealer()).await?;
            let requests = summaries(&mut snapshot, &page.ids, self.sealer()).await?;
            snapshot.commit().await?;
            Ok((requests, page.next.map(RequestId::from)))
        })
        .await
    }

    /// How many requests match.
    pub(crate) async fn count_requests(&self, filter: &RequestFilter) -> Result<Count, Error> {
        self.run_verified("inspect.count", async |connection| {
            let mut snapshot = connection.begin_with(SNAPSHOT).await?;
            let mut count = Count::new(0, true);
            if let Some(search) = search(&mut snapshot, filter, None, self.sealer()).await? {
                for source in search.sources() {
                    let found = count_in(&mut snapshot, &search, source, self.sealer()).await?;
                    count = count.and(found);
                    // Whatever the others have, it is at least so many.
                    if count.number == MAX_COUNT && !count.is_exact {
                        break;
                    }
                }
            }
            snapshot.commit().await?;
            Ok(count)
        })
        .await
    }
}

/// Resolves the filter's key. `None` if no request has it.
async fn search<'a>(
    connection: &mut PgConnection,
    filter: &'a RequestFilter,
    before: Option<RequestId>,
    sealer: &Sealer,
) -> Result<Option<Search<'a>>, sqlx::Error> {
    let mut search = Search {
        filter,
        id: filter.id.map(Uuid::from),
        before: before.map(Uuid::from),
        has_keys: sealer.has_keys(),
    };
    if let (Some(channel), Some(key)) = (&filter.channel, &filter.key) {
        let found = request_of_key(connection, channel, key).await?;
        match found.map(Uuid::from) {
            Some(found) if search.id.is_none_or(|id| id == found) => search.id = Some(found),
            _ => return Ok(None),
        }
    }
    Ok(Some(search))
}

/// The request that has a caller's key.
pub(super) async fn request_of_key(
    connection: &mut PgConnection,
    channel: &str,
    key: &str,
) -> Result<Option<RequestId>, sqlx::Error> {
    let id: Option<Uuid> = sqlx::query_scalar(
        "SELECT k.id FROM request_keys k WHERE k.channel_name = $1 AND k.key = $2",
    )
    .bind(channel)
    .bind(key)
    .fetch_optional(connection)
    .await?;
    Ok(id.map(RequestId::from))
}

struct Page {
    ids: Vec<Uuid>,
    next: Option<Uuid>,
}

async fn page(
    connection: &mut PgConnection,
    search: &Search<'_>,
    limit: usize,
    sealer: &Sealer,
) -> Result<Page, sqlx::Error> {
    let mut ids = Vec::new();
    // Below this id, some source was not looked at.
    let mut seen_down_to: Option<Uuid> = None;
    for source in search.sources() {
        let found = matches_in(connection, search, source, limit + 1, sealer).await?;
        seen_down_to = seen_down_to.max(found.seen_down_to);
        ids.extend(found.ids);
    }
    // The nil id comes before all.
    ids.retain(|id| Some(*id) >= seen_down_to);
    ids.sort_unstable_by(|a, b| b.cmp(a));
    ids.dedup();
    let next = if ids.len() > limit {
        ids.truncate(limit);
        ids.last().copied()
    } else {
        seen_down_to
    };
    Ok(Page { ids, next })
}

struct Found {
    /// The last one first.
    ids: Vec<Uuid>,
    /// The last row that was looked at, in the order of the list. `None` if all were.
    seen_down_to: Option<Uuid>,
}

/// Up to `limit` matches of a source.
async fn matches_in(
    connection: &mut PgConnection,
    search: &Search<'_>,
    source: Source,
    limit: usize,
    sealer: &Sealer,
) -> Result<Found, sqlx::Error> {
    let is_narrow = match search.probe(source) {
        Some(probe) => rows_of(connection, probe).await? <= WINDOW as i64,
        None => false,
    };
    if is_narrow {
        if let Some(statement) = search.narrowed(source, limit) {
            let ids = matching(connection, statement, search, limit, sealer).await?;
            let seen_down_to = (ids.len() == limit).then(|| ids[limit - 1]);
            return Ok(Found { ids, seen_down_to });
        }
    }
    let mut ids = Vec::new();
    if let Some(statement) = search.walked(source, limit) {
        ids = matching(connection, statement, search, limit, sealer).await?;
    }
    let seen_down_to = if ids.len() == limit {
        Some(ids[limit - 1])
    } else {
        let mut end = search.end_of_walk(source);
        let end = end.build_query_scalar().persistent(false);
        end.fetch_optional(connection).await?
    };
    Ok(Found { ids, seen_down_to })
}

async fn count_in(
    connection: &mut PgConnection,
    search: &Search<'_>,
    source: Source,
    sealer: &Sealer,
) -> Result<Count, sqlx::Error> {
    let narrow = match search.probe(source) {
        Some(probe) => Some(rows_of(connection, probe).await?),
        None => None,
    };
    let is_complete = if let Some(rows) = narrow {
        rows <= WINDOW as i64
    } else {
        let mut end = search.end_of_walk(source);
        let end = end.build_query_scalar::<Uuid>().persistent(false);
        end.fetch_optional(&mut *connection).await?.is_none()
    };
    let number = if search.has_keys && search.filter.error_contains.is_some() {
        let limit = WINDOW + 1;
        let statement = match narrow {
            Some(_) => search.narrowed(source, limit),
            None => search.walked(source, limit),
        };
        let Some(statement) = statement else {
            return Ok(Count::new(0, true));
        };
        let found = matching(connection, statement, search, limit, sealer).await?;
        found.len() as u64
    } else {
        let counted = rows_of(connection, search.counted(source)).await?;
        counted.unsigned_abs()
    };
    Ok(Count::new(number, is_complete))
}

async fn rows_of(
    connection: &mut PgConnection,
    mut statement: QueryBuilder<'static, Postgres>,
) -> Result<i64, sqlx::Error> {
    let query = statement.build_query_scalar().persistent(false);
    query.fetch_one(connection).await
}

/// The first matches, after their errors were decrypted if that is what is searched.
async fn matching(
    connection: &mut PgConnection,
    mut statement: QueryBuilder<'static, Postgres>,
    search: &Search<'_>,
    limit: usize,
    sealer: &Sealer,
) -> Result<Vec<Uuid>, sqlx::Error> {
    let query = statement.build().persistent(false);
    let rows = query.fetch_all(connection).await?;
    let text = search.filter.error_contains.as_deref();
    let text = text.filter(|_| search.has_keys).map(str::to_lowercase);
    let mut ids = Vec::with_capacity(rows.len().min(limit));
    for row in rows {
        let id: Uuid = row.try_get(0)?;
        let error: Option<String> = row.try_get(2).unwrap_or_default();
        if let (Some(text), Some(error)) = (&text, error) {
            let class: Option<String> = row.try_get(1).unwrap_or_default();
            let class = class.unwrap_or_default();
            let shown = sealer.read_error_text(id.into(), &class, error);
            if !shown.is_ok_and(|shown| shown.to_lowercase().contains(text)) {
                continue;
            }
        }
        ids.push(id);
        if ids.len() == limit {
            break;
        }
    }
    Ok(ids)
}
