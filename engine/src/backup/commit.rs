//! The end of a backup: everything durable, then the manifest; from then on it is a backup.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use jiff::Timestamp;

use super::audit::Audit;
use super::changes::keep;
use super::plan::Source;
use super::run::{Counts, Found, Run, whole_second};
use super::salvage::Salvage;
use super::{Report, advice};
use crate::error::Result;
use crate::repo::{
    BackupSummary, ByteString, FORMAT_VERSION, Manifest, PackName, Packer, TablespaceLocation, with_lengths,
};
use crate::source::Tablespace;

impl Run<'_, '_> {
    /// Writes the manifest, when all else is durable.
    pub(super) fn commit(self, mut found: Found, map: Packer, begun: Instant) -> Result<Report> {
        let mut manifest = self.manifest(&found)?;
        let kept = self.keep_changes();
        map.close()?;
        let mut own = self.data.finish()?;
        own.extend(map.finish()?);
        manifest.pages = std::mem::take(&mut found.table.pages);
        let needed = found.table.packs;
        let inherited = self.plan.parent.iter().flat_map(|parent| &parent.packs);
        let salvaged = self.salvage.iter().flat_map(Salvage::packs);
        let salvage_read = self.salvage.as_ref().map_or(0, Salvage::bytes_read);
        let taken_over = salvaged.clone().filter(|pack| needed.contains(&pack.name)).map(|pack| pack.len);
        let taken_over: u64 = taken_over.sum();
        let lengths: HashMap<PackName, u64> =
            inherited.chain(&own).chain(salvaged).map(|pack| (pack.name, pack.len)).collect();
        manifest.packs = with_lengths(&self.plan.options.cluster, &needed, |pack| lengths.get(pack).copied())?;
        manifest.sequence = self.plan.repo.catalog(&manifest.cluster)?.next_sequence();
        manifest.stop_time = whole_second(Timestamp::now());
        manifest.duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let written: u64 = own.iter().map(|pack| pack.len).sum();
        manifest.own_bytes = written + taken_over + kept;
        let manifest_len = self.plan.repo.commit(&manifest, &self.lease)?;
        let bytes_read = self.totals.bytes_read.load(Ordering::Relaxed) + salvage_read;
        let advice = advice::on_summaries(&self.plan, self.audit.is_some(), bytes_read, manifest.blocks_changed);
        advice.iter().for_each(|advice| self.progress.notice(advice));
        Ok(Report {
            audit: self.audit.map(Audit::finish),
            backup: BackupSummary::new(&manifest, manifest_len),
            seconds: begun.elapsed().as_secs_f64(),
            bytes_read,
            bytes_written: written + kept + manifest_len,
            repository_damage: self.plan.repository_damage,
        })
    }

    /// Keeps what the detector said, unless an audit found that it missed something; how many bytes that takes. No backup needs it.
    fn keep_changes(&self) -> u64 {
        let is_whole = self.audit.as_ref().is_none_or(Audit::missed_nothing);
        let (Some(parent), Some(map), true) = (&self.plan.parent, &self.changes, is_whole) else { return 0 };
        keep(self.plan.repo, parent, self.id, map).unwrap_or_else(|error| {
            self.progress.notice(&format!("what the detector found is not kept for later backups: {error}"));
            0
        })
    }

    /// The manifest, but for what is known only when all else is stored.
    fn manifest(&self, found: &Found) -> Result<Manifest> {
        let Found { listing, bounds, control, .. } = found;
        let Counts { cluster_bytes, wal_bytes, files } = found.table.counts;
        let postgres_version = match &self.plan.source {
            Source::Live { session, .. } => session.server().version.clone(),
            Source::Offline { data_dir } => data_dir.major_version().to_string(),
        };
        Ok(Manifest {
            format: FORMAT_VERSION,
            repository: self.plan.repo.id().to_owned(),
            cluster: self.plan.options.cluster.clone(),
            id: self.id,
            sequence: 0,
            synthesis: 0,
            edition: 0,
            backup_type: self.plan.backup_type,
            parent: self.plan.parent.as_ref().map(|parent| parent.id),
            merged_from: None,
            system_identifier: control.system_identifier.to_string(),
            postgres_version,
            postgres_major: control.major_version().as_u32(),
            catalog_version: control.catalog_version.as_u32(),
            block_size: control.block_size.as_u32(),
            wal_segment_size: control.wal_segment_size.as_u32(),
            data_checksum_version: control.data_checksum_version,
            start_lsn: bounds.start,
            stop_lsn: bounds.stop,
            start_timeline: bounds.start_timeline,
            timeline: bounds.timeline,
            wal: found.wal.clone(),
            start_time: self.start_time,
            stop_time: self.start_time,
            duration_ms: 0,
            from_standby: bounds.from_standby,
            offline: bounds.backup_label.is_none(),
            backup_label: bounds.backup_label.clone().map(ByteString),
            tablespace_map: bounds.tablespace_map.clone().map(ByteString),
            tablespaces: listing.tablespaces.iter().map(tablespace_location).collect(),
            data_directory_mode: listing.mode,
            data_directory_owner: (listing.uid, listing.gid),
            config_outside: found.settings.is_some(),
            settings: found.settings.clone().unwrap_or_default(),
            cluster_bytes,
            wal_bytes,
            file_count: files,
            blocks_changed: self.totals.blocks_changed.load(Ordering::Relaxed),
            own_bytes: 0,
            detector: self.plan.detection.detector.to_string(),
            detector_reason: self.plan.detection.reason.clone(),
            history_mark: found.history_mark.clone(),
            corrupt_pages: found.corrupt_pages.clone(),
            note: self.plan.options.note.clone().filter(|note| !note.is_empty()),
            packs: Vec::new(),
            pages: Vec::new(),
        })
    }
}

fn tablespace_location(found: &Tablespace) -> TablespaceLocation {
    let bytes = |link: &PathBuf| ByteString(link.as_os_str().as_bytes().to_vec());
    TablespaceLocation { oid: found.oid.as_u32(), location: found.link.as_ref().map(bytes) }
}
