//! Stacks of layers: how a new one goes upon those of an earlier backup (`format.md`, Block maps).
//!
//! A layer swallows the layers below it that hold no more than twice its own blocks, and as many more as leave the stack at most [`MAX_LAYERS`] high. What goes wrong:
//! a layer of the earlier backup that is damaged or gone, which ends whatever wants to build upon it.

use std::collections::BTreeSet;

use super::layer::{DataPack, Layer, encode_fingerprints};
use super::names::{PackKind, PackName};
use super::pack::{Packer, RECORD_CHECK_LEN};
use super::table::{LayerPlace, PartMap};
use super::{Depth, Manifest, Repository};
use crate::chunk::Fingerprint;
use crate::error::{Error, Result};

/// Layers of a stack at most.
pub(super) const MAX_LAYERS: usize = 8;

/// Stacks new layers upon an earlier backup's.
pub struct Stack<'a> {
    /// Where the earlier backup is.
    pub repo: &'a Repository,
    /// The earlier backup, if there is one.
    pub parent: Option<&'a Manifest>,
    /// Takes metadata records.
    pub map: &'a Packer,
}

impl Stack<'_> {
    /// The fingerprints of every block of a part of the parent.
    ///
    /// # Errors
    /// `Missing` or `Corrupt`, with the object.
    pub fn fingerprints(&self, map: &PartMap) -> Result<Vec<Fingerprint>> {
        let flat = self.repo.flatten(self.parent()?, map, Depth::Fingerprints)?;
        flat.all_fingerprints().ok_or_else(|| Error::bug("a flattened layer without its fingerprints"))
    }

    /// Puts `layer` over `older`, newest first; it swallows those that are not more than twice as large.
    ///
    /// # Errors
    /// `Missing` or `Corrupt` for an older layer; what the store says.
    pub fn add(&self, mut layer: Layer, mut older: &[LayerPlace]) -> Result<PartMap> {
        while let [next, rest @ ..] = older {
            let small = next.stored_blocks() <= 2 * layer.locations.stored_blocks();
            if !small && older.len() < MAX_LAYERS {
                break;
            }
            layer = layer.over(&self.repo.read_layer(self.parent()?, next, Depth::Fingerprints)?);
            older = rest;
        }
        let mut packs: BTreeSet<PackName> = layer.data_packs().collect();
        for place in older {
            packs.extend(self.repo.read_layer(self.parent()?, place, Depth::Locations)?.data_packs());
        }
        let mut layers = vec![write_layer(self.map, &layer)?];
        layers.extend_from_slice(older);
        Ok(PartMap { layers, data: packs.into_iter().collect() })
    }

    fn parent(&self) -> Result<&Manifest> {
        self.parent.ok_or_else(|| Error::bug("layers of a parent that there is not"))
    }
}

/// Writes a layer, with its fingerprints.
///
/// # Errors
/// What the store says.
pub fn write_layer(map: &Packer, layer: &Layer) -> Result<LayerPlace> {
    let locations = layer.locations.encode()?;
    let fingerprints = encode_fingerprints(&layer.fingerprints);
    let checked_len = |body: &[u8]| u32::try_from(body.len() + RECORD_CHECK_LEN).unwrap_or(u32::MAX);
    let locations_len = checked_len(&locations);
    let fingerprints_len = if fingerprints.is_empty() { 0 } else { checked_len(&fingerprints) };
    let bodies = [locations, fingerprints].into_iter().filter(|body| !body.is_empty()).collect();
    let place = map.append_checked(bodies)?;
    Ok(LayerPlace { pack: place.pack, offset: place.offset, locations_len, fingerprints_len })
}

impl Layer {
    /// The packs that hold its chunks.
    pub(crate) fn data_packs(&self) -> impl Iterator<Item = PackName> {
        self.locations.packs.iter().map(DataPack::name)
    }
}

impl DataPack {
    /// Its name among packs of all kinds.
    pub fn name(&self) -> PackName {
        PackName { run: self.run, seq: self.seq, kind: PackKind::Data }
    }
}
