//! See `engine::fuzz::backup_label`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::backup_label(bytes));
