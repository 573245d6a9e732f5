//! Kubernetes quantities as whole numbers. A quantity that is accepted is never rounded down.

/// Reads a quantity (`100m`, `1.5Gi`, `2e3`, `128974848`) in thousandths of its unit, rounded up.
/// `None` for what is no quantity, is negative, or does not fit.
pub fn milli(text: &str) -> Option<i64> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '+')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let number = number.strip_prefix('+').unwrap_or(number);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || number.contains('+') {
        return None;
    }
    let digits = format!("{whole}{fraction}");
    let mantissa: i128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    let (multiplier, decimal_exponent) = scale(suffix)?;
    let exponent = decimal_exponent + 3 - i32::try_from(fraction.len()).ok()?;
    let scaled = mantissa.checked_mul(multiplier)?;
    let value = if exponent >= 0 {
        scaled.checked_mul(10_i128.checked_pow(exponent.unsigned_abs())?)?
    } else {
        let divisor = 10_i128.checked_pow(exponent.unsigned_abs())?;
        scaled.checked_add(divisor - 1)? / divisor
    };
    i64::try_from(value).ok()
}

/// Reads a quantity in its unit, rounded up: bytes of a memory size, cores of a cpu count.
pub fn whole(text: &str) -> Option<i64> {
    if let Some(milli) = milli(text) {
        return Some(milli / 1000 + i64::from(milli % 1000 > 0));
    }
    let plain: Option<i64> = text.trim().parse().ok();
    plain.filter(|value| *value >= 0)
}

/// The factor of a suffix: a binary multiplier and a power of ten.
fn scale(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        exponent => {
            let digits = exponent.strip_prefix(['e', 'E'])?;
            let power: i32 = digits.parse().ok()?;
            (1, (-18..=18).contains(&power).then_some(power)?)
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_forms_of_a_quantity() {
        let cases = [
            ("1", Some(1000)),
            ("100m", Some(100)),
            ("0.1", Some(100)),
            ("1.5", Some(1500)),
            (".5", Some(500)),
            ("2.", Some(2000)),
            ("1k", Some(1_000_000)),
            ("1Ki", Some(1_024_000)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("1e3", Some(1_000_000)),
            ("1E-1", Some(100)),
            ("1n", Some(1)),
            ("0", Some(0)),
            ("", None),
            (".", None),
            ("m", None),
            ("-1", None),
            ("1.2.3", None),
            ("1x", None),
            ("1e99", None),
            ("99999999999999999999Ei", None),
        ];
        for (text, expected) in cases {
            assert_eq!(milli(text), expected, "{text:?}");
        }
    }

    #[test]
    fn whole_rounds_up_and_takes_large_byte_counts() {
        assert_eq!(whole("100m"), Some(1));
        assert_eq!(whole("1500m"), Some(2));
        assert_eq!(whole("64Mi"), Some(64 << 20));
        assert_eq!(whole("9223372036854775807"), Some(i64::MAX));
        assert_eq!(whole("x"), None);
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,12}") {
            let _ = (milli(&text), whole(&text));
        }

        #[test]
        fn plain_numbers_are_themselves(n in 0_i64..1_000_000_000) {
            prop_assert_eq!(milli(&n.to_string()), Some(n * 1000));
            prop_assert_eq!(milli(&format!("{n}m")), Some(n));
        }
    }
}
