//! Resource quantities (`100m`, `1Gi`, `0.5`, `1e3`): exact to a billionth, compared by value and written in one
//! canonical form.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde_json::Value;
use thiserror::Error;

/// Why a text is no quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum QuantityError {
    /// Not a number with an optional suffix.
    #[error(
        "must be a number with an optional suffix n, u, m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei or an exponent (such as '500m', '1.5' or '64Mi')"
    )]
    Form,
    /// Beyond ±2^63.
    #[error("must be between -2^63 and 2^63")]
    Range,
}

/// Which suffixes the text used; the canonical form keeps to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Notation {
    Decimal,
    Binary,
    Exponent,
}

/// A quantity.
#[derive(Debug, Clone, Copy)]
pub struct Quantity {
    /// Billionths.
    nano: i128,
    notation: Notation,
}

const NANO: i128 = 1_000_000_000;
const VALUE_MAX: i128 = 1 << 63;
const BINARY: [(&str, u32); 6] = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40), ("Pi", 50), ("Ei", 60)];
/// Decimal suffixes with their power of ten, largest first.
const DECIMAL: [(&str, i32); 10] =
    [("E", 18), ("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3), ("", 0), ("m", -3), ("u", -6), ("n", -9)];

impl Quantity {
    /// Nothing.
    pub const ZERO: Self = Self { nano: 0, notation: Notation::Decimal };

    /// Reads a JSON string or number.
    pub fn from_json(value: &Value) -> Result<Self, QuantityError> {
        match value {
            Value::String(s) => s.parse(),
            Value::Number(n) => n.to_string().parse(),
            _ => Err(QuantityError::Form),
        }
    }

    /// Whole units, rounded up.
    pub fn units(self) -> i64 {
        saturate(self.nano.div_euclid(NANO) + i128::from(self.nano.rem_euclid(NANO) != 0))
    }

    /// Thousandths, rounded up: CPU quantities in millicores.
    pub fn millis(self) -> i64 {
        const MICRO: i128 = 1_000_000;
        saturate(self.nano.div_euclid(MICRO) + i128::from(self.nano.rem_euclid(MICRO) != 0))
    }

    /// Below zero.
    pub fn is_negative(self) -> bool {
        self.nano < 0
    }

    /// Exactly zero.
    pub fn is_zero(self) -> bool {
        self.nano == 0
    }

    /// A whole number of units.
    pub fn is_integer(self) -> bool {
        self.nano % NANO == 0
    }
}

fn saturate(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nano == other.nano
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nano.cmp(&other.nano)
    }
}

fn scale_of(suffix: &str) -> Option<(Notation, i128, i128)> {
    if let Some((_, shift)) = BINARY.iter().find(|(s, _)| *s == suffix) {
        return Some((Notation::Binary, NANO << shift, 1));
    }
    let power = |exponent: i32| -> Option<(i128, i128)> {
        let shifted = exponent + 9;
        if (0..=36).contains(&shifted) {
            Some((10_i128.pow(shifted.unsigned_abs()), 1))
        } else if (-36..0).contains(&shifted) {
            Some((1, 10_i128.pow(shifted.unsigned_abs())))
        } else {
            None
        }
    };
    if let Some((_, exponent)) = DECIMAL.iter().find(|(s, _)| *s == suffix) {
        let (mul, div) = power(*exponent)?;
        return Some((Notation::Decimal, mul, div));
    }
    let digits = suffix.strip_prefix(['e', 'E'])?;
    if digits.starts_with('+') && digits[1..].starts_with(['+', '-']) {
        return None;
    }
    let (mul, div) = power(digits.parse().ok()?)?;
    Some((Notation::Exponent, mul, div))
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(QuantityError::Form);
        }
        let (notation, mul, div) = scale_of(suffix).ok_or(QuantityError::Form)?;
        // Digits beyond the 19th of either part cannot matter within the range, or make it an error.
        let whole = whole.trim_start_matches('0');
        if whole.len() > 20 {
            return Err(QuantityError::Range);
        }
        let whole: i128 =
            if whole.is_empty() { 0 } else { whole.parse().map_err(|_| QuantityError::Form)? };
        let mut nano = whole.checked_mul(mul).ok_or(QuantityError::Range)?;
        let mut lost = nano % div != 0;
        nano /= div;
        let mut unit = mul;
        let mut part = 0_i128;
        for digit in fraction.bytes().take(36) {
            let digit = i128::from(digit - b'0');
            lost |= (digit * unit) % (10 * div) != 0;
            part += digit * unit / (10 * div);
            unit /= 10;
            lost |= unit == 0 && digit != 0;
        }
        nano = nano.checked_add(part).ok_or(QuantityError::Range)?;
        if lost {
            nano += 1;
        }
        if nano > VALUE_MAX * NANO {
            return Err(QuantityError::Range);
        }
        Ok(Self { nano: if negative { -nano } else { nano }, notation })
    }
}

impl fmt::Display for Quantity {
    /// The canonical form: no fraction, and the largest suffix that allows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano == 0 {
            return f.write_str("0");
        }
        if self.notation == Notation::Binary && self.is_integer() {
            let value = self.nano / NANO;
            if let Some((suffix, shift)) = BINARY.iter().rev().find(|(_, shift)| value % (1 << shift) == 0) {
                return write!(f, "{}{suffix}", value >> shift);
            }
            return write!(f, "{value}");
        }
        for (suffix, exponent) in DECIMAL {
            let unit = 10_i128.pow((exponent + 9).unsigned_abs());
            if self.nano % unit == 0 {
                return match (self.notation, exponent) {
                    (Notation::Exponent, 0) => write!(f, "{}", self.nano / unit),
                    (Notation::Exponent, e) => write!(f, "{}e{e}", self.nano / unit),
                    _ => write!(f, "{}{suffix}", self.nano / unit),
                };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn q(text: &str) -> Quantity {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn canonical_forms() {
        for (text, canonical) in [
            ("0", "0"),
            ("0m", "0"),
            ("1", "1"),
            ("01", "1"),
            ("+1", "1"),
            ("1.", "1"),
            (".5", "500m"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("0.5", "500m"),
            ("1000", "1k"),
            ("1000k", "1M"),
            ("1234567", "1234567"),
            ("1Ki", "1Ki"),
            ("1024Ki", "1Mi"),
            ("1024Mi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("0.5Gi", "512Mi"),
            ("0.1Ki", "102400m"),
            ("1e3", "1e3"),
            ("1E3", "1e3"),
            ("1e-3", "1e-3"),
            ("12e-1", "1200e-3"),
            ("1E", "1E"),
            ("8E", "8E"),
            ("5u", "5u"),
            ("1n", "1n"),
            ("0.1n", "1n"),
            ("-1", "-1"),
            ("-500m", "-500m"),
            ("-1Gi", "-1Gi"),
        ] {
            assert_eq!(q(text).to_string(), canonical, "{text}");
        }
    }

    #[test]
    fn refused() {
        for text in [
            "", "x", "1x", "1 Gi", "Gi", "-", "1..2", "1.2.3", "1KiB", "1ki", "1e", "1e1.5", "0x10", "1e99",
            "1e++1", "1,5", "ü", "1K",
        ] {
            assert_eq!(text.parse::<Quantity>(), Err(QuantityError::Form), "{text}");
        }
        for text in ["10E", "9Ei", "99999999999999999999999", "1e20"] {
            assert_eq!(text.parse::<Quantity>(), Err(QuantityError::Range), "{text}");
        }
        assert!(Quantity::from_json(&json!(true)).is_err());
    }

    #[test]
    fn compared_by_value() {
        assert_eq!(q("1000m"), q("1"));
        assert_eq!(q("1Gi"), q("1073741824"));
        assert!(q("1Gi") > q("1G"));
        assert!(q("-1") < Quantity::ZERO);
        assert_eq!(Quantity::from_json(&json!(1.5)).unwrap(), q("1500m"));
        assert_eq!(Quantity::from_json(&json!(2)).unwrap(), q("2"));
    }

    #[test]
    fn rounds_up() {
        assert_eq!((q("1500m").units(), q("1").units(), q("-1500m").units()), (2, 1, -1));
        assert_eq!((q("1500m").millis(), q("1u").millis(), q("0").millis()), (1500, 1, 0));
        assert_eq!(q("8E").millis(), i64::MAX);
    }

    proptest! {
        #[test]
        fn canonical_is_stable(whole in 0u64..1_000_000, fraction in 0u32..1000,
            suffix in prop::sample::select(vec!["", "m", "u", "k", "M", "G", "T", "Ki", "Mi", "Gi", "e2", "e-2"])) {
            let text = format!("{whole}.{fraction:03}{suffix}");
            let value = q(&text);
            let canonical = value.to_string();
            prop_assert!(!canonical.contains('.'));
            prop_assert_eq!(q(&canonical), value);
            prop_assert_eq!(q(&canonical).to_string(), canonical);
        }

        #[test]
        fn any_text_is_an_answer(text in ".{0,24}") {
            if let Ok(value) = text.parse::<Quantity>() {
                prop_assert_eq!(q(&value.to_string()), value);
            }
        }
    }
}
