//! Pausing and resuming channels.

use super::Admin;
use crate::error::Error;
use crate::inspection::PausedChannel;
use crate::store::paused_channels::{MAX_PAUSED_CHANNELS, Paused};

impl Admin {
    /// Pauses a channel: no process begins an attempt of its requests until
    /// [`resume_channel`](Self::resume_channel), whatever restarts in between. `false` if it is
    /// paused already.
    ///
    /// Requests are still persisted, and wait. What is guaranteed:
    ///
    /// - Once this has returned, no runner claims a request of the channel.
    /// - This process begins no attempt any more. Others learn within about a second that they are
    ///   not to begin one of a request that they have: the first attempt of a new request, or a
    ///   retry that they hold. A process that can't reach the database doesn't learn it.
    /// - Attempts under way continue, and are settled. Attempts that fail then wait too.
    /// - Callers of [`await_response`](crate::Durable::await_response) wait. Their own limit of
    ///   time counts, and so do [deadlines](crate::Options::deadline): a request that waits in the
    ///   queue past either is given up. Other limits of time don't count, and no request is given
    ///   up because no runner delivers the channel.
    ///
    /// A request that waits for this says so by
    /// [`Hold::ChannelPaused`](super::Hold::ChannelPaused).
    ///
    /// # Errors
    ///
    /// If the channel's name or the author is refused, or if as many channels as can be are paused,
    /// which are 1000 ([`Error::is_request`]), or if the database fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// let admin = admin.by("ann").because("the template is wrong");
    /// admin.pause_channel("emails").await?;
    /// // Mended.
    /// admin.resume_channel("emails").await?;
    /// # Ok(()) }
    /// ```
    pub async fn pause_channel(&self, channel: &str) -> Result<bool, Error> {
        crate::Options::default().channel(channel).validate()?;
        let author = self.signed()?;
        let name = channel.to_owned();
        let paused = self
            .with_store(|store| async move { store.pause_channel(&name, &author).await })
            .await?;
        if paused == Paused::TooMany {
            return Err(Error::request(
                "channel",
                format!(
                    "{MAX_PAUSED_CHANNELS} channels are paused, and no more can be; resume some"
                ),
            ));
        }
        self.note_paused(channel, true);
        Ok(paused == Paused::Now)
    }

    /// Lets attempts of a channel begin again. `false` if it was not paused.
    ///
    /// # Errors
    ///
    /// If the channel's name or the author is refused ([`Error::is_request`]), or if the
    /// database fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// for paused in admin.paused_channels().await? {
    ///     admin.resume_channel(&paused.channel).await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn resume_channel(&self, channel: &str) -> Result<bool, Error> {
        crate::Options::default().channel(channel).validate()?;
        let author = self.signed()?;
        let name = channel.to_owned();
        let resumed = self
            .with_store(|store| async move { store.resume_channel(&name, &author).await })
            .await?;
        self.note_paused(channel, false);
        Ok(resumed)
    }

    /// The channels that are paused, by name.
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
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// for paused in admin.paused_channels().await? {
    ///     println!("{} by {}", paused.channel, paused.by);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn paused_channels(&self) -> Result<Vec<PausedChannel>, Error> {
        self.with_store(|store| async move { store.paused_channels().await })
            .await
    }
}
