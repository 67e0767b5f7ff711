//! See `engine::fuzz::tablespace_map`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::tablespace_map(bytes));
