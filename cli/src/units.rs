//! Numbers as people read and write them. Those that the engine's plans have, too, are the engine's.

use std::num::NonZeroU64;
use std::time::Duration;

pub use engine::units::{count, duration, size};

/// `bytes` in `seconds` as a rate; nothing when no time passed.
pub fn rate(bytes: u64, seconds: f64) -> Option<String> {
    (seconds > 0.0).then(|| format!("{}/s", size((bytes as f64 / seconds) as u64)))
}

/// [`duration`] for a count of seconds that comes out of a report; a negative or absurd one counts as none.
pub fn seconds(count: f64) -> String {
    duration(Duration::try_from_secs_f64(count).unwrap_or_default())
}

/// Reads a number of bytes as in `50M`, `1G`, `100k`, `4096`; suffixes are powers of 1024, as in PostgreSQL's tools.
pub fn parse_bytes(text: &str) -> Result<NonZeroU64, String> {
    let digits_len = text.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, suffix) = text.split_at(digits_len);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("expected a whole number of bytes, with k, M, G or T behind it as in 50M".to_owned()),
    };
    let number = digits.parse::<u64>().map_err(|_| match digits {
        "" => "expected a number first, as in 50M".to_owned(),
        _ => "the number is too large".to_owned(),
    })?;
    let bytes = number.checked_mul(1 << shift).ok_or("the number is too large")?;
    NonZeroU64::new(bytes).ok_or_else(|| "zero would never finish; leave the option out for no limit".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absurd_count_of_seconds_is_none() {
        assert_eq!(seconds(-1.0), "0.0 s");
        assert_eq!(seconds(f64::NAN), "0.0 s");
    }

    #[test]
    fn a_rate_needs_time() {
        assert_eq!(rate(2048, 2.0).as_deref(), Some("1.00 KiB/s"));
        assert_eq!(rate(2048, 0.0), None);
    }

    #[test]
    fn byte_counts_take_suffixes_of_powers_of_1024() {
        let cases = [
            ("4096", 4096),
            ("100k", 102_400),
            ("50M", 52_428_800),
            ("1G", 1 << 30),
            ("1GiB", 1 << 30),
            ("2tb", 2 << 40),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_bytes(text).map(NonZeroU64::get), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn texts_that_are_no_byte_count_are_refused_with_the_reason() {
        let cases = [
            ("", "expected a number first"),
            ("M", "expected a number first"),
            ("0", "zero would never finish"),
            ("1.5G", "expected a whole number"),
            ("50X", "expected a whole number"),
            ("-1", "expected a whole number"),
            ("18446744073709551616", "too large"),
            ("16777216T", "too large"),
        ];
        for (text, reason) in cases {
            let error = parse_bytes(text).unwrap_err();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }
}
