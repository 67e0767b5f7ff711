//! See `engine::fuzz::locations`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::fuzz::locations(bytes));
