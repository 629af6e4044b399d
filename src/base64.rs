//! Base64 with the standard alphabet and padding (RFC 4648 section 4).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

pub(crate) fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// `None` if the text is not what [`encode`] makes of some bytes. Texts that a lenient decoder
/// takes for the same bytes are refused.
#[cfg_attr(
    not(feature = "webhooks"),
    expect(dead_code, reason = "only keys and signatures are decoded")
)]
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_vectors_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encode(bytes.as_bytes()), text);
            #[cfg(feature = "webhooks")]
            assert_eq!(decode(text).unwrap(), bytes.as_bytes());
        }
        assert_eq!(encode(&[0xfb, 0xff]), "+/8=");
    }

    #[cfg(feature = "webhooks")]
    #[test]
    fn other_texts_are_refused() {
        for text in [
            "Z", "Zg", "Zg=", "Zg===", "====", "=Zg=", "Z=g=", "Zh==", "Zm9=", "Zm9v=", "Zm 9",
            "-_8=", "Zg==Zg==", "Zg==\n", "Zé==",
        ] {
            assert_eq!(decode(text), None, "{text}");
        }
    }

    #[cfg(feature = "webhooks")]
    proptest! {
        #[test]
        fn bytes_survive(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
        }

        #[test]
        fn one_text_for_the_same_bytes(text in "[A-Za-z0-9+/=\n]{0,12}") {
            if let Some(bytes) = decode(&text) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }
    }
}
