//! What a backup says at its end of how the next one could cost less.

use super::plan::{Plan, Source};
use crate::detect::Detector;
use crate::detect::DetectorChoice;
use crate::units::size;

/// How WAL summaries are switched on, for a hint.
pub(crate) const SWITCH_ON_SUMMARIES: &str =
    "as a superuser: ALTER SYSTEM SET summarize_wal = on; SELECT pg_reload_conf(); no restart is needed";

/// What WAL summaries would have spared a backup that read everything because there are none; nothing where most of it had changed anyway.
pub(super) fn on_summaries(plan: &Plan<'_>, is_audit: bool, bytes_read: u64, blocks_changed: u64) -> Option<String> {
    let Source::Live { session, .. } = &plan.source else { return None };
    let server = session.server();
    let was_asked_to = plan.options.detector != DetectorChoice::Auto || plan.options.audit || is_audit;
    let scanned = plan.parent.is_some() && plan.detection.detector == Detector::Scan && !was_asked_to;
    let could_summarize = server.major.as_u32() >= 17 && !server.summarize_wal;
    let changed = blocks_changed.saturating_mul(plan.control.block_size.as_u64());
    (scanned && could_summarize).then(|| saving(bytes_read, changed)).flatten()
}

fn saving(read: u64, changed: u64) -> Option<String> {
    let (told_read, told_changed) = (size(read), size(changed));
    let text = format!(
        "summarize_wal is off: this backup read {told_read} to find {told_changed} changed; with it on, an incremental reads only what \
         changed; {SWITCH_ON_SUMMARIES}"
    );
    (changed < read / 2).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spared_is_told_in_numbers_unless_it_is_little() {
        let text = saving(4 << 30, 12 << 20).unwrap();
        assert!(text.contains("read 4.00 GiB to find 12.0 MiB changed"), "{text}");
        assert_eq!(saving(4 << 30, 3 << 30), None);
        assert_eq!(saving(0, 0), None);
    }
}
