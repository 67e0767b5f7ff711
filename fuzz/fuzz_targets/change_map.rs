//! See `engine::fuzz::change_map`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::change_map(bytes));
