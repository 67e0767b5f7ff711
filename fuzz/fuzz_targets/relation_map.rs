//! See `engine::fuzz::relation_map`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::relation_map(bytes));
