//! Moves what lives out of packs that are mostly dead, so that they can go.
//!
//! Each layer that is in such a pack, or that names a chunk in one, is written anew, once, whoever shares it: without the blocks that nobody sees any more (in every stack
//! that the layer is in, newer layers hide them), and with its chunks where they are now. Then the file tables that name those layers, and the manifests, each as its next
//! edition. Backups that somebody uses right now are left as they are, and the packs that they need with them.
//!
//! What goes wrong: anything; then the editions that are stored so far and those before are whole, all packs are there, and what was moved for nothing is litter.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use jiff::Timestamp;
use rayon::prelude::*;

use super::usage::{Usage, key};
use super::{Options, Survey};
use crate::error::{Error, Result};
use crate::progress::{Phase, Progress};
use crate::repack::Mover;
use crate::repo::{
    BackupId, ClusterName, DataPack, Depth, Layer, LayerPlace, Lease, Locations, Manifest, PackKind, PackName, Packer,
    PagePlace, PartMap, Place, Repository, TableWriter, read_page, union, with_lengths, write_layer,
};

/// What moving cost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Vacated {
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
}

/// A layer of some stacks.
struct LayerUse {
    place: LayerPlace,
    /// For each of its stacks the layers above it.
    above: Vec<Vec<LayerPlace>>,
}

/// A layer that was written anew, and the packs of its chunks.
struct Rewritten {
    place: LayerPlace,
    data: Vec<PackName>,
}

/// What is needed to move.
pub(super) struct Vacating<'a> {
    /// Where.
    pub repo: &'a Repository,
    /// Whose packs.
    pub cluster: &'a ClusterName,
    /// What stays.
    pub survey: &'a Survey,
    /// What is needed.
    pub usage: &'a Usage,
    /// The packs to leave.
    pub vacated: &'a BTreeSet<PackName>,
    /// How.
    pub options: &'a Options,
    /// The expiry's.
    pub lease: &'a Lease,
    /// Who watches.
    pub progress: &'a dyn Progress,
}

impl Vacating<'_> {
    /// Moves what lives and commits the manifests that name it.
    pub fn run(&self) -> Result<Vacated> {
        let Some(common) = &self.usage.common else { return Ok(Vacated::default()) };
        let run = BackupId::generate(Timestamp::now())?;
        let mut committed = false;
        self.run_as(run, common, &mut committed).inspect_err(|_| {
            if !committed {
                // Nothing names them yet; what cannot be removed is litter.
                let _ = self.repo.discard(self.cluster, run);
            }
        })
    }

    fn run_as(&self, run: BackupId, common: &Manifest, committed: &mut bool) -> Result<Vacated> {
        let packer = |kind| Packer::new(Arc::clone(self.repo.store()), self.cluster.clone(), run, kind);
        let (data, map) = (packer(PackKind::Data), packer(PackKind::Map));
        let packs_of = self.packs_of_layers(common)?;
        let layers = self.layers_to_write(&packs_of);
        let (rewritten, bytes_read) = self.move_layers(common, &layers, &data, &map)?;
        let mut manifests = Vec::new();
        let mut written = HashMap::new();
        for id in self.survey.backups.iter().filter(|id| !self.survey.fixed.contains(id)) {
            let manifest = self.repo.manifest(self.cluster, *id)?;
            if manifest.packs.iter().any(|pack| self.vacated.contains(&pack.name)) {
                manifests.push(self.write_table(manifest, &packs_of, &rewritten, &map, &mut written)?);
            }
        }
        let mut own = data.finish()?;
        own.extend(map.finish()?);
        self.prove(common, &packs_of, &rewritten)?;
        let mut bytes_written = own.iter().map(|pack| pack.len).sum();
        let mut lengths = self.survey.referenced.clone();
        lengths.extend(own.iter().map(|pack| (pack.name, pack.len)));
        for (mut manifest, needed) in manifests {
            manifest.packs = with_lengths(self.cluster, &needed, |pack| lengths.get(pack).copied())?;
            *committed = true;
            bytes_written += self.repo.commit(&manifest, self.lease)?;
        }
        Ok(Vacated { bytes_read, bytes_written })
    }

    /// Reads back what was written, and sees that each stack says of each block what it said before.
    fn prove(
        &self,
        common: &Manifest,
        packs_of: &HashMap<Place, Vec<PackName>>,
        rewritten: &HashMap<Place, Rewritten>,
    ) -> Result<()> {
        let affected = self.usage.stacks.par_iter().filter(|stack| self.is_affected(&stack.map));
        affected.try_for_each(|stack| {
            let fingerprints = |map: &PartMap| {
                let flat = self.repo.flatten(common, map, Depth::Fingerprints)?;
                flat.all_fingerprints().ok_or_else(|| Error::bug("a flattened layer without its fingerprints"))
            };
            let (before, after) =
                (fingerprints(&stack.map)?, fingerprints(&replaced(&stack.map, packs_of, rewritten)?)?);
            let path = String::from_utf8_lossy(&stack.path);
            if before == after {
                Ok(())
            } else {
                Err(Error::bug(format!("moving chunks has changed the block map of {path}")))
            }
        })
    }

    fn is_affected(&self, map: &PartMap) -> bool {
        let vacated = |pack: &PackName| self.vacated.contains(pack);
        map.data.iter().any(vacated) || map.layers.iter().any(|layer| vacated(&layer.pack))
    }

    /// The packs that each layer of an affected stack needs.
    fn packs_of_layers(&self, common: &Manifest) -> Result<HashMap<Place, Vec<PackName>>> {
        let affected = self.usage.stacks.iter().filter(|stack| self.is_affected(&stack.map));
        let places: HashMap<Place, LayerPlace> =
            affected.flat_map(|stack| &stack.map.layers).map(|layer| (key(layer), *layer)).collect();
        let read = |(key, place): (Place, LayerPlace)| {
            let layer = self.repo.read_layer(common, &place, Depth::Locations)?;
            Ok((key, layer.data_packs().collect()))
        };
        places.into_par_iter().map(read).collect()
    }

    /// The layers that cannot stay as they are, in the order of the files.
    fn layers_to_write(&self, packs_of: &HashMap<Place, Vec<PackName>>) -> Vec<LayerUse> {
        let mut layers: Vec<LayerUse> = Vec::new();
        let mut known: HashMap<Place, usize> = HashMap::new();
        for stack in &self.usage.stacks {
            for (depth, place) in stack.map.layers.iter().enumerate() {
                let Some(packs) = packs_of.get(&key(place)) else { continue };
                let must_go =
                    self.vacated.contains(&place.pack) || packs.iter().any(|pack| self.vacated.contains(pack));
                if !must_go {
                    continue;
                }
                let index = *known.entry(key(place)).or_insert_with(|| {
                    layers.push(LayerUse { place: *place, above: Vec::new() });
                    layers.len() - 1
                });
                layers[index].above.push(stack.map.layers[..depth].to_vec());
            }
        }
        layers
    }

    /// Writes the layers without what nobody sees, their chunks moved.
    fn move_layers(
        &self,
        common: &Manifest,
        layers: &[LayerUse],
        data: &Packer,
        map: &Packer,
    ) -> Result<(HashMap<Place, Rewritten>, u64)> {
        let mover = Mover {
            from: self.repo,
            cluster: self.cluster,
            block_len: common.block_len(),
            data,
            compression: self.options.compression,
            jobs: crate::os::worker_count(self.options.jobs),
            progress: self.progress,
        };
        let load = |layer: &LayerUse| self.seen(common, layer);
        let moves = |pack: &DataPack| self.vacated.contains(&pack.name());
        let plan = mover.plan(layers, &load, &moves)?;
        self.progress.begin(Phase::Moving, plan.bytes());
        let mut rewritten = HashMap::new();
        let moved = mover.run(&plan, layers, &load, &moves, &mut |layer, moved| {
            let place = write_layer(map, &moved)?;
            rewritten.insert(key(&layer.place), Rewritten { place, data: moved.data_packs().collect() });
            Ok(())
        })?;
        Ok((rewritten, moved.bytes_read))
    }

    /// A layer without the blocks that newer ones hide in all of its stacks.
    fn seen(&self, common: &Manifest, layer: &LayerUse) -> Result<Layer> {
        let whole = self.repo.read_layer(common, &layer.place, Depth::Fingerprints)?;
        let mut seen: Vec<Range<u32>> = Vec::new();
        for above in &layer.above {
            let locations = |place: &LayerPlace| {
                let layer = self.repo.read_layer(common, place, Depth::Locations)?;
                Ok::<Locations, Error>(layer.locations)
            };
            let above: Vec<Locations> = above.iter().map(locations).collect::<Result<_>>()?;
            seen.extend(whole.seen_through(&above));
        }
        Ok(whole.restricted(&union(seen)))
    }

    /// Writes the file table of a backup anew, and its manifest but for the lengths of its packs.
    fn write_table(
        &self,
        manifest: Manifest,
        packs_of: &HashMap<Place, Vec<PackName>>,
        rewritten: &HashMap<Place, Rewritten>,
        map: &Packer,
        written: &mut HashMap<[u8; 16], PagePlace>,
    ) -> Result<(Manifest, Vec<PackName>)> {
        let stay = manifest.pages.iter().filter(|page| !self.vacated.contains(&page.place.pack));
        let known: Vec<PagePlace> = stay.chain(written.values()).cloned().collect();
        let mut table = TableWriter::new(map, &known);
        for page in &manifest.pages {
            for mut entry in read_page(&**self.repo.store(), self.cluster, page)?.entries {
                for part in entry.parts.iter_mut().filter(|part| self.is_affected(part)) {
                    *part = replaced(part, packs_of, rewritten)?;
                }
                table.push(entry)?;
            }
        }
        let (pages, needed) = table.finish()?;
        written.extend(pages.iter().map(|page| (page.id, page.clone())));
        Ok((Manifest { edition: next_edition(&manifest)?, pages, ..manifest }, needed))
    }
}

fn next_edition(manifest: &Manifest) -> Result<u32> {
    let too_many = || Error::corrupt(manifest.id.to_string(), "the manifest was written anew too often");
    manifest.edition.checked_add(1).ok_or_else(too_many)
}

/// A part with those of its layers that were written anew.
fn replaced(
    part: &PartMap,
    packs_of: &HashMap<Place, Vec<PackName>>,
    rewritten: &HashMap<Place, Rewritten>,
) -> Result<PartMap> {
    let mut data = BTreeSet::new();
    let mut layers = Vec::with_capacity(part.layers.len());
    for layer in &part.layers {
        let (place, packs) = match rewritten.get(&key(layer)) {
            Some(Rewritten { place, data }) => (*place, data),
            None => {
                let packs = packs_of.get(&key(layer));
                (*layer, packs.ok_or_else(|| Error::bug("a layer that was not looked at"))?)
            }
        };
        layers.push(place);
        data.extend(packs.iter().copied());
    }
    Ok(PartMap { layers, data: data.into_iter().collect() })
}
