//! What an attempt's request carries in its extensions, besides its [`RequestId`].

use std::fmt;
use std::sync::Arc;

use http::Extensions;

use crate::id::RequestId;

/// The number of an attempt, from 1, in the [`http::Extensions`] of the attempt's request.
///
/// Inner tower layers, inner reqwest middleware and transports find it there, next to the
/// [`RequestId`] and the [`Channel`].
///
/// # Examples
///
/// A tower layer below [`DurableLayer`](crate::DurableLayer) that marks repetitions:
///
/// ```
/// use requeuest::{AttemptNumber, Body};
/// use tower::ServiceBuilder;
///
/// let marking = ServiceBuilder::new().map_request(|mut request: http::Request<Body>| {
///     let number = request.extensions().get::<AttemptNumber>().map_or(1, |number| number.get());
///     request.headers_mut().insert("x-attempt", number.into());
///     request
/// });
/// # let _: ServiceBuilder<_> = marking;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptNumber(u32);

impl AttemptNumber {
    /// The number. The first attempt is number 1.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for AttemptNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The channel of a request, in the [`http::Extensions`] of each attempt's request. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Channel(Arc<str>);

impl Channel {
    /// The channel's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Adds what an attempt's request carries. Values of these types that the caller attached, perhaps
/// those of an outer request, are replaced.
pub(crate) fn attach(extensions: &mut Extensions, id: RequestId, channel: &Arc<str>, number: u32) {
    extensions.insert(id);
    extensions.insert(AttemptNumber(number));
    extensions.insert(Channel(Arc::clone(channel)));
}

/// Whether these are the extensions of an attempt, so that its request is persisted already.
pub(crate) fn is_attempt(extensions: &Extensions) -> bool {
    extensions.get::<AttemptNumber>().is_some()
}

/// Removes what is true of a single attempt only. The id stays.
#[cfg(feature = "reqwest-middleware")]
pub(crate) fn detach(extensions: &mut Extensions) {
    extensions.remove::<AttemptNumber>();
    extensions.remove::<Channel>();
}
