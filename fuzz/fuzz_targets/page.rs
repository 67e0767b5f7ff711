//! See `engine::fuzz::page`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::page(bytes));
