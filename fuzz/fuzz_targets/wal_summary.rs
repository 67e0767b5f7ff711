//! See `engine::fuzz::wal_summary`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::wal_summary(bytes));
