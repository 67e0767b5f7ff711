//! Moving a CRC-32C over bytes that follow.
//!
//! A CRC is the remainder of a polynomial, so `len` zero bytes after it multiply it by x^(8 len). That power is a product of a few
//! precomputed ones; each multiplication is 32 steps. (Combining two CRCs with the `crc32c` library builds matrices anew at each call: a
//! tenth of a restore's time.)

/// The polynomial of CRC-32C, reflected.
const POLYNOMIAL: u32 = 0x82F6_3B78;
/// The polynomial 1, reflected.
const ONE: u32 = 1 << 31;

/// x^(8 * 2^k) for each k.
static POWERS: [u32; 64] = powers();

const fn powers() -> [u32; 64] {
    let mut powers = [0; 64];
    // x^8, reflected.
    let mut power = ONE >> 8;
    let mut k = 0;
    while k < 64 {
        powers[k] = power;
        power = multiply(power, power);
        k += 1;
    }
    powers
}

/// The product of two polynomials modulo [`POLYNOMIAL`].
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = ONE;
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        b = if b & 1 == 1 { b >> 1 ^ POLYNOMIAL } else { b >> 1 };
        bit >>= 1;
    }
    product
}

/// The state of a CRC-32C after `len` more zero bytes.
pub(super) fn shift(crc: u32, len: u64) -> u32 {
    let powers = POWERS.iter().enumerate().filter(|(k, _)| len >> k & 1 == 1);
    powers.fold(crc, |crc, (_, power)| multiply(*power, crc))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_shift_is_what_the_library_says_of_zero_bytes(crc: u32, len in 0usize..1 << 40) {
            prop_assert_eq!(shift(crc, len as u64), crc32c::crc32c_combine(crc, 0, len));
        }
    }

    #[test]
    fn zero_bytes_are_no_shift() {
        assert_eq!(shift(0x1234_5678, 0), 0x1234_5678);
    }
}
