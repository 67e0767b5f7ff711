//! See `engine::fuzz::sealed_text`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::sealed_text(bytes));
