//! What flags take as numbers: value parsers whose errors say the range.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use clap::builder::RangedI64ValueParser;

use landmarkdb::limits;

/// For `value_parser`: an integer of a range.
pub(super) fn integer<T>(range: RangeInclusive<u32>) -> RangedI64ValueParser<T>
where
    T: TryFrom<i64, Error: std::error::Error + Send + Sync> + Clone + Send + Sync + 'static,
{
    RangedI64ValueParser::new().range(i64::from(*range.start())..=i64::from(*range.end()))
}

/// For `value_parser`: an integer of at least 1.
pub(super) fn from_one<T>() -> RangedI64ValueParser<T>
where
    T: TryFrom<i64, Error: std::error::Error + Send + Sync> + Clone + Send + Sync + 'static,
{
    RangedI64ValueParser::new().range(1..)
}

/// For `value_parser`: a number of a range, which may be open above.
pub(super) fn number<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync
where
    T: FromStr + PartialOrd + Display + Into<f64> + Copy + Send + Sync,
{
    let open = (*range.end()).into().is_infinite();
    let expected =
        if open { format!("{} or more", range.start()) } else { format!("{} to {}", range.start(), range.end()) };
    move |typed| {
        let number = typed.parse::<T>().ok().filter(|number| range.contains(number) && (*number).into().is_finite());
        number.ok_or_else(|| format!("expected {expected}"))
    }
}

/// For `value_parser`: how many blocks a choice may have.
pub(super) fn top_k() -> RangedI64ValueParser<u32> {
    integer(1..=limits::TOP_K_MAX)
}
