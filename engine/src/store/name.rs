//! Names of objects.

use std::fmt;

use crate::error::{Error, Result};

/// The name of an object: components of `a-z A-Z 0-9 _ . -` joined by `/`, none of which begins with a dot.
///
/// So every name is a relative path that stays below the store's root, on any file system and in any object store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(String);

impl ObjectName {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 512;

    /// Checks `text` and makes a name of it.
    ///
    /// # Errors
    /// `Invalid` for a text that is no name.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let sound = text.len() <= Self::MAX_LEN && text.split('/').all(is_component);
        if sound { Ok(Self(text)) } else { Err(Error::invalid(format!("{text:?} is not an object name"))) }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether `text` can be one component of an object name.
pub(crate) fn is_component(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    !text.is_empty() && text.len() <= 200 && !text.starts_with('.') && text.bytes().all(allowed)
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_the_store() {
        for text in ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", ".hidden", "a/.b", "a b", "a\0", "é", "a\\b"] {
            assert!(ObjectName::new(text).is_err(), "{text:?}");
        }
        assert!(ObjectName::new("x".repeat(513)).is_err());
        assert!(ObjectName::new("clusters/main/packs/20261122T160312Z-0a1b2c3d/000001.data").is_ok());
    }
}
