//! Encrypting what is stored by another key, and finding out when a key may go.

use std::collections::BTreeMap;

use super::Durable;
use crate::error::Error;
use crate::store::reencrypt::{Place, Reencrypted, Table};

/// A key, and how many rows need it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyUsage {
    /// The id of the key. `None` stands for what is not encrypted.
    pub id: Option<String>,
    /// Requests in the queue or kept as dead letters.
    pub requests: u64,
    /// Outcomes.
    pub outcomes: u64,
    /// Recorded attempts.
    pub attempts: u64,
    /// [Keys](crate::Options::key) of requests.
    pub request_keys: u64,
    /// Errors of handlers of outcomes.
    pub hand_overs: u64,
}

impl KeyUsage {
    fn new(id: &str) -> Self {
        Self {
            id: (!id.is_empty()).then(|| id.to_owned()),
            requests: 0,
            outcomes: 0,
            attempts: 0,
            request_keys: 0,
            hand_overs: 0,
        }
    }

    fn of(&mut self, table: Table) -> &mut u64 {
        match table {
            Table::Requests => &mut self.requests,
            Table::Outcomes => &mut self.outcomes,
            Table::Attempts => &mut self.attempts,
            Table::Keys => &mut self.request_keys,
            Table::HandOvers => &mut self.hand_overs,
        }
    }

    /// All rows that need the key.
    pub fn rows(&self) -> u64 {
        self.requests + self.outcomes + self.attempts + self.request_keys + self.hand_overs
    }
}

/// How far a [`Reencryption`] is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReencryptionProgress {
    /// Rows that were encrypted by the first key.
    pub done: u64,
    /// Rows that are left, of those that there were at the beginning.
    pub remaining: u64,
    /// Rows that this process can't read. They stay as they are.
    pub unreadable: u64,
    /// Rows that a transaction had locked or changed meanwhile. They are left for another call.
    pub skipped: u64,
}

/// Encrypts what is stored by the first key, a batch for each [`next`](Self::next).
#[must_use = "it does nothing until `next` is called"]
#[derive(Debug)]
pub struct Reencryption {
    durable: Durable,
    writer: String,
    /// The table, and the position in it. `None` before the first batch.
    at: Option<(usize, Place)>,
    progress: ReencryptionProgress,
}

impl Reencryption {
    /// Encrypts a batch of up to 500 rows, and returns how far the work is. `None` at the end.
    ///
    /// # Errors
    ///
    /// If the database fails. What was encrypted by then stays so, and the next call continues.
    ///
    /// # Cancel safety
    ///
    /// A batch that was begun is finished, awaited or not. If the future is dropped before it
    /// returns, the counts don't include the batch. The next call continues.
    pub async fn next(&mut self) -> Result<Option<ReencryptionProgress>, Error> {
        let Some((number, place)) = self.at.clone() else {
            self.progress.remaining = self.stale_rows().await?;
            self.at = Some((0, Table::ALL[0].start()));
            return Ok(Some(self.progress));
        };
        let Some(table) = Table::ALL.get(number).copied() else {
            return Ok(None);
        };
        let writer = self.writer.clone();
        let engine = self.durable.engine();
        let (progress, last) = engine
            .with_store(|store| async move {
                let mut progress = ReencryptionProgress::default();
                let rows = store.keyed_rows(table, &place).await?;
                for row in &rows {
                    if row.keys.iter().all(|key| *key == writer) {
                        continue;
                    }
                    match store.reencrypt(table, &row.place).await? {
                        Reencrypted::Done => progress.done += 1,
                        Reencrypted::Skipped => progress.skipped += 1,
                        Reencrypted::Unreadable(reason) => {
                            progress.unreadable += 1;
                            tracing::debug!(?table, %reason, "a row can't be encrypted anew");
                        }
                    }
                }
                Ok((progress, rows.into_iter().next_back().map(|row| row.place)))
            })
            .await?;
        self.at = Some(if let Some(place) = last {
            (number, place)
        } else {
            let next = Table::ALL.get(number + 1).unwrap_or(&table);
            (number + 1, next.start())
        });
        let all = &mut self.progress;
        let looked = progress.done + progress.skipped + progress.unreadable;
        all.done += progress.done;
        all.skipped += progress.skipped;
        all.unreadable += progress.unreadable;
        all.remaining = all.remaining.saturating_sub(looked);
        Ok(Some(*all))
    }

    /// Encrypts everything, and returns how far that came.
    ///
    /// # Errors
    ///
    /// If the database fails. What was encrypted by then stays so.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, a part of the rows has been encrypted. Another
    /// [`Durable::reencrypt`] finds the others.
    pub async fn finish(mut self) -> Result<ReencryptionProgress, Error> {
        while self.next().await?.is_some() {}
        Ok(self.progress)
    }

    async fn stale_rows(&self) -> Result<u64, Error> {
        let mut stale = 0;
        self.durable
            .each_keyed_row(|_, keys| {
                stale += u64::from(keys.iter().any(|key| *key != self.writer));
            })
            .await?;
        Ok(stale)
    }
}

impl Durable {
    /// Encrypts what is stored by the first key of the handle's
    /// [`Keyring`](crate::encryption::Keyring): what another key encrypted, and what is not
    /// encrypted. Does nothing until [`Reencryption::next`] or [`Reencryption::finish`] is called.
    ///
    /// It works while all processes run, in batches, and can be stopped and begun again at any
    /// time. All processes should have the first key by then: those that don't have it park what it
    /// encrypts.
    ///
    /// Postgres keeps earlier versions of rows until a vacuum, and in the backups that it has.
    ///
    /// # Errors
    ///
    /// If the handle has no keys, with `encryption` in [`Error::field`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// let mut work = durable.reencrypt()?;
    /// while let Some(progress) = work.next().await? {
    ///     println!("{} rows encrypted, {} remain", progress.done, progress.remaining);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn reencrypt(&self) -> Result<Reencryption, Error> {
        let sealer = self.engine().driver().store.sealer();
        let writer = sealer.keys().and_then(|keys| keys.ids().next());
        let writer = writer.ok_or_else(|| {
            Error::config(
                "encryption",
                "is missing: the handle has no keys to encrypt with",
            )
        })?;
        Ok(Reencryption {
            writer: writer.to_owned(),
            durable: self.clone(),
            at: None,
            progress: ReencryptionProgress::default(),
        })
    }

    /// The keys that stored rows need, each with the number of rows, in the order of their ids.
    /// What is not encrypted comes first. The handle needs no keys for this.
    ///
    /// A key that is not listed may be removed from all processes, once none of them encrypts with
    /// it any more. The call reads all rows, a page at a time, so don't call it often.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// let keys = durable.encryption_keys().await?;
    /// if !keys.iter().any(|key| key.id.as_deref() == Some("2026-01")) {
    ///     println!("the key 2026-01 may go");
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn encryption_keys(&self) -> Result<Vec<KeyUsage>, Error> {
        let mut found: BTreeMap<String, KeyUsage> = BTreeMap::new();
        self.each_keyed_row(|table, keys| {
            for key in keys {
                let usage = found
                    .entry(key.clone())
                    .or_insert_with(|| KeyUsage::new(key));
                *usage.of(table) += 1;
            }
        })
        .await?;
        Ok(found.into_values().collect())
    }

    /// Calls the function with the keys of each row.
    async fn each_keyed_row(&self, mut see: impl FnMut(Table, &[String])) -> Result<(), Error> {
        for table in Table::ALL {
            let mut place = table.start();
            loop {
                let engine = self.engine();
                let rows = engine
                    .with_store(|store| async move { store.keyed_rows(table, &place).await })
                    .await?;
                for row in &rows {
                    see(table, &row.keys);
                }
                let Some(last) = rows.into_iter().next_back() else {
                    break;
                };
                place = last.place;
            }
        }
        Ok(())
    }
}
