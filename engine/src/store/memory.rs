//! A store in memory, for tests and experiments.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{ObjectInfo, ObjectName, Store};
use crate::error::{Error, ErrorKind, Result};

/// Objects in memory; clones share them.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    objects: Arc<Mutex<BTreeMap<ObjectName, Vec<u8>>>>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces or removes an object's bytes behind every promise's back: what a test does to cause damage.
    pub fn tamper(&self, name: &ObjectName, bytes: Option<Vec<u8>>) {
        match bytes {
            Some(bytes) => self.lock().insert(name.clone(), bytes),
            None => self.lock().remove(name),
        };
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectName, Vec<u8>>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn missing(name: &ObjectName) -> Error {
    Error::new(ErrorKind::Missing, "no such object").at(name.as_str())
}

impl Store for MemoryStore {
    fn put_new(&self, name: &ObjectName, content: &mut dyn BufRead) -> Result<u64> {
        let taken = || Error::new(ErrorKind::Conflict, "the object exists already").at(name.as_str());
        if self.lock().contains_key(name) {
            return Err(taken());
        }
        let mut bytes = Vec::new();
        content
            .read_to_end(&mut bytes)
            .map_err(|e| Error::new(ErrorKind::Unavailable, "cannot read what is to be stored").because(e))?;
        let len = bytes.len() as u64;
        let mut objects = self.lock();
        if objects.contains_key(name) {
            return Err(taken());
        }
        objects.insert(name.clone(), bytes);
        Ok(len)
    }

    fn get(&self, name: &ObjectName, max_len: u64) -> Result<Vec<u8>> {
        let objects = self.lock();
        let bytes = objects.get(name).ok_or_else(|| missing(name))?;
        super::local::check_len(name, bytes.len() as u64, max_len)?;
        Ok(bytes.clone())
    }

    fn get_range(&self, name: &ObjectName, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let objects = self.lock();
        let bytes = objects.get(name).ok_or_else(|| missing(name))?;
        let range = usize::try_from(offset).ok().and_then(|from| bytes.get(from..from.checked_add(buffer.len())?));
        let range = range.ok_or_else(|| super::local::too_short(name, bytes.len() as u64, offset, buffer.len()))?;
        buffer.copy_from_slice(range);
        Ok(())
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let objects = self.lock();
        let named = objects.iter().filter(|(name, _)| name.as_str().starts_with(prefix));
        Ok(named.map(|(name, bytes)| ObjectInfo { name: name.clone(), len: bytes.len() as u64 }).collect())
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        self.lock().remove(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_conforms() {
        super::super::conformance::run(&super::MemoryStore::new());
    }
}
