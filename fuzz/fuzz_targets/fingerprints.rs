//! See `engine::fuzz::fingerprints`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::fingerprints(bytes));
