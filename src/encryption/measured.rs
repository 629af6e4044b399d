//! For the benches: what encryption costs, without a database.

use bytes::Bytes;

use super::cipher::Part;
use super::key::Keyring;
use crate::codec::Delivery;
use crate::id::RequestId;
use crate::options::{Guarantee, Priority};
use crate::request::Request;
use crate::retry::RetryPolicy;
use crate::sealer::Sealer;

const NONCE: [u8; 23] = [7; 23];

fn id() -> RequestId {
    uuid::Uuid::nil().into()
}

pub fn seal_body(keys: &Keyring, body: &[u8]) -> Vec<u8> {
    keys.seal_body(Part::RequestBody, id(), &NONCE, body)
}

pub fn open_body(keys: &Keyring, sealed: Vec<u8>) -> Option<Vec<u8>> {
    let key = keys.ids().next()?;
    let opened = keys.open_body(key, Part::RequestBody, id(), &NONCE, sealed);
    opened.ok()
}

pub struct Encoder {
    sealer: Sealer,
    delivery: Delivery,
}

impl Encoder {
    pub fn new(keys: Option<Keyring>) -> Self {
        Self {
            sealer: keys.map(Sealer::new).unwrap_or_default(),
            delivery: Delivery {
                attempt_timeout: std::time::Duration::from_secs(30),
                retry: RetryPolicy::awaited(),
                accept: None,
                guarantee: Guarantee::default(),
                priority: Priority::default(),
                limit_key: None,
                awaited: true,
            },
        }
    }

    pub fn request(&self, request: &Request) -> Option<(String, Option<Bytes>)> {
        let uri = request.uri().ok()?;
        Some(self.sealer.request(id(), request, &uri, &self.delivery))
    }
}
