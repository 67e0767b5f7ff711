//! See `engine::fuzz::pack`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::pack(bytes));
