//! See `engine::fuzz::pg_manifest`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::pg_manifest(bytes));
