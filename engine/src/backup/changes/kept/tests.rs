//! Chains of maps over made-up catalogs.

use super::*;
use crate::repo::sample_manifest;
use crate::store::ObjectName;

fn id(number: u32) -> BackupId {
    format!("20261122T160312Z-{number:08x}").parse().unwrap()
}

/// Backups by number, oldest first, each with what it was made from.
fn backups(listed: &[(u32, Option<u32>)]) -> Vec<BackupSummary> {
    let summary = |(number, from): &(u32, Option<u32>)| {
        let manifest = Manifest { merged_from: from.map(id), ..sample_manifest("r", id(*number), 1) };
        BackupSummary::new(&manifest, 0)
    };
    listed.iter().map(summary).collect()
}

fn maps(between: &[(u32, u32)]) -> Vec<KeptChanges> {
    let kept = |(backup, parent): &(u32, u32)| {
        let object = ObjectName::new(format!("changes/{backup}.{parent}")).unwrap();
        KeptChanges { object, len: 1, backup: id(*backup), parent: id(*parent) }
    };
    between.iter().map(kept).collect()
}

/// The newest backup that maps lead to from `parent`, and how many.
fn found(listed: &[(u32, Option<u32>)], between: &[(u32, u32)], parent: u32) -> Option<(BackupId, usize)> {
    let kept = maps(between);
    chain(&backups(listed), &kept, id(parent)).map(|(newest, maps)| (newest, maps.len()))
}

#[test]
fn maps_lead_to_the_newest_backup_of_a_chain() {
    let listed = [(1, None), (2, None), (3, None), (4, None)];
    assert_eq!(found(&listed, &[(2, 1), (3, 2), (4, 3)], 1), Some((id(4), 3)));
    assert_eq!(found(&listed, &[(2, 1), (3, 2), (4, 3)], 3), Some((id(4), 1)));
    assert_eq!(found(&listed, &[(2, 1), (3, 2), (4, 3)], 4), None);
    // The last was a scan: nothing tells what came between.
    assert_eq!(found(&listed, &[(2, 1), (3, 2)], 1), Some((id(3), 2)));
    assert_eq!(found(&listed, &[(2, 1), (4, 3)], 1), Some((id(2), 1)));
    assert_eq!(found(&listed, &[(3, 2), (4, 3)], 1), None);
    assert_eq!(found(&listed, &[(3, 1), (4, 1)], 1), Some((id(4), 1)));
    // The backup between was removed, and its map with it, or without.
    assert_eq!(found(&[(1, None), (3, None)], &[(3, 2)], 1), None);
    assert_eq!(found(&[(1, None), (3, None)], &[(2, 1), (3, 2)], 1), Some((id(3), 2)));
}

#[test]
fn a_merged_backup_is_the_moment_that_it_was_made_from() {
    let listed = [(1, None), (2, None), (7, Some(2)), (3, None)];
    assert_eq!(found(&listed, &[(2, 1), (3, 7)], 1), Some((id(3), 2)));
    assert_eq!(found(&listed, &[(2, 1), (3, 2)], 7), Some((id(3), 1)));
    assert_eq!(found(&listed[..3], &[(2, 1)], 2), None);
    assert_eq!(found(&listed[..3], &[(2, 1)], 7), None);
    // What it was made from was removed since.
    assert_eq!(found(&[(1, None), (7, Some(2)), (3, None)], &[(2, 1), (3, 7)], 1), Some((id(3), 2)));
    assert_eq!(found(&[(1, None), (7, Some(2)), (8, Some(7)), (3, None)], &[(2, 1), (3, 8)], 1), Some((id(3), 2)));
}

#[test]
fn names_that_nobody_gave_lead_in_no_circle() {
    let listed = [(1, None), (2, Some(3)), (3, Some(2)), (4, None)];
    assert_eq!(found(&listed, &[(4, 3), (3, 4), (2, 2)], 1), None);
}
