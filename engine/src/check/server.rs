//! The cluster by itself: whether its server and its directory can be backed up by this user and this role.

use std::path::Path;

use super::{Area, Options, Sheet, Verdict};
use crate::backup::{connect, must_belong_together};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{ControlFile, RelationFile};
use crate::progress::{Phase, Progress};
use crate::source::{DataDir, EntryKind, Listing, Session, SlotCount};
use crate::units::{count, size};

const AREA: Area = Area::Server;

/// A server and its directory, which belong together.
pub(super) struct Live {
    pub session: Session,
    pub data_dir: DataDir,
    pub control: ControlFile,
    /// Bytes of its files, and of relation files among them; none if they cannot be listed.
    pub bytes: Option<Bytes>,
}

/// How much there is to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes {
    pub cluster: u64,
    pub relations: u64,
}

/// Looks at the server and its directory.
pub(super) fn look(options: &Options, progress: &dyn Progress, sheet: &mut Sheet) -> Option<Live> {
    let given = match options.data_dir.as_deref().map(DataDir::open) {
        Some(opened) => {
            let opened = sheet.need(AREA, "data_directory", opened);
            if opened.is_none() && options.conninfo.is_none() {
                // Where the server is, this directory was to say.
                return None;
            }
            opened
        }
        None => None,
    };
    let session = sheet.need(AREA, "connection", connect(options.conninfo.as_deref(), given.as_ref()))?;
    introduce(&session, sheet);
    let data_dir = match given {
        Some(data_dir) => Some(data_dir),
        // The one that was named cannot be opened, which was said.
        None if options.data_dir.is_some() => None,
        None => sheet.need(AREA, "data_directory", DataDir::open(&session.server().data_directory)),
    };
    permissions(&session, sheet);
    for notice in session.take_notices() {
        sheet.add(AREA, "connection", Verdict::Warning, notice, None);
    }
    let data_dir = data_dir?;
    sheet.need(AREA, "data_directory", must_belong_together(&session, &data_dir))?;
    let (_, control) = sheet.need(AREA, "data_directory", data_dir.read_control())?;
    replayed_without_images(&session, &control, sheet);
    checksums(&control, sheet);
    let bytes = files(&session, &data_dir, &control, progress, sheet);
    Some(Live { session, data_dir, control, bytes })
}

fn introduce(session: &Session, sheet: &mut Sheet) {
    let server = session.server();
    let kind = if server.in_recovery { "a standby" } else { "a primary" };
    let text = format!(
        "PostgreSQL {} at {}, {kind}, connected to as {:?}",
        server.version,
        session.endpoint(),
        session.role()
    );
    sheet.ok(AREA, "connection", text);
    sheet.facts.postgres_version = Some(server.version.clone());
    sheet.facts.system_identifier = Some(server.system_identifier.to_string());
    sheet.facts.is_standby = Some(server.in_recovery);
}

/// What the role may, and what the settings allow.
fn permissions(session: &Session, sheet: &mut Sheet) {
    if sheet.need(AREA, "rights", session.must_be_allowed_to_back_up()).is_some() {
        sheet.ok(AREA, "rights", format!("the role {:?} has the rights that a backup needs", session.role()));
    }
    if sheet.need(AREA, "wal_level", session.must_write_enough_wal()).is_some() {
        sheet.ok(AREA, "wal_level", format!("wal_level is {}", session.server().wal_level));
    }
    if let Some(slots) = sheet.need(AREA, "slots", session.replication_slots()) {
        slot(slots, sheet);
    }
}

fn slot(SlotCount { max, used }: SlotCount, sheet: &mut Sheet) {
    if used < max {
        return sheet.ok(AREA, "slots", format!("{} of {max} replication slots are free", max - used));
    }
    let what = format!("none of {} is free: nothing keeps the WAL while a backup runs", count(max, "replication slot"));
    let hint = "raise max_replication_slots and restart the server, or drop a slot that nobody uses; without one a backup fails \
                where the server removes WAL too soon";
    sheet.warn(AREA, "slots", what, hint);
}

/// PostgreSQL: src/backend/access/transam/xlog.c, do_pg_backup_start: a standby refuses where the last checkpoint was made without.
fn replayed_without_images(session: &Session, control: &ControlFile, sheet: &mut Sheet) {
    if session.server().in_recovery && !control.full_page_writes {
        let what = "the primary writes WAL with full_page_writes = off, from which a standby cannot be backed up";
        let hint =
            "set full_page_writes = on on the primary, reload it, and let first it, then the standby make a checkpoint";
        sheet.error(AREA, "full_page_writes", Verdict::Failed, &Error::new(ErrorKind::Postgres, what).hint(hint));
    }
}

fn checksums(control: &ControlFile, sheet: &mut Sheet) {
    let are_on = control.has_data_checksums();
    sheet.facts.data_checksums = Some(are_on);
    if are_on {
        return sheet.ok(AREA, "checksums", "pages have checksums: each that is read is checked");
    }
    let what = "pages have no checksums: a corrupt page cannot be told from a good one";
    sheet.warn(
        AREA,
        "checksums",
        what,
        "stop the server cleanly and run pg_checksums --enable; the backup after it reads everything",
    );
}

/// Lists the files and sees that each can be opened: one that cannot ends a backup.
fn files(
    session: &Session,
    data_dir: &DataDir,
    control: &ControlFile,
    progress: &dyn Progress,
    sheet: &mut Sheet,
) -> Option<Bytes> {
    progress.begin(Phase::Listing, 0);
    let listing = sheet.need(AREA, "files", data_dir.list())?;
    for notice in &listing.notices {
        sheet.warn(AREA, "files", notice.clone(), "move it elsewhere, or back it up by other means");
    }
    sheet.need(AREA, "files", data_dir.wal_segments(control.wal_segment_size))?;
    let server = session.server();
    for path in [&server.hba_file, &server.ident_file] {
        sheet.need(AREA, "files", data_dir.read_external(path).map(drop));
    }
    let bytes = bytes(&listing, &control.tablespace_version_dir());
    sheet.facts.cluster_bytes = Some(bytes.cluster);
    sheet.facts.relation_bytes = Some(bytes.relations);
    sheet.need(AREA, "files", all_can_be_opened(data_dir, &listing))?;
    let files = listing.entries.iter().filter(|entry| len(&entry.kind).is_some()).count() as u64;
    let place = data_dir.path().display();
    let (files, block) = (count(files, "file"), size(control.block_size.as_u64()));
    sheet.ok(AREA, "files", format!("{place}: {files} can be read, {}, in blocks of {block}", size(bytes.cluster)));
    Some(bytes)
}

fn len(kind: &EntryKind) -> Option<u64> {
    match kind {
        EntryKind::File { len } => Some(*len),
        EntryKind::Directory => None,
    }
}

fn bytes(listing: &Listing, tablespace_version_dir: &str) -> Bytes {
    let mut bytes = Bytes { cluster: 0, relations: 0 };
    for entry in listing.entries.iter() {
        let len = len(&entry.kind).unwrap_or(0);
        bytes.cluster += len;
        if RelationFile::parse_path(&entry.path, tablespace_version_dir).is_some() {
            bytes.relations += len;
        }
    }
    bytes
}

/// The first file that cannot be opened, and how many there are of them.
fn all_can_be_opened(data_dir: &DataDir, listing: &Listing) -> Result<()> {
    let files = listing.entries.iter().filter(|entry| len(&entry.kind).is_some());
    let mut failures = files.filter_map(|entry| data_dir.open_file(&entry.path).err());
    let Some(first) = failures.next() else { return Ok(()) };
    let more = failures.count() as u64;
    Err(if more == 0 { first } else { first.hint_too(format!("{} cannot be read, either", count(more, "other file"))) })
}

/// Whether a directory is on the file system of another; false where that cannot be told.
pub(super) fn is_beside(one: &Path, other: &Path) -> bool {
    crate::os::share_a_file_system(one, other).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_wants_one_slot_and_does_without() {
        let statuses = [(10, 9), (10, 10), (0, 0), (1, 2)].map(|(max, used)| {
            let mut sheet = Sheet::default();
            slot(SlotCount { max, used }, &mut sheet);
            sheet.found[0].status
        });
        assert_eq!(statuses, [Verdict::Ok, Verdict::Warning, Verdict::Warning, Verdict::Warning]);
    }
}
